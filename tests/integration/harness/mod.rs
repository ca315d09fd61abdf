//! What integration tests stand on: a database of their own, a server on it, and agents that speak to it.

#![expect(clippy::expect_used, reason = "in a test a panic with a sentence is the report")]

pub(crate) mod agent;
pub(crate) mod frames;
pub(crate) mod http;
mod postgres;
mod raw;
pub(crate) mod server;
pub(crate) mod swarm;

use std::sync::Arc;

use opamp_server::store::{self, Store};
use tempfile::TempDir;

pub(crate) use raw::{Held, Raw};

/// How many connections a store of a test may open.
const CONNECTIONS: u32 = 5;

/// The two kinds of database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Sqlite,
    Postgres,
}

/// An empty database that belongs to one test.
#[derive(Debug)]
pub(crate) struct Database {
    kind: Kind,
    url: String,
    _place: Place,
}

/// What goes away with the database.
#[derive(Debug)]
#[expect(dead_code, reason = "held, not read: dropping it cleans up")]
enum Place {
    Folder(TempDir),
    Server(postgres::Temporary),
}

impl Database {
    /// A `SQLite` file in a folder of its own.
    pub(crate) fn sqlite() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let url = format!("sqlite://{}/fleet.db", folder.path().display());
        Self { kind: Kind::Sqlite, url, _place: Place::Folder(folder) }
    }

    /// A new database on the server that `DATABASE_URL` names; none, and a word about it, where that is not set.
    pub(crate) async fn postgres() -> Option<Self> {
        let temporary = postgres::Temporary::create().await?;
        Some(Self { kind: Kind::Postgres, url: temporary.url().to_owned(), _place: Place::Server(temporary) })
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// A store on this database; every call is one more process as far as the database can tell.
    pub(crate) async fn open(&self) -> Arc<dyn Store> {
        store::open(&self.url, CONNECTIONS, true).await.expect("the store opens")
    }

    /// A look past the store.
    pub(crate) async fn raw(&self) -> Raw {
        Raw::connect(self.kind, &self.url).await
    }
}

#[test]
fn a_url_is_told_another_database() {
    assert_eq!(
        postgres::with_database("postgres://u:p@h:1/postgres?sslmode=disable", "x"),
        "postgres://u:p@h:1/x?sslmode=disable"
    );
    assert_eq!(postgres::with_database("postgres://h", "x"), "postgres://h/x");
}
