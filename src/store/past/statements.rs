//! The statements of questions about the past.
//!
//! One index holds each agent's rows by when they began, another its changes of status, both with what decides: an
//! agent as of a moment costs one step into each, however long its history is. Where nothing is asked but who was known,
//! a third holds the few changes that decide that, and the steps are taken for one page only.

use std::time::Duration;

use sqlx::{Encode, QueryBuilder, Type};

use super::{PastFilter, Span, StayPlace};
use crate::agent::InstanceUid;
use crate::clock::Moment;
use crate::store::agents::from_matching;
use crate::store::connections::{COLUMNS, LIVENESS, narrow};
use crate::store::dialect::Dialect;
use crate::store::{AgentFilter, HistoryFilter, PageRequest};

/// The words for an agent that was not connected, by what is known; a connected one's word is its transport.
pub(super) const UNKNOWN: &str = "unknown";
pub(super) const DISCONNECTED: &str = "disconnected";

/// What a row `c` says about time.
const STAY: &str =
    "c.id, c.connected_at, c.disconnected_at, c.disconnected_by, c.disconnect_reason AS reason,
    c.transport, CASE WHEN c.disconnected_at IS NULL THEN (SELECT l.last_seen_at FROM agent_liveness l
        WHERE l.agent_id = c.agent_id) END AS confirmed_until";

/// Adds the query for the changes of status after a span began and before it ends.
pub(in crate::store) fn select_changes<D>(query: &mut QueryBuilder<D>, span: Span, most: u32)
where
    D: Dialect,
    for<'q> i64: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query
        .push("SELECT s.agent_id, s.at, s.to_status FROM agent_status_log s WHERE s.at > ")
        .push_bind(span.from);
    query
        .push(" AND s.at < ")
        .push_bind(span.to)
        .push(" ORDER BY s.at, s.id LIMIT ")
        .push_bind(i64::from(most));
}

/// Adds the query for the ends of connections in a span.
pub(in crate::store) fn select_ends<D>(query: &mut QueryBuilder<D>, span: Span, most: u32)
where
    D: Dialect,
    for<'q> i64: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query.push("SELECT c.disconnected_at FROM agent_connection_history c WHERE c.disconnected_at >= ");
    query.push_bind(span.from).push(" AND c.disconnected_at < ").push_bind(span.to);
    query.push(" LIMIT ").push_bind(i64::from(most));
}

/// Adds the query for the last stay of an agent that began at or before a moment.
pub(in crate::store) fn select_stay_at<D>(query: &mut QueryBuilder<D>, agent: InstanceUid, at: Moment)
where
    D: Dialect,
    for<'q> uuid::Uuid: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query.push("SELECT ").push(STAY).push(" FROM agent_connection_history c");
    query.push(" WHERE c.agent_id = ").push_bind(agent.as_uuid());
    query.push(" AND c.connected_at <= ").push_bind(at);
    query.push(" ORDER BY c.agent_id DESC, c.connected_at DESC, c.id DESC LIMIT 1");
}

/// Adds the query for the next stays of an agent that began after a span did and before it ends.
pub(in crate::store) fn select_further_stays<D>(
    query: &mut QueryBuilder<D>,
    agent: InstanceUid,
    span: Span,
    after: Option<StayPlace>,
    limit: u32,
) where
    D: Dialect,
    for<'q> i64: Encode<'q, D> + Type<D>,
    for<'q> uuid::Uuid: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    let (moment, id) = after.unwrap_or((span.from, i64::MAX));
    query.push("SELECT ").push(STAY).push(" FROM agent_connection_history c");
    query.push(" WHERE c.agent_id = ").push_bind(agent.as_uuid());
    query.push(" AND (c.connected_at, c.id) > (").push_bind(moment).push(", ").push_bind(id).push(")");
    query.push(" AND c.connected_at < ").push_bind(span.to);
    query.push(" ORDER BY c.agent_id, c.connected_at, c.id LIMIT ").push_bind(i64::from(limit));
}

