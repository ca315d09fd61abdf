//! No list, filter or count reads a whole table where an index serves it: both databases are asked for their plans.

use std::collections::BTreeMap;

use sqlx::{Postgres, QueryBuilder, Row, Sqlite};

use super::agents::{count_agents, select_agents};
use super::attributes::select_causes;
use super::connections::{count_connections, select_connections};
use super::dialect::SqlStore;
use super::observation::select_ended;
use super::orders::{select_close_orders, select_to_lock};
use super::past::{
    PastFilter, Span, count_past, select_changes, select_connections_of_all, select_ends, select_everybody,
    select_further_stays, select_open_at, select_past, select_stay_at, select_stays_of_all,
};
use super::status_log::{count_transitions, select_transitions};
use super::{AgentFilter, HistoryFilter, PageRequest, Status, Transport};
use crate::agent::InstanceUid;
use crate::clock::Moment;

/// The tables that grow with the fleet and with time.
const GROWING: [&str; 5] =
    ["agents", "agent_attribute_sets", "agent_liveness", "agent_connection_history", "agent_status_log"];

/// How many agents there are, each with one connection, its first report and [`FURTHER`] changes of status.
const AGENTS: usize = 20_000;

/// How many changes of status followed the first: enough that those which made an agent known are few.
const FURTHER: usize = 4;

/// How many more of both the first agent has: enough that its rows are met on the way through everybody's.
const BUSY: usize = 16_000;

/// What statements are called that ask of every agent, one by one: an index holds all of them, but so does the table.
const EVERYBODY: &str = "everybody";

/// A fleet in which everything that is looked for is rare, so that an index is worth it.
fn fleet(postgres: bool) -> String {
    let (numbers, uid, at) = if postgres {
        (
            format!("SELECT n FROM generate_series(1, {AGENTS}) n"),
            "lpad(to_hex(n), 32, '0')::uuid",
            "'2026-01-01T00:00:00Z'::timestamptz + n * interval '1 second'",
        )
    } else {
        (
            format!(
                "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {AGENTS}) SELECT n FROM s"
            ),
            "unhex(printf('%032x', n))",
            "1767225600000000 + n * 1000000",
        )
    };
    let node =
        if postgres { "'00000000-0000-0000-0000-000000000001'::uuid" } else { "unhex(printf('%032x', 1))" };
    let [north, south] = ["north", "south"].map(|zone| {
        if postgres { format!("'{{zone={zone}}}'::text[]") } else { format!("'[\"zone={zone}\"]'") }
    });
    let generated = if postgres { "OVERRIDING SYSTEM VALUE" } else { "" };
    let busy = if postgres { "lpad('1', 32, '0')::uuid" } else { "unhex(printf('%032x', 1))" };
    let many = numbers.replace(&AGENTS.to_string(), &BUSY.to_string());
    let further = numbers
        .replace(&AGENTS.to_string(), &FURTHER.to_string())
        .replace("SELECT n FROM", "SELECT n AS more FROM");
    format!(
        "INSERT INTO nodes (id, name, version, lease_ms, started_at, renewed_at)
             SELECT {node}, 'a', '1', 1000, {at}, {at} FROM (SELECT 1 AS n) one;
         INSERT INTO agents (id, name, host, status, status_since, healthy, connection_id, close_connection, close_reason,
                 created_at, updated_at)
             SELECT {uid}, 'name-' || n, 'host-' || n,
                 CASE n % 2000 WHEN 0 THEN 'error' WHEN 1 THEN 'offline' WHEN 2 THEN 'retired' ELSE 'online' END, {at},
                 CASE WHEN n % 2000 = 3 THEN false END, CASE WHEN n % 2000 = 4 THEN n END,
                 CASE WHEN n % 2000 = 4 THEN n END, CASE WHEN n % 2000 = 4 THEN 'deleted' END, {at}, {at}
             FROM ({numbers}) numbers;
         INSERT INTO agent_liveness (agent_id, last_seen_at) SELECT {uid}, {at} FROM ({numbers}) numbers;
         INSERT INTO agent_attribute_sets (agent_id, causes, pairs)
             SELECT {uid}, '{{}}', CASE WHEN n % 2000 = 5 THEN {north} ELSE {south} END FROM ({numbers}) numbers;
         INSERT INTO agent_connection_history (id, agent_id, connected_at, disconnected_at, duration_seconds,
                 disconnect_reason, transport, node_id, node_seq, created_at)
             {generated} SELECT n, {uid}, {at}, CASE WHEN n % 2000 <> 4 THEN {at} END, 0, 'connection_lost', 'websocket',
                 {node}, n, {at} FROM ({numbers}) numbers;
         INSERT INTO agent_status_log (agent_id, at, to_status, reason)
             SELECT {uid}, {at}, 'online', 'first_report' FROM ({numbers}) numbers;
         INSERT INTO agent_status_log (agent_id, at, from_status, to_status, reason)
             SELECT {uid}, {at}, 'offline', 'online', 'returned' FROM ({numbers}) numbers, ({further}) further;
         INSERT INTO agent_connection_history (id, agent_id, connected_at, disconnected_at, duration_seconds,
                 disconnect_reason, transport, node_id, node_seq, created_at)
             {generated} SELECT {AGENTS} + n, {busy}, {at}, {at}, 0, 'connection_lost', 'websocket', {node}, {AGENTS} + n, {at}
             FROM ({many}) numbers;
         INSERT INTO agent_status_log (agent_id, at, from_status, to_status, reason)
             SELECT {busy}, {at}, 'offline', 'online', 'returned' FROM ({many}) numbers;"
    )
}

