//! Postgres: the pool, and how its sessions are set up.

use std::str::FromStr;

use async_trait::async_trait;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
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

/// Connects without touching the schema.
pub(super) async fn connect(url: &str, max_connections: u32) -> Result<SqlStore<Postgres>, StoreError> {
    known_parameters(url)?;
    let options = PgConnectOptions::from_str(url)
        .map_err(|error| StoreError::Schema(format!("store.url is not a valid postgres:// URL: {error}")))?
        .application_name("opamp-server")
        // A server that hangs is a server that is away: its sessions give up by themselves as well.
        .options([("statement_timeout", format!("{}ms", CALL_DEADLINE.as_millis()))])
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
