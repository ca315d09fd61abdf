//! Lists: filters, pages, summaries and the history of one agent.

use std::sync::Arc;

use opamp_server::agent::InstanceUid;
use opamp_server::close::CloseReason;
use opamp_server::config::Ephemeral;
use opamp_server::store::{
    AgentFilter, AgentSummary, HistoryFilter, Page, PageRequest, Status, Store, Transport, Write,
};

use super::scene::{ALL, Node, at, create, delete, uid, update};
use crate::harness::Database;

/// The uids that a filter finds; the total must say the same.
async fn found(store: &Arc<dyn Store>, filter: AgentFilter) -> Vec<InstanceUid> {
    let page = store
        .list_agents(&filter, PageRequest { after: None, limit: 1_000 })
        .await
        .expect("the store answers");
    assert_eq!(page.total, page.items.len() as u64, "the total is exact");
    assert!(!page.more);
    page.items.into_iter().map(|agent| agent.id).collect()
}

/// Agents 1 and 2 connected, healthy and not; 3 offline; 4 in error; 5 retired; 6 online without connection.
async fn fleet(store: &Arc<dyn Store>) -> Node {
    let node = Node::start(store, "a", at(0)).await;
    for number in [4, 5] {
        node.visit(uid(number), at(1), at(2)).await;
    }
    store
        .retire_stale_agents(at(5), std::time::Duration::ZERO, Ephemeral::None)
        .await
        .expect("the sweep runs");
    delete(store, uid(5), at(6), false).await;
    for (number, healthy) in [(1, true), (2, false)] {
        let opened = node.open(uid(number), at(10)).await;
        let mut change = node.report(&opened, uid(number), at(11));
        change.documents.healthy = Some(healthy);
        update(store, change).await;
    }
    node.visit(uid(3), at(10), at(20)).await;
    let cut_off = node.open(uid(6), at(10)).await;
    node.end(&cut_off, uid(6), CloseReason::ServerShutdown, at(20)).await;
    node
}

/// Every filter narrows the list, and several narrow it further.
pub(super) async fn a_list_is_narrowed_by_every_filter(store: Arc<dyn Store>) {
    fleet(&store).await;
    let all = AgentFilter::default;
    let with = |statuses: &[Status]| AgentFilter { statuses: statuses.to_vec(), ..all() };
    let cases = [
        (all(), vec![1, 2, 3, 4, 6]),
        (with(&[Status::Online]), vec![1, 2, 6]),
        (with(&[Status::Offline]), vec![3]),
        (with(&[Status::Offline, Status::Error]), vec![3, 4]),
        (with(&[Status::Retired]), vec![5]),
        (AgentFilter { connected: Some(true), ..all() }, vec![1, 2]),
        (AgentFilter { connected: Some(false), ..all() }, vec![3, 4, 6]),
        (AgentFilter { healthy: Some(true), ..all() }, vec![1]),
        (AgentFilter { healthy: Some(false), ..all() }, vec![2]),
        (AgentFilter { connected: Some(false), ..with(&[Status::Online]) }, vec![6]),
        (AgentFilter { healthy: Some(true), ..with(&[Status::Offline]) }, vec![]),
    ];
    for (filter, numbers) in cases {
        let expected: Vec<_> = numbers.into_iter().map(uid).collect();
        assert_eq!(found(&store, filter.clone()).await, expected, "{filter:?}");
    }
}

/// The transport is that of the open connection.
pub(super) async fn a_list_is_narrowed_by_transport(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    node.open(uid(1), at(10)).await;
    create(&store, node.poll(uid(2), at(10))).await;
    node.visit(uid(3), at(10), at(11)).await;
    for (transport, number) in [(Transport::Websocket, 1), (Transport::Http, 2)] {
        let filter = AgentFilter { transport: Some(transport), ..AgentFilter::default() };
        assert_eq!(found(&store, filter).await, [uid(number)]);
    }
}

/// Who is found by attributes, each of which must match.
pub(super) async fn found_by(store: &Arc<dyn Store>, wanted: &[(&str, &str)]) -> Vec<InstanceUid> {
    let attributes = wanted.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    found(store, AgentFilter { attributes, ..AgentFilter::default() }).await
}

