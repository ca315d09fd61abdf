use std::io;
use std::pin::Pin;
use std::sync::atomic::AtomicBool;
use std::task::{Context, Poll};

use prost::Message as _;
use tokio::io::{DuplexStream, ReadBuf, duplex};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::*;
use crate::agent::InstanceUid;
use crate::burden::Share;
use crate::clock::{Clock, Rate};
use crate::heartbeat::HeartbeatMonitor;
use crate::history::History;
use crate::lanes::Lanes;
use crate::outage::Outage;
use crate::proto::{AgentDescription, AgentToServer};
use crate::pulse::Expectations;
use crate::session::QUESTIONS_PER_SECOND;
use crate::session::hub::Hub;
use crate::sight::Sight;
use crate::store::{self, HistoryFilter, NewNode, PageRequest};
use crate::transport::Limits;

/// A socket that panics once, when it is read after the switch was thrown.
struct Faulty {
    socket: DuplexStream,
    panics: Arc<AtomicBool>,
}

impl AsyncRead for Faulty {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.socket).poll_read(cx, buf);
        assert!(
            read.is_pending() || !self.panics.swap(false, std::sync::atomic::Ordering::Relaxed),
            "the fault of this test"
        );
        read
    }
}

impl AsyncWrite for Faulty {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

impl Bearer for Faulty {
    fn take_share(&mut self) -> Option<Box<Share>> {
        None
    }
}

/// What a link works with, on a database in memory, and a writer behind it.
async fn services() -> Arc<Services> {
    let store = store::open("sqlite::memory:", 1, true).await.unwrap();
    let (node_id, at) = (Uuid::now_v7(), store.now().await.unwrap());
    let expected = Expectations { interval: Duration::from_secs(30), timeout: Duration::from_mins(1) };
    let node = NewNode {
        id: node_id,
        name: "node".to_owned(),
        version: "0".to_owned(),
        lease: Duration::from_secs(10),
        at,
        return_time: expected.return_time(),
        first_poll: expected.first_poll(),
    };
    store.start_node(&node).await.unwrap();
    let (clock, metrics) = (Clock::anchored(at), Arc::<Metrics>::default());
    let outage = Arc::new(Outage::new(Arc::clone(&metrics)));
    let sight = Arc::new(Sight::new(clock.clone(), Arc::clone(&metrics), Arc::clone(&outage)));
    let (history, writer) = History::new(
        Arc::clone(&store),
        clock.clone(),
        Arc::clone(&metrics),
        Arc::clone(&sight),
        node_id,
        expected,
    );
    let peers = Arc::<crate::peers::Peers>::default();
    let (watch, monitor) = HeartbeatMonitor::new(
        history.clone(),
        Arc::clone(&sight),
        Arc::clone(&peers),
        Arc::clone(&metrics),
        Duration::from_secs(1),
        Box::new(|_| {}),
    );
    let stop = CancellationToken::new();
    let owners = async move { tokio::join!(writer.run(stop.clone()), monitor.run(Lanes::default(), stop)) };
    drop(tokio_util::task::TaskTracker::new().spawn(owners));
    let hub = Arc::new(Hub::new(Arc::clone(&metrics)));
    let (questions, closing) = (Rate::new(QUESTIONS_PER_SECOND), AtomicBool::new(false));
    Arc::new(Services {
        store,
        history,
        hub,
        watch,
        clock,
        metrics,
        outage,
        sight,
        peers,
        questions,
        closing,
    })
}

fn admission() -> Arc<Admission> {
    Arc::new(Admission::new(Limits {
        path: "/".to_owned(),
        token: None,
        local: false,
        max_connections: 10,
        max_connects_per_second: 10,
        max_inflight: 1 << 20,
        max_message_size: 1 << 20,
        max_per_link: 10,
    }))
}

/// A link whose socket panics when told, its task, and the peer's end of it.
async fn link_to(
    services: &Arc<Services>,
) -> (Arc<AtomicBool>, impl Future<Output = ()> + Send + 'static, WebSocketStream<DuplexStream>) {
    let (near, far) = duplex(1 << 16);
    let panics = Arc::new(AtomicBool::new(false));
    let socket = Faulty { socket: near, panics: Arc::clone(&panics) };
    let (admission, link) = (admission(), Arc::new(Link::heard_at(services.clock.tick())));
    let place = Admission::take_place(&admission, &link).unwrap();
    let remote_addr = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
    let origin = Origin { transport: Transport::Websocket, remote_addr, link };
    let agents = Agents::new(Arc::clone(services), admission, origin);
    let socket = WebSocketStream::from_raw_socket(socket, Role::Server, None).await;
    let task = Box::new(LinkTask { socket, agents, _place: place }).run();
    (panics, task, WebSocketStream::from_raw_socket(far, Role::Client, None).await)
}

fn report(agent: InstanceUid, number: u64) -> Message {
    let report = AgentToServer {
        instance_uid: agent.as_bytes().to_vec(),
        sequence_num: number,
        capabilities: 1,
        agent_description: Some(AgentDescription::default()),
        ..AgentToServer::default()
    };
    Message::Binary([&[0][..], &report.encode_to_vec()].concat().into())
}

/// A panic in one link's task ends that link, on record and with a Close frame, is counted, and harms no other.
#[tokio::test]
async fn a_panic_ends_its_link_and_no_other() {
    let services = services().await;
    let (broken, other) = (InstanceUid::generate(), InstanceUid::generate());
    let (panics, task, mut peer) = link_to(&services).await;
    let (_, other_task, mut other_peer) = link_to(&services).await;
    let story = async {
        peer.send(report(broken, 1)).await.unwrap();
        assert!(matches!(peer.next().await, Some(Ok(Message::Binary(_)))));
        other_peer.send(report(other, 1)).await.unwrap();
        assert!(matches!(other_peer.next().await, Some(Ok(Message::Binary(_)))));

        panics.store(true, std::sync::atomic::Ordering::Relaxed);
        peer.send(report(broken, 2)).await.unwrap();
        let Some(Ok(Message::Close(Some(frame)))) = peer.next().await else { panic!("no Close frame") };
        assert_eq!((u16::from(frame.code), frame.reason.as_str()), (1011, "internal_error"));
        let page = PageRequest { after: None, limit: 10 };
        let rows =
            services.store.list_connection_history(broken, HistoryFilter::default(), page).await.unwrap();
        assert_eq!(rows.items[0].disconnect_reason.as_deref(), Some("internal_error"));
        assert!(services.metrics.render().contains("\nopamp_link_panics_total 1\n"));

        other_peer.send(report(other, 2)).await.unwrap();
        assert!(matches!(other_peer.next().await, Some(Ok(Message::Binary(_)))), "it lives on");
        assert!(services.store.get_active_connection(other).await.unwrap().is_some());
        drop((peer, other_peer));
    };
    tokio::join!(task, other_task, story);
}
