//! Where the server listens for agents, and how to get a TCP connection there.
//!
//! Promises that the agents take turns over the source addresses, so that none runs out of ports,
//! and that opening a connection ends in bounded time. Must not know what is said on it.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    ops::Range,
    process,
    str::FromStr,
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use hyper::{
    Uri,
    header::{AUTHORIZATION, HeaderValue},
};
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio_tungstenite::tungstenite::ClientRequestBuilder;

use crate::loss::Loss;

/// The longest an attempt to connect, handshake included, may take.
pub(crate) const CONNECT_LIMIT: Duration = Duration::from_secs(30);
const DEFAULT_PORT: u16 = 80;
/// The ports that a source address is used with: those that systems give to whoever asks for any.
const PORTS: Range<u16> = 32_768..61_000;
/// How many ports are tried that turn out to be taken.
const PORTS_TRIED: usize = 1_000;

/// The two ways an agent talks to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    WebSocket,
    Http,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::WebSocket => "websocket",
            Self::Http => "http",
        })
    }
}

/// The URL of the server, as given.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) transport: Transport,
    uri: Uri,
}

impl FromStr for Target {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let uri: Uri = text.parse()?;
        let transport = match uri.scheme_str() {
            Some("ws") => Transport::WebSocket,
            Some("http") => Transport::Http,
            Some("wss" | "https") => bail!("TLS is not supported, only ws:// and http://"),
            _ => bail!("the URL must begin with ws:// or http://"),
        };
        ensure!(uri.host().is_some(), "the URL names no host");
        Ok(Self { transport, uri })
    }
}

/// The server as the agents see it, its name already resolved.
pub(crate) struct Endpoint {
    pub(crate) transport: Transport,
    pub(crate) uri: Uri,
    pub(crate) authorization: Option<HeaderValue>,
    /// Bodies are packed, in both directions.
    pub(crate) gzip: bool,
    address: SocketAddr,
    sources: Vec<Source>,
}

/// A local address, with the number of ports that were taken in turn.
///
/// A system that is asked for any port of an address looks for one that nobody has, before it knows for which peer: with
/// ten thousand links that takes longer than all that follows.
struct Source {
    address: IpAddr,
    taken: AtomicU16,
}

impl Source {
    fn new(address: IpAddr) -> Self {
        // Fleets side by side begin elsewhere.
        let [first, second, ..] = process::id().to_le_bytes();
        Self { address, taken: AtomicU16::new(u16::from_le_bytes([first, second])) }
    }

    fn next(&self) -> SocketAddr {
        let turn = self.taken.fetch_add(1, Ordering::Relaxed) % (PORTS.end - PORTS.start);
        (self.address, PORTS.start + turn).into()
    }
}

impl Endpoint {
    pub(crate) async fn resolve(
        target: Target,
        sources: Vec<IpAddr>,
        token: Option<&str>,
        gzip: bool,
    ) -> anyhow::Result<Self> {
        let Target { transport, uri } = target;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let port = uri.port_u16().unwrap_or(DEFAULT_PORT);
        let fits = |address: &SocketAddr| {
            let mut wrong = sources.iter().filter(|s| s.is_ipv4() != address.is_ipv4());
            wrong.next().is_none()
        };
        let address = lookup_host((host, port))
            .await
            .with_context(|| format!("cannot resolve {host}"))?
            .find(fits)
            .with_context(|| format!("no address of {host} goes with the source addresses"))?;
        let sources = sources.into_iter().map(Source::new).collect();
        Ok(Self { transport, authorization: token.map(bearer).transpose()?, uri, gzip, address, sources })
    }

    /// Opens a TCP connection from the source address whose turn it is.
    pub(crate) async fn dial(&self, turn: usize) -> Result<TcpStream, Loss> {
        let stream = match self.sources.get(turn % self.sources.len().max(1)) {
            Some(source) => self.dial_from(source).await?,
            None => self.socket()?.connect(self.address).await?,
        };
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn socket(&self) -> io::Result<TcpSocket> {
        if self.address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }
    }

    /// Opens a TCP connection from the next port of `source` that is free.
    async fn dial_from(&self, source: &Source) -> io::Result<TcpStream> {
        let mut busy = io::ErrorKind::AddrInUse.into();
        for _ in 0..PORTS_TRIED {
            let local = source.next();
            // Where nobody listens, it would meet itself.
            if local.port() == self.address.port() {
                continue;
            }
            let socket = self.socket()?;
            // A link that ended leaves its port behind for a minute, of which only the same peer takes notice.
            socket.set_reuseaddr(true)?;
            match socket.bind(local) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    busy = error;
                    continue;
                }
                bound => bound?,
            }
            match socket.connect(self.address).await {
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => busy = error,
                connected => return connected,
            }
        }
        Err(busy)
    }

    /// The request that asks for a WebSocket.
    pub(crate) fn upgrade(&self) -> ClientRequestBuilder {
        let request = ClientRequestBuilder::new(self.uri.clone());
        match self.authorization.as_ref().and_then(|v| v.to_str().ok()) {
            Some(value) => request.with_header(AUTHORIZATION.as_str(), value),
            None => request,
        }
    }
}

fn bearer(token: &str) -> anyhow::Result<HeaderValue> {
    let mut value = HeaderValue::try_from(format!("Bearer {token}"))
        .ok()
        .filter(|value| value.to_str().is_ok())
        .context("the token holds characters that no header can carry")?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_chooses_the_transport() {
        let transport = |url: &str| url.parse::<Target>().map(|t| t.transport).ok();
        assert_eq!(transport("ws://host:4320/x"), Some(Transport::WebSocket));
        assert_eq!(transport("http://[::1]:4320/x"), Some(Transport::Http));
        for wrong in ["wss://host/x", "host:4320", "/v1/opamp", ""] {
            assert_eq!(transport(wrong), None, "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_passed_over() {
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = tokio::net::TcpListener::bind(anywhere).await.unwrap();
        let url = format!("ws://{}/", server.local_addr().unwrap());
        let source = IpAddr::from([127, 0, 0, 77]);
        let endpoint =
            async || Endpoint::resolve(url.parse().unwrap(), vec![source], None, false).await.unwrap();
        let (first, second) = (endpoint().await, endpoint().await);
        let taken = first.dial(0).await.unwrap().local_addr().unwrap();
        assert_eq!(taken.ip(), source);
        // It would take the same port, if it did not meet the server that listens there by now.
        let _listening = tokio::net::TcpListener::bind(taken).await.unwrap();
        let other = second.dial(0).await.unwrap().local_addr().unwrap();
        assert_eq!(other.ip(), source);
        assert_ne!(other, taken);
    }

    #[test]
    fn a_token_must_fit_into_a_header() {
        assert!(bearer("123456").is_ok());
        assert!(bearer("line\nbreak").is_err());
    }
}