/// Adds the expression for the status of `agents a` at a moment, or of what `of` stands for; `none` where it was not known
/// yet.
///
/// That is what the first change after it began from, and the present one where there was none.
fn push_status<D>(query: &mut QueryBuilder<D>, of: &str, at: Moment)
where
    D: Dialect,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query.push(format!(
        "coalesce((SELECT coalesce(s.from_status, 'none') FROM agent_status_log s WHERE s.agent_id = {of}.id AND s.at > "
    ));
    query.push_bind(at).push(format!(" ORDER BY s.agent_id, s.at, s.id LIMIT 1), {of}.status)"));
}

/// Adds the expression for what is known of the connectedness of `agents a` at a moment.
///
/// The rule of `timeline`, in SQL: what a WebSocket's row proves stays proven; where nobody watched, nothing else is known.
fn push_state<D>(query: &mut QueryBuilder<D>, at: Moment, watched: bool)
where
    D: Dialect,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    let (polled, absent) = if watched { ("'http'", DISCONNECTED) } else { ("'unknown'", UNKNOWN) };
    query.push("coalesce((SELECT CASE WHEN CASE WHEN c.disconnected_at IS NULL THEN (SELECT l.last_seen_at FROM agent_liveness l WHERE l.agent_id = c.agent_id) ELSE c.disconnected_at END > ");
    query.push_bind(at);
    query.push(format!(" THEN CASE WHEN c.transport = 'websocket' THEN 'websocket' ELSE {polled} END"));
    query.push(" WHEN c.disconnected_at IS NULL OR c.disconnected_by > ").push_bind(at);
    query.push(format!(" THEN '{UNKNOWN}' ELSE '{absent}' END FROM agent_connection_history c"));
    query.push(" WHERE c.agent_id = a.id AND c.connected_at <= ").push_bind(at);
    query.push(format!(" ORDER BY c.agent_id DESC, c.connected_at DESC, c.id DESC LIMIT 1), '{absent}')"));
}

/// Begins a query with `states`: of each of the agents that are still to be named, its id, its present status, and its
/// state at a moment. Worked out once for each, not once for each mention.
fn push_states<D>(query: &mut QueryBuilder<D>, at: Moment, watched: bool)
where
    D: Dialect,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query.push("WITH states AS MATERIALIZED (SELECT a.id, a.status, ");
    push_state(query, at, watched);
    query.push(" AS state");
}

/// Adds the expression for the status of `states e` at the same moment: who is connected is online, and is not looked up.
fn push_status_beside_state<D>(query: &mut QueryBuilder<D>, at: Moment)
where
    D: Dialect,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query.push(format!("CASE WHEN e.state IN ('{UNKNOWN}', '{DISCONNECTED}') THEN "));
    push_status(query, "e", at);
    query.push(" ELSE 'online' END");
}

/// Adds the query for how many agents had which status and which state at a moment.
pub(in crate::store) fn count_past<D>(query: &mut QueryBuilder<D>, at: Moment, watched: bool)
where
    D: Dialect,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    push_states(query, at, watched);
    query.push(" FROM agents a ORDER BY a.id), everybody AS MATERIALIZED (SELECT ");
    push_status_beside_state(query, at);
    query.push(
        " AS status, e.state FROM states e) SELECT e.status, e.state, count(*) FROM everybody e GROUP BY e.status, e.state",
    );
}

/// Adds the query for the next agents that match as of a moment, by id, each with the total; one row without an agent
/// where there is none.
pub(in crate::store) fn select_past<D>(
    query: &mut QueryBuilder<D>,
    filter: &PastFilter,
    at: Moment,
    watched: bool,
    page: PageRequest<InstanceUid>,
) where
    D: Dialect,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> bool: Encode<'q, D> + Type<D>,
    for<'q> i64: Encode<'q, D> + Type<D>,
    for<'q> uuid::Uuid: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    let selection = push_selection(query, filter, at, watched);
    query.push(" SELECT t.total, p.id AS agent, ");
    match selection {
        Selection::Known => push_status(query, "p", at),
        Selection::Matching => _ = query.push("p.status"),
    }
    query.push(" AS status, (SELECT max(s.at) FROM agent_status_log s WHERE s.agent_id = p.id AND s.at <= ");
    query.push_bind(at).push(") AS since, ").push(STAY);
    query.push(
        " FROM (SELECT count(*) AS total FROM everybody) t LEFT JOIN (SELECT e.id, e.status FROM everybody e",
    );
    if let Some(after) = page.after {
        query.push(" WHERE e.id > ").push_bind(after.as_uuid());
    }
    query.push(" ORDER BY e.id LIMIT ").push_bind(i64::from(page.limit));
    query.push(
        ") p ON true LEFT JOIN agent_connection_history c ON c.id = (SELECT w.id FROM agent_connection_history w
             WHERE w.agent_id = p.id AND w.connected_at <= ",
    );
    query.push_bind(at).push(" ORDER BY w.agent_id DESC, w.connected_at DESC, w.id DESC LIMIT 1)");
    query.push(" ORDER BY p.id");
}

