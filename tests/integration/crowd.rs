//! Many agents at once share commits, and a lone one waits for nobody; on both databases.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;

use crate::harness::Database;
use crate::harness::agent::{Agent, Poller, Socket, assert_acknowledged};
use crate::harness::server::TestServer;

/// How many agents come at once.
const CROWD: usize = 1_000;

/// How many commits their openings may take.
const COMMITS: f64 = 50.0;

/// How many sockets are opened at a time: more than the backlog of a listener are lost at first.
const AT_A_TIME: usize = 100;

/// Openings that come at once share commits, and none is lost.
async fn a_thousand_simultaneous_opens_share_commits(database: Database) {
    let server =
        TestServer::on(&database, |config| config.store.flush_interval = Duration::from_mins(1)).await;
    let mut agents: Vec<Agent> = (0..CROWD).map(|_| Agent::new()).collect();
    let mut sockets = Vec::new();
    for _ in 0..CROWD / AT_A_TIME {
        sockets.extend(join_all((0..AT_A_TIME).map(|_| Socket::connect(&server))).await);
    }
    let commits = server.metrics().await.value("opamp_store_batch_size_count");
    // Bare reports: an opening each and nothing to save.
    join_all(sockets.iter_mut().zip(&agents).map(|(socket, agent)| async {
        let offer = socket.exchange(&agent.bare()).await;
        assert_eq!(offer.error_response, None);
    }))
    .await;
    let metrics = server.metrics().await;
    let commits = metrics.value("opamp_store_batch_size_count") - commits;
    assert!(commits <= COMMITS, "{CROWD} openings took {commits} commits");
    let writes = metrics.value("opamp_store_batch_size_sum");
    assert!((writes - 1_000.0).abs() < 0.5, "{writes} writes, and each commit is counted");
    let raw = database.raw().await;
    let open = "SELECT count(DISTINCT agent_id) FROM agent_connection_history WHERE disconnected_at IS NULL";
    assert_eq!(raw.number(open).await, 1_000, "none is lost");
    let changes = raw.number("SELECT count(*) FROM agent_status_log WHERE to_status = 'online'").await;
    assert_eq!(changes, 1_000);
    // Saves share commits as well.
    let before = metrics.value("opamp_store_batch_size_count");
    join_all(sockets.iter_mut().zip(&mut agents).map(|(socket, agent)| async {
        assert_eq!(socket.exchange(&agent.full()).await.error_response, None);
    }))
    .await;
    let saves = server.metrics().await.value("opamp_store_batch_size_count") - before;
    assert!(saves <= COMMITS, "{CROWD} saves took {saves} commits");
    assert_eq!(raw.number("SELECT count(*) FROM agents WHERE name = 'collector'").await, 1_000);
    drop(sockets);
    server.stop().await.unwrap();
}

/// Openings one after another wait for no timer: all of them take far less than one flush interval.
async fn a_lone_open_waits_for_no_timer(database: Database) {
    const FLUSH: Duration = Duration::from_mins(1);
    let server = TestServer::on(&database, |config| config.store.flush_interval = FLUSH).await;
    let started = Instant::now();
    let mut sockets = Vec::new();
    for number in 0..20_u32 {
        let mut agent = Agent::new();
        if number.is_multiple_of(2) {
            let (socket, offer) = Socket::greet(&server, &agent.full()).await;
            assert_acknowledged(&offer, agent.uid);
            sockets.push(socket);
        } else {
            assert_acknowledged(&Poller::once(&server, &agent.full()).await, agent.uid);
        }
        assert_eq!(server.history(agent.uid).await.len(), 1);
    }
    let took = started.elapsed();
    assert!(took < FLUSH / 6, "20 openings took {took:?}");
    let metrics = server.metrics().await;
    let commits = metrics.value("opamp_store_batch_size_count");
    assert!(
        (commits - 20.0).abs() < 0.5,
        "each had one commit, for its connection and its report: {commits}"
    );
    drop(sockets);
    server.stop().await.unwrap();
}

mod sqlite {
    use crate::harness::Database;

    #[tokio::test]
    async fn a_thousand_simultaneous_opens_share_commits() {
        super::a_thousand_simultaneous_opens_share_commits(Database::sqlite()).await;
    }

    #[tokio::test]
    async fn a_lone_open_waits_for_no_timer() {
        super::a_lone_open_waits_for_no_timer(Database::sqlite()).await;
    }
}

mod postgres {
    use crate::harness::Database;

    #[tokio::test]
    async fn a_thousand_simultaneous_opens_share_commits() {
        let Some(database) = Database::postgres().await else { return };
        super::a_thousand_simultaneous_opens_share_commits(database).await;
    }

    #[tokio::test]
    async fn a_lone_open_waits_for_no_timer() {
        let Some(database) = Database::postgres().await else { return };
        super::a_lone_open_waits_for_no_timer(database).await;
    }
}
