//! One odd agent: the store refuses what it reports, and nobody else notices.

use futures_util::future::join_all;
use opamp_server::proto::{AgentToServer, ServerErrorResponseType};

use crate::harness::Database;
use crate::harness::agent::{Agent, Socket, assert_acknowledged, description, error_of};
use crate::harness::server::TestServer;

/// The report is refused, its agent is connected all the same, and those who came with it are taken in.
pub(super) async fn a_first_report_that_the_store_refuses_is_refused_alone(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    let raw = database.raw().await;
    raw.execute(if raw.locks_rows() {
        "ALTER TABLE agents ADD CONSTRAINT odd CHECK (name <> 'odd')"
    } else {
        "CREATE TRIGGER odd BEFORE UPDATE ON agents WHEN NEW.name = 'odd' BEGIN SELECT RAISE(ABORT, 'odd'); END"
    })
    .await;
    let mut odd = Agent::new();
    let first =
        AgentToServer { agent_description: Some(description(&[("service.name", "odd")])), ..odd.full() };
    let others = (0..20).map(|_| {
        let ports = *server;
        async move {
            let mut agent = Agent::new();
            let (socket, offer) = Socket::greet(&ports, &agent.full()).await;
            assert_acknowledged(&offer, agent.uid);
            assert_eq!(ports.agent(agent.uid).await.expect("it is on record")["name"], "collector");
            socket
        }
    });
    let ((mut socket, offer), others) = tokio::join!(Socket::greet(&server, &first), join_all(others));
    let text = error_of(&offer, ServerErrorResponseType::BadRequest);
    assert_eq!(text, "the report holds data that cannot be stored");
    assert_eq!(server.status(odd.uid).await["connected"], true);
    assert_eq!(server.history(odd.uid).await.len(), 1);
    assert!(server.agent(odd.uid).await.expect("it is on record")["name"].is_null());
    // What was refused is missing: its next report is answered by the question for everything, and that is stored.
    let offer = socket.exchange(&odd.report()).await;
    assert!(offer.flags != 0, "{offer:?}");
    assert_acknowledged(&socket.exchange(&odd.full()).await, odd.uid);
    assert_eq!(server.agent(odd.uid).await.expect("it is on record")["name"], "collector");
    drop(others);
    server.stop().await.expect("it stops");
}
