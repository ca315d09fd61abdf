//! Plain HTTP: one POST is one exchange through the same session as over WebSocket.
//!
//! Promises: a report that can be read is answered with 200 and one offer, also where the offer is
//! an error; passing trouble is 503, because agents drop the message on every other status; a body
//! that is too large is read and thrown away, so that the sender sees the answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Request, Response, StatusCode};

use super::admission::{Admission, come_back_later};
use super::intake::{self, Unfit};
use super::io::UNFINISHED;
use super::{Answer, PROTOBUF, closing, text};
use crate::agent::offer::Refusal;
use crate::agent::{InstanceUid, Sender};
use crate::burden::Share;
use crate::clock::Tick;
use crate::history::OpenConnection;
use crate::metrics::{DecodeFailure, Refused};
use crate::pulse::Link;
use crate::session::{Exchange, Exchanged, Inbound, Origin, Services, exchange, introduce, reject, sender};
use crate::store::Transport;
use crate::wire::{self, WireError};

/// The most bytes that are set aside for a body because its head announces them.
const ANNOUNCED: usize = 64 << 10;

/// How long the rest of a body that is refused is read.
const DISCARD: Duration = Duration::from_secs(5);

/// Answers one poll.
pub(super) async fn poll(
    services: &Arc<Services>,
    admission: &Admission,
    request: Request<Incoming>,
    peer: SocketAddr,
) -> Answer {
    let limits = admission.limits();
    let (head, body) = request.into_parts();
    if head.headers.contains_key(header::EXPECT) && announced(&body) > limits.max_message_size {
        // It asks before it sends: it is told, and its body never comes.
        services.metrics.decode_failures.of(DecodeFailure::TooLarge).increment(1);
        return closing(too_large(limits.max_message_size));
    }
    let packed = match encoding(&head.headers) {
        Ok(packed) => packed,
        Err(unknown) => {
            let refusal = format!("unknown Content-Encoding: {unknown}\n");
            let refusal = text(StatusCode::UNSUPPORTED_MEDIA_TYPE, &refusal);
            return refuse(&head.headers, body, limits.max_message_size, refusal).await;
        }
    };
    let mut share = admission.budget().share();
    let link = Arc::new(Link::default());
    let body = match read(body, limits.max_message_size, &mut share).await {
        Ok(body) => body,
        Err(unread) => return unread.refuse(services, limits.max_message_size),
    };
    // What it says was true when it came, however long it waits for memory and for the store.
    link.heard(services.clock.tick(), 0);
    let body =
        if packed { intake::unpack(body, limits.max_message_size, &mut share).await } else { Ok(body) };
    let body = match body {
        Ok(body) => Bytes::from(body),
        Err(Unfit::Crowded) => return crowded(services),
        Err(Unfit::Wire(WireError::TooLarge { limit })) => {
            services.metrics.decode_failures.of(DecodeFailure::TooLarge).increment(1);
            return too_large(limit);
        }
        Err(Unfit::Wire(_)) => {
            services.metrics.decode_failures.of(DecodeFailure::Gzip).increment(1);
            return text(StatusCode::BAD_REQUEST, "the body is not valid gzip\n");
        }
    };
    let exchanged = match intake::unfold(body, Some(share), admission.budget()).await {
        Ok(inbound) => exchanged(services, admission, inbound, peer, link).await,
        Err(Unfit::Crowded) => return crowded(services),
        Err(Unfit::Wire(error)) => {
            let many = error == WireError::TooMany;
            let cause = if many { DecodeFailure::TooMany } else { DecodeFailure::Protobuf };
            services.metrics.decode_failures.of(cause).increment(1);
            reject(services, &[], Refusal::BadRequest(error.to_string()))
        }
    };
    if matches!(exchanged.refusal, Some(Refusal::Unavailable { .. })) {
        return come_back_later();
    }
    respond(&exchanged, &head.headers)
}

/// There was no memory for the message.
fn crowded(services: &Services) -> Answer {
    services.note_refusal(Refused::Memory);
    come_back_later()
}

