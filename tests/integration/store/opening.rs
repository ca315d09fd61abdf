//! Opening connections: new and known agents, newcomers and what they displace.

use std::sync::Arc;

use opamp_server::agent::Capabilities;
use opamp_server::agent::report::{KnownAgent, Part, PartSet};
use opamp_server::close::CloseReason;
use opamp_server::store::{
    ConnectionEnd, Displaced, NewConnection, Older, Opened, Rival, Sighting, Status, StatusChange, Store,
    Transport, Write, Written,
};
use serde_json::json;

use super::lists::found_by;
use super::scene::{
    Node, assert_true_history, at, create, delete, end, history, only_row, opened, row, shown, status_log,
    uid, update, write_one,
};
use super::updating::detail;
use crate::harness::Database;

/// The first report of an unknown agent makes its record and its first row, and both say the same.
pub(super) async fn a_new_agent_gets_its_record_and_its_row_in_one_transaction(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    assert_eq!(store.get_agent_row(uid(1)).await, Ok(None));
    let opened = node.open(uid(1), at(5)).await;
    assert!(!opened.agent.known);
    assert_eq!((opened.connected_at, opened.displaced), (at(5), None));
    let first = StatusChange {
        agent: uid(1),
        from: None,
        to: Status::Online,
        reason: "first_report".to_owned(),
        connection_id: Some(opened.connection_id),
    };
    assert_eq!(opened.status, Some(first));
    let (agent, connection) = (row(&store, uid(1)).await, only_row(&store, uid(1)).await);
    assert_eq!((agent.status, agent.status_since), (Status::Online, at(5)));
    assert_eq!((agent.connection_id, agent.last_connected_at), (Some(connection.id), Some(at(5))));
    assert_eq!(
        (agent.last_seen_at, agent.created_at, agent.last_disconnected_at),
        (Some(at(5)), at(5), None)
    );
    assert_eq!((connection.id, connection.connected_at), (opened.connection_id, at(5)));
    assert_eq!((connection.disconnected_at, connection.disconnect_reason), (None, None));
    assert_eq!((connection.node_id, connection.transport), (Some(node.id), Transport::Websocket));
    assert_eq!(connection.remote_addr.as_deref(), Some("192.0.2.1:40001"));
    assert_eq!(connection.confirmed_until, Some(at(5)));
}

/// An agent of which nothing is on record has its whole first report stored in the same commit: record, number,
/// attributes, bulky documents, inventory.
pub(super) async fn a_new_agent_s_first_report_is_stored_with_its_connection(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    let (first, plain) = (node.reporting(uid(1), at(5)), node.arrival(uid(2), at(5)));
    let reported = first.first_report.clone().expect("it reports");
    let written = store.write(&[Write::CreateConnection(first), Write::CreateConnection(plain)]).await;
    let [opened, other]: [Opened; 2] =
        written.expect("both open").into_iter().map(opened).collect::<Vec<_>>().try_into().expect("two");
    assert_eq!((opened.stored, other.stored), (true, false));
    assert_eq!(opened.agent, KnownAgent::default(), "what was known of it before");
    let stored = detail(&store, 1).await;
    let documents = reported.documents.clone();
    assert_eq!(stored.description, shown(documents.description.map(|described| described.document)));
    assert_eq!(stored.effective_config, shown(documents.effective_config), "a bulky one");
    assert_eq!(stored.components, shown(documents.components));
    assert_eq!((stored.row.name.as_deref(), stored.capabilities), (Some("edge"), 7));
    assert_eq!((stored.row.status, stored.row.status_since), (Status::Online, at(5)));
    assert_eq!(
        (stored.row.connection_id, stored.row.last_connected_at),
        (Some(opened.connection_id), Some(at(5)))
    );
    assert_eq!(found_by(&store, &[("zone", "eu")]).await, [uid(1)]);
    assert_eq!(status_log(&raw, uid(1)).await.len(), 1);
    // Whoever returns meets it, and a later report of this connection holds the fence.
    assert!(update(&store, node.described(&opened, uid(1), at(6), &[("zone", "us")])).await);
    assert_eq!(found_by(&store, &[("zone", "us")]).await, [uid(1)]);
    end(
        &store,
        ConnectionEnd { unsaved: true, ..node.end_of(&opened, uid(1), CloseReason::ClosedByAgent, at(7)) },
    )
    .await;
    let again = node.open(uid(1), at(8)).await;
    assert_eq!((again.agent.known, again.agent.sequence_num), (true, Some(1)));
    assert!(again.agent.parts.has(Part::EffectiveConfig) && again.agent.parts.has(Part::AvailableComponents));
    assert_true_history(&store, uid(1)).await;
}

