//! The short list in which the databases differ; every statement is written once on top of it.
//!
//! A batch travels as one parameter, a JSON array of rows, so that a statement's text does not
//! depend on the batch's size and one round trip serves a thousand agents.

use std::fmt::Write as _;
use std::future::Future;
use std::time::Duration;

use serde::Serialize;
use sqlx::{
    AssertSqlSafe, Database, Encode, Executor, IntoArguments, Pool, Postgres, QueryBuilder, Sqlite,
    Transaction, Type,
};
use uuid::Uuid;

use super::{CALL_DEADLINE, StoreError};

/// The type of one column of a batch.
#[derive(Clone, Copy, Debug)]
pub(super) enum Column {
    Uuid,
    Moment,
    Integer,
    Boolean,
    Text,
    Json,
    /// A list of texts.
    Texts,
}

/// A database.
pub(super) trait Dialect: Database {
    /// How a writing transaction begins: SQLite takes its one write lock at once.
    const BEGIN: &'static str;
    /// How a transaction begins whose statements all see one state of the database.
    const BEGIN_READING: &'static str;
    /// Locks the selected rows of `agents a` until the transaction ends.
    const LOCK_AGENTS: &'static str;
    /// Locks the selected rows of `agent_liveness l` and leaves out those that another transaction has locked; none where
    /// only one writes.
    const SKIP_LOCKED: Option<&'static str>;
    /// After `agents a` that are joined by `connection_id`: SQLite is told of the index that holds nobody else, and reads
    /// no row.
    const CONNECTED: &'static str;
    /// The query for the database's time; none where that is the host's.
    const NOW: Option<&'static str>;
    /// Before a column whose condition must not choose the index: look through the rows that another one finds. SQLite
    /// knows nothing of how many there are and would look up each element of a set, or everybody with a status;
    /// Postgres decides by itself.
    const LOOK_THROUGH: &'static str;
    /// After a query in brackets: find all of its rows before anything is sorted or left out. Postgres would walk every
    /// agent in the order of a page where it thinks it likely to have the page full soon.
    const ALL_FIRST: &'static str;
    /// After `agent_attribute_sets s`: the condition that it has some pairs, before, between and after them.
    const WITH_PAIRS: [&'static str; 3];
    /// The order in which `r` is best written into `agent_attribute_sets`: the inverted index of SQLite is written anew
    /// wherever a row comes before the last one.
    const SETS_IN_ORDER: &'static str;
    /// After `agent_attribute_sets s` of which the causes are read: SQLite is told of the index without what is wide.
    const CAUSES: &'static str;
    /// True where a page of agents is found by their ids first and its rows are read then: SQLite sorts whatever is
    /// selected. Postgres joins as it walks and would look for the rows once more.
    const PAGE_FIRST: bool;
    /// After the ids of a `page`: their rows in `agents a`, each looked up. Postgres would read the whole table where it
    /// thinks that hardly longer.
    const ROWS_OF_PAGE: &'static str;
    /// The conditions for the rows of one agent in `c` before one of them: what stands before, between and after the
    /// agent, the agent once more, and the id. In the order of both columns there is one index. With a plain equality
    /// Postgres knows that the agent does not matter there, and takes the primary key where it thinks it likely to
    /// meet the agent's rows soon, past everybody else's.
    const ROWS_BEFORE: [&'static str; 4];
    /// The smaller and the larger of two values.
    const LEAST: &'static str;
    const GREATEST: &'static str;
    /// Tells every node at commit that orders were written; none where there is one node only.
    const ANNOUNCE: Option<&'static str>;
    /// Says how long the statements of a transaction may take, in milliseconds that follow; none where sessions do not
    /// limit that themselves.
    const LIMIT_TIME: Option<&'static str>;
    /// True where all nodes on one database share one lock, so that whoever holds it is alone.
    const SINGLE_NODE: bool;
    /// Up and down script of each migration, by number from 1.
    const MIGRATIONS: &'static [(&'static str, &'static str)];
    /// True where a table of this name exists: a query with one parameter.
    const TABLE_EXISTS: &'static str;
    /// Two migrating processes wait for each other here.
    const LOCK_MIGRATIONS: &'static str;
    /// The code of the error that a lock was not had in time; none where nothing limits that.
    const LOCK_TIMED_OUT: Option<&'static str>;

    /// One element of a batch, `value`, as this column.
    fn element(index: usize, column: Column) -> String;

    /// The set of a batch's elements.
    const ELEMENTS: &'static str;

    /// Whole seconds between two moments.
    fn seconds(from: &str, to: &str) -> String;

    /// A moment shifted by `$n` microseconds.
    fn shifted(moment: &str, micros: &str) -> String;

    /// An expression of type text whose order is that of its bytes.
    fn sorted_by_bytes(text: &str) -> String;

    /// How many rows a statement changed.
    fn affected(done: &Self::QueryResult) -> u64;

    /// What a database error means to the caller.
    fn classify(error: &dyn sqlx::error::DatabaseError) -> StoreError;
}

/// The rows of the batch in `$1`, to be used as a table.
pub(super) fn rows<D: Dialect>(columns: &[(&str, Column)]) -> String {
    let mut sql = "(SELECT ".to_owned();
    for (index, (name, column)) in columns.iter().enumerate() {
        let comma = if index == 0 { "" } else { ", " };
        let _infallible = write!(sql, "{comma}{} AS {name}", D::element(index, *column));
    }
    let _infallible = write!(sql, " FROM {})", D::ELEMENTS);
    sql
}

impl Dialect for Postgres {
    const BEGIN: &'static str = "BEGIN";
    const BEGIN_READING: &'static str = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY";
    const LOCK_AGENTS: &'static str = "FOR UPDATE OF a";
    const SKIP_LOCKED: Option<&'static str> = Some("FOR UPDATE OF l SKIP LOCKED");
    const CONNECTED: &'static str = "";
    const NOW: Option<&'static str> = Some("SELECT clock_timestamp()");
    const LOOK_THROUGH: &'static str = "";
    const PAGE_FIRST: bool = false;
    const ROWS_OF_PAGE: &'static str =
        " JOIN LATERAL (SELECT * FROM agents WHERE id = page.id OFFSET 0) a ON true";
    const ROWS_BEFORE: [&'static str; 4] = ["c.agent_id >= ", " AND (c.agent_id, c.id) < (", ", ", ")"];
    const ALL_FIRST: &'static str = " OFFSET 0";
    const WITH_PAIRS: [&'static str; 3] = ["WHERE s.pairs @> ARRAY[", ", ", "]"];
    const SETS_IN_ORDER: &'static str = "";
    const CAUSES: &'static str = "";
    const LEAST: &'static str = "least";
    const GREATEST: &'static str = "greatest";
    const ANNOUNCE: Option<&'static str> = Some("SELECT pg_notify('opamp_orders', '')");
    const LIMIT_TIME: Option<&'static str> = Some("SET LOCAL statement_timeout = ");
    const SINGLE_NODE: bool = false;
    const MIGRATIONS: &'static [(&'static str, &'static str)] = &[
        (
            include_str!("../../migrations/postgres/0001_fleet.up.sql"),
            include_str!("../../migrations/postgres/0001_fleet.down.sql"),
        ),
        (
            include_str!("../../migrations/postgres/0002_time_travel.up.sql"),
            include_str!("../../migrations/postgres/0002_time_travel.down.sql"),
        ),
        (
            include_str!("../../migrations/postgres/0003_reads.up.sql"),
            include_str!("../../migrations/postgres/0003_reads.down.sql"),
        ),
        (
            include_str!("../../migrations/postgres/0004_attributes.up.sql"),
            include_str!("../../migrations/postgres/0004_attributes.down.sql"),
        ),
        (
            include_str!("../../migrations/postgres/0005_search.up.sql"),
            include_str!("../../migrations/postgres/0005_search.down.sql"),
        ),
    ];
    const TABLE_EXISTS: &'static str =
        "SELECT count(*) FROM pg_tables WHERE schemaname = current_schema() AND tablename = $1";
    const LOCK_MIGRATIONS: &'static str =
        "SELECT pg_advisory_xact_lock(hashtextextended('opamp-server migrations', 0))";
    const LOCK_TIMED_OUT: Option<&'static str> = Some("55P03");
    const ELEMENTS: &'static str = "jsonb_array_elements($1::jsonb)";

    fn element(index: usize, column: Column) -> String {
        match column {
            Column::Uuid => format!("(value->>{index})::uuid"),
            Column::Moment => {
                format!("'epoch'::timestamptz + (value->>{index})::bigint * interval '1 microsecond'")
            }
            Column::Integer => format!("(value->>{index})::bigint"),
            Column::Boolean => format!("(value->>{index})::boolean"),
            Column::Text => format!("value->>{index}"),
            Column::Json => format!("nullif(value->{index}, 'null'::jsonb)"),
            Column::Texts => format!("ARRAY(SELECT jsonb_array_elements_text(value->{index}))"),
        }
    }

    fn seconds(from: &str, to: &str) -> String {
        format!("floor(extract(epoch FROM ({to} - {from})))::integer")
    }

    fn shifted(moment: &str, micros: &str) -> String {
        format!("{moment} + {micros} * interval '1 microsecond'")
    }

    fn sorted_by_bytes(text: &str) -> String {
        format!("{text} COLLATE \"C\"")
    }

    fn affected(done: &Self::QueryResult) -> u64 {
        done.rows_affected()
    }

    fn classify(error: &dyn sqlx::error::DatabaseError) -> StoreError {
        let code = error.code().unwrap_or_default();
        match code.as_ref() {
            "40001" | "40P01" => StoreError::Conflict,
            "2BP01" => StoreError::Schema(format!(
                "{}: drop what was built on it, migrate, and build it again",
                error.message()
            )),
            // Data, integrity, program limits: this very data. Whatever else goes wrong, a wrong
            // password or a missing table included, is the store's own trouble and passes.
            code if ["22", "23", "54"].iter().any(|class| code.starts_with(class)) => {
                StoreError::Rejected(error.message().to_owned())
            }
            _ => StoreError::Unavailable(error.message().to_owned()),
        }
    }
}

impl Dialect for Sqlite {
    const BEGIN: &'static str = "BEGIN IMMEDIATE";
    const BEGIN_READING: &'static str = "BEGIN";
    const LOCK_AGENTS: &'static str = "";
    const SKIP_LOCKED: Option<&'static str> = None;
    const CONNECTED: &'static str = "INDEXED BY agents_connected";
    const NOW: Option<&'static str> = None;
    const LOOK_THROUGH: &'static str = "+";
    const PAGE_FIRST: bool = true;
    const ROWS_OF_PAGE: &'static str = " JOIN agents a ON a.id = page.id";
    const ROWS_BEFORE: [&'static str; 4] = ["c.agent_id = ", " AND c.agent_id = ", " AND c.id < ", ""];
    const ALL_FIRST: &'static str = "";
    const WITH_PAIRS: [&'static str; 3] = [
        "INDEXED BY agent_attribute_sets_agents WHERE s.number IN
             (SELECT i.rowid FROM agent_attribute_index i WHERE agent_attribute_index MATCH hex(",
        ") || ' AND ' || hex(",
        "))",
    ];
    const SETS_IN_ORDER: &'static str = "ORDER BY
        (SELECT s.number FROM agent_attribute_sets s WHERE s.agent_id = r.id) NULLS LAST";
    const CAUSES: &'static str = "INDEXED BY agent_attribute_sets_agents";
    const LEAST: &'static str = "min";
    const GREATEST: &'static str = "max";
    const ANNOUNCE: Option<&'static str> = None;
    const LIMIT_TIME: Option<&'static str> = None;
    const SINGLE_NODE: bool = true;
    const MIGRATIONS: &'static [(&'static str, &'static str)] = &[
        (
            include_str!("../../migrations/sqlite/0001_fleet.up.sql"),
            include_str!("../../migrations/sqlite/0001_fleet.down.sql"),
        ),
        (
            include_str!("../../migrations/sqlite/0002_time_travel.up.sql"),
            include_str!("../../migrations/sqlite/0002_time_travel.down.sql"),
        ),
        (
            include_str!("../../migrations/sqlite/0003_reads.up.sql"),
            include_str!("../../migrations/sqlite/0003_reads.down.sql"),
        ),
        (
            include_str!("../../migrations/sqlite/0004_attributes.up.sql"),
            include_str!("../../migrations/sqlite/0004_attributes.down.sql"),
        ),
        (
            include_str!("../../migrations/sqlite/0005_search.up.sql"),
            include_str!("../../migrations/sqlite/0005_search.down.sql"),
        ),
    ];
    const TABLE_EXISTS: &'static str =
        "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = $1";
    const LOCK_MIGRATIONS: &'static str = "SELECT 1";
    const LOCK_TIMED_OUT: Option<&'static str> = None;
    // Elements that are arrays come parsed: each of their columns would read the whole text of its row again.
    const ELEMENTS: &'static str = "jsonb_each($1)";

    fn element(index: usize, column: Column) -> String {
        match column {
            Column::Uuid => format!("unhex(value->>{index}, '-')"),
            Column::Moment
            | Column::Integer
            | Column::Boolean
            | Column::Text
            | Column::Json
            | Column::Texts => {
                format!("value->>{index}")
            }
        }
    }

    fn seconds(from: &str, to: &str) -> String {
        format!("({to} - {from}) / 1000000")
    }

    fn shifted(moment: &str, micros: &str) -> String {
        format!("{moment} + {micros}")
    }

    fn sorted_by_bytes(text: &str) -> String {
        text.to_owned()
    }

    fn affected(done: &Self::QueryResult) -> u64 {
        done.rows_affected()
    }

    fn classify(error: &dyn sqlx::error::DatabaseError) -> StoreError {
        let code = error.code().and_then(|code| code.parse::<i32>().ok()).unwrap_or_default();
        // The low byte is the primary code: too big, constraint, mismatch, range mean this very data.
        match code & 0xff {
            18 | 19 | 20 | 25 => StoreError::Rejected(error.message().to_owned()),
            _ => StoreError::Unavailable(error.message().to_owned()),
        }
    }
}

/// What a failure of the driver means to the caller.
#[expect(clippy::wildcard_enum_match_arm, reason = "whatever else the driver may report means: not now")]
pub(super) fn failure<D: Dialect>(error: sqlx::Error) -> StoreError {
    match error {
        sqlx::Error::Database(error) => D::classify(error.as_ref()),
        sqlx::Error::ColumnDecode { index, source } => {
            StoreError::Corrupt(format!("column {index}: {source}"))
        }
        sqlx::Error::Decode(source) => StoreError::Corrupt(source.to_string()),
        other => StoreError::Unavailable(other.to_string()),
    }
}

/// A store on one kind of database: a pool that writes and a pool that reads, which may be the same.
#[derive(Debug)]
pub(super) struct SqlStore<D: Dialect> {
    pub(super) writers: Pool<D>,
    pub(super) readers: Pool<D>,
    pub(super) name_lock: tokio::sync::Mutex<Option<(String, NameLock)>>,
    pub(super) lock_place: LockPlace,
}

/// Where the lock on a node's name lives.
#[derive(Clone, Debug)]
pub(super) enum LockPlace {
    /// A session advisory lock of Postgres, on a connection of its own.
    Session(Box<sqlx::postgres::PgConnectOptions>),
    /// A lock file beside the database.
    File(std::path::PathBuf),
    /// A database in memory has no second process.
    Nowhere,
}

/// What holds the lock on a node's name; dropping it lets go.
#[derive(Debug)]
#[expect(dead_code, reason = "a file is held, not read: the lock lives as long as it")]
pub(super) enum NameLock {
    Session(sqlx::PgConnection),
    File(std::fs::File),
    Nowhere,
}

/// Runs one call under the deadline of every call.
pub(super) async fn bounded<T>(
    call: impl Future<Output = Result<T, StoreError>> + Send,
) -> Result<T, StoreError> {
    bounded_by(CALL_DEADLINE, call).await
}

/// Runs one call under a deadline of its own.
pub(super) async fn bounded_by<T>(
    deadline: Duration,
    call: impl Future<Output = Result<T, StoreError>> + Send,
) -> Result<T, StoreError> {
    tokio::time::timeout(deadline, call).await.unwrap_or_else(|_| {
        Err(StoreError::Unavailable(format!("no answer within {} s", deadline.as_secs())))
    })
}

impl<D: Dialect> SqlStore<D> {
    /// Begins a writing transaction.
    pub(super) async fn begin(&self) -> Result<Transaction<'static, D>, StoreError> {
        self.writers.begin_with(D::BEGIN).await.map_err(failure::<D>)
    }

    /// Begins a reading transaction that sees one state of the database.
    pub(super) async fn begin_reading(&self) -> Result<Transaction<'static, D>, StoreError> {
        self.readers.begin_with(D::BEGIN_READING).await.map_err(failure::<D>)
    }

    /// Gives a transaction that concerns much another time than a call has; zero = as long as it takes.
    pub(super) async fn limit_time(tx: &mut Transaction<'_, D>, limit: Duration) -> Result<(), StoreError>
    where
        for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
        D::Arguments: IntoArguments<D>,
    {
        if let Some(text) = D::LIMIT_TIME {
            let text = format!("{text}{}", limit.as_millis());
            sqlx::query(sql(text)).execute(&mut **tx).await.map_err(failure::<D>)?;
        }
        Ok(())
    }
}

/// Adds the conditions for the rows of `agent` in `c` that follow `after` in a list with the newest first.
pub(super) fn push_rows_before<D>(query: &mut QueryBuilder<D>, agent: Uuid, after: Option<i64>)
where
    D: Dialect,
    for<'q> i64: Encode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
{
    let [begin, again, id, end] = D::ROWS_BEFORE;
    query.push(begin).push_bind(agent).push(again).push_bind(agent);
    query.push(id).push_bind(after.unwrap_or(i64::MAX)).push(end);
}

/// A batch as the one parameter of its statement.
pub(super) fn batch<R: Serialize>(rows: &[R]) -> String {
    // Every map here has texts as keys, and documents are JSON already: nothing else makes this fail.
    serde_json::to_string(rows).unwrap_or_default()
}

/// Keys as the rows of a batch, one each.
pub(super) fn keys<K>(keys: impl IntoIterator<Item = K>) -> Vec<(K,)> {
    keys.into_iter().map(|key| (key,)).collect()
}

/// A statement whose text is put together from constants of this crate only, never from data.
pub(super) fn sql(text: String) -> AssertSqlSafe<String> {
    AssertSqlSafe(text)
}

impl<D> SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'q> String: Encode<'q, D> + Type<D>,
{
    /// Runs one statement over a batch, unless the batch is empty.
    pub(super) async fn execute<R: Serialize + Sync>(
        tx: &mut Transaction<'_, D>,
        text: String,
        values: &[R],
    ) -> Result<(), StoreError> {
        if !values.is_empty() {
            sqlx::query(sql(text)).bind(batch(values)).execute(&mut **tx).await.map_err(failure::<D>)?;
        }
        Ok(())
    }
}
