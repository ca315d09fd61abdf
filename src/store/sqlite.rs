//! SQLite: one writer and several readers on a file in WAL mode, and the lock file beside it.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::error::DatabaseError;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Sqlite, SqlitePool};
use tokio::time::Instant;

use super::dialect::{LockPlace, SqlStore, bounded, failure};
use super::{CALL_DEADLINE, Store, StoreError};

/// The cache of a connection that reads, 16 MiB: the indexes of a large fleet stay in it.
const READER_CACHE: &str = "-16384";

/// The cache of the connection that writes, 16 MiB: most of what a batch touches is written once, at its end. It grows
/// as it is needed.
const WRITER_CACHE: &str = "-16384";

/// After so many pages, 8 MiB, the log of what was written goes into the file: pages that several batches touch go there
/// once. The commit that does so waits for it, also on a slow disk.
const CHECKPOINT_PAGES: &str = "2000";

/// How many rows a connection reads before whoever asked has taken them: a page of a thousand is handed over in a few
/// turns, not one for every 50.
const ROWS_AHEAD: usize = 512;

/// How long a look at a file that another process holds is put off.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// Opens the store, a file that is made where it is missing, and brings its schema up to date.
pub(super) async fn open(
    url: &str,
    max_connections: u32,
    migrate: bool,
) -> Result<SqlStore<Sqlite>, StoreError> {
    let store = connect(url, max_connections, migrate).await?;
    store.prepare(migrate).await?;
    // What one statement may have to take back is not worth a file; what a migration sorts is.
    let in_memory = sqlx::query("PRAGMA temp_store = memory").execute(&store.writers);
    bounded(async { in_memory.await.map_err(failure::<Sqlite>) }).await?;
    Ok(store)
}

/// Connects without touching the schema; a missing file is made only where `create` says so.
pub(super) async fn connect(
    url: &str,
    max_connections: u32,
    create: bool,
) -> Result<SqlStore<Sqlite>, StoreError> {
    let options = SqliteConnectOptions::from_str(url)
        .map_err(|error| StoreError::Schema(format!("store.url is not a valid sqlite:// URL: {error}")))?
        .create_if_missing(create)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(CALL_DEADLINE)
        .row_buffer_size(ROWS_AHEAD)
        .disable_statement_logging();
    let file = options.get_filename().to_path_buf();
    let in_memory = file.as_os_str().is_empty() || url.contains(":memory:") || url.contains("mode=memory");
    let pool = |connections: u32| {
        SqlitePoolOptions::new().max_connections(connections).acquire_timeout(CALL_DEADLINE)
    };
    let place = file.display().to_string();
    if !create && !in_memory && !file.exists() {
        return Err(StoreError::Schema(format!(
            "{place} does not exist, its migrations are missing: run `opamp-server migrate up`, or start without \
             --no-migrate"
        )));
    }
    let unusable = |error| match failure::<Sqlite>(error) {
        StoreError::Unavailable(text) => StoreError::Unavailable(format!("cannot open {place}: {text}")),
        error @ (StoreError::Conflict
        | StoreError::NodeEnded
        | StoreError::Corrupt(_)
        | StoreError::Rejected(_)
        | StoreError::Schema(_)) => error,
    };
    let writer = pool(1).idle_timeout(None).max_lifetime(None);
    let writing =
        options.clone().pragma("cache_size", WRITER_CACHE).pragma("wal_autocheckpoint", CHECKPOINT_PAGES);
    let writers = connect_writer(writer, &writing).await.map_err(unusable)?;
    let readers = if in_memory {
        // A database in memory is private to its one connection.
        writers.clone()
    } else {
        let reading = options.pragma("query_only", "on").pragma("cache_size", READER_CACHE);
        pool(max_connections).connect_lazy_with(reading)
    };
    let lock_place = if in_memory {
        LockPlace::Nowhere
    } else {
        let mut lock: std::ffi::OsString = file.into_os_string();
        lock.push(".lock");
        LockPlace::File(PathBuf::from(lock))
    };
    Ok(SqlStore { writers, readers, name_lock: tokio::sync::Mutex::default(), lock_place })
}

/// Opens the connection that writes.
///
/// A file becomes one in WAL mode when it is opened first. Where another process is at that, `SQLite` fails at once,
/// whatever `busy_timeout` says: it is tried again for as long.
async fn connect_writer(
    pool: SqlitePoolOptions,
    options: &SqliteConnectOptions,
) -> Result<SqlitePool, sqlx::Error> {
    let deadline = Instant::now() + CALL_DEADLINE;
    loop {
        match pool.clone().connect_with(options.clone()).await {
            Err(sqlx::Error::Database(error)) if is_busy(error.as_ref()) && Instant::now() < deadline => {
                tokio::time::sleep(BUSY_PAUSE).await;
            }
            result => return result,
        }
    }
}

/// True where another connection holds the file: `SQLITE_BUSY`, in the low byte of the code.
fn is_busy(error: &dyn DatabaseError) -> bool {
    error.code().and_then(|code| code.parse::<i32>().ok()).is_some_and(|code| code & 0xff == 5)
}

#[async_trait]
impl Store for SqlStore<Sqlite> {
    async fn check(&self) -> Result<(), StoreError> {
        bounded(self.check_schema()).await
    }

    async fn hear_orders(&self, _url: Option<&str>, heard: &(dyn Fn() + Send + Sync)) -> StoreError {
        // One process has the file, and it tells itself.
        heard();
        std::future::pending().await
    }

    async fn close(&self) {
        self.readers.close().await;
        self.writers.close().await;
        self.name_lock.lock().await.take();
    }
}
