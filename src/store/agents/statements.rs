//! The statements that find agents: what a row of theirs is made of, and the conditions of a filter.

use sqlx::{Encode, QueryBuilder, Type};
use uuid::Uuid;

use super::AgentFilter;
use crate::agent::InstanceUid;
use crate::clock::Moment;
use crate::store::PageRequest;
use crate::store::attributes::has_attributes;
use crate::store::dialect::Dialect;

pub(super) const ROW: &str = "a.id, a.name, a.host, a.status, a.status_since, a.offline_at, a.connection_id, c.transport,
    c.remote_addr, a.healthy, a.groups, a.clients_count, a.sync_revision, a.ephemeral, l.last_seen_at, l.poll_silence_ms,
    a.last_connected_at, a.last_disconnected_at, a.disconnect_reason, a.previous_id, a.retired_at, a.created_at,
    a.updated_at";

pub(super) const JOINED: &str = " FROM agents a LEFT JOIN agent_liveness l ON l.agent_id = a.id
    LEFT JOIN agent_connection_history c ON c.id = a.connection_id";

const LIVENESS: &str = " LEFT JOIN agent_liveness l ON l.agent_id = a.id";

const CONNECTION: &str = " LEFT JOIN agent_connection_history c ON c.id = a.connection_id";

pub(super) const DETAIL: &str = ", a.capabilities, a.description, a.health, a.effective_config, a.remote_config_status,
    a.package_statuses, a.custom_capabilities, a.components_hash, a.connection_settings_status, l.sequence_num,
    (SELECT i.components FROM component_inventories i WHERE i.hash = a.components_hash) AS components";

/// The query for the moment of the next pending verdict.
pub(in crate::store) const NEXT_OVERDUE: &str =
    "SELECT min(offline_at) FROM agents WHERE offline_at IS NOT NULL";

/// Adds the query for the number of agents that match.
pub(in crate::store) fn count_agents<D>(query: &mut QueryBuilder<D>, filter: &AgentFilter)
where
    D: Dialect,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> bool: Encode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query.push("SELECT count(*)");
    from_found(query, filter, None);
}

/// Adds the query for the next agents that match, by id.
pub(in crate::store) fn select_agents<D>(
    query: &mut QueryBuilder<D>,
    filter: &AgentFilter,
    page: PageRequest<InstanceUid>,
) where
    D: Dialect,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> bool: Encode<'q, D> + Type<D>,
    for<'q> i64: Encode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query.push("SELECT ").push(ROW);
    let searches = filter.search().is_some();
    let page_first = D::PAGE_FIRST || searches;
    let id = if searches { "found.id" } else { "a.id" };
    if page_first {
        query.push(" FROM (SELECT ").push(id);
        from_found(query, filter, page.after);
    } else {
        query.push(" FROM agents a").push(LIVENESS).push(CONNECTION).push(" WHERE true");
        narrow(query, filter, "", true);
        push_after(query, id, page.after);
    }
    query.push(format!(" ORDER BY {id} LIMIT ")).push_bind(i64::from(page.limit));
    if page_first {
        query.push(") page").push(D::ROWS_OF_PAGE).push(LIVENESS).push(CONNECTION);
        query.push(" ORDER BY page.id");
    }
}

/// Adds the agents that match and follow `after`, joined with nothing but what `filter` looks at.
pub(in crate::store) fn from_matching<D>(
    query: &mut QueryBuilder<D>,
    filter: &AgentFilter,
    after: Option<InstanceUid>,
) where
    D: Dialect,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> bool: Encode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    let ranges = ranges(filter);
    // A search chooses the indexes, each of its ranges one.
    let look = if ranges.is_empty() { "" } else { D::LOOK_THROUGH };
    from_narrowed(query, filter, look);
    for (index, range) in ranges.iter().enumerate() {
        query.push(if index == 0 { " AND (" } else { " OR " });
        range.push(query);
    }
    if !ranges.is_empty() {
        query.push(")");
    }
    push_after(query, &format!("{look}a.id"), after);
}

/// Adds the agents that match and follow `after`: of a search their ids only, as `found`. Those come range by range, each
/// without whom an earlier one has, so that an index holds all that a range asks for.
fn from_found<D>(query: &mut QueryBuilder<D>, filter: &AgentFilter, after: Option<InstanceUid>)
where
    D: Dialect,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> bool: Encode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    let ranges = ranges(filter);
    if ranges.is_empty() {
        return from_matching(query, filter, after);
    }
    for (index, range) in ranges.iter().enumerate() {
        query.push(if index == 0 { " FROM (SELECT a.id" } else { " UNION ALL SELECT a.id" });
        from_narrowed(query, filter, range.look::<D>());
        query.push(" AND ");
        range.push(query);
        for earlier in &ranges[..index] {
            query.push(" AND ");
            earlier.push(query);
            query.push(" IS NOT TRUE");
        }
    }
    query.push(D::ALL_FIRST).push(") found WHERE true");
    push_after(query, "found.id", after);
}

/// Adds the condition that `id` follows `after`.
fn push_after<D>(query: &mut QueryBuilder<D>, id: &str, after: Option<InstanceUid>)
where
    D: Dialect,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
{
    if let Some(after) = after {
        query.push(format!(" AND {id} > ")).push_bind(after.as_uuid());
    }
}