/// What `everybody` holds beside the ids of the agents that match.
enum Selection {
    /// Their present status: what was then is still to be looked up, of those on the page only.
    Known,
    /// Their status then, which they were picked by.
    Matching,
}

/// Begins a query with `everybody`: the agents that match as of a moment.
fn push_selection<D>(query: &mut QueryBuilder<D>, filter: &PastFilter, at: Moment, watched: bool) -> Selection
where
    D: Dialect,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> bool: Encode<'q, D> + Type<D>,
    for<'q> i64: Encode<'q, D> + Type<D>,
    for<'q> uuid::Uuid: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    let by_state = filter.connected.is_some() || filter.transport.is_some();
    if !by_state && filter.id.is_none() && filter.prefix.is_none() && filter.statuses.is_empty() {
        push_known(query, at, filter.include_retired);
        return Selection::Known;
    }
    let named = AgentFilter {
        id: filter.id,
        prefix: filter.prefix.clone(),
        include_retired: true,
        ..AgentFilter::default()
    };
    if by_state {
        push_states(query, at, watched);
    } else {
        query.push("WITH states AS MATERIALIZED (SELECT a.id, ");
        push_status(query, "a", at);
        query.push(" AS status");
    }
    from_matching(query, &named, None);
    // In the order in which both indexes of the past have them: each page of those is read once.
    query.push(" ORDER BY a.id)");
    if by_state {
        query.push(", matching AS MATERIALIZED (SELECT e.id, ");
        push_status_beside_state(query, at);
        query.push(" AS status FROM states e WHERE true");
        push_matching_state(query, filter);
        query.push(")");
    }
    let matching = if by_state { "matching" } else { "states" };
    query.push(", everybody AS NOT MATERIALIZED (SELECT e.id, e.status FROM ").push(matching).push(" e");
    push_matching(query, filter);
    query.push(")");
    Selection::Matching
}

/// Begins a query with `everybody` who was known at a moment, and was not retired unless those are wanted too, with their
/// present status.
///
/// Nobody's status then is looked up but that of those who were ever retired: who came later is found by the change that
/// began from nothing, which no other change of the agent is older than.
fn push_known<D>(query: &mut QueryBuilder<D>, at: Moment, include_retired: bool)
where
    D: Dialect,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query.push("WITH absent AS MATERIALIZED (SELECT s.agent_id AS id FROM agent_status_log s WHERE s.from_status IS NULL AND s.at > ");
    query.push_bind(at);
    if !include_retired {
        query.push(" UNION SELECT r.id FROM (SELECT a.id, a.status FROM agents a WHERE a.status = 'retired'");
        query.push(" UNION SELECT a.id, a.status FROM agent_status_log s JOIN agents a ON a.id = s.agent_id WHERE s.from_status = 'retired' AND s.at > ");
        query.push_bind(at).push(") r WHERE ");
        push_status(query, "r", at);
        query.push(" = 'retired'");
    }
    query.push("), everybody AS MATERIALIZED (SELECT a.id, a.status FROM agents a LEFT JOIN absent n ON n.id = a.id WHERE n.id IS NULL)");
}

/// Adds the conditions on the status that an agent had then.
fn push_matching<D>(query: &mut QueryBuilder<D>, filter: &PastFilter)
where
    D: Dialect,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
{
    query.push(" WHERE e.status <> 'none'");
    if !filter.statuses.is_empty() {
        let mut list = query.push(" AND e.status IN (").separated(", ");
        for status in &filter.statuses {
            list.push_bind(status.label());
        }
        query.push(")");
    } else if !filter.include_retired {
        query.push(" AND e.status <> 'retired'");
    }
}