/// The filters that an index serves.
fn filters() -> Vec<AgentFilter> {
    let all = AgentFilter::default;
    let with = |statuses: &[Status]| AgentFilter { statuses: statuses.to_vec(), ..all() };
    vec![
        AgentFilter { id: Some(InstanceUid::from_bytes([7; 16])), include_retired: true, ..all() },
        with(&[Status::Offline]),
        with(&[Status::Error]),
        with(&[Status::Retired]),
        AgentFilter { connected: Some(false), ..with(&[Status::Offline]) },
        AgentFilter {
            unseen_since: Moment::parse("2027-01-01T00:00:00Z"),
            ..with(&[Status::Offline, Status::Error])
        },
        AgentFilter { connected: Some(true), ..all() },
        AgentFilter { healthy: Some(false), ..all() },
        AgentFilter { transport: Some(Transport::Http), ..all() },
        AgentFilter { attributes: BTreeMap::from([("zone".to_owned(), "north".to_owned())]), ..all() },
        AgentFilter {
            attributes: BTreeMap::from([
                ("zone".to_owned(), "north".to_owned()),
                ("os.type".to_owned(), "linux".to_owned()),
            ]),
            ..all()
        },
        AgentFilter {
            connected: Some(true),
            healthy: Some(false),
            transport: Some(Transport::Websocket),
            prefix: Some("host-7".to_owned()),
            ..with(&[Status::Error])
        },
        AgentFilter { prefix: Some("name-777".to_owned()), ..all() },
        AgentFilter { prefix: Some("00000000-0000-0000-0000-0000000000".to_owned()), ..all() },
    ]
}

/// What agents as of a moment are narrowed by.
fn past_filters() -> Vec<PastFilter> {
    let all = PastFilter::default;
    vec![
        all(),
        PastFilter { id: Some(InstanceUid::from_bytes([7; 16])), include_retired: true, ..all() },
        PastFilter { include_retired: true, ..all() },
        PastFilter { statuses: vec![Status::Offline], ..all() },
        PastFilter { statuses: vec![Status::Online], connected: Some(false), ..all() },
        PastFilter { connected: Some(true), ..all() },
        PastFilter { transport: Some(Transport::Http), ..all() },
        PastFilter { prefix: Some("name-777".to_owned()), ..all() },
    ]
}