/// Adds the agents of whom all conditions hold but what is searched for.
fn from_narrowed<D>(query: &mut QueryBuilder<D>, filter: &AgentFilter, look: &str)
where
    D: Dialect,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> bool: Encode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    query.push(" FROM agents a");
    if filter.unseen_since.is_some() {
        query.push(LIVENESS);
    }
    query.push(" WHERE true");
    narrow(query, filter, look, false);
}

/// Adds the conditions of `filter` but what is searched for, with `look` before the columns that must not choose the index;
/// `walked` where the connection is joined and the rows are met one by one.
fn narrow<D>(query: &mut QueryBuilder<D>, filter: &AgentFilter, look: &str, walked: bool)
where
    D: Dialect,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> &'q str: Encode<'q, D> + Type<D>,
    for<'q> bool: Encode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    if let Some(id) = filter.id {
        query.push(" AND a.id = ").push_bind(id.as_uuid());
    }
    if !filter.statuses.is_empty() {
        let mut list = query.push(" AND ").push(look).push("a.status IN (").separated(", ");
        for status in &filter.statuses {
            list.push_bind(status.label());
        }
        query.push(")");
    } else if !filter.include_retired {
        query.push(" AND ").push(look).push("a.status IN ('online', 'offline', 'error')");
    }
    if let Some(connected) = filter.connected {
        query.push(" AND ").push(look).push("a.connection_id IS ").push(if connected {
            "NOT NULL"
        } else {
            "NULL"
        });
    }
    if let Some(healthy) = filter.healthy {
        query.push(" AND ").push(look).push("a.healthy = ").push_bind(healthy);
    }
    if let Some(transport) = filter.transport {
        query.push(" AND ").push(look).push("a.connection_id IS NOT NULL AND ").push(look);
        query.push(if walked {
            "(c.transport = "
        } else {
            "a.id IN (SELECT o.agent_id FROM agent_connection_history o WHERE o.disconnected_at IS NULL AND o.transport = "
        });
        query.push_bind(transport.label()).push(")");
    }
    if !filter.attributes.is_empty() {
        query.push(" AND ");
        has_attributes(query, &filter.attributes);
    }
    if let Some(since) = filter.unseen_since {
        query.push(" AND l.last_seen_at < ").push_bind(since);
    }
}

/// Agents beside each other in one index.
enum Range<'a> {
    /// Whose name, or host, begins with a text in any case.
    Texts { column: &'static str, prefix: &'a str },
    /// With a uid between these, both included.
    Uids(Uuid, Uuid),
}

/// Where whoever is searched for may be: anybody in one of these; empty where nobody is searched for.
fn ranges(filter: &AgentFilter) -> Vec<Range<'_>> {
    let Some(prefix) = filter.search() else { return Vec::new() };
    // Both other indexes hold the uid, so that it comes first: it is what they can leave out.
    let uids = uid_range(&prefix.to_ascii_lowercase()).map(|(low, high)| Range::Uids(low, high));
    uids.into_iter().chain(["name", "host"].map(|column| Range::Texts { column, prefix })).collect()
}

impl Range<'_> {
    /// What stands before the columns of all other conditions: uids are in every index, beside the status at best.
    fn look<D: Dialect>(&self) -> &'static str {
        match self {
            Self::Texts { .. } => D::LOOK_THROUGH,
            Self::Uids(..) => "",
        }
    }

    /// Adds the condition that the agent `a` is one of them.
    fn push<D>(&self, query: &mut QueryBuilder<D>)
    where
        D: Dialect,
        for<'q> String: Encode<'q, D> + Type<D>,
        for<'q> Uuid: Encode<'q, D> + Type<D>,
    {
        match self {
            Self::Texts { column, prefix } => {
                // No character sorts behind the last code point, so that the range holds every text with this prefix.
                // The database folds the case of both sides, each in its own way.
                let column = D::sorted_by_bytes(&format!("lower(a.{column})"));
                query.push(format!("({column} >= lower(")).push_bind((*prefix).to_owned());
                query.push(format!(") AND {column} <= lower(")).push_bind(format!("{prefix}\u{10ffff}"));
                query.push("))");
            }
            Self::Uids(low, high) => {
                query.push("(a.id >= ").push_bind(*low).push(" AND a.id <= ").push_bind(*high).push(")");
            }
        }
    }
}

/// The first and the last uid whose text begins with `prefix`; none where no uid does.
fn uid_range(prefix: &str) -> Option<(Uuid, Uuid)> {
    let pattern = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx";
    let fits = prefix.len() <= pattern.len()
        && prefix
            .chars()
            .zip(pattern.chars())
            .all(|(c, p)| if p == '-' { c == '-' } else { c.is_ascii_hexdigit() });
    if !fits {
        return None;
    }
    let fill = |digit: &str| format!("{prefix}{}", pattern[prefix.len()..].replace('x', digit));
    Some((Uuid::parse_str(&fill("0")).ok()?, Uuid::parse_str(&fill("f")).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uid_prefix_is_a_range_of_uids() {
        let (low, high) = uid_range("0190d3c2-7").unwrap();
        assert_eq!(low.to_string(), "0190d3c2-7000-0000-0000-000000000000");
        assert_eq!(high.to_string(), "0190d3c2-7fff-ffff-ffff-ffffffffffff");
        assert!(uid_range("").is_some());
        assert_eq!(uid_range("edge"), None);
        assert_eq!(uid_range("0190d3c27"), None, "the text form has a dash there");
    }
}
