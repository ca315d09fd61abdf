//! Pages of a list that changes while it is read.

use std::collections::BTreeSet;

use crate::harness::Database;
use crate::harness::agent::{Agent, Socket};
use crate::harness::server::{Ports, TestServer};

/// Agents that come with one link and leave again.
async fn visit(server: &Ports, agents: &mut [Agent]) {
    let mut socket = Socket::connect(server).await;
    for agent in agents {
        socket.exchange(&agent.full()).await;
        socket.exchange(&agent.farewell()).await;
    }
}

/// While agents come and go between the pages, whoever stays is on exactly one of them.
pub(super) async fn pages_miss_nobody_who_stays(database: &Database) {
    let server = TestServer::on(database, |_| {}).await;
    let mut staying: Vec<Agent> = (0..9).map(|_| Agent::new()).collect();
    let mut leaving: Vec<Agent> = (0..9).map(|_| Agent::new()).collect();
    visit(&server, &mut staying).await;
    visit(&server, &mut leaving).await;
    let (mut seen, mut cursor): (Vec<String>, _) = (Vec::new(), String::new());
    loop {
        let page = server.read(&format!("/api/v1/agents?limit=2{cursor}")).await;
        let agents = page["agents"].as_array().expect("a list");
        seen.extend(agents.iter().map(|agent| agent["id"].as_str().expect("a uid").to_owned()));
        // Newcomers' uids are random: before the cursor and behind it.
        let mut newcomer = [Agent::new()];
        newcomer[0].uid = uuid::Uuid::new_v4().into();
        visit(&server, &mut newcomer).await;
        if let Some(next) = page["next_cursor"].as_str() {
            cursor = format!("&cursor={next}");
            // One that was shown, if any, and one that was not.
            for place in [0, leaving.len().saturating_sub(1)] {
                if place < leaving.len() {
                    let gone = leaving.remove(place);
                    let target = format!("/api/v1/agents/{}", gone.uid);
                    assert_eq!(server.ask("DELETE", &target, &[]).await.status, 204);
                }
            }
        } else {
            break;
        }
        assert!(seen.len() < 100, "the newcomers outrun the pages");
    }
    assert!(seen.windows(2).all(|pair| pair[0] < pair[1]), "in order, nobody twice: {seen:?}");
    let seen: BTreeSet<String> = seen.into_iter().collect();
    for agent in &staying {
        assert!(seen.contains(&agent.uid.to_string()), "{} is missing: {seen:?}", agent.uid);
    }
    server.stop().await.expect("it stops");
}
