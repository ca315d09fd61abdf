//! Migrations: both directions with rows in the tables, and what a binary refuses to run on.

use std::sync::Arc;

use opamp_server::close::CloseReason;
use opamp_server::store::{self, AgentFilter, Observer, PageRequest, Sighting, Store, StoreError};
use serde_json::json;

use super::scene::{Node, at, create, history, row, uid, update};
use crate::harness::{Database, Raw};

const TABLES: [&str; 7] = [
    "nodes",
    "agents",
    "agent_liveness",
    "agent_attributes",
    "component_inventories",
    "agent_connection_history",
    "agent_status_log",
];

/// Rows in every table, and links between them.
async fn inhabit(database: &Database) {
    let store = database.open().await;
    Node::start(&store, "a", at(0)).await;
    let node = Node::start(&store, "a", at(1)).await;
    let temporary = create(&store, node.poll(uid(1), at(10))).await;
    store.assign_uid(uid(1), uid(2), at(11)).await.expect("a uid is assigned");
    node.end(&temporary, uid(1), CloseReason::UidReassigned, at(12)).await;
    let opened = node.open(uid(2), at(13)).await;
    let mut change = node.described(&opened, uid(2), at(14), &[("service.name", "edge")]);
    change.documents.components_hash = Some("aa".to_owned());
    change.documents.components = Some(json!({ "receivers": {} }).into());
    assert!(update(&store, change).await);
    let seen = Sighting {
        agent: uid(2),
        connection_id: opened.connection_id,
        at: at(15),
        sequence_num: Some(2),
        poll_silence: None,
    };
    assert_eq!(store.update_last_seen(&[seen]).await, Ok(1));
    store.close().await;
}

async fn assert_inhabited(raw: &Raw) {
    for table in TABLES {
        assert!(raw.number(format!("SELECT count(*) FROM {table}")).await > 0, "{table} has rows");
    }
}

/// Down takes everything away that up made, rows or not, and up works again after it.
pub(super) async fn going_down_and_up_again_works_with_rows_in_the_tables(database: &Database) {
    inhabit(database).await;
    let raw = database.raw().await;
    assert_inhabited(&raw).await;
    let migrations = store::migrations(database.url(), true).await.expect("the database answers");
    let state = migrations.state().await.expect("the state is read");
    assert_eq!((state.version(), state.pending()), (state.newest, 0));
    for version in (0..state.newest).rev() {
        assert_eq!(migrations.down().await.map(|state| state.version()), Ok(version));
    }
    assert_eq!(migrations.down().await.map(|state| state.version()), Ok(0), "there is nothing below");
    assert_eq!(left_behind(&raw).await, Vec::<(String,)>::new());
    assert_eq!(migrations.up().await, Ok(state.clone()));
    assert_eq!(migrations.up().await, Ok(state), "there is nothing above");
    drop(migrations);
    inhabit(database).await;
    assert_inhabited(&raw).await;
    let store = database.open().await;
    assert_eq!(row(&store, uid(2)).await.name.as_deref(), Some("edge"));
    assert_eq!(history(&store, uid(1)).await.len(), 1);
}

/// What the database still has of ours.
async fn left_behind(raw: &Raw) -> Vec<(String,)> {
    let text = match raw {
        Raw::Sqlite(_) => "SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'",
        Raw::Postgres(_) => {
            "SELECT relname::text FROM pg_class WHERE relnamespace = current_schema()::regnamespace"
        }
    };
    raw.rows(text).await
}

fn is_schema(error: Result<impl Sized, StoreError>, words: &str) {
    match error {
        Err(StoreError::Schema(text)) => assert!(text.contains(words), "{text}"),
        Err(other) => panic!("not a matter of the schema: {other}"),
        Ok(_) => panic!("the schema was accepted"),
    }
}

/// Without leave to migrate a store does not open; a running one says what is missing. Both name the cure.
pub(super) async fn a_missing_migration_is_named(database: &Database) {
    is_schema(store::open(database.url(), 2, false).await, "opamp-server migrate up");
    let migrations = store::migrations(database.url(), true).await.expect("the database answers");
    let state = migrations.state().await.expect("the state is read");
    assert_eq!((state.version(), state.pending(), state.applied), (0, state.newest, Vec::new()));
    let store = database.open().await;
    assert_eq!(store.check().await, Ok(()));
    migrations.down().await.expect("it goes down");
    is_schema(store.check().await, "opamp-server migrate up");
    migrations.up().await.expect("it goes up");
    assert_eq!(store.check().await, Ok(()));
}

async fn apply_unknown(database: &Database, breaking: bool) {
    database.open().await.close().await;
    let text = format!("INSERT INTO schema_versions (version, breaking) VALUES (9999, {breaking})");
    assert_eq!(database.raw().await.execute(text).await, 1);
}

/// A newer binary changed the schema in a way that this one would get wrong: it does not touch the store.
pub(super) async fn an_unknown_breaking_migration_is_refused(database: &Database) {
    let running = database.open().await;
    apply_unknown(database, true).await;
    for migrate in [true, false] {
        is_schema(store::open(database.url(), 2, migrate).await, "migration 9999");
    }
    is_schema(running.check().await, "migration 9999");
    let migrations = store::migrations(database.url(), true).await.expect("the database answers");
    is_schema(migrations.down().await, "migration 9999");
    is_schema(migrations.up().await, "migration 9999");
}