/// The statements whose plans are looked at, each with what it is for.
macro_rules! statements {
    ($database:ty, $explain:literal) => {{
        let mut statements: Vec<(String, QueryBuilder<$database>)> = Vec::new();
        let mut add = |what: String, fill: &dyn Fn(&mut QueryBuilder<$database>)| {
            let mut query = QueryBuilder::new($explain);
            fill(&mut query);
            statements.push((what, query));
        };
        let somebody = InstanceUid::from_bytes(1_u128.to_be_bytes());
        for filter in filters() {
            add(format!("count of {filter:?}"), &|query| count_agents(query, &filter));
            for after in [None, Some(somebody)] {
                let page = PageRequest { after, limit: 101 };
                add(format!("page of {filter:?}"), &|query| select_agents(query, &filter, page));
                add(format!("deletion of {filter:?}"), &|query| select_to_lock(query, &filter, after));
            }
        }
        let page = PageRequest { after: Some(somebody), limit: 101 };
        add("page of all".to_owned(), &|query| select_agents(query, &AgentFilter::default(), page));
        let moment = Some(Moment::from_micros(0));
        for (from, to) in [(None, None), (moment, None), (None, moment), (moment, moment)] {
            let filter = HistoryFilter { from, to };
            add(format!("count of {filter:?}"), &|query| count_connections(query, somebody, filter));
            for after in [None, Some(20_077)] {
                let page = PageRequest { after, limit: 101 };
                add(format!("page of {filter:?}"), &|query| {
                    select_connections(query, somebody, filter, page)
                });
            }
        }
        add("count of transitions".to_owned(), &|query| count_transitions(query, somebody));
        for after in [None, Some(20_077)] {
            let page = PageRequest { after, limit: 101 };
            add("page of transitions".to_owned(), &|query| select_transitions(query, somebody, page));
        }
        let at = Moment::parse("2026-01-01T01:00:00Z").unwrap();
        let span = Span { from: at, to: at.after(std::time::Duration::from_mins(5)) };
        add("a stay at a moment".to_owned(), &|query| select_stay_at(query, somebody, at));
        for after in [None, Some((at, 7))] {
            add("stays of an agent".to_owned(), &|query| {
                select_further_stays(query, somebody, span, after, 1_000);
            });
        }
        add("changes of status in a span".to_owned(), &|query| select_changes(query, span, 500_001));
        add("ends in a span".to_owned(), &|query| select_ends(query, span, 500_001));
        for filter in past_filters() {
            for after in [None, Some(somebody)] {
                let page = PageRequest { after, limit: 101 };
                add(format!("{EVERYBODY} as of a moment, {filter:?}"), &|query| {
                    select_past(query, &filter, at, true, page);
                });
            }
        }
        add(format!("{EVERYBODY} counted as of a moment"), &|query| count_past(query, at, true));
        add(format!("{EVERYBODY} with status at a moment"), &|query| select_everybody(query, at));
        for begun in [false, true] {
            let whose = if begun { "newcomers among everybody" } else { EVERYBODY };
            add(format!("{whose} over a span"), &|query| select_stays_of_all(query, span, begun, 500_001));
            for after in [None, Some((at, 7))] {
                add(format!("{whose} with connections in a span"), &|query| {
                    select_connections_of_all(query, span, begun, after, 1_000);
                });
            }
        }
        add("orders to a node".to_owned(), &|query| select_close_orders(query, uuid::Uuid::nil()));
        let [begins, ends] = ["2026-01-01T00:01:00Z", "2026-01-01T00:05:00Z"];
        let [begins, ends] = [begins, ends].map(|text| Moment::parse(text).unwrap());
        add("ends of a span".to_owned(), &|query| select_ended(query, begins, ends, 500_000));
        add(format!("{EVERYBODY} open at a moment"), &|query| select_open_at(query, at));
        add(format!("{EVERYBODY} with attributes that may be causes"), &|query| select_causes(query));
        add("next overdue".to_owned(), &|query| {
            query.push(super::agents::NEXT_OVERDUE);
        });
        statements
    }};
}

