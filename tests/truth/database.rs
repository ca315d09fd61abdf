//! The databases of a round: what the servers reach, if need be through a breakable proxy, and what the checker reads past them.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use opamp_server::clock::Moment;
use sqlx::postgres::{PgPoolOptions, PgRow};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions, SqliteRow};
use sqlx::{AssertSqlSafe, FromRow, PgPool, SqlitePool};
use tempfile::TempDir;
use uuid::Uuid;

use crate::postgres::Temporary;
use crate::proxy::Proxy;

/// What a round runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Sqlite,
    Postgres,
    TwoNodes,
}

impl Kind {
    pub(crate) fn nodes(self) -> usize {
        if self == Self::TwoNodes { 2 } else { 1 }
    }

    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Sqlite => "sqlite",
            Self::Postgres => "postgres",
            Self::TwoNodes => "two-nodes",
        }
    }
}

/// A row of the connection history.
#[derive(Clone, Debug, FromRow)]
pub(crate) struct Row {
    pub(crate) id: i64,
    pub(crate) agent_id: Uuid,
    pub(crate) connected_at: Moment,
    pub(crate) disconnected_at: Option<Moment>,
    pub(crate) disconnected_by: Option<Moment>,
    pub(crate) disconnect_reason: Option<String>,
    pub(crate) seconds: Option<i64>,
    pub(crate) remote_addr: Option<String>,
    pub(crate) transport: String,
    pub(crate) node_id: Option<Uuid>,
}

/// A change of status.
#[derive(Clone, Debug, FromRow)]
pub(crate) struct Change {
    pub(crate) agent_id: Uuid,
    pub(crate) at: Moment,
    pub(crate) from_status: Option<String>,
    pub(crate) to_status: String,
    pub(crate) reason: String,
    pub(crate) connection_id: Option<i64>,
}

/// What an agent's record says of its present.
#[derive(Clone, Debug, FromRow)]
pub(crate) struct AgentRow {
    pub(crate) id: Uuid,
    pub(crate) status: String,
    pub(crate) connection_id: Option<i64>,
    pub(crate) last_connected_at: Option<Moment>,
    pub(crate) last_disconnected_at: Option<Moment>,
    pub(crate) disconnect_reason: Option<String>,
}

/// A server process on record.
#[derive(Clone, Debug, FromRow)]
pub(crate) struct NodeRow {
    pub(crate) id: Uuid,
    pub(crate) name: String,
    pub(crate) ended_at: Option<Moment>,
}

/// Everything on record at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Books {
    pub(crate) rows: Vec<Row>,
    pub(crate) changes: Vec<Change>,
    pub(crate) agents: Vec<AgentRow>,
    pub(crate) nodes: Vec<NodeRow>,
}