/// Attributes are compared whole, as text, and all of them must match.
pub(super) async fn a_list_is_narrowed_by_attributes(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    for (number, zone) in [(1, "eu"), (2, "eu"), (3, "us")] {
        let opened = node.open(uid(number), at(10)).await;
        let rank = number.to_string();
        update(&store, node.described(&opened, uid(number), at(11), &[("zone", zone), ("rank", &rank)]))
            .await;
    }
    for (wanted, numbers) in [
        (vec![("zone", "eu")], vec![1, 2]),
        (vec![("zone", "eu"), ("rank", "2")], vec![2]),
        (vec![("zone", "e")], vec![]),
        (vec![("zone", "EU")], vec![]),
        (vec![("zone", "%")], vec![]),
        (vec![("eu", "zone")], vec![]),
        (vec![("zone=eu", "")], vec![]),
        (vec![("", "")], vec![]),
    ] {
        let expected: Vec<_> = numbers.into_iter().map(uid).collect();
        assert_eq!(found_by(&store, &wanted).await, expected, "{wanted:?}");
    }
}

/// An attribute is found by what it is, whatever that means to an index; and nothing else is.
pub(super) async fn odd_attributes_are_found_as_they_are(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let long = "\u{1f980}".repeat(255);
    let odd = [
        ("a=b", "c"),
        ("a", "b=c"),
        ("a%3Db", "c"),
        ("", ""),
        ("NOT", "zone OR * NEAR(a b) \"^"),
        ("quoted", "'\"\\{},[]\u{1}\n\t"),
        (long.as_str(), long.as_str()),
        ("é", "É"),
    ];
    for (number, pair) in (1..).zip(odd) {
        let opened = node.open(uid(number), at(10)).await;
        assert!(update(&store, node.described(&opened, uid(number), at(11), &[pair])).await);
    }
    for (number, pair) in (1..).zip(odd) {
        assert_eq!(found_by(&store, &[pair]).await, [uid(number)], "{pair:?}");
    }
    assert_eq!(found_by(&store, &[("é", "é")]).await, []);
    assert_eq!(found_by(&store, &odd[..2]).await, []);
}

/// What an agent no longer says does not find it, what it says again does.
pub(super) async fn an_agent_is_found_by_what_it_says_now(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let (zone, tier, rank) = (("zone", "eu"), ("tier", "edge"), ("rank", "7"));
    let mut held = Vec::new();
    for number in [1, 2] {
        let opened = node.open(uid(number), at(10)).await;
        assert!(update(&store, node.described(&opened, uid(number), at(11), &[zone, tier])).await);
        held.push(opened);
    }
    let say = async |at, attributes: &[(&str, &str)]| {
        assert!(update(&store, node.described(&held[0], uid(1), at, attributes)).await);
    };
    say(at(12), &[zone, rank]).await;
    assert_eq!(found_by(&store, &[zone]).await, [uid(1), uid(2)]);
    assert_eq!(found_by(&store, &[tier]).await, [uid(2)]);
    assert_eq!(found_by(&store, &[rank]).await, [uid(1)]);
    say(at(13), &[]).await;
    assert_eq!(found_by(&store, &[zone]).await, [uid(2)]);
    assert_eq!(found_by(&store, &[rank]).await, []);
    for again in [14, 15] {
        say(at(again), &[tier, zone]).await;
        assert_eq!(found_by(&store, &[zone, tier]).await, [uid(1), uid(2)]);
    }
}

async fn named(store: &Arc<dyn Store>, names: &[(u32, &str, &str)]) {
    let node = Node::start(store, "a", at(0)).await;
    for (number, name, host) in names {
        let opened = node.open(uid(*number), at(10)).await;
        let attributes = [("service.name", *name), ("host.name", *host)];
        update(store, node.described(&opened, uid(*number), at(11), &attributes)).await;
    }
}

async fn with_prefix(store: &Arc<dyn Store>, prefix: &str) -> Vec<InstanceUid> {
    found(store, AgentFilter { prefix: Some(prefix.to_owned()), ..AgentFilter::default() }).await
}

