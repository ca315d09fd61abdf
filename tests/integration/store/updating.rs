//! Reports and signs of life: what is stored, and that only the holder of the fence stores it.

use std::sync::Arc;

use opamp_server::agent::Capabilities;
use opamp_server::agent::document::Documents;
use opamp_server::close::CloseReason;
use opamp_server::store::{AgentDetail, Sighting, Store};
use serde_json::{Value, json};

use super::scene::{Node, at, description, row, shown, uid, update};
use crate::harness::Database;

pub(super) async fn detail(store: &Arc<dyn Store>, number: u32) -> AgentDetail {
    store.get_agent(uid(number)).await.expect("the store answers").expect("the agent is on record")
}

/// A report of a displaced connection is refused as a whole: state, number, attributes, last seen.
pub(super) async fn an_update_after_a_take_over_changes_nothing(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let older = node.open(uid(1), at(10)).await;
    assert!(update(&store, node.described(&older, uid(1), at(11), &[("service.name", "first")])).await);
    node.open(uid(1), at(20)).await;
    let before = detail(&store, 1).await;
    let mut late = node.described(&older, uid(1), at(30), &[("service.name", "second")]);
    late.sequence_num = Some(99);
    late.capabilities = Capabilities(7);
    late.documents.components_hash = Some("ab".to_owned());
    late.documents.components = Some(json!({}).into());
    assert!(!update(&store, late).await);
    assert_eq!(detail(&store, 1).await, before);
}

/// What was kept in memory while the store was away yields to what another node has stored since.
pub(super) async fn a_kept_update_yields_to_a_newer_one(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let opened = node.open(uid(1), at(10)).await;
    let mut newer = node.report(&opened, uid(1), at(20));
    newer.documents.healthy = Some(true);
    assert!(update(&store, newer).await);
    let mut kept = node.report(&opened, uid(1), at(19));
    (kept.documents.healthy, kept.late) = (Some(false), true);
    assert!(!update(&store, kept.clone()).await);
    assert_eq!(row(&store, uid(1)).await.healthy, Some(true));
    kept.read_at = at(20);
    assert!(update(&store, kept).await, "nobody was heard since");
    assert_eq!(row(&store, uid(1)).await.healthy, Some(false));
}

/// A connection that is ended stores nothing any more.
pub(super) async fn an_update_after_an_end_changes_nothing(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let opened = node.visit(uid(1), at(10), at(20)).await;
    let before = detail(&store, 1).await;
    assert!(!update(&store, node.described(&opened, uid(1), at(30), &[("service.name", "late")])).await);
    assert_eq!(detail(&store, 1).await, before);
}

fn full() -> Documents {
    Documents {
        description: Some(description(&[("service.name", "edge"), ("host.name", "h1")])),
        health: Some(json!({ "healthy": false, "last_error": "x" }).into()),
        healthy: Some(false),
        effective_config: Some(json!({ "a.yaml": { "body": "a: 1", "content_type": "" } }).into()),
        remote_config_status: Some(json!({ "status": "APPLIED" }).into()),
        sync_revision: Some("0a".to_owned()),
        package_statuses: Some(json!({ "packages": { "p": 1, "q": 2 } }).into()),
        custom_capabilities: Some(json!(["c1"]).into()),
        components_hash: Some("aa".to_owned()),
        components: Some(json!({ "receivers": {} }).into()),
        connection_settings_status: Some(json!({ "status": "APPLIED" }).into()),
    }
}

/// A part that is reported replaces the stored one whole; a part that is left out stays.
pub(super) async fn changed_parts_are_replaced_whole_and_absent_ones_stay(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let opened = node.open(uid(1), at(10)).await;
    let mut first = node.report(&opened, uid(1), at(11));
    first.documents = full();
    assert!(update(&store, first).await);
    let stored = detail(&store, 1).await;
    let documents = full();
    assert_eq!(stored.description, shown(documents.description.map(|described| described.document)));
    assert_eq!((stored.health.clone(), stored.row.healthy), (shown(documents.health), Some(false)));
    assert_eq!(
        (stored.package_statuses.clone(), stored.components.clone()),
        (shown(documents.package_statuses), shown(documents.components))
    );
    let mut second = node.report(&opened, uid(1), at(12));
    second.documents.package_statuses = Some(json!({ "packages": { "q": 3 } }).into());
    second.documents.healthy = Some(true);
    assert!(update(&store, second).await);
    let mut expected = stored;
    expected.package_statuses = Some(json!({ "packages": { "q": 3 } }));
    expected.row.healthy = Some(true);
    expected.row.last_seen_at = Some(at(12));
    expected.row.updated_at = at(12);
    assert_eq!(detail(&store, 1).await, expected);
}

