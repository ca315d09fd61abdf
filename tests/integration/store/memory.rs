//! A database in memory, and URLs that name no database at all.

use opamp_server::store::{self, StoreError};

use super::scene::{Node, assert_true_history, at, uid};

/// A database in memory keeps the same promises for the one process that has it.
#[tokio::test]
async fn a_database_in_memory_serves_its_one_process() {
    let store = store::open("sqlite::memory:", 4, true).await.expect("the store opens");
    assert_eq!(store.lock_node_name("a").await, Ok(true));
    let node = Node::start(&store, "a", at(0)).await;
    node.visit(uid(1), at(10), at(20)).await;
    node.open(uid(1), at(30)).await;
    assert_true_history(&store, uid(1)).await;
    assert_eq!(store.check().await, Ok(()));
}

/// What names no database is refused with a sentence that says what would.
#[tokio::test]
async fn a_url_of_another_kind_is_refused() {
    for url in ["mysql://localhost/fleet", "fleet.db", ""] {
        let refused = store::open(url, 4, true).await.err();
        assert!(
            matches!(&refused, Some(StoreError::Schema(text)) if text.contains("sqlite://")),
            "{refused:?}"
        );
    }
}