/// What is on record may be newer than what a first report on a link was made against: the session looks at it then.
pub(super) async fn a_first_report_is_stored_of_nobody_who_is_on_record(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let known = node.open(uid(1), at(1)).await;
    let opened = create(&store, node.reporting(uid(1), at(5))).await;
    assert!(
        !opened.stored
            && opened.displaced.is_some_and(|displaced| displaced.connection_id == known.connection_id)
    );
    assert_eq!((detail(&store, 1).await.description, opened.agent.parts), (None, PartSet::EMPTY));
    // Nor once more, where the answer to the first opening was lost.
    let fresh = node.reporting(uid(2), at(5));
    assert!(create(&store, fresh.clone()).await.stored);
    let again = create(&store, fresh).await;
    assert!(again.continued && !again.stored);
    assert_eq!(again.agent.sequence_num, Some(0), "it is on record");
}

/// One commit takes new agents of both transports with their reports beside everybody else's writes.
pub(super) async fn a_batch_holds_first_reports_beside_all_other_writes(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let (holder, displaced) = (node.open(uid(1), at(1)).await, node.open(uid(2), at(1)).await);
    let polled = create(&store, node.poll(uid(3), at(1))).await;
    let mut change = node.described(&holder, uid(1), at(5), &[("service.name", "changed")]);
    change.documents.components_hash = Some("cc".to_owned());
    change.documents.components = Some(json!({ "receivers": {} }).into());
    let with_report = |mut new: NewConnection, number: Option<u64>| {
        let mut report =
            node.reporting(new.agent, new.at).first_report.as_deref().cloned().expect("it reports");
        report.sequence_num = number;
        new.first_report = Some(Arc::new(report));
        Write::CreateConnection(new)
    };
    let batch = [
        with_report(node.poll(uid(4), at(6)), Some(0)),
        Write::UpdateAgent(Box::new(change)),
        with_report(node.arrival(uid(5), at(6)), None),
        with_report(node.arrival(uid(2), at(6)), Some(7)),
        with_report(node.poll(uid(3), at(6)), Some(7)),
    ];
    let mut written = store.write(&batch).await.expect("it is written");
    assert!(matches!(written.remove(1), Written::Agent(true)));
    let [by_poll, stale, newer, going_on]: [Opened; 4] =
        written.into_iter().map(opened).collect::<Vec<_>>().try_into().expect("four");
    assert_eq!([&by_poll, &stale, &newer, &going_on].map(|opened| opened.stored), [true, true, false, false]);
    assert_eq!(newer.displaced.map(|older| older.connection_id), Some(displaced.connection_id));
    assert_eq!((going_on.connection_id, going_on.continued), (polled.connection_id, true));
    let mut found = Vec::new();
    for number in 1..=5 {
        let agent = detail(&store, number).await;
        found.push((agent.row.name, agent.sequence_num, agent.components.is_some()));
        assert_true_history(&store, uid(number)).await;
    }
    let edge = Some("edge".to_owned());
    let expected = [
        (Some("changed".to_owned()), Some(1), true),
        (None, None, false),
        (None, None, false),
        (edge.clone(), Some(0), true),
        (edge, None, true),
    ];
    assert_eq!(found, expected, "what may be missing has no number");
}

/// The record that a new uid was given to waits for its agent, and says nothing of it.
pub(super) async fn an_agent_that_was_given_its_uid_is_new(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    node.visit(uid(1), at(1), at(2)).await;
    let given = store.assign_uid(uid(1), uid(2), at(2)).await.expect("it is given");
    assert!(create(&store, node.reporting(given, at(3))).await.stored);
    let stored = detail(&store, 2).await;
    assert_eq!(
        (stored.row.status, stored.row.retired_at, stored.row.name.as_deref()),
        (Status::Online, None, Some("edge"))
    );
    assert_eq!((stored.row.status_since, stored.row.last_connected_at), (at(3), Some(at(3))));
    assert_eq!((stored.sequence_num, stored.row.previous_id), (Some(0), Some(uid(1).as_uuid())));
}