/// What an operator types in the search box: the beginning of an id, a name or a host.
pub(super) async fn a_prefix_finds_id_name_and_host_in_any_case(store: Arc<dyn Store>) {
    named(
        &store,
        &[(1, "Edge-Gateway", "h1"), (2, "edgewise", "h2"), (3, "core", "EDGE-3"), (0x1a, "x", "y")],
    )
    .await;
    for prefix in ["edge", "EDGE", "Edge"] {
        assert_eq!(with_prefix(&store, prefix).await, [uid(1), uid(2), uid(3)], "{prefix}");
    }
    assert_eq!(with_prefix(&store, "edge-g").await, [uid(1)]);
    assert_eq!(with_prefix(&store, "dge").await, []);
    assert_eq!(with_prefix(&store, "0190D3C2-7a10").await, [uid(1), uid(2), uid(3), uid(0x1a)]);
    assert_eq!(with_prefix(&store, &uid(0x1a).to_string()).await, [uid(0x1a)]);
    assert_eq!(with_prefix(&store, &uid(0x1a).to_string()[..35]).await, [uid(0x1a)]);
    assert_eq!(with_prefix(&store, &format!("{}0", uid(0x1a))).await, []);
    assert_eq!(with_prefix(&store, "").await.len(), 4, "everything begins with nothing");
}

/// Whoever is found by more than one of id, name and host is found once, on one page.
pub(super) async fn a_search_finds_nobody_twice(store: Arc<dyn Store>) {
    let both = "0190d3c2-7a10 as a text";
    named(&store, &[(1, "x", both), (2, both, both), (3, both, "y"), (4, "x", "y")]).await;
    assert_eq!(with_prefix(&store, both).await, [uid(1), uid(2), uid(3)]);
    let filter = AgentFilter { prefix: Some("0190d3c2-7a10".to_owned()), ..AgentFilter::default() };
    assert_eq!(found(&store, filter.clone()).await, [1, 2, 3, 4].map(uid));
    let mut after = None;
    for number in 1..=4 {
        let page =
            store.list_agents(&filter, PageRequest { after, limit: 1 }).await.expect("the store answers");
        let ids: Vec<_> = page.items.iter().map(|agent| agent.id).collect();
        assert_eq!((ids, page.total, page.more), (vec![uid(number)], 4, number < 4));
        after = Some(uid(number));
    }
}

/// A search is narrowed by every other filter, whether the id, the name or the host is what it finds.
pub(super) async fn a_search_is_narrowed_by_every_filter(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    // Of each three agents one has the text as name, one as host, one as both.
    let names = [("edge-1", "h"), ("n", "Edge-2"), ("edge-3", "edge-3")];
    let describe = async |opened: &_, number: u32, healthy: bool| {
        let (name, host) = names[(number % 3) as usize];
        let zone = if number < 4 { "eu" } else { "us" };
        let attributes = [("service.name", name), ("host.name", host), ("zone", zone)];
        let mut change = node.described(opened, uid(number), at(11), &attributes);
        change.documents.healthy = Some(healthy);
        assert!(update(&store, change).await);
    };
    for number in 1..=3 {
        let opened = node.open(uid(number), at(10)).await;
        describe(&opened, number, true).await;
    }
    for number in 4..=6 {
        let opened = create(&store, node.poll(uid(number), at(10))).await;
        describe(&opened, number, false).await;
    }
    for number in 7..=9 {
        let opened = node.open(uid(number), at(10)).await;
        describe(&opened, number, true).await;
        node.end(&opened, uid(number), CloseReason::AgentDisconnect, at(20)).await;
    }
    let outsider = node.open(uid(10), at(10)).await;
    update(&store, node.described(&outsider, uid(10), at(11), &[("service.name", "core"), ("zone", "eu")]))
        .await;
    delete(&store, uid(9), at(30), false).await;

    let all = AgentFilter::default;
    let cases = [
        (all(), 1..=8),
        (AgentFilter { include_retired: true, ..all() }, 1..=9),
        (AgentFilter { statuses: vec![Status::Offline], ..all() }, 7..=8),
        (AgentFilter { statuses: vec![Status::Retired], ..all() }, 9..=9),
        (AgentFilter { connected: Some(true), ..all() }, 1..=6),
        (AgentFilter { connected: Some(false), ..all() }, 7..=8),
        (AgentFilter { healthy: Some(false), ..all() }, 4..=6),
        (AgentFilter { transport: Some(Transport::Http), ..all() }, 4..=6),
        (AgentFilter { transport: Some(Transport::Websocket), healthy: Some(true), ..all() }, 1..=3),
        (AgentFilter { attributes: [("zone".to_owned(), "eu".to_owned())].into(), ..all() }, 1..=3),
        (AgentFilter { unseen_since: Some(at(15)), connected: Some(true), ..all() }, 1..=6),
        (AgentFilter { id: Some(uid(2)), ..all() }, 2..=2),
    ];
    for (filter, numbers) in cases {
        let filter = AgentFilter { prefix: Some("eDge-".to_owned()), ..filter };
        let expected: Vec<_> = numbers.map(uid).collect();
        assert_eq!(found(&store, filter.clone()).await, expected, "{filter:?}");
    }
}

