//! The agents' listener: one URL, two transports. How bytes come and go; knows no SQL.
//!
//! [`Listener`] accepts sockets and dispatches each request: path, then site, then token, then by media type to
//! `polling` or to a WebSocket upgrade and its `websocket` task. Everything that can be refused
//! is refused here, before the upgrade. A socket stays on the thread that it is given to.

mod admission;
mod frames;
mod intake;
mod io;
mod polling;
mod websocket;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Version};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use admission::{Admission, Limits};
use admission::{Denied, Place};

use crate::lanes::{Lanes, Load};
use crate::pulse::Link;
use crate::session::Services;
use io::{Metered, Phase, Stage};

/// The media type of OpAMP over plain HTTP.
const PROTOBUF: &str = "application/x-protobuf";

/// How many sockets may wait for a thread to take them in; others wait with the system.
const DESK: usize = 512;

/// How long to wait where no thread takes in another one.
const DESK_PAUSE: Duration = Duration::from_millis(1);

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
    stop: CancellationToken,
}

/// The agents' listener.
#[derive(Debug)]
pub struct Listener {
    socket: std::net::TcpListener,
    desks: Desks,
    stop: CancellationToken,
}

/// A socket that no poller knows, and its peer.
type Accepted = (std::net::TcpStream, SocketAddr);

/// Where sockets are given to a thread.
#[derive(Debug)]
struct Desk {
    lane: Handle,
    waiting: mpsc::Sender<Accepted>,
}

impl Desk {
    /// What there is for the thread: each link is one task, but while it is upgraded.
    fn load(&self) -> Load {
        let waiting = self.waiting.max_capacity() - self.waiting.capacity();
        Load { links: self.lane.metrics().num_alive_tasks() + waiting, waiting }
    }
}

/// The desks of all lanes.
#[derive(Debug)]
struct Desks(Vec<Desk>);

impl Desks {
    /// Gives a socket to a thread, as soon as one takes it in. False where one is gone, without which the server cannot
    /// go on.
    async fn give(&self, mut accepted: Accepted) -> bool {
        while let Some(desk) = Lanes::next(self.0.iter().map(Desk::load)).and_then(|lane| self.0.get(lane)) {
            match desk.waiting.try_send(accepted) {
                Ok(()) => return true,
                Err(TrySendError::Closed(_)) => return false,
                // Whichever moves first gets it: another one may be stuck.
                Err(TrySendError::Full(back)) => accepted = back,
            }
            tokio::time::sleep(DESK_PAUSE).await;
        }
        false
    }
}

impl Listener {
    /// A listener on a bound socket. Its tasks run on `lanes` and are counted by `tasks`.
    ///
    /// Once `stop` is cancelled, nobody is accepted any more, and connections over plain HTTP close
    /// after the request they are at.
    #[must_use]
    pub fn new(
        socket: std::net::TcpListener,
        services: Arc<Services>,
        admission: Arc<Admission>,
        tasks: TaskTracker,
        lanes: &Lanes,
        stop: CancellationToken,
    ) -> Self {
        let context = Arc::new(Context { services, admission, tasks, stop: stop.clone() });
        let desk = |lane: &Handle| {
            let (waiting, taken) = mpsc::channel(DESK);
            context.tasks.spawn_on(Arc::clone(&context).take_in(taken), lane);
            Desk { lane: lane.clone(), waiting }
        };
        Self { socket, desks: Desks(lanes.iter().map(desk).collect()), stop }
    }