/// Who returns meets what was stored: number, mask and parts, so that nothing is asked again.
pub(super) async fn a_known_agent_keeps_number_parts_and_capabilities(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let first = node.open(uid(1), at(1)).await;
    let mut change = node.report(&first, uid(1), at(2));
    change.sequence_num = Some(41);
    change.capabilities = Capabilities(0x8000_0000_0000_1807);
    change.documents.health = Some(json!({ "healthy": true }).into());
    change.documents.components_hash = Some("ab".to_owned());
    assert!(update(&store, change).await);
    let mut leaves = node.end_of(&first, uid(1), CloseReason::ClosedByAgent, at(3));
    leaves.sequence_num = Some(42);
    end(&store, leaves).await;
    let known = node.open(uid(1), at(10)).await.agent;
    assert!(known.known);
    assert_eq!((known.sequence_num, known.capabilities), (Some(42), Capabilities(0x8000_0000_0000_1807)));
    assert_eq!(known.parts, PartSet::of([Part::Health, Part::AvailableComponents]));
}

/// A newcomer ends the older row: last proof … its own beginning, superseded.
pub(super) async fn a_newcomer_takes_over_at_once(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let older = node.open(uid(1), at(10)).await;
    update(&store, node.report(&older, uid(1), at(15))).await;
    let newer = node.open(uid(1), at(20)).await;
    let displaced = Displaced {
        connection_id: older.connection_id,
        reason: CloseReason::Superseded,
        duration_seconds: 5,
    };
    assert_eq!((newer.displaced, newer.status), (Some(displaced), None));
    let rows = history(&store, uid(1)).await;
    assert_eq!((rows[0].disconnected_at, rows[0].disconnected_by), (Some(at(15)), Some(at(20))));
    assert_eq!(
        (rows[0].duration_seconds, rows[0].disconnect_reason.as_deref()),
        (Some(5), Some("superseded"))
    );
    assert_eq!((rows[1].connected_at, rows[1].disconnected_at), (at(20), None));
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.connection_id, agent.status), (Some(newer.connection_id), Status::Online));
    assert_eq!((agent.last_connected_at, agent.last_disconnected_at), (Some(at(20)), Some(at(15))));
}

/// The node that held the older link knows more than the store: its last proof counts.
pub(super) async fn a_proof_in_memory_beats_an_older_one_on_record(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let held = node.open(uid(1), at(10)).await;
    let older = Older {
        connection_id: held.connection_id,
        transport: Transport::Websocket,
        last_proof: at(19),
        number: None,
    };
    let newcomer = NewConnection { older: Some(older), ..node.arrival(uid(1), at(20)) };
    create(&store, newcomer).await;
    assert_eq!(history(&store, uid(1)).await[0].disconnected_at, Some(at(19)));
}

/// The row of a node that is known to be gone was not superseded: that node was lost.
pub(super) async fn a_newcomer_ends_the_row_of_a_gone_node_as_server_lost(store: Arc<dyn Store>) {
    let gone = Node::start(&store, "a", at(0)).await;
    let node = Node::start(&store, "b", at(1)).await;
    gone.open(uid(1), at(10)).await;
    store.end_node(gone.id, at(12)).await.expect("the node ends");
    let newer = node.open(uid(1), at(20)).await;
    assert_eq!(newer.displaced.map(|displaced| displaced.reason), Some(CloseReason::ServerLost));
    let rows = history(&store, uid(1)).await;
    assert_eq!(rows[0].disconnect_reason.as_deref(), Some("server_lost"));
    assert_eq!((rows[0].disconnected_at, rows[0].disconnected_by), (Some(at(10)), Some(at(20))));
}

/// The late close of an older link changes neither row, nor status, nor fence, nor number.
pub(super) async fn a_late_end_of_a_displaced_connection_changes_nothing(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    let older = node.open(uid(1), at(10)).await;
    let newer = node.open(uid(1), at(20)).await;
    update(&store, node.report(&newer, uid(1), at(21))).await;
    let before =
        (history(&store, uid(1)).await, store.get_agent(uid(1)).await, status_log(&raw, uid(1)).await);
    for reason in [CloseReason::ConnectionLost, CloseReason::ServerShutdown, CloseReason::UidReassigned] {
        let late = node.end(&older, uid(1), reason, at(30)).await;
        assert_eq!((late.duration_seconds, late.status), (None, None));
    }
    let after =
        (history(&store, uid(1)).await, store.get_agent(uid(1)).await, status_log(&raw, uid(1)).await);
    assert_eq!(before, after);
}