/// Nothing an agent may be called is more than an index can hold: 255 characters of four bytes that no compression shortens.
pub(super) async fn the_longest_names_are_found(store: Arc<dyn Store>) {
    let mut state = 1_u32;
    let mut text = || -> String {
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            char::from_u32(0x2_0000 + (state >> 16) % 0xa000).expect("a code point of the second plane")
        })
        .take(255)
        .collect()
    };
    let (name, host) = (text(), text());
    named(&store, &[(1, &name, &host), (2, "x", "y")]).await;
    assert_eq!(with_prefix(&store, &name).await, [uid(1)]);
    assert_eq!(with_prefix(&store, &host[..400]).await, [uid(1)]);
}

/// A name beyond ASCII is found as it is written.
pub(super) async fn a_prefix_finds_names_beyond_ascii(store: Arc<dyn Store>) {
    named(&store, &[(1, "Übergang-Öl", "h"), (2, "пограничный", "h2"), (3, "Ubergang", "h3")]).await;
    assert_eq!(with_prefix(&store, "Üb").await, [uid(1)]);
    assert_eq!(with_prefix(&store, "Übergang-Ö").await, [uid(1)]);
    assert_eq!(with_prefix(&store, "погра").await, [uid(2)]);
}

/// Signs that mean something to a database mean nothing here.
pub(super) async fn a_prefix_is_no_pattern(store: Arc<dyn Store>) {
    named(&store, &[(1, "100%_done", "h1"), (2, "100 percent", "h2"), (3, "it's", "h3"), (4, "a\\b", "h4")])
        .await;
    for (prefix, expected) in
        [("100%", vec![1]), ("100%_", vec![1]), ("100", vec![1, 2]), ("%", vec![]), ("it'", vec![3])]
    {
        let expected: Vec<_> = expected.into_iter().map(uid).collect();
        assert_eq!(with_prefix(&store, prefix).await, expected, "{prefix}");
    }
    assert_eq!(with_prefix(&store, "a\\").await, [uid(4)]);
}

/// Who was not seen since a moment, by the last sign of life on record.
pub(super) async fn unseen_agents_are_listed(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    node.visit(uid(1), at(10), at(20)).await;
    node.open(uid(2), at(30)).await;
    let unseen = |seconds| AgentFilter { unseen_since: Some(at(seconds)), ..AgentFilter::default() };
    assert_eq!(found(&store, unseen(20)).await, []);
    assert_eq!(found(&store, unseen(21)).await, [uid(1)]);
    assert_eq!(found(&store, unseen(31)).await, [uid(1), uid(2)]);
}

/// Retired agents appear only where asked for.
pub(super) async fn retired_agents_are_hidden_unless_asked_for(store: Arc<dyn Store>) {
    fleet(&store).await;
    let every = AgentFilter { include_retired: true, ..AgentFilter::default() };
    assert_eq!(found(&store, every).await, [1, 2, 3, 4, 5, 6].map(uid));
    assert!(!found(&store, AgentFilter::default()).await.contains(&uid(5)));
}

/// A reader that walks the pages sees every agent that was there all the time, once.
pub(super) async fn pages_have_no_gaps_and_no_doubles_while_agents_arrive(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let arrive = |numbers: Vec<u32>| {
        let arrivals: Vec<Write> = numbers
            .into_iter()
            .map(|number| Write::CreateConnection(node.arrival(uid(number), at(10))))
            .collect();
        let store = Arc::clone(&store);
        async move { store.write(&arrivals).await.expect("they open") }
    };
    arrive((0..10).map(|number| number * 10).collect()).await;
    let (mut seen, mut after, mut newcomer) = (Vec::new(), None, 5);
    loop {
        let page = store.list_agents(&AgentFilter::default(), PageRequest { after, limit: 3 }).await;
        let page = page.expect("the store answers");
        assert!(page.items.len() <= 3);
        seen.extend(page.items.iter().map(|agent| agent.id));
        after = page.items.last().map(|agent| agent.id);
        if !page.more {
            break;
        }
        arrive(vec![newcomer, newcomer + 20]).await;
        newcomer += 40;
    }
    assert!(seen.windows(2).all(|pair| pair[0] < pair[1]), "in order, without doubles: {seen:?}");
    assert!((0..10).all(|number| seen.contains(&uid(number * 10))), "without gaps: {seen:?}");
}