    /// Accepts until it is told to stop, on whatever thread this runs; ends as well when a lane is gone.
    pub async fn run(self) {
        let Self { socket, desks, stop } = self;
        let socket = match TcpListener::from_std(socket) {
            Ok(socket) => socket,
            Err(error) => return tracing::error!(%error, "the agents' listener failed"),
        };
        while let Some(accepted) = stop.run_until_cancelled(socket.accept()).await {
            // From here on it is known to another poller.
            let accepted = accepted.and_then(|(stream, peer)| Ok((stream.into_std()?, peer)));
            match accepted {
                Ok(accepted) => {
                    if stop.run_until_cancelled(desks.give(accepted)).await != Some(true) {
                        return;
                    }
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
    /// Takes in what is given to a thread, on that thread.
    async fn take_in(self: Arc<Self>, mut waiting: mpsc::Receiver<Accepted>) {
        while let Some((stream, peer)) = waiting.recv().await {
            match TcpStream::from_std(stream) {
                Ok(stream) => drop(self.tasks.spawn(Arc::clone(&self).serve(stream, peer))),
                Err(error) => tracing::warn!(%error, %peer, "cannot take in a connection"),
            }
        }
    }

    /// Serves one socket until it is closed or upgraded.
    async fn serve(self: Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        // Small messages must not wait for each other; a socket without the option still works.
        let _best_effort = stream.set_nodelay(true);
        let clock = self.services.clock.clone();
        let link = Arc::new(Link::heard_at(clock.tick()));
        // Whoever finds every place taken is told so, and then goes.
        let place = Admission::take_place(&self.admission, &link);
        let _doorway = if place.is_err() {
            let Some(doorway) = self.admission.doorway() else { return };
            Some(doorway)
        } else {
            None
        };
        let place = Arc::new(Mutex::new(place));
        let phase = Phase::new(Arc::clone(&link), clock.tick());
        let budget = self.admission.budget().clone();
        let io = TokioIo::new(Metered::new(stream, Arc::clone(&phase), clock.clone(), budget));
        let service = service_fn(|request| {
            phase.enter(Stage::Busy, clock.tick());
            let (context, link, place) = (Arc::clone(&self), Arc::clone(&link), Arc::clone(&place));
            let (phase, clock) = (Arc::clone(&phase), clock.clone());
            async move {
                let answer = context.answer(request, peer, link, &place).await;
                phase.enter(Stage::Idle, clock.tick());
                Ok::<_, Infallible>(answer)
            }
        });
        let connection =
            hyper::server::conn::http1::Builder::new().serve_connection(io, service).with_upgrades();
        tokio::pin!(connection);
        // A peer that breaks off is no event of its own: whatever it had open says so.
        tokio::select! {
            _broken_off = &mut connection => {}
            () = phase.overdue(&clock) => {}
            () = self.stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                let _broken_off = connection.await;
            }
        }
        self.services.metrics.count_bytes(link.harvest());
    }

    /// Answers one request: path, site, token, then by media type.
    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
        peer: SocketAddr,
        link: Arc<Link>,
        place: &Mutex<Result<Place, Denied>>,
    ) -> Answer {
        if let Some(refusal) = self.refusal(&request, place) {
            return self.refuse(request, refusal).await;
        }
        if !is_protobuf(request.headers()) {
            return match accept_key(&request) {
                Some(accept) => self.upgrade(request, accept, peer, link, place),
                None => self.refuse(request, upgrade_required()).await,
            };
        }
        // An exchange that has begun is finished, whether the peer waits for it or not.
        let (services, admission) = (Arc::clone(&self.services), Arc::clone(&self.admission));
        let exchange = async move { polling::poll(&services, &admission, request, peer).await };
        self.tasks.spawn(exchange).await.unwrap_or_else(|_panicked| {
            self.services.metrics.link_panics.increment(1);
            tracing::error!(%peer, "an exchange over plain HTTP panicked");
            admission::come_back_later()
        })
    }

    /// What can be refused by the head alone: path, site, token, admission, method.
    fn refusal(&self, request: &Request<Incoming>, place: &Mutex<Result<Place, Denied>>) -> Option<Answer> {
        let (headers, admission) = (request.headers(), &self.admission);
        let path = &admission.limits().path;
        if request.uri().path() != path {
            return Some(text(StatusCode::NOT_FOUND, &format!("agents connect at {path}\n")));
        }
        let admitted = admission
            .screen(headers)
            .and_then(|()| admission.authorize(headers))
            .and_then(|()| admission.admit());
        if let Err(denied) = admitted {
            return Some(self.deny(denied));
        }
        if !is_protobuf(headers) {
            return None;
        }
        if let Err(denied) = &*place.lock().unwrap_or_else(PoisonError::into_inner) {
            return Some(closing(self.deny(*denied)));
        }
        if request.method() != Method::POST {
            let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, "OpAMP over plain HTTP is POST\n");
            answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
            return Some(answer);
        }
        None
    }

    async fn refuse(&self, request: Request<Incoming>, refusal: Answer) -> Answer {
        let (head, body) = request.into_parts();
        polling::refuse(&head.headers, body, self.admission.limits().max_message_size, refusal).await
    }

    fn deny(&self, denied: Denied) -> Answer {
        self.services.note_refusal(denied.cause());
        denied.answer()
    }

    /// Answers a WebSocket handshake and leaves the socket to a task of its own.
    fn upgrade(
        &self,
        mut request: Request<Incoming>,
        accept: String,
        peer: SocketAddr,
        link: Arc<Link>,
        place: &Mutex<Result<Place, Denied>>,
    ) -> Answer {
        let Ok(key) = HeaderValue::try_from(accept) else {
            return text(StatusCode::BAD_REQUEST, "unusable Sec-WebSocket-Key\n");
        };
        // The place of the socket becomes that of the link.
        let place =
            std::mem::replace(&mut *place.lock().unwrap_or_else(PoisonError::into_inner), Err(Denied::Full));
        let place = match place {
            Ok(_) if self.services.outage.is_away() => return closing(self.deny(Denied::Store)),
            Ok(place) if self.admission.admits_newcomer(&self.services.history) => place,
            Ok(_) => return closing(self.deny(Denied::Rate)),
            Err(denied) => return closing(self.deny(denied)),
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

/// What is neither a poll nor a valid handshake is told what this server speaks.
fn upgrade_required() -> Answer {
    let mut answer = text(
        StatusCode::UPGRADE_REQUIRED,
        "OpAMP is a WebSocket (version 13) or a POST of application/x-protobuf\n",
    );
    let headers = answer.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    answer
}

/// The answer after which the connection is closed: whoever is not admitted must not keep a socket.
fn closing(mut answer: Answer) -> Answer {
    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    answer
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
        && request.version() == Version::HTTP_11
        && names(header::UPGRADE, "websocket")
        && names(header::CONNECTION, "upgrade")
        && names(header::SEC_WEBSOCKET_VERSION, "13");
    let key = headers.get(header::SEC_WEBSOCKET_KEY).filter(|_| valid)?;
    let random = BASE64.decode(key).ok()?;
    (random.len() == 16).then(|| derive_accept_key(key.as_bytes()))
}

/// An answer in plain text.
fn text(status: StatusCode, body: &str) -> Answer {
    let mut answer = Response::new(Full::from(body.to_owned()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}