/// Adds the conditions on how it was connected then, to a query of `states e`.
fn push_matching_state<D>(query: &mut QueryBuilder<D>, filter: &PastFilter)
where
    D: Dialect,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
{
    match filter.connected {
        Some(true) => query.push(format!(" AND e.state NOT IN ('{UNKNOWN}', '{DISCONNECTED}')")),
        Some(false) => query.push(format!(" AND e.state = '{DISCONNECTED}'")),
        None => query,
    };
    if let Some(transport) = filter.transport {
        query.push(" AND e.state = ").push_bind(transport.label());
    }
}

/// Adds the query for every agent on record and its status at a moment.
pub(in crate::store) fn select_everybody<D>(query: &mut QueryBuilder<D>, at: Moment)
where
    D: Dialect,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query.push("SELECT a.id, ");
    push_status(query, "a", at);
    query.push(" FROM agents a");
}

/// The last row of each agent that began by a moment, as `c`; what follows is the moment.
const LAST_OF_EACH: &str = " FROM agents a JOIN agent_connection_history c ON c.id = (SELECT w.id
    FROM agent_connection_history w WHERE w.agent_id = a.id AND w.connected_at <= ";

/// The end of [`LAST_OF_EACH`], behind the moment.
const OF_EACH: &str = " ORDER BY w.agent_id DESC, w.connected_at DESC, w.id DESC LIMIT 1)";

/// Adds the query for the connections of all agents that were open at a moment, as far as that is proved.
pub(in crate::store) fn select_open_at<D>(query: &mut QueryBuilder<D>, at: Moment)
where
    D: Dialect,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query.push("SELECT c.agent_id, c.connected_at, c.node_id, c.remote_addr").push(LAST_OF_EACH);
    // Who came at that very moment displaced whom it is about.
    query.push_bind(at.before(Duration::from_micros(1))).push(OF_EACH);
    query.push(" WHERE (c.disconnected_at IS NULL OR c.disconnected_at >= ").push_bind(at).push(")");
}

/// Adds the rows of all agents, as `c`, that reach into a span: `begun` in it, or before it.
fn push_reaching<D>(query: &mut QueryBuilder<D>, span: Span, begun: bool, joined: &str)
where
    D: Dialect,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    if begun {
        query.push(" FROM agent_connection_history c").push(joined);
        query.push(" WHERE c.connected_at > ").push_bind(span.from);
        query.push(" AND c.connected_at < ").push_bind(span.to);
    } else {
        // Agent by agent, as there is no other way to a row that may have begun long before.
        query.push(LAST_OF_EACH).push_bind(span.from);
        query.push(OF_EACH).push(joined);
        query.push(" WHERE true");
        narrow(query, HistoryFilter { from: Some(span.from), to: None });
    }
}

/// Adds the query for the stays of all agents that reach into a span, and `begun` in it, or before it.
pub(in crate::store) fn select_stays_of_all<D>(
    query: &mut QueryBuilder<D>,
    span: Span,
    begun: bool,
    most: u32,
) where
    D: Dialect,
    for<'q> i64: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query.push("SELECT c.agent_id AS agent, ").push(STAY);
    push_reaching(query, span, begun, "");
    query.push(" ORDER BY c.connected_at, c.id LIMIT ").push_bind(i64::from(most));
}

/// Adds the query for the next connections of all agents that reach into a span, and `begun` in it, or before it.
pub(in crate::store) fn select_connections_of_all<D>(
    query: &mut QueryBuilder<D>,
    span: Span,
    begun: bool,
    after: Option<StayPlace>,
    limit: u32,
) where
    D: Dialect,
    for<'q> i64: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query.push(COLUMNS);
    push_reaching(query, span, begun, LIVENESS);
    if let Some((connected_at, id)) = after {
        query.push(" AND (c.connected_at, c.id) > (").push_bind(connected_at);
        query.push(", ").push_bind(id).push(")");
    }
    query.push(" ORDER BY c.connected_at, c.id LIMIT ").push_bind(i64::from(limit));
}