/// An end known in memory is written ahead of the newcomer that shares its batch, wherever it stands in it.
pub(super) async fn an_end_queued_ahead_of_a_newcomer_keeps_its_reason(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let older = node.open(uid(1), at(10)).await;
    let end = node.end_of(&older, uid(1), CloseReason::ConnectionLost, at(15));
    let batch = [Write::CreateConnection(node.arrival(uid(1), at(20))), Write::UpdateConnection(end)];
    let mut written = store.write(&batch).await.expect("the batch is written");
    let newer = opened(written.remove(0));
    assert_eq!(newer.displaced, None);
    assert_eq!(newer.status.map(|change| change.reason), Some("returned".to_owned()));
    let rows = history(&store, uid(1)).await;
    assert_eq!(rows[0].disconnect_reason.as_deref(), Some("connection_lost"));
    assert_eq!((rows[0].disconnected_at, rows[0].disconnected_by), (Some(at(15)), None));
    assert_eq!(row(&store, uid(1)).await.status, Status::Online);
    assert_true_history(&store, uid(1)).await;
}

/// A node whose clock is behind cannot put a connection before what is on record.
pub(super) async fn moments_of_an_agent_never_go_back(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let first = node.open(uid(1), at(100)).await;
    let second = node.open(uid(1), at(90)).await;
    assert_eq!(second.connected_at, at(100), "not before the row it displaces");
    node.end(&second, uid(1), CloseReason::ClosedByAgent, at(110)).await;
    let third = node.open(uid(1), at(105)).await;
    assert_eq!(third.connected_at, at(110), "not before the end of the last one");
    let mut unseen = node.end_of(&third, uid(1), CloseReason::InternalError, at(120));
    unseen.disconnected_by = Some(at(130));
    end(&store, unseen).await;
    let fourth = node.open(uid(1), at(125)).await;
    assert_eq!(fourth.connected_at, at(130), "not before the last end was known");
    assert_true_history(&store, uid(1)).await;
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.last_connected_at, agent.last_disconnected_at), (Some(at(130)), Some(at(120))));
    assert!(first.connection_id < fourth.connection_id);
}

/// An agent's older link may be opened after its newer one: until then it was there on the newer one.
pub(super) async fn an_opening_that_comes_late_begins_with_the_last_proof(store: Arc<dyn Store>) {
    let (a, b) = (Node::start(&store, "a", at(0)).await, Node::start(&store, "b", at(0)).await);
    let newer = a.open(uid(1), at(100)).await;
    let seen = Sighting {
        agent: uid(1),
        connection_id: newer.connection_id,
        at: at(140),
        sequence_num: Some(9),
        poll_silence: None,
    };
    assert_eq!(store.update_last_seen(&[seen]).await, Ok(1));
    let older = b.open(uid(1), at(90)).await;
    assert_eq!(older.connected_at, at(140), "nobody was heard on it before");
    let rows = history(&store, uid(1)).await;
    assert_eq!((rows[0].disconnected_at, rows[0].disconnected_by), (Some(at(140)), Some(at(140))));
    assert_true_history(&store, uid(1)).await;
}

/// The log of an agent's status is in the order of its moments, and each line begins where the one before it ended.
pub(super) async fn the_status_log_never_goes_back(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    let first = node.open(uid(1), at(10)).await;
    let mut silent = node.end_of(&first, uid(1), CloseReason::HeartbeatTimeout, at(20));
    silent.disconnected_by = Some(at(50));
    end(&store, silent).await;
    node.visit(uid(1), at(30), at(40)).await;
    delete(&store, uid(1), at(35), false).await;
    let log = status_log(&raw, uid(1)).await;
    let words: Vec<&str> = log.iter().map(|(_, _, to, ..)| to.as_str()).collect();
    assert_eq!(words, ["online", "offline", "online", "offline", "retired"]);
    assert!(log.windows(2).all(|pair| pair[0].0 <= pair[1].0), "{log:?}");
    assert!(log.windows(2).all(|pair| Some(&pair[0].2) == pair[1].1.as_ref()), "{log:?}");
    assert_eq!(row(&store, uid(1)).await.status_since, log[4].0);
}

/// Two stays that ended in an orderly way are two rows, each with its own bounds.
pub(super) async fn two_clean_stays_are_two_rows(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    node.visit(uid(1), at(10), at(20)).await;
    node.visit(uid(1), at(20), at(30)).await;
    let rows = history(&store, uid(1)).await;
    let bounds: Vec<_> = rows.iter().map(|row| (row.connected_at, row.disconnected_at)).collect();
    assert_eq!(bounds, [(at(10), Some(at(20))), (at(20), Some(at(30)))]);
    assert_true_history(&store, uid(1)).await;
}

