//! A look past the store, into the tables themselves.

use std::time::Duration;

use opamp_server::agent::InstanceUid;
use opamp_server::clock::Moment;
use sqlx::postgres::PgRow;
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, FromRow, PgPool, Postgres, Sqlite, SqlitePool, Transaction};

use super::Kind;

/// A connection of our own to a test's database.
#[derive(Clone, Debug)]
pub(crate) enum Raw {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

impl Raw {
    pub(crate) async fn connect(kind: Kind, url: &str) -> Self {
        match kind {
            Kind::Sqlite => Self::Sqlite(SqlitePool::connect(url).await.expect("the file opens")),
            Kind::Postgres => Self::Postgres(PgPool::connect(url).await.expect("the server answers")),
        }
    }

    /// Runs statements; answers how many rows they changed.
    pub(crate) async fn execute(&self, text: impl Into<String>) -> u64 {
        let query = sqlx::raw_sql(AssertSqlSafe(text.into()));
        let done = match self {
            Self::Sqlite(pool) => query.execute(pool).await.map(|done| done.rows_affected()),
            Self::Postgres(pool) => query.execute(pool).await.map(|done| done.rows_affected()),
        };
        done.expect("the statement runs")
    }

    /// The rows of a query.
    pub(crate) async fn rows<T>(&self, text: impl Into<String>) -> Vec<T>
    where
        T: for<'r> FromRow<'r, SqliteRow> + for<'r> FromRow<'r, PgRow> + Send + Unpin,
    {
        let text = AssertSqlSafe(text.into());
        let rows = match self {
            Self::Sqlite(pool) => sqlx::query_as(text).fetch_all(pool).await,
            Self::Postgres(pool) => sqlx::query_as(text).fetch_all(pool).await,
        };
        rows.expect("the query answers")
    }

    /// The one number a query answers.
    pub(crate) async fn number(&self, text: impl Into<String>) -> i64 {
        let rows: Vec<(i64,)> = self.rows(text).await;
        rows.first().expect("one row").0
    }

    /// A moment as it is written in this database's SQL.
    pub(crate) fn moment(&self, at: Moment) -> String {
        match self {
            Self::Sqlite(_) => at.as_micros().to_string(),
            Self::Postgres(_) => format!("'{at}'"),
        }
    }

    /// Runs statements in a transaction that stays open, its locks held.
    pub(crate) async fn hold(&self, texts: &[String]) -> Held {
        let mut held = match self {
            Self::Sqlite(pool) => {
                Held::Sqlite(pool.begin_with("BEGIN IMMEDIATE").await.expect("a transaction"))
            }
            Self::Postgres(pool) => Held::Postgres(pool.begin().await.expect("a transaction")),
        };
        for text in texts {
            held.execute(text).await;
        }
        held
    }

    /// Returns when a session waits for a lock. `SQLite` tells nobody; there a writer cannot help but wait.
    pub(crate) async fn until_somebody_waits(&self) {
        let Self::Postgres(_) = self else { return };
        let text = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        let waiting = async { while self.number(text).await == 0 {} };
        tokio::time::timeout(Duration::from_secs(10), waiting).await.expect("somebody waits for the lock");
    }

    /// True where a transaction locks the rows it writes, false where it locks the whole database.
    pub(crate) fn locks_rows(&self) -> bool {
        matches!(self, Self::Postgres(_))
    }

    /// A uid as it is written in this database's SQL.
    pub(crate) fn literal(&self, agent: InstanceUid) -> String {
        match self {
            Self::Sqlite(_) => format!("x'{}'", agent.as_uuid().simple()),
            Self::Postgres(_) => format!("'{agent}'"),
        }
    }
}

/// A transaction that holds its locks until it is committed.
pub(crate) enum Held {
    Sqlite(Transaction<'static, Sqlite>),
    Postgres(Transaction<'static, Postgres>),
}

impl Held {
    async fn execute(&mut self, text: &str) {
        let query = sqlx::raw_sql(AssertSqlSafe(text.to_owned()));
        let done = match self {
            Self::Sqlite(held) => query.execute(&mut **held).await.map(|_| ()),
            Self::Postgres(held) => query.execute(&mut **held).await.map(|_| ()),
        };
        done.expect("the statement runs");
    }

    pub(crate) async fn commit(self) {
        let done = match self {
            Self::Sqlite(held) => held.commit().await,
            Self::Postgres(held) => held.commit().await,
        };
        done.expect("the transaction is committed");
    }
}
