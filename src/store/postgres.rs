//! Postgres: the pool, and how its sessions are set up.

use std::str::FromStr;

use async_trait::async_trait;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Postgres};

use super::dialect::{LockPlace, SqlStore, bounded, failure};
use super::{CALL_DEADLINE, Store, StoreError};

/// Opens the store and brings its schema up to date.
pub(super) async fn open(
    url: &str,
    max_connections: u32,
    migrate: bool,
) -> Result<SqlStore<Postgres>, StoreError> {
    let store = connect(url, max_connections).await?;
    store.prepare(migrate).await?;
    Ok(store)
}

/// Connects without touching the schema.
pub(super) async fn connect(url: &str, max_connections: u32) -> Result<SqlStore<Postgres>, StoreError> {
    let options = PgConnectOptions::from_str(url)
        .map_err(|error| StoreError::Schema(format!("store.url is not a valid postgres:// URL: {error}")))?
        .application_name("opamp-server")
        // A server that hangs is a server that is away: its sessions give up by themselves as well.
        .options([("statement_timeout", format!("{}ms", CALL_DEADLINE.as_millis()))])
        .disable_statement_logging();
    let pool = PgPoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(CALL_DEADLINE)
        .connect_with(options.clone())
        .await
        .map_err(failure::<Postgres>)?;
    Ok(SqlStore {
        writers: pool.clone(),
        readers: pool,
        name_lock: tokio::sync::Mutex::default(),
        lock_place: LockPlace::Session(Box::new(options)),
    })
}

#[async_trait]
impl Store for SqlStore<Postgres> {
    async fn check(&self) -> Result<(), StoreError> {
        bounded(self.check_schema()).await
    }

    async fn close(&self) {
        self.readers.close().await;
        self.name_lock.lock().await.take();
    }
}