#[tokio::test]
async fn sqlite_scans_no_table() {
    let store: SqlStore<Sqlite> = super::sqlite::open("sqlite::memory:", 1, true).await.unwrap();
    // Without statistics, as in service.
    sqlx::raw_sql(super::dialect::sql(fleet(false))).execute(&store.writers).await.unwrap();
    for (what, mut query) in statements!(Sqlite, "EXPLAIN QUERY PLAN ") {
        let rows = query.build().fetch_all(&store.readers).await.unwrap();
        let plan: Vec<String> = rows.iter().map(|row| row.get("detail")).collect();
        // `SCAN a` walks a table, `SCAN a USING INDEX` an index; the primary key's order is what a page is in. A page, or
        // a set that was collected from an index, is short; and down the rows from a rowid are everybody's.
        // What was worked out of every agent is walked once more to count it.
        let short = |step: &str| {
            ["SCAN page", "SCAN found", "SCAN e", "SCAN everybody", "SCAN r", "SCAN t", "SCAN p LEFT-JOIN"]
                .contains(&step)
        };
        // What matches in the inverted index is no walk through it.
        let matched = |step: &str| step.contains(" VIRTUAL TABLE INDEX 0:M");
        let scans = |step: &&String| {
            step.starts_with("SCAN ") && !step.contains(" USING ") && !short(step) && !matched(step)
                || step.contains("(rowid<?)")
        };
        assert_eq!(plan.iter().find(scans), None, "{what}: {plan:#?}");
        let looked_up = |step: &&String| step.starts_with("SEARCH a ") && !step.contains(" (id=?)");
        let mut steps = plan.iter().filter(looked_up);
        if what.contains("prefix: Some") && (what.starts_with("count") || what.starts_with("page of A")) {
            assert!(steps.all(|step| step.contains(" COVERING ")), "a search reads rows: {what}: {plan:#?}");
        } else if what.contains("prefix: Some") && what.starts_with("deletion") {
            let walked = |step: &String| step.contains("sqlite_autoindex") && !step.contains("id<?");
            assert!(!steps.any(walked), "a search walks the agents: {what}: {plan:#?}");
        }
    }
}

#[tokio::test]
async fn postgres_scans_no_table() {
    let Some(url) = server() else {
        assert!(variable("CI").is_none(), "DATABASE_URL must be set where CI is: no test is skipped there");
        return;
    };
    let schema = format!("plans_{}", uuid::Uuid::new_v4().simple());
    let admin = sqlx::PgPool::connect(&url).await.unwrap();
    let run = async |text: String| sqlx::raw_sql(super::dialect::sql(text)).execute(&admin).await.unwrap();
    run(format!("CREATE SCHEMA {schema}")).await;
    let joint = if url.contains('?') { '&' } else { '?' };
    let store = super::postgres::open(&format!("{url}{joint}options=-csearch_path%3D{schema}"), 1, true)
        .await
        .unwrap();
    sqlx::raw_sql(super::dialect::sql(fleet(true))).execute(&store.writers).await.unwrap();
    // As autovacuum does within minutes.
    let vacuum = format!("VACUUM ANALYZE {}", GROWING.join(", "));
    sqlx::raw_sql(super::dialect::sql(vacuum)).execute(&store.writers).await.unwrap();
    let mut faults = Vec::new();
    for (what, mut query) in statements!(Postgres, "EXPLAIN ") {
        let rows = query.build().fetch_all(&store.readers).await.unwrap();
        let plan: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        // Where there is hardly more history than agents, walking both once is right; scripts/bench-rest looks at more.
        let by_agent = ["agents", "agent_attribute_sets", "agent_liveness", "agent_connection_history"];
        // Down the primary key of a history are everybody's rows.
        let scans = |step: &String| {
            let walked = GROWING.iter().find(|table| step.contains(&format!("Seq Scan on {table} ")));
            walked.is_some_and(|table| !(by_agent.contains(table) && what.contains(EVERYBODY)))
                || (step.contains("Scan Backward using") && step.contains("_pkey"))
        };
        // Whom a name leads to is counted from the index alone.
        let covered = !(what.starts_with("count") && what.contains("prefix: Some(\"name"))
            || plan.iter().any(|step| step.contains("Index Only Scan using agents_name "));
        if plan.iter().any(scans) || !covered {
            faults.push(format!("{what}:\n{}", plan.join("\n")));
        }
    }
    store.readers.close().await;
    run(format!("DROP SCHEMA {schema} CASCADE")).await;
    assert!(faults.is_empty(), "{}", faults.join("\n\n"));
}

fn server() -> Option<String> {
    variable("DATABASE_URL")
}

#[expect(clippy::disallowed_methods, reason = "the environment tells tests where Postgres is")]
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