/// A batch whose answer was lost is written again: the connection it opened is found, not displaced.
pub(super) async fn an_opening_done_again_is_the_same_row(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    for new in [node.arrival(uid(1), at(10)), NewConnection { first_poll: None, ..node.poll(uid(2), at(10)) }]
    {
        let agent = new.agent;
        let first = create(&store, new.clone()).await;
        let again = create(&store, new).await;
        assert_eq!((again.connection_id, again.displaced), (first.connection_id, None));
        assert_eq!(only_row(&store, agent).await.disconnected_at, None);
        assert_eq!(status_log(&raw, agent).await.len(), 1);
    }
}

/// Who waits for an agent's row decides on what it finds once it has the row, signs of life included.
pub(super) async fn an_opening_sees_what_was_committed_while_it_waited(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    let older = node.open(uid(1), at(10)).await;
    update(&store, node.report(&older, uid(1), at(11))).await;
    let agent = raw.literal(uid(1));
    let seen = raw.moment(at(20));
    let holder = raw
        .hold(&[
            format!("UPDATE agents SET updated_at = updated_at WHERE id = {agent}"),
            format!(
                "UPDATE agent_liveness SET last_seen_at = {seen}, sequence_num = 7 WHERE agent_id = {agent}"
            ),
        ])
        .await;
    let arrival = node.arrival(uid(1), at(30));
    let opening = create(&store, arrival);
    let release = async {
        raw.until_somebody_waits().await;
        holder.commit().await;
    };
    let (newer, ()) = tokio::join!(opening, release);
    assert_eq!(newer.agent.sequence_num, Some(7));
    assert_eq!(newer.displaced.map(|displaced| displaced.duration_seconds), Some(10));
    assert_eq!(history(&store, uid(1)).await[0].disconnected_at, Some(at(20)));
}

/// The displaced agent that comes back to its own numbers while another one is connected is another agent:
/// nothing is opened, the present connection stays, and the uid it is given is the same each time.
pub(super) async fn who_continues_the_displaced_numbers_is_another_agent(store: Arc<dyn Store>) {
    let (a, b) = (Node::start(&store, "a", at(0)).await, Node::start(&store, "b", at(0)).await);
    let first = a.open(uid(1), at(10)).await;
    let mut said = a.report(&first, uid(1), at(11));
    said.sequence_num = Some(100);
    update(&store, said).await;
    let present = b.open(uid(1), at(20)).await;
    let mut said = b.report(&present, uid(1), at(21));
    said.sequence_num = Some(5);
    update(&store, said).await;
    let returning =
        |number, spare| NewConnection { number, spare: Some(uid(spare)), ..a.arrival(uid(1), at(30)) };
    for (number, spare, offers) in [(101, 7, 1), (102, 8, 2)] {
        let written = write_one(&store, Write::CreateConnection(returning(number, spare)))
            .await
            .expect("it is answered");
        let Written::Rival(rival) = written else { panic!("it is another agent: {written:?}") };
        assert_eq!(rival, Rival { uid: uid(7), offers });
    }
    assert_eq!(row(&store, uid(1)).await.connection_id, Some(present.connection_id));
    assert_eq!(history(&store, uid(1)).await.len(), 2);
    let late = NewConnection { at: at(100), ..returning(103, 9) };
    let opened = create(&store, late).await;
    assert_eq!(
        opened.displaced.map(|displaced| displaced.connection_id),
        Some(present.connection_id),
        "a minute later"
    );
}

/// Numbers that are near each other may be those of one agent whose connections arrive out of order.
pub(super) async fn near_numbers_prove_nothing_before_the_third_displacement(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let arrive = |number, seconds| NewConnection { number, ..node.arrival(uid(1), at(seconds)) };
    let mut seconds = 10;
    for number in [0_u64, 0, 1, 1] {
        let opened = create(&store, arrive(number, seconds)).await;
        let mut said = node.report(&opened, uid(1), at(seconds + 1));
        said.sequence_num = Some(number);
        update(&store, said).await;
        seconds += 2;
    }
    let written =
        write_one(&store, Write::CreateConnection(arrive(2, seconds))).await.expect("it is answered");
    assert!(matches!(written, Written::Rival(Rival { offers: 1, .. })), "{written:?}");
}