/// A newer binary only added something: this one goes on, so that a rolling update may go back.
pub(super) async fn an_unknown_migration_that_breaks_nothing_is_tolerated(database: &Database) {
    apply_unknown(database, false).await;
    for migrate in [true, false] {
        let store = store::open(database.url(), 2, migrate).await.expect("the store opens");
        assert_eq!(store.check().await, Ok(()));
        Node::start(&store, "a", at(0)).await.visit(uid(1), at(1), at(2)).await;
    }
}

/// Several processes may start on an empty database in the same moment.
pub(super) async fn stores_that_start_together_migrate_once(database: &Database) {
    let (a, b, c) = tokio::join!(database.open(), database.open(), database.open());
    for store in [a, b, c] {
        assert_eq!(store.check().await, Ok(()));
    }
    assert_eq!(
        database.raw().await.number("SELECT count(*) FROM schema_versions WHERE version = 1").await,
        1
    );
}

/// A migration that needs a table for itself does not have a whole fleet wait behind somebody who reads for long.
pub(super) async fn a_long_reader_holds_up_no_fleet(database: &Database) {
    database.open().await.close().await;
    let migrations = store::migrations(database.url(), true).await.expect("the database answers");
    let state = migrations.down().await.expect("it goes down");
    let read = "SELECT count(*) FROM agents";
    match database.raw().await {
        // There readers hold up nobody.
        Raw::Sqlite(pool) => {
            let mut reader = pool.begin().await.expect("it begins");
            sqlx::query(read).execute(&mut *reader).await.expect("it reads");
            assert_eq!(migrations.up().await.map(|state| state.pending()), Ok(0));
        }
        Raw::Postgres(pool) => {
            let mut reader = pool.begin().await.expect("it begins");
            sqlx::query(read).execute(&mut *reader).await.expect("it reads");
            is_schema(migrations.up().await, "somebody reads for long");
            assert_eq!(migrations.state().await, Ok(state), "nothing was done");
            drop(reader);
            assert_eq!(migrations.up().await.map(|state| state.pending()), Ok(0));
        }
    }
}

/// What an older binary deleted is not on record: the oldest end that is left bounds what can be said.
pub(super) async fn an_upgrade_takes_the_oldest_end_for_the_horizon(database: &Database) {
    let store = database.open().await;
    let node = Node::start(&store, "a", at(0)).await;
    node.visit(uid(1), at(10), at(20)).await;
    node.visit(uid(1), at(30), at(40)).await;
    let observer = Observer { node: node.id, now: at(100) };
    let horizon = async |store: &Arc<dyn Store>| store.watch(observer).await.map(|watch| watch.horizon());
    assert_eq!(horizon(&store).await, Ok(None), "nothing was deleted");
    let migrations = store::migrations(database.url(), true).await.expect("the database answers");
    while migrations.down().await.expect("it goes down").version() > 1 {}
    let raw = database.raw().await;
    assert_eq!(raw.number("SELECT count(*) FROM agent_connection_history").await, 2, "down takes no history");
    migrations.up().await.expect("it goes up");
    assert_eq!(horizon(&database.open().await).await, Ok(Some(at(20))));
}

/// Rows of attributes become sets and sets rows, whatever is in them.
pub(super) async fn attributes_outlive_migrations_in_both_directions(database: &Database) {
    let store = database.open().await;
    let node = Node::start(&store, "a", at(0)).await;
    let odd = [("a%3Db", "c"), ("a=b", "c=d"), ("host.name", "h1"), ("quoted", "'\"{}[],\u{1}é")];
    let said = [vec![("zone", "eu")], odd.to_vec(), Vec::new()];
    for (number, attributes) in (1..).zip(&said) {
        let opened = node.open(uid(number), at(10)).await;
        assert!(update(&store, node.described(&opened, uid(number), at(11), attributes)).await);
    }
    let raw = database.raw().await;
    let shown = async || -> Vec<(String, String)> {
        let agent = raw.literal(uid(2));
        raw.rows(format!("SELECT key, value FROM agent_attributes WHERE agent_id = {agent} ORDER BY key"))
            .await
    };
    let expected = odd.map(|(key, value)| (key.to_owned(), value.to_owned()));
    assert_eq!(shown().await, expected);
    let migrations = store::migrations(database.url(), true).await.expect("the database answers");
    while migrations.down().await.expect("it goes down").version() > 3 {}
    assert_eq!(raw.number("SELECT count(*) FROM agent_attributes").await, 5);
    assert_eq!(shown().await, expected);
    migrations.up().await.expect("it goes up");
    assert_eq!(shown().await, expected);
    let store = database.open().await;
    for pair in odd {
        let attributes = [pair].map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let filter = AgentFilter { attributes, ..AgentFilter::default() };
        let page = store.list_agents(&filter, PageRequest { after: None, limit: 10 }).await;
        let found: Vec<_> = page.expect("the list is read").items.into_iter().map(|agent| agent.id).collect();
        assert_eq!(found, [uid(2)], "{pair:?}");
    }
    let causes =
        raw.number("SELECT count(*) FROM agent_attribute_sets WHERE CAST(causes AS text) LIKE '%h1%'").await;
    assert_eq!(causes, 1);
}