/// A new description replaces name, host, groups and every attribute, also those it does not mention.
pub(super) async fn attributes_are_replaced_as_a_whole(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    let opened = node.open(uid(1), at(10)).await;
    let first = [("service.name", "edge"), ("host.name", "h1"), ("k8s.pod.uid", "p"), ("zone", "eu")];
    update(&store, node.described(&opened, uid(1), at(11), &first)).await;
    let agent = row(&store, uid(1)).await;
    assert_eq!(
        (agent.name.as_deref(), agent.host.as_deref(), agent.ephemeral),
        (Some("edge"), Some("h1"), true)
    );
    let mut second = node.described(&opened, uid(1), at(12), &[("service.name", "core"), ("zone", "us")]);
    let changed = second.documents.description.as_mut().expect("it has one");
    (changed.groups, changed.clients_count) = (json!(["g"]), 2_147_483_647);
    update(&store, second).await;
    let agent = row(&store, uid(1)).await;
    assert_eq!((agent.name.as_deref(), agent.host, agent.ephemeral), (Some("core"), None, false));
    assert_eq!((agent.groups, agent.clients_count), (json!(["g"]).into(), 2_147_483_647));
    let rows: Vec<(String, String)> = raw.rows("SELECT key, value FROM agent_attributes ORDER BY key").await;
    assert_eq!(rows, [("service.name".to_owned(), "core".to_owned()), ("zone".to_owned(), "us".to_owned())]);
}

/// Lists within lists, `depth` of them.
fn nested(depth: usize) -> Value {
    (0..depth).fold(json!("bottom"), |inner, _| json!([inner]))
}

/// Large, deep and extreme values come back as they were.
pub(super) async fn odd_values_come_back_as_they_were(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let opened = node.open(uid(1), at(10)).await;
    let text = "\u{fffd}'\"\\\u{1}\u{1f980}é$1%_".repeat(5_000);
    let odd = json!({
        "text": text, "deep": nested(100), "min": i64::MIN, "max": i64::MAX, "unsigned": u64::MAX,
        "small": 5e-324, "float": 0.1, "negative": -1.5, "": null, "a.b": { "": [] },
    });
    let name = "é".repeat(255);
    let mut change = node.described(
        &opened,
        uid(1),
        at(11),
        &[("service.name", &name), ("q'uote", "1; DROP TABLE agents")],
    );
    change.documents.description.as_mut().expect("it has one").document = odd.clone().into();
    change.documents.effective_config = Some(json!({ "": { "body": text, "content_type": "" } }).into());
    change.documents.custom_capabilities = Some(json!([]).into());
    change.capabilities = Capabilities(u64::MAX);
    change.sequence_num = Some(u64::MAX);
    assert!(update(&store, change).await);
    let stored = detail(&store, 1).await;
    assert_eq!(stored.description, Some(odd));
    assert_eq!(stored.effective_config, Some(json!({ "": { "body": text, "content_type": "" } })));
    assert_eq!((stored.custom_capabilities, stored.row.name), (Some(json!([])), Some(name)));
    assert_eq!((stored.capabilities, stored.sequence_num), (-1, Some(-1)));
    let known = node.open(uid(1), at(20)).await.agent;
    assert_eq!((known.capabilities, known.sequence_num), (Capabilities(u64::MAX), Some(u64::MAX)));
}

/// An inventory belongs to its hash: who reports only the hash shows it, and a new hash does not lose the old one.
pub(super) async fn an_inventory_is_kept_per_hash(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let inventory = json!({ "receivers": { "metadata": {} } });
    let hash_only = |hash: &str| Documents { components_hash: Some(hash.to_owned()), ..Documents::default() };
    let first = node.open(uid(1), at(10)).await;
    let mut change = node.report(&first, uid(1), at(11));
    change.documents = Documents { components: Some(inventory.clone().into()), ..hash_only("aa") };
    update(&store, change).await;
    let second = node.open(uid(2), at(12)).await;
    for (opened, number, hash, expected) in [
        (&second, 2, "aa", Some(&inventory)),
        (&first, 1, "aa", Some(&inventory)),
        (&first, 1, "bb", None),
        (&first, 1, "aa", Some(&inventory)),
    ] {
        let mut change = node.report(opened, uid(number), at(13));
        change.documents = hash_only(hash);
        update(&store, change).await;
        let stored = detail(&store, number).await;
        assert_eq!((stored.components_hash.as_deref(), stored.components.as_ref()), (Some(hash), expected));
    }
}