/// Takes a report through the session of its agent.
async fn exchanged(
    services: &Arc<Services>,
    admission: &Admission,
    mut inbound: Inbound,
    peer: SocketAddr,
    link: Arc<Link>,
) -> Exchanged {
    let report = &inbound.report;
    let agent = match sender(services, report) {
        Ok(Sender::Agent(agent)) => agent,
        Ok(Sender::Anonymous) => return introduce(services, report),
        Err(exchanged) => return *exchanged,
    };
    let newcomer = services.hub.get(agent).is_none();
    let refused = if newcomer && services.outage.is_away() {
        Some(Refused::Store)
    } else if newcomer && !admission.admits_newcomer(&services.history) {
        Some(Refused::Rate)
    } else {
        None
    };
    if let Some(cause) = refused {
        services.note_refusal(cause);
        return reject(services, &report.instance_uid, Refusal::Unavailable { retry_after_seconds: 30 });
    }
    let origin = Origin { transport: Transport::Http, remote_addr: peer, link };
    let mut agent = agent;
    loop {
        match seated(services, &origin, agent, &mut inbound).await {
            Exchange::Done(exchanged) => return *exchanged,
            Exchange::Rival(uid) => agent = uid,
        }
    }
}

/// Takes a report through the session that waits for it in its agent's seat.
async fn seated(
    services: &Arc<Services>,
    origin: &Origin,
    agent: InstanceUid,
    inbound: &mut Inbound,
) -> Exchange {
    let seat = services.hub.seat(agent);
    let mut session = seat.lock().await;
    let polls = |connection: &Arc<OpenConnection>| connection.transport == Transport::Http;
    let known = services.hub.get(agent).filter(polls).map(|connection| Arc::clone(&connection.link));
    let _to_the_known = known.map(|link| Attending::since(services.clock.tick(), services, link));
    // Who waited for its turn was not read meanwhile, either.
    let _to_a_new = Attending::since(origin.link.last_byte(), services, Arc::clone(&origin.link));
    let exchange = exchange(services, &mut session, origin, agent, inbound).await;
    if let Exchange::Done(exchanged) = &exchange
        && exchanged.refusal.is_some()
        && let Some(connection) = services.hub.get(agent).filter(polls)
    {
        connection.pulse.refused(origin.link.last_byte());
    }
    if session.is_some() {
        services.hub.keep_seat(agent, &seat);
    } else {
        services.hub.free_seat(agent);
    }
    exchange
}

/// A poll that the server works on: meanwhile nobody can say that its agent is silent.
struct Attending<'a> {
    services: &'a Services,
    link: Arc<Link>,
    began: Tick,
}

impl<'a> Attending<'a> {
    fn since(began: Tick, services: &'a Services, link: Arc<Link>) -> Self {
        link.turn_away();
        Self { services, link, began }
    }
}

impl Drop for Attending<'_> {
    fn drop(&mut self) {
        self.link.attend(self.began, self.services.clock.tick());
    }
}

/// True for gzip, false for none; the error is an encoding nobody knows.
fn encoding(headers: &HeaderMap) -> Result<bool, String> {
    let values = headers.get_all(header::CONTENT_ENCODING).iter();
    let values: Vec<_> = values.map(|value| String::from_utf8_lossy(value.as_bytes())).collect();
    // Several headers are one list.
    let name = values.join(", ");
    match name.trim() {
        "" => Ok(false),
        name if name.eq_ignore_ascii_case("identity") => Ok(false),
        name if name.eq_ignore_ascii_case("gzip") => Ok(true),
        name => Err(name.to_owned()),
    }
}

/// Why a body was not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unread {
    TooLarge,
    BrokenOff,
    TooSlow,
    /// It waited for memory, not for its sender.
    Crowded,
}

impl Unread {
    /// Counts it and answers it.
    fn refuse(self, services: &Services, limit: usize) -> Answer {
        let (cause, answer) = match self {
            Self::Crowded => return crowded(services),
            Self::TooLarge => (DecodeFailure::TooLarge, too_large(limit)),
            Self::BrokenOff => {
                (DecodeFailure::Unfinished, text(StatusCode::BAD_REQUEST, "the body broke off\n"))
            }
            Self::TooSlow => {
                let late = text(StatusCode::REQUEST_TIMEOUT, "the body did not come in time\n");
                (DecodeFailure::Unfinished, late)
            }
        };
        services.metrics.decode_failures.of(cause).increment(1);
        answer
    }
}

/// The length that a body announces, else 0.
fn announced(body: &Incoming) -> usize {
    usize::try_from(body.size_hint().exact().unwrap_or_default()).unwrap_or(usize::MAX)
}

