//! The question a container's healthcheck asks: is the server of this configuration ready?

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// How long the server may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why the server is not ready.
#[derive(Debug, thiserror::Error)]
pub enum Unready {
    /// Nobody listens.
    #[error("nothing answers at {0}: {1} (is the server running, with the same operators.listen?)")]
    Unreachable(SocketAddr, std::io::Error),
    /// It does not speak HTTP as expected.
    #[error("no valid answer from {0}: {1}")]
    Odd(SocketAddr, hyper::Error),
    /// It took too long.
    #[error("no answer from {0} in time")]
    Slow(SocketAddr),
    /// It says that it is not ready.
    #[error("not ready: {0}")]
    Unready(String),
}

/// Asks the operators' listener at `listen` whether the server is ready; answers its words.
pub async fn ask(listen: SocketAddr) -> Result<String, Unready> {
    let address = reachable(listen);
    tokio::time::timeout(PATIENCE, readyz(address)).await.unwrap_or(Err(Unready::Slow(address)))
}

/// The address under which a listener on `listen` is reached from its own host.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip @ (IpAddr::V4(_) | IpAddr::V6(_)) => ip,
    };
    SocketAddr::new(ip, listen.port())
}

async fn readyz(address: SocketAddr) -> Result<String, Unready> {
    let odd = |error| Unready::Odd(address, error);
    let stream = TcpStream::connect(address).await.map_err(|error| Unready::Unreachable(address, error))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(odd)?;
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.uri_mut() = hyper::Uri::from_static("/readyz");
    if let Ok(host) = address.to_string().parse() {
        request.headers_mut().insert(HOST, host);
    }
    let asking = async move {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    let (answered, _until_answered) = tokio::join!(asking, connection);
    match answered.map_err(odd)? {
        (StatusCode::OK, text) => Ok(text),
        (_, text) => Err(Unready::Unready(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_every_address_is_asked_on_loopback() {
        let asked = |listen: &str| reachable(listen.parse().unwrap()).to_string();
        assert_eq!(asked("0.0.0.0:4321"), "127.0.0.1:4321");
        assert_eq!(asked("[::]:4321"), "[::1]:4321");
        assert_eq!(asked("10.0.0.7:4321"), "10.0.0.7:4321");
    }
}
