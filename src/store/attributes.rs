//! The attributes of agents as they are stored and found: one row for each agent, and an inverted index of its pairs.
//!
//! A row and an index entry for each attribute would be most of what a fleet writes when it connects first. Here the
//! databases' own inverted indexes do it: GIN in Postgres, FTS5 in SQLite, which its triggers keep.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Serialize, Serializer};
use serde_json::{Map, Value};
use sqlx::types::Json;
use sqlx::{Encode, Executor, IntoArguments, QueryBuilder, Transaction, Type};

use super::StoreError;
use super::dialect::{Column, Dialect, SqlStore, batch, failure, rows, sql};
use crate::agent::InstanceUid;
use crate::incidents::CauseKind;

/// The attributes of an agent that may be causes, key to value.
pub(super) type Causes = Json<BTreeMap<String, String>>;

/// An attribute as one text, `key=value`. In the key, `%` is `%25` and `=` is `%3D`, so that the first `=` is the border.
struct Pair<'a>(&'a str, &'a str);

impl fmt::Display for Pair<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(key, value) = self;
        if key.contains(['%', '=']) {
            f.write_str(&key.replace('%', "%25").replace('=', "%3D"))?;
        } else {
            f.write_str(key)?;
        }
        f.write_str("=")?;
        f.write_str(value)
    }
}

impl Serialize for Pair<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Adds the condition that the agent `a` has these attributes, one at least.
pub(super) fn has_attributes<D>(query: &mut QueryBuilder<D>, attributes: &BTreeMap<String, String>)
where
    D: Dialect,
    for<'q> String: Encode<'q, D> + Type<D>,
{
    let [begin, between, end] = D::WITH_PAIRS;
    query.push(D::LOOK_THROUGH).push("a.id IN (SELECT s.agent_id FROM agent_attribute_sets s ");
    for (index, (key, value)) in attributes.iter().enumerate() {
        query.push(if index == 0 { begin } else { between }).push_bind(Pair(key, value).to_string());
    }
    query.push(end).push(")");
}

/// Adds the query for the attributes of all agents that may be causes: its id and [`Causes`].
pub(super) fn select_causes<D: Dialect>(query: &mut QueryBuilder<D>) {
    query.push("SELECT s.agent_id, s.causes FROM agent_attribute_sets s ").push(D::CAUSES);
}

/// The attributes of one agent as an element of its batch, written from where they stand: whose, those that may be causes,
/// all pairs.
pub(super) struct AttributeSet<'a> {
    pub(super) agent: InstanceUid,
    pub(super) attributes: &'a Map<String, Value>,
}

impl AttributeSet<'_> {
    fn texts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.attributes.iter().filter_map(|(key, value)| Some((key.as_str(), value.as_str()?)))
    }
}

impl Serialize for AttributeSet<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let causes = self.texts().filter(|(key, _)| CauseKind::of_attribute(key).is_some());
        let causes: BTreeMap<_, _> = causes.collect();
        let pairs: Vec<_> = self.texts().map(|(key, value)| Pair(key, value)).collect();
        (self.agent, causes, pairs).serialize(serializer)
    }
}

impl<D> SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'q> String: Encode<'q, D> + Type<D>,
{
    /// Replaces the attributes of agents whose rows this transaction holds. Where they are the same, the index is left alone.
    pub(super) async fn replace_attributes(
        tx: &mut Transaction<'_, D>,
        sets: &[AttributeSet<'_>],
    ) -> Result<(), StoreError> {
        if sets.is_empty() {
            return Ok(());
        }
        let columns = [("id", Column::Uuid), ("causes", Column::Json), ("pairs", Column::Texts)];
        let text = format!(
            "INSERT INTO agent_attribute_sets (agent_id, causes, pairs) SELECT r.id, r.causes, r.pairs FROM {} r WHERE true {}
             ON CONFLICT (agent_id) DO UPDATE SET causes = excluded.causes, pairs = excluded.pairs
             WHERE agent_attribute_sets.pairs <> excluded.pairs OR agent_attribute_sets.causes <> excluded.causes",
            rows::<D>(&columns),
            D::SETS_IN_ORDER
        );
        sqlx::query(sql(text)).bind(batch(sets)).execute(&mut **tx).await.map_err(failure::<D>)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_attributes_make_the_same_pair() {
        let pair = |key, value| Pair(key, value).to_string();
        assert_eq!(pair("zone", "a=b"), "zone=a=b");
        assert_eq!(pair("zone=a", "b"), "zone%3Da=b");
        assert_eq!(pair("zone%3Da", "b"), "zone%253Da=b");
        assert_eq!(pair("", ""), "=");
    }
}
