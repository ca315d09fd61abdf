//! The agents' listener: one URL, two transports. How bytes come and go; knows no SQL.
//!
//! [`Listener`] accepts sockets and dispatches each request: path, then site, then token, then by media type to
//! `polling` or to a WebSocket upgrade and its `websocket` task. Everything that can be refused
//! is refused here, before the upgrade.

mod admission;
mod io;
mod polling;
mod websocket;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use admission::Denied;
pub use admission::{Admission, Limits};

use crate::metrics::Direction;
use crate::pulse::Link;
use crate::session::Services;
use io::Metered;

/// The media type of OpAMP over plain HTTP.
const PROTOBUF: &str = "application/x-protobuf";

/// How long a new connection may stay without a complete request.
const FIRST_REQUEST: Duration = Duration::from_secs(10);

/// How long a keep-alive connection may be idle.
const IDLE: Duration = Duration::from_mins(2);

/// How long to wait after a failed accept, typically for want of file handles.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// An answer with a body held in memory.
type Answer = Response<Full<Bytes>>;

/// What every connection of the listener works with.
#[derive(Debug)]
struct Context {
    services: Arc<Services>,
    admission: Arc<Admission>,
    tasks: TaskTracker,
}

/// The agents' listener.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    context: Arc<Context>,
}

impl Listener {
    /// A listener on a bound socket. Its tasks run on `tasks`.
    #[must_use]
    pub fn new(
        socket: TcpListener,
        services: Arc<Services>,
        admission: Arc<Admission>,
        tasks: TaskTracker,
    ) -> Self {
        Self { socket, context: Arc::new(Context { services, admission, tasks }) }
    }

    /// Accepts until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        while let Some(accepted) = stop.run_until_cancelled(self.socket.accept()).await {
            match accepted {
                Ok((stream, peer)) => {
                    let context = Arc::clone(&self.context);
                    self.context.tasks.spawn(context.serve(stream, peer));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

impl Context {
    /// Serves one socket until it is closed or upgraded.
    async fn serve(self: Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        // Small messages must not wait for each other; a socket without the option still works.
        let _best_effort = stream.set_nodelay(true);
        let clock = self.services.clock.clone();
        let link = Arc::new(Link::heard_at(clock.tick()));
        let io = TokioIo::new(Metered::new(stream, Arc::clone(&link), clock));
        let requested = Arc::new(AtomicBool::new(false));
        let service = service_fn(|request| {
            requested.store(true, Ordering::Relaxed);
            let (context, link) = (Arc::clone(&self), Arc::clone(&link));
            async move { Ok::<_, Infallible>(context.answer(request, peer, link).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE)
            .serve_connection(io, service)
            .with_upgrades();
        tokio::pin!(connection);
        tokio::select! {
            // A peer that breaks off is no event of its own: whatever it had open says so.
            _broken_off = &mut connection => {}
            () = silence(&requested) => {}
        }
        let (received, sent) = link.harvest();
        self.services.metrics.bytes.of(Direction::Received).increment(received);
        self.services.metrics.bytes.of(Direction::Sent).increment(sent);
    }

    /// Answers one request: path, site, token, then by media type.
    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
        peer: SocketAddr,
        link: Arc<Link>,
    ) -> Answer {
        if request.uri().path() != self.admission.limits().path {
            return text(
                StatusCode::NOT_FOUND,
                &format!("agents connect at {}\n", self.admission.limits().path),
            );
        }
        let (headers, admission) = (request.headers(), &self.admission);
        let admitted = admission
            .screen(headers)
            .and_then(|()| admission.authorize(headers))
            .and_then(|()| admission.admit());
        if let Err(denied) = admitted {
            return self.deny(denied);
        }
        if !is_protobuf(request.headers()) {
            return self.upgrade(request, peer, link);
        }
        if request.method() != Method::POST {
            let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "OpAMP over plain HTTP is POST\n");
            answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
            return answer;
        }
        // An exchange that has begun is finished, whether the peer waits for it or not.
        let (services, admission) = (Arc::clone(&self.services), Arc::clone(&self.admission));
        let exchange = async move { polling::poll(&services, admission.limits(), request, peer).await };
        self.tasks.spawn(exchange).await.unwrap_or_else(|_panicked| {
            self.services.metrics.link_panics.increment(1);
            tracing::error!(%peer, "an exchange over plain HTTP panicked");
            admission::come_back_later()
        })
    }

    fn deny(&self, denied: Denied) -> Answer {
        self.services.metrics.refused.of(denied.cause()).increment(1);
        denied.answer()
    }

    /// Answers a WebSocket handshake and leaves the socket to a task of its own.
    fn upgrade(&self, mut request: Request<Incoming>, peer: SocketAddr, link: Arc<Link>) -> Answer {
        let Some(accept) = accept_key(&request) else {
            let mut answer = text(
                StatusCode::UPGRADE_REQUIRED,
                "OpAMP is a WebSocket (version 13) or a POST of application/x-protobuf\n",
            );
            let headers = answer.headers_mut();
            headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
            return answer;
        };
        let Ok(key) = HeaderValue::from_str(&accept) else {
            return text(StatusCode::BAD_REQUEST, "unusable Sec-WebSocket-Key\n");
        };
        let place = match Admission::take_place(&self.admission, &link) {
            Ok(place) => place,
            Err(denied) => return self.deny(denied),
        };
        let upgraded = hyper::upgrade::on(&mut request);
        let (services, admission) = (Arc::clone(&self.services), Arc::clone(&self.admission));
        let tasks = self.tasks.clone();
        self.tasks.spawn(async move {
            let Ok(upgraded) = upgraded.await else { return };
            // A task of its own, so that what the upgrade needed is not kept with an idle link.
            if let Some(link) = websocket::link(services, admission, place, upgraded, peer, link).await {
                tasks.spawn(link);
            }
        });
        let mut answer = Response::new(Full::default());
        *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = answer.headers_mut();
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, key);
        answer
    }
}

/// Ends when the first request has not come in time; never, once it has.
async fn silence(requested: &AtomicBool) {
    tokio::time::sleep(FIRST_REQUEST).await;
    if requested.load(Ordering::Relaxed) {
        std::future::pending::<()>().await;
    }
}

/// True where the media type is that of OpAMP over plain HTTP; parameters do not count.
fn is_protobuf(headers: &HeaderMap) -> bool {
    let media_type =
        headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    media_type.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case(PROTOBUF)
}

/// The accept key of a valid WebSocket handshake.
fn accept_key(request: &Request<Incoming>) -> Option<String> {
    let headers = request.headers();
    let names = |name: header::HeaderName, token: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(token)))
    };
    let valid = request.method() == Method::GET
        && names(header::UPGRADE, "websocket")
        && names(header::CONNECTION, "upgrade")
        && names(header::SEC_WEBSOCKET_VERSION, "13");
    let key = headers.get(header::SEC_WEBSOCKET_KEY).filter(|_| valid)?;
    Some(derive_accept_key(key.as_bytes()))
}

/// An answer in plain text.
fn text(status: StatusCode, body: &str) -> Answer {
    let mut answer = Response::new(Full::from(body.to_owned()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}
