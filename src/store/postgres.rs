//! Postgres: the pool, and how its sessions are set up.

use std::convert::Infallible;
use std::str::FromStr;

use async_trait::async_trait;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, PgConnection, Postgres};

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

/// The channel on which orders are announced.
const ORDERS: &str = "opamp_orders";

impl SqlStore<Postgres> {
    /// Listens until the connection is lost.
    async fn listen(
        &self,
        url: Option<&str>,
        heard: &(dyn Fn() + Send + Sync),
    ) -> Result<Infallible, StoreError> {
        let options = match (url, &self.lock_place) {
            (Some(url), _) => PgConnectOptions::from_str(url).map_err(|error| {
                StoreError::Schema(format!("store.listen_url is not a valid postgres:// URL: {error}"))
            })?,
            (None, LockPlace::Session(options)) => options.as_ref().clone(),
            (None, LockPlace::File(_) | LockPlace::Nowhere) => {
                return Err(StoreError::Schema("this store has no server to listen at".to_owned()));
            }
        };
        let connecting = async {
            let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(CALL_DEADLINE);
            let pool = pool.connect_with(options).await.map_err(failure::<Postgres>)?;
            let mut listener = PgListener::connect_with(&pool).await.map_err(failure::<Postgres>)?;
            listener.eager_reconnect(false);
            listener.listen(ORDERS).await.map_err(failure::<Postgres>)?;
            Ok(listener)
        };
        let mut listener = bounded(connecting).await?;
        heard();
        while listener.try_recv().await.map_err(failure::<Postgres>)?.is_some() {
            heard();
        }
        Err(StoreError::Unavailable("the connection that listens was lost".to_owned()))
    }
}

/// How statements are planned.
const PLANNING: [(&str, &str); 2] = [
    // To compile a statement takes longer than any of them runs.
    ("jit", "off"),
    // To start a process that helps takes longer than a page of agents: only counts of a million are worth it.
    ("parallel_setup_cost", "20000"),
];

/// Connects without touching the schema.
pub(super) async fn connect(url: &str, max_connections: u32) -> Result<SqlStore<Postgres>, StoreError> {
    known_parameters(url)?;
    let options = PgConnectOptions::from_str(url)
        .map_err(|error| StoreError::Schema(format!("store.url is not a valid postgres:// URL: {error}")))?
        .application_name("opamp-server")
        // A server that hangs is a server that is away: its sessions give up by themselves as well.
        .options([("statement_timeout", format!("{}ms", CALL_DEADLINE.as_millis()))])
        .options(PLANNING)
        .disable_statement_logging();
    // Alone first: the pool would try again until its time is over and then hide the reason.
    bounded(async {
        let connection = PgConnection::connect_with(&options).await.map_err(failure::<Postgres>)?;
        connection.close().await.map_err(failure::<Postgres>)
    })
    .await?;
    let pool = PgPoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(CALL_DEADLINE)
        .connect_lazy_with(options.clone());
    Ok(SqlStore {
        writers: pool.clone(),
        readers: pool,
        name_lock: tokio::sync::Mutex::default(),
        lock_place: LockPlace::Session(Box::new(options)),
    })
}

/// The parameters that a URL may have; the driver ignores others, a misspelt `sslmode` among them.
const PARAMETERS: [&str; 18] = [
    "application_name",
    "dbname",
    "host",
    "hostaddr",
    "options",
    "password",
    "port",
    "ssl-ca",
    "ssl-cert",
    "ssl-key",
    "ssl-mode",
    "ssl-root-cert",
    "sslcert",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "statement-cache-capacity",
    "user",
];

/// Refuses a URL with a parameter that would be ignored: what was meant to protect would not.
fn known_parameters(url: &str) -> Result<(), StoreError> {
    let query = url.split_once('?').map_or("", |(_, query)| query);
    let query = query.split_once('#').map_or(query, |(query, _)| query);
    let names = query.split('&').map(|pair| pair.split_once('=').map_or(pair, |(name, _)| name));
    for name in names.filter(|name| !name.is_empty()) {
        if !PARAMETERS.contains(&name) && !name.starts_with("options[") {
            return Err(StoreError::Schema(format!(
                "store.url has the unknown parameter {name:?}: correct it (TLS is sslmode=verify-full) or remove it"
            )));
        }
    }
    Ok(())
}

#[async_trait]
impl Store for SqlStore<Postgres> {
    async fn check(&self) -> Result<(), StoreError> {
        bounded(self.check_schema()).await
    }

    async fn hear_orders(&self, url: Option<&str>, heard: &(dyn Fn() + Send + Sync)) -> StoreError {
        match self.listen(url, heard).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn close(&self) {
        self.readers.close().await;
        self.name_lock.lock().await.take();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_parameter_is_refused_and_not_ignored() {
        assert_eq!(known_parameters("postgres://u:p@h/d?sslmode=verify-full&options[a]=b"), Ok(()));
        assert_eq!(known_parameters("postgres://h/d"), Ok(()));
        let refused = known_parameters("postgres://h/d?sslmod=verify-full").unwrap_err().to_string();
        assert!(refused.contains("\"sslmod\""), "{refused}");
    }
}