#[derive(Debug)]
enum Pool {
    Sqlite(SqlitePool, #[expect(dead_code, reason = "the folder goes with it")] TempDir),
    Postgres(PgPool, #[expect(dead_code, reason = "the database goes with it")] Temporary),
}

/// The database of one round.
#[derive(Debug)]
pub(crate) struct Database {
    pool: Pool,
    /// What each node is told.
    pub(crate) urls: Vec<String>,
    /// What stands before each node's Postgres.
    pub(crate) proxies: Vec<Arc<Proxy>>,
}

impl Database {
    /// An empty database; none where it wants Postgres and there is none.
    pub(crate) async fn create(kind: Kind) -> Option<Self> {
        if kind == Kind::Sqlite {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let file = folder.path().join("fleet.db");
            let url = format!("sqlite://{}", file.display());
            let options = SqliteConnectOptions::new().filename(file).create_if_missing(true);
            let pool = SqlitePoolOptions::new().connect_lazy_with(options);
            return Some(Self { pool: Pool::Sqlite(pool, folder), urls: vec![url], proxies: Vec::new() });
        }
        let temporary = Temporary::create().await?;
        let pool =
            PgPoolOptions::new().max_connections(2).connect(temporary.url()).await.expect("a database");
        let upstream = upstream(temporary.url()).await.expect("DATABASE_URL names a host");
        let (mut urls, mut proxies) = (Vec::new(), Vec::new());
        for _ in 0..kind.nodes() {
            let proxy = Proxy::start(upstream).await.expect("a proxy");
            urls.push(through(temporary.url(), proxy.address()));
            proxies.push(Arc::new(proxy));
        }
        Some(Self { pool: Pool::Postgres(pool, temporary), urls, proxies })
    }

    async fn rows<T>(&self, text: &'static str) -> Result<Vec<T>, sqlx::Error>
    where
        T: for<'r> FromRow<'r, SqliteRow> + for<'r> FromRow<'r, PgRow> + Send + Unpin,
    {
        match &self.pool {
            Pool::Sqlite(pool, _) => sqlx::query_as(AssertSqlSafe(text)).fetch_all(pool).await,
            Pool::Postgres(pool, _) => sqlx::query_as(AssertSqlSafe(text)).fetch_all(pool).await,
        }
    }

    /// Reads everything.
    pub(crate) async fn read(&self) -> Result<Books, sqlx::Error> {
        let rows = self.rows(
            "SELECT id, agent_id, connected_at, disconnected_at, disconnected_by, disconnect_reason,
                    CAST(duration_seconds AS bigint) AS seconds, remote_addr, transport, node_id
             FROM agent_connection_history ORDER BY id",
        );
        let changes = self.rows(
            "SELECT agent_id, at, from_status, to_status, reason, connection_id FROM agent_status_log ORDER BY id",
        );
        Ok(Books {
            rows: rows.await?,
            changes: changes.await?,
            nodes: self.rows("SELECT id, name, ended_at FROM nodes").await?,
            agents: self.rows("SELECT id, status, connection_id, last_connected_at, last_disconnected_at, disconnect_reason FROM agents").await?,
        })
    }

    /// Takes the database from all servers until `released` completes: `SQLite` as another writer does, Postgres by
    /// ending every session over and over, as a restart does for as long as it takes.
    pub(crate) async fn seize(&self, released: impl Future<Output = ()>) -> Result<(), sqlx::Error> {
        match &self.pool {
            Pool::Sqlite(pool, _) => {
                let held = pool.begin_with("BEGIN IMMEDIATE").await?;
                released.await;
                held.rollback().await?;
            }
            Pool::Postgres(pool, _) => {
                let mut own = pool.acquire().await?;
                let end_others = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                                  WHERE datname = current_database() AND pid <> pg_backend_pid()";
                let ending = async {
                    loop {
                        sqlx::query(end_others).execute(&mut *own).await?;
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                };
                tokio::select! {
                    () = released => {}
                    failed = ending => return failed,
                }
            }
        }
        Ok(())
    }
}

/// The part of a URL that says who and where.
fn authority(url: &str) -> (usize, usize) {
    let start = url.find("://").map_or(0, |scheme| scheme + 3);
    let end = url[start..].find(['/', '?']).map_or(url.len(), |length| start + length);
    (start, end)
}

/// `url` by way of `proxy`, in the clear: the proxy looks for words.
fn through(url: &str, proxy: SocketAddr) -> String {
    let (start, end) = authority(url);
    let who = url[start..end].rsplit_once('@').map(|(who, _)| format!("{who}@")).unwrap_or_default();
    let rest = url[end..].split('?').next().unwrap_or_default();
    format!("{}{who}{proxy}{rest}?sslmode=disable", &url[..start])
}

async fn upstream(url: &str) -> io::Result<SocketAddr> {
    let (start, end) = authority(url);
    let host = url[start..end].rsplit_once('@').map_or(&url[start..end], |(_, host)| host);
    let host = if host.contains(':') { host.to_owned() } else { format!("{host}:5432") };
    tokio::net::lookup_host(host).await?.next().ok_or_else(|| io::ErrorKind::NotFound.into())
}

#[test]
fn a_url_goes_by_way_of_a_proxy() {
    let proxy = SocketAddr::from(([127, 0, 0, 1], 9));
    assert_eq!(
        through("postgres://u:p@h:5432/d?sslmode=require", proxy),
        "postgres://u:p@127.0.0.1:9/d?sslmode=disable"
    );
}
