//! Many on one link, much from one agent: nobody harms another.

use std::cell::Cell;
use std::time::Duration;

use opamp_server::proto::server_error_response::Details;
use opamp_server::proto::{AgentToServer, ServerErrorResponseType};
use tokio::time::Instant;

use crate::harness::agent::{
    Agent, HEARTBEATS, Poller, STATUS, Socket, assert_acknowledged, description, error_of,
};
use crate::harness::frames::{Frames, framed};
use crate::harness::server::TestServer;

/// How many agents share the link.
const CROWD: usize = 300;

/// S-034, S-062: hundreds of agents share a link: each is answered, addressed and on record, and all end with it.
#[tokio::test]
async fn s_034_hundreds_of_agents_share_a_link() {
    let server = TestServer::fresh().await;
    let mut agents: Vec<Agent> = (0..CROWD).map(|_| Agent::new()).collect();
    let mut frames = Frames::connect(&server).await;
    // Nobody waits for an answer; the answers come in order.
    for round in 0..3 {
        let reports: Vec<u8> = agents
            .iter_mut()
            .flat_map(|agent| framed(&if round == 0 { agent.full() } else { agent.report() }))
            .collect();
        frames.write(&reports).await;
        for agent in &agents {
            assert_acknowledged(&frames.offer().await, agent.uid);
        }
    }
    let summary = server.read("/api/v1/agents/summary").await;
    assert_eq!((summary["online"].as_u64(), summary["connected"].as_u64()), (Some(300), Some(300)));
    let (leaving, staying) = agents.split_at_mut(CROWD / 2);
    let farewells: Vec<u8> = leaving.iter_mut().flat_map(|agent| framed(&agent.farewell())).collect();
    frames.write(&farewells).await;
    for agent in &*leaving {
        assert_acknowledged(&frames.offer().await, agent.uid);
    }
    assert_eq!(server.read("/api/v1/agents/summary").await["connected"], 150);
    drop(frames);
    for agent in staying {
        assert_eq!(server.until_ended(agent.uid).await["disconnect_reason"], "connection_lost");
    }
    for agent in leaving {
        assert_eq!(server.history(agent.uid).await[0]["disconnect_reason"], "agent_disconnect");
    }
}

/// S-028, R-020: one agent's bad report on a shared link is refused to it alone; all others are answered as ever.
#[tokio::test]
async fn s_028_a_bad_report_on_a_shared_link_is_refused_alone() {
    let server = TestServer::fresh().await;
    let mut agents: Vec<Agent> = (0..20).map(|_| Agent::new()).collect();
    let mut socket = Socket::connect(&server).await;
    for agent in &mut agents {
        socket.exchange(&agent.full()).await;
    }
    for agent in &mut agents {
        socket.send_bytes(vec![0, 0x0a, 0x10, 0x01]).await;
        let offer = socket.offer().await;
        error_of(&offer, ServerErrorResponseType::BadRequest);
        assert!(offer.instance_uid.is_empty(), "R-020: nobody knows whose it was");
        assert_acknowledged(&socket.exchange(&agent.report()).await, agent.uid);
    }
    for agent in &agents {
        assert_eq!(server.history(agent.uid).await.len(), 1);
    }
}

/// S-137: who finds the link full is told so as Unavailable, with a time to wait in nanoseconds, and stays unknown.
#[tokio::test]
async fn s_137_unavailable_tells_how_long_to_wait_in_nanoseconds() {
    let server = TestServer::with(|config| config.agents.max_per_link = 1).await;
    let (mut one, mut other) = (Agent::new(), Agent::new());
    let (mut socket, _) = Socket::greet(&server, &one.full()).await;
    for _ in 0..3 {
        let offer = socket.exchange(&other.full()).await;
        error_of(&offer, ServerErrorResponseType::Unavailable);
        assert_eq!(offer.instance_uid, other.uid.as_bytes());
        let Some(Details::RetryInfo(retry)) = offer.error_response.unwrap().details else {
            panic!("no time to wait");
        };
        let wait = Duration::from_nanos(retry.retry_after_nanoseconds);
        assert!((Duration::from_secs(30)..=Duration::from_mins(1)).contains(&wait), "{wait:?}");
    }
    assert_eq!(server.agent(other.uid).await, None);
    assert_acknowledged(&socket.exchange(&one.report()).await, one.uid);
}

/// A flood of valid reports, each a change, from one agent slows no other: each is answered in time and stays online.
#[tokio::test]
async fn s_025_a_flood_of_valid_reports_harms_no_other_agent() {
    const PATIENCE: Duration = Duration::from_secs(2);
    let server = TestServer::with(|config| config.heartbeat.timeout = Duration::from_secs(5)).await;
    let (mut loud, mut calm, mut poll) = (Agent::new(), Agent::with(STATUS | HEARTBEATS), Agent::new());
    let (mut flood, _) = Frames::greet(&server, &loud.full()).await;
    let (mut socket, _) = Socket::greet(&server, &calm.full()).await;
    let mut poller = Poller::connect(&server).await;
    poller.exchange(&poll.full()).await;
    let reports: Vec<u8> = (0..500)
        .flat_map(|change| {
            let described = description(&[("service.name", &format!("loud {change}"))]);
            framed(&AgentToServer { agent_description: Some(described), ..loud.report() })
        })
        .collect();
    let over = Cell::new(false);
    let flooding = async {
        flood.write(&reports).await;
        for _ in 0..500 {
            assert_eq!(flood.offer().await.error_response, None);
        }
        over.set(true);
    };
    let calm_ones = async {
        let mut exchanges = 0;
        while !over.get() {
            let started = Instant::now();
            assert_acknowledged(&socket.exchange(&calm.report()).await, calm.uid);
            assert_acknowledged(&poller.exchange(&poll.report()).await, poll.uid);
            assert!(started.elapsed() < PATIENCE, "answered after {:?}", started.elapsed());
            exchanges += 1;
        }
        exchanges
    };
    let ((), exchanges) = tokio::join!(flooding, calm_ones);
    assert!(exchanges > 10, "in the time of 500 changes the others had {exchanges} exchanges");
    assert_eq!(server.agent(loud.uid).await.unwrap()["name"], "loud 499");
    for agent in [calm.uid, poll.uid] {
        assert_eq!(server.history(agent).await.len(), 1);
        assert_eq!(server.status(agent).await["status"], "online");
    }
}

/// S-034: the same agents on one link and by polls, in turn: every take-over is seen, nobody is mixed up.
#[tokio::test]
async fn s_034_agents_that_change_links_in_turn_are_never_mixed_up() {
    let server = TestServer::fresh().await;
    let mut agents: Vec<Agent> = (0..8).map(|_| Agent::new()).collect();
    let mut poller = Poller::connect(&server).await;
    for round in 0..3 {
        let mut shared = Socket::connect(&server).await;
        for agent in &mut agents {
            let mut report = agent.report();
            let name = format!("{} in round {round}", agent.uid);
            report.agent_description = Some(description(&[("service.name", &name)]));
            assert_acknowledged(&shared.exchange(&report).await, agent.uid);
        }
        for agent in &mut agents {
            assert_acknowledged(&poller.exchange(&agent.report()).await, agent.uid);
            let known = server.agent(agent.uid).await.unwrap();
            assert_eq!(known["name"], format!("{} in round {round}", agent.uid));
            assert_eq!(known["transport"], "http");
        }
    }
    for agent in &agents {
        let rows = server.history(agent.uid).await;
        assert_eq!(rows.len(), 6);
        assert!(rows[1..].iter().all(|row| row["disconnect_reason"] == "superseded"), "{rows:?}");
    }
}
