//! Migrations: plain SQL, up and down, the same numbers for both databases.
//!
//! `schema_versions` says which are applied and which of them are breaking: a binary that meets a
//! breaking migration it does not know refuses to run, one that is not breaking it tolerates.

use std::time::Duration;

use async_trait::async_trait;
use sqlx::{ColumnIndex, Decode, Encode, Executor, FromRow, IntoArguments, Type};

use super::StoreError;
use super::dialect::{Dialect, SqlStore, failure};

/// Which migrations are applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationState {
    /// Number and whether it is breaking, of each applied migration.
    pub applied: Vec<(i64, bool)>,
    /// The newest migration this binary knows.
    pub newest: i64,
}

impl MigrationState {
    /// The newest applied migration; 0 for an empty database.
    #[must_use]
    pub fn version(&self) -> i64 {
        self.applied.iter().map(|(version, _)| *version).max().unwrap_or(0)
    }

    /// How many migrations this binary would apply.
    #[must_use]
    pub fn pending(&self) -> i64 {
        (self.newest - self.version()).max(0)
    }

    /// True where a migration is applied that this binary does not know.
    fn is_newer(&self) -> bool {
        self.version() > self.newest
    }

    /// An error where a breaking migration is applied that this binary does not know.
    fn refuse_unknown(&self) -> Result<(), StoreError> {
        match self.applied.iter().find(|(version, breaking)| *version > self.newest && *breaking) {
            None => Ok(()),
            Some((version, _)) => Err(StoreError::Schema(format!(
                "the store has migration {version}, this opamp-server knows migrations up to {}: run a newer \
                 opamp-server, or let the newer one go back with `opamp-server migrate down`",
                self.newest
            ))),
        }
    }
}

impl std::fmt::Display for MigrationState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (version, newest) = (self.version(), self.newest);
        if !self.is_newer() {
            return write!(f, "schema version {version} of {newest}, {} pending", self.pending());
        }
        let runs = if self.refuse_unknown().is_ok() { "runs on it" } else { "refuses to run on it" };
        write!(f, "schema version {version}, newer than this opamp-server knows ({newest}), which {runs}")
    }
}

/// The migrations of one database.
#[async_trait]
pub trait Migrations: Send + Sync {
    /// Which are applied.
    async fn state(&self) -> Result<MigrationState, StoreError>;
    /// Applies all that are missing; answers the new state.
    async fn up(&self) -> Result<MigrationState, StoreError>;
    /// Takes back the newest one; answers the new state.
    async fn down(&self) -> Result<MigrationState, StoreError>;
}

/// What a failure of a migration's script means to whoever starts it.
fn not_migrated<D: Dialect>(error: sqlx::Error) -> StoreError {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
    if code.is_some() && code.as_deref() == D::LOCK_TIMED_OUT {
        return StoreError::Schema(
            "a migration needs a table that somebody reads for long, a backup perhaps: try again when they are done"
                .to_owned(),
        );
    }
    failure::<D>(error)
}

#[async_trait]
impl<D> Migrations for SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> (i64, bool): FromRow<'r, D::Row>,
    usize: ColumnIndex<D::Row>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> i64: Decode<'q, D> + Type<D>,
{
    async fn state(&self) -> Result<MigrationState, StoreError> {
        let mut connection = self.readers.acquire().await.map_err(failure::<D>)?;
        Self::read_state(&mut connection).await
    }

    async fn up(&self) -> Result<MigrationState, StoreError> {
        self.migrate(|state| {
            let first = usize::try_from(state.version()).unwrap_or(usize::MAX);
            D::MIGRATIONS.iter().skip(first).map(|(up, _)| *up).collect()
        })
        .await
    }

    async fn down(&self) -> Result<MigrationState, StoreError> {
        self.migrate(|state| {
            let newest = usize::try_from(state.version() - 1).ok();
            newest.and_then(|index| D::MIGRATIONS.get(index)).map(|(_, down)| *down).into_iter().collect()
        })
        .await
    }
}

impl<D> SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> (i64, bool): FromRow<'r, D::Row>,
    usize: ColumnIndex<D::Row>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> i64: Decode<'q, D> + Type<D>,
{
    async fn read_state(connection: &mut D::Connection) -> Result<MigrationState, StoreError> {
        let newest = i64::try_from(D::MIGRATIONS.len()).unwrap_or(i64::MAX);
        let tables: i64 = sqlx::query_scalar(D::TABLE_EXISTS)
            .bind("schema_versions")
            .fetch_one(&mut *connection)
            .await
            .map_err(failure::<D>)?;
        if tables == 0 {
            return Ok(MigrationState { applied: Vec::new(), newest });
        }
        let applied = sqlx::query_as("SELECT version, breaking FROM schema_versions ORDER BY version")
            .fetch_all(connection)
            .await
            .map_err(failure::<D>)?;
        Ok(MigrationState { applied, newest })
    }

    /// Runs the chosen scripts in one transaction, one migrating process at a time.
    async fn migrate(
        &self,
        choose: impl Fn(&MigrationState) -> Vec<&'static str> + Send,
    ) -> Result<MigrationState, StoreError> {
        let mut tx = self.begin().await?;
        // An index over a long history takes as long as it takes.
        Self::limit_time(&mut tx, Duration::ZERO).await?;
        sqlx::query(D::LOCK_MIGRATIONS).execute(&mut *tx).await.map_err(failure::<D>)?;
        let state = Self::read_state(&mut tx).await?;
        state.refuse_unknown()?;
        for script in choose(&state) {
            sqlx::raw_sql(script).execute(&mut *tx).await.map_err(not_migrated::<D>)?;
        }
        let state = Self::read_state(&mut tx).await?;
        tx.commit().await.map_err(failure::<D>)?;
        Ok(state)
    }

    /// Brings the schema up to date, or, where that is not wanted, says what is missing.
    pub(super) async fn prepare(&self, migrate: bool) -> Result<(), StoreError> {
        let state = self.state().await?;
        state.refuse_unknown()?;
        match (state.pending(), migrate) {
            (0, _) => Ok(()),
            (_, true) => self.up().await.map(|_| ()),
            (pending, false) => Err(StoreError::Schema(format!(
                "{pending} migrations are missing: run `opamp-server migrate up`, or start without --no-migrate"
            ))),
        }
    }

    /// An error unless the database answers and no migration is missing.
    pub(super) async fn check_schema(&self) -> Result<(), StoreError> {
        let state = self.state().await?;
        state.refuse_unknown()?;
        if state.pending() > 0 {
            return Err(StoreError::Schema(
                "migrations are missing: run `opamp-server migrate up`".to_owned(),
            ));
        }
        Ok(())
    }
}