/// The summary counts each agent under its status; retired ones are not part of the fleet.
pub(super) async fn a_summary_counts_every_agent_once(store: Arc<dyn Store>) {
    assert_eq!(store.summarize_agents().await, Ok(AgentSummary::default()));
    fleet(&store).await;
    let expected = AgentSummary {
        total: 5,
        online: 3,
        offline: 1,
        error: 1,
        retired: 1,
        connected: 2,
        healthy: 1,
        unhealthy: 1,
    };
    assert_eq!(store.summarize_agents().await, Ok(expected));
}

/// The history is newest first; its pages go on from the last row, whatever came in on top.
pub(super) async fn a_history_is_newest_first_and_paged(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let mut ids = Vec::new();
    for stay in 0..5 {
        ids.push(node.visit(uid(1), at(stay * 10), at(stay * 10 + 5)).await.connection_id);
    }
    node.visit(uid(2), at(0), at(5)).await;
    ids.reverse();
    let page = |after| {
        store.list_connection_history(uid(1), HistoryFilter::default(), PageRequest { after, limit: 2 })
    };
    let first = page(None).await.expect("the store answers");
    assert_eq!((row_ids(&first), first.total, first.more), (ids[..2].to_vec(), 5, true));
    node.open(uid(1), at(100)).await;
    let second = page(Some(ids[1])).await.expect("the store answers");
    assert_eq!((row_ids(&second), second.total, second.more), (ids[2..4].to_vec(), 6, true));
    let third = page(Some(ids[3])).await.expect("the store answers");
    assert_eq!((row_ids(&third), third.more), (ids[4..].to_vec(), false));
}

fn row_ids(page: &Page<opamp_server::store::ConnectionRow>) -> Vec<i64> {
    page.items.iter().map(|row| row.id).collect()
}

/// `from` and `to` name a span: connections that touch it are listed, and counted.
pub(super) async fn a_history_is_cut_by_from_and_to(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let mut ids = Vec::new();
    for (from, to) in [(10, 20), (30, 40)] {
        ids.push(node.visit(uid(1), at(from), at(to)).await.connection_id);
    }
    ids.push(node.open(uid(1), at(50)).await.connection_id);
    let cases = [
        (None, None, vec![2, 1, 0]),
        (Some(21), None, vec![2, 1]),
        (Some(20), None, vec![2, 1, 0]),
        (Some(1_000), None, vec![2]),
        (None, Some(30), vec![0]),
        (None, Some(31), vec![1, 0]),
        (Some(35), Some(36), vec![1]),
        (Some(21), Some(29), vec![]),
    ];
    for (from, to, expected) in cases {
        let filter = HistoryFilter { from: from.map(at), to: to.map(at) };
        let page = store.list_connection_history(uid(1), filter, ALL).await.expect("the store answers");
        let expected: Vec<i64> = expected.into_iter().map(|index: usize| ids[index]).collect();
        assert_eq!((row_ids(&page), page.total), (expected.clone(), expected.len() as u64), "{filter:?}");
    }
}

/// The active connection is the open row with its last sign of life, and nobody else's.
pub(super) async fn the_active_connection_is_the_open_row(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    node.visit(uid(1), at(10), at(20)).await;
    assert_eq!(store.get_active_connection(uid(1)).await, Ok(None));
    let opened = node.open(uid(1), at(30)).await;
    update(&store, node.report(&opened, uid(1), at(35))).await;
    node.open(uid(2), at(30)).await;
    let active = store.get_active_connection(uid(1)).await.expect("the store answers").expect("it is open");
    assert_eq!((active.id, active.agent_id), (opened.connection_id, uid(1)));
    assert_eq!((active.connected_at, active.confirmed_until), (at(30), Some(at(35))));
}

/// The query operators wrote long ago still works on both databases.
pub(super) async fn the_operators_view_shows_the_fleet(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    fleet(&store).await;
    let fleet: Vec<(Option<bool>, i32, Option<String>)> = raw
        .rows("SELECT healthy, clients_count, sync_revision FROM agent_nodes WHERE last_heartbeat IS NOT NULL ORDER BY id")
        .await;
    let healthy: Vec<_> = fleet.iter().map(|(healthy, ..)| *healthy).collect();
    assert_eq!(healthy, [Some(true), Some(false), None, None, None]);
}