/// Signs of life count for the connection that holds the fence, and only forwards.
pub(super) async fn a_sign_of_life_needs_the_fence_and_never_goes_back(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let older = node.open(uid(1), at(10)).await;
    let newer = node.open(uid(1), at(20)).await;
    let other = node.open(uid(2), at(20)).await;
    let seen = |connection_id, agent, seconds, number| Sighting {
        agent,
        connection_id,
        at: at(seconds),
        sequence_num: Some(number),
        poll_silence: None,
    };
    let flush = [seen(older.connection_id, uid(1), 60, 9), seen(other.connection_id, uid(2), 30, 5)];
    assert_eq!(store.update_last_seen(&flush).await, Ok(1));
    assert_eq!(row(&store, uid(1)).await.last_seen_at, Some(at(20)));
    assert_eq!(detail(&store, 2).await.sequence_num, Some(5));
    assert_eq!(store.update_last_seen(&[seen(newer.connection_id, uid(1), 40, 7)]).await, Ok(1));
    assert_eq!(store.update_last_seen(&[seen(newer.connection_id, uid(1), 35, 6)]).await, Ok(0));
    let stored = detail(&store, 1).await;
    assert_eq!((stored.row.last_seen_at, stored.sequence_num), (Some(at(40)), Some(7)));
    node.end(&newer, uid(1), CloseReason::ClosedByAgent, at(50)).await;
    assert_eq!(store.update_last_seen(&[seen(newer.connection_id, uid(1), 60, 8)]).await, Ok(0));
    assert_eq!(store.update_last_seen(&[]).await, Ok(0));
}

/// A flush that meets a newcomer's transaction changes nothing: where rows are locked one by one it
/// skips them without waiting, where there is one writer it finds the fence moved when its turn comes.
pub(super) async fn a_sign_of_life_that_meets_a_take_over_changes_nothing(database: &Database) {
    let (store, raw) = (database.open().await, database.raw().await);
    let node = Node::start(&store, "a", at(0)).await;
    let older = node.open(uid(1), at(10)).await;
    let newcomer = raw.hold(&[take_over(&raw.literal(uid(1)), &raw.moment(at(20)))]).await;
    let late = [Sighting {
        agent: uid(1),
        connection_id: older.connection_id,
        at: at(30),
        sequence_num: Some(9),
        poll_silence: None,
    }];
    let flush = store.update_last_seen(&late);
    let changed = if raw.locks_rows() {
        let changed = flush.await;
        newcomer.commit().await;
        changed
    } else {
        tokio::join!(flush, newcomer.commit()).0
    };
    assert_eq!(changed, Ok(0));
    assert_eq!(row(&store, uid(1)).await.last_seen_at, Some(at(20)));
}

/// What a newcomer does to the rows that a flush reads, by another process.
fn take_over(agent: &str, when: &str) -> String {
    format!(
        "UPDATE agents SET connection_id = 1000 WHERE id = {agent};
         UPDATE agent_liveness SET last_seen_at = {when}, connection_id = 1000 WHERE agent_id = {agent}"
    )
}

/// While something may be missing the number is unknown, and stored as such, so that a restart asks again.
pub(super) async fn a_number_that_is_unknown_is_stored_as_unknown(store: Arc<dyn Store>) {
    let node = Node::start(&store, "a", at(0)).await;
    let opened = node.open(uid(1), at(10)).await;
    let mut known = node.report(&opened, uid(1), at(11));
    known.sequence_num = Some(0);
    update(&store, known).await;
    let same_moment = Sighting {
        agent: uid(1),
        connection_id: opened.connection_id,
        at: at(11),
        sequence_num: Some(7),
        poll_silence: None,
    };
    assert_eq!(store.update_last_seen(&[same_moment]).await, Ok(1));
    assert_eq!(detail(&store, 1).await.sequence_num, Some(7), "a later report came in the same moment");
    let unknown = Sighting { sequence_num: None, ..same_moment };
    assert_eq!(store.update_last_seen(&[unknown]).await, Ok(1));
    assert_eq!(detail(&store, 1).await.sequence_num, Some(7), "what is not known of it takes nothing back");
    let unknown = Sighting {
        agent: uid(1),
        connection_id: opened.connection_id,
        at: at(12),
        sequence_num: None,
        poll_silence: None,
    };
    assert_eq!(store.update_last_seen(&[unknown]).await, Ok(1));
    assert_eq!(detail(&store, 1).await.sequence_num, None);
    let mut gap = node.report(&opened, uid(1), at(13));
    gap.sequence_num = None;
    update(&store, gap).await;
    assert_eq!(node.open(uid(1), at(20)).await.agent.sequence_num, None);
}