/// Reads a body of at most `limit` bytes.
async fn read(mut body: Incoming, limit: usize, share: &mut Share) -> Result<Vec<u8>, Unread> {
    let announced = announced(&body);
    if announced > limit {
        let _whole = discard(body, limit).await;
        return Err(Unread::TooLarge);
    }
    // An announced length is a promise of the peer's; memory is given as bytes come.
    let mut bytes = Vec::with_capacity(announced.min(ANNOUNCED));
    let crowded = AtomicBool::new(false);
    let reading = async {
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(|_| Unread::BrokenOff)?.into_data() else { continue };
            if bytes.len() + data.len() > limit {
                return Err(Unread::TooLarge);
            }
            crowded.store(true, Ordering::Relaxed);
            share.cover((bytes.len() + data.len()) as u64).await;
            crowded.store(false, Ordering::Relaxed);
            bytes.extend_from_slice(&data);
        }
        Ok(())
    };
    match tokio::time::timeout(UNFINISHED, reading).await {
        Ok(Ok(())) => Ok(bytes),
        Ok(Err(Unread::TooLarge)) => {
            let _whole = discard(body, limit).await;
            Err(Unread::TooLarge)
        }
        Ok(Err(unread)) => Err(unread),
        Err(_elapsed) if crowded.load(Ordering::Relaxed) => Err(Unread::Crowded),
        Err(_elapsed) => Err(Unread::TooSlow),
    }
}

/// Answers a refusal so that the sender sees it: a body that is on its way is read and thrown away.
pub(super) async fn refuse(headers: &HeaderMap, body: Incoming, limit: usize, refusal: Answer) -> Answer {
    // Who asked before it sends its body is told, and the body never comes.
    let over = !headers.contains_key(header::EXPECT) && discard(body, limit).await;
    if over { refusal } else { closing(refusal) }
}

/// Reads the rest of a refused body and throws it away, within reason, so that the sender sees the answer.
/// False where there is more of it than that.
async fn discard(mut body: Incoming, limit: usize) -> bool {
    let discarding = async {
        let mut discarded = 0;
        while let Some(Ok(frame)) = body.frame().await {
            discarded += frame.data_ref().map_or(0, Bytes::len);
            if discarded > limit.saturating_mul(2) {
                return false;
            }
        }
        true
    };
    tokio::time::timeout(DISCARD, discarding).await.unwrap_or(false)
}

fn too_large(limit: usize) -> Answer {
    text(StatusCode::PAYLOAD_TOO_LARGE, &format!("the message is larger than {limit} bytes\n"))
}

/// 200 with the offer, packed where the agent takes it (S-016, S-017).
fn respond(exchanged: &Exchanged, request: &HeaderMap) -> Answer {
    let body = wire::encode_body(&exchanged.offer);
    let packed = takes_gzip(request).then(|| wire::gzip(&body)).flatten();
    let is_packed = packed.is_some();
    let mut answer = Response::new(Full::from(packed.unwrap_or(body)));
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(PROTOBUF));
    if is_packed {
        answer.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    answer
}

/// True where the request's `Accept-Encoding` allows gzip.
fn takes_gzip(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    let (mut named, mut any) = (None, false);
    for coding in values.flat_map(|value| value.split(',')) {
        let mut parts = coding.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let refused = parts.any(|part| {
            part.to_ascii_lowercase()
                .strip_prefix("q=")
                .and_then(|q| q.trim().parse::<f32>().ok())
                .is_some_and(|q| q <= 0.0)
        });
        if name.eq_ignore_ascii_case("gzip") {
            named = Some(!refused);
        } else if name == "*" {
            any = !refused;
        }
    }
    // The star stands for what is not named.
    named.unwrap_or(any)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn s_015_gzip_and_plain_bodies_are_taken_and_r_030_others_are_not() {
        assert_eq!(encoding(&HeaderMap::new()), Ok(false));
        assert_eq!(encoding(&headers(header::CONTENT_ENCODING, "GZIP")), Ok(true));
        assert_eq!(encoding(&headers(header::CONTENT_ENCODING, "br")), Err("br".to_owned()));
    }

    #[test]
    fn s_016_the_answer_is_packed_where_accept_encoding_allows() {
        assert!(takes_gzip(&headers(header::ACCEPT_ENCODING, "deflate, gzip;q=0.5")));
        assert!(takes_gzip(&headers(header::ACCEPT_ENCODING, "*")));
        assert!(!takes_gzip(&headers(header::ACCEPT_ENCODING, "gzip;q=0, br")));
        assert!(!takes_gzip(&headers(header::ACCEPT_ENCODING, "gzip;q=0, *")));
        assert!(!takes_gzip(&HeaderMap::new()));
    }
}
