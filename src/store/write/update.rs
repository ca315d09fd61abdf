//! What agents reported: records, indexed attributes, inventories.
//!
//! Most documents travel in the batch. A bulky one goes by itself, bound as it is: inside a batch the
//! databases would read and copy it many times over.

use std::collections::HashSet;

use serde::ser::{Serialize, SerializeTuple, Serializer};
use serde_json::Value;
use sqlx::types::Json;
use sqlx::{ColumnIndex, Decode, Encode, Executor, FromRow, IntoArguments, Transaction, Type};
use uuid::Uuid;

use super::{AgentUpdate, LockedAgent, OpenRow, Seen};
use crate::agent::InstanceUid;
use crate::clock::Moment;
use crate::store::StoreError;
use crate::store::attributes::attribute_set;
use crate::store::dialect::{Column, Dialect, SqlStore, batch, failure, rows, sql};

/// Documents with more text than so many bytes go by themselves.
const BULKY: usize = 64 << 10;

/// The columns of documents.
const DOCUMENTS: [&str; 7] = [
    "description",
    "health",
    "effective_config",
    "remote_config_status",
    "package_statuses",
    "custom_capabilities",
    "connection_settings_status",
];

/// The documents of an update, in the order of [`DOCUMENTS`].
fn documents(update: &AgentUpdate) -> [Option<&Value>; DOCUMENTS.len()] {
    let documents = &update.documents;
    [
        documents.description.as_ref().map(|described| &described.document),
        documents.health.as_ref(),
        documents.effective_config.as_ref(),
        documents.remote_config_status.as_ref(),
        documents.package_statuses.as_ref(),
        documents.custom_capabilities.as_ref(),
        documents.connection_settings_status.as_ref(),
    ]
}

/// True where a document has more text than [`BULKY`].
fn is_bulky(document: &Value) -> bool {
    text_left(document, BULKY).is_none()
}

/// What is left of `left` bytes after the texts of `document`; none where they are more.
fn text_left(document: &Value, left: usize) -> Option<usize> {
    match document {
        Value::Null | Value::Bool(_) | Value::Number(_) => left.checked_sub(1),
        Value::String(text) => left.checked_sub(text.len()),
        Value::Array(list) => list.iter().try_fold(left, |left, item| text_left(item, left)),
        Value::Object(members) => {
            members.iter().try_fold(left, |left, (name, item)| text_left(item, left.checked_sub(name.len())?))
        }
    }
}

/// An update as an element of its batch, in the order of [`UPDATE_COLUMNS`], written from where it stands.
struct UpdateRow<'a> {
    update: &'a AgentUpdate,
    /// The documents that go with the batch.
    documents: [Option<&'a Value>; DOCUMENTS.len()],
}

impl Serialize for UpdateRow<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let described = self.update.documents.description.as_ref();
        let mut row = serializer.serialize_tuple(UPDATE_COLUMNS.len())?;
        row.serialize_element(&self.update.agent)?;
        row.serialize_element(&self.update.connection_id)?;
        row.serialize_element(&self.update.at.as_micros())?;
        row.serialize_element(&self.update.capabilities.0.cast_signed())?;
        row.serialize_element(&described.is_some())?;
        row.serialize_element(&described.and_then(|described| described.name.as_ref()))?;
        row.serialize_element(&described.and_then(|described| described.host.as_ref()))?;
        row.serialize_element(&described.map(|described| &described.groups))?;
        row.serialize_element(&described.is_some_and(|described| described.ephemeral))?;
        row.serialize_element(&described.map_or(0, |described| described.clients_count))?;
        row.serialize_element(&self.update.documents.healthy)?;
        row.serialize_element(&self.update.documents.sync_revision)?;
        row.serialize_element(&self.update.documents.components_hash)?;
        row.serialize_element(&self.update.late)?;
        row.serialize_element(&self.update.read_at.as_micros())?;
        for document in self.documents {
            row.serialize_element(&document)?;
        }
        row.end()
    }
}

const UPDATE_COLUMNS: [(&str, Column); 15 + DOCUMENTS.len()] = [
    ("agent", Column::Uuid),
    ("connection_id", Column::Integer),
    ("at", Column::Moment),
    ("capabilities", Column::Integer),
    ("described", Column::Boolean),
    ("name", Column::Text),
    ("host", Column::Text),
    ("groups", Column::Json),
    ("ephemeral", Column::Boolean),
    ("clients_count", Column::Integer),
    ("healthy", Column::Boolean),
    ("sync_revision", Column::Text),
    ("components_hash", Column::Text),
    ("late", Column::Boolean),
    ("read_at", Column::Moment),
    (DOCUMENTS[0], Column::Json),
    (DOCUMENTS[1], Column::Json),
    (DOCUMENTS[2], Column::Json),
    (DOCUMENTS[3], Column::Json),
    (DOCUMENTS[4], Column::Json),
    (DOCUMENTS[5], Column::Json),
    (DOCUMENTS[6], Column::Json),
];

impl<D> SqlStore<D>
where
    D: Dialect,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    D::Arguments: IntoArguments<D>,
    for<'r> LockedAgent: FromRow<'r, D::Row>,
    for<'r> OpenRow: FromRow<'r, D::Row>,
    usize: ColumnIndex<D::Row>,
    for<'q> String: Encode<'q, D> + Type<D>,
    for<'q> i64: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Uuid: Encode<'q, D> + Decode<'q, D> + Type<D>,
    for<'q> Json<&'q Value>: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    /// Stores what agents reported; answers whose report was stored.
    pub(super) async fn update_agents(
        tx: &mut Transaction<'_, D>,
        updates: &[&AgentUpdate],
    ) -> Result<HashSet<InstanceUid>, StoreError> {
        if updates.is_empty() {
            return Ok(HashSet::new());
        }
        let kept: Vec<String> = ["healthy", "sync_revision", "components_hash"]
            .iter()
            .chain(&DOCUMENTS)
            .map(|column| format!("{column} = coalesce(r.{column}, a.{column}), "))
            .collect();
        let described: String = ["name", "host", "groups", "ephemeral", "clients_count"]
            .map(|column| format!("{column} = CASE WHEN r.described THEN r.{column} ELSE a.{column} END, "))
            .concat();
        let text = format!(
            "UPDATE agents AS a SET {}{described}
                 capabilities = r.capabilities, updated_at = {}(a.updated_at, r.at)
             FROM {} r WHERE a.id = r.agent AND a.connection_id = r.connection_id
                 AND NOT (r.late AND EXISTS (SELECT 1 FROM agent_liveness l
                                             WHERE l.agent_id = a.id AND l.last_seen_at > r.read_at))
             RETURNING id",
            kept.concat(),
            D::GREATEST,
            rows::<D>(&UPDATE_COLUMNS)
        );
        let row = |update| UpdateRow {
            update,
            documents: documents(update).map(|document| document.filter(|document| !is_bulky(document))),
        };
        let values: Vec<UpdateRow<'_>> = updates.iter().copied().map(row).collect();
        let stored: Vec<(Uuid,)> = sqlx::query_as(sql(text))
            .bind(batch(&values))
            .fetch_all(&mut **tx)
            .await
            .map_err(failure::<D>)?;
        let stored: HashSet<InstanceUid> = stored.into_iter().map(|(id,)| id.into()).collect();
        let stored_updates: Vec<_> =
            updates.iter().copied().filter(|update| stored.contains(&update.agent)).collect();
        let seen = |update: &&AgentUpdate| Seen {
            agent: update.agent,
            at: update.at,
            number: update.sequence_num,
            unsaved: false,
        };
        Self::update_liveness(tx, stored_updates.iter().map(seen)).await?;
        let described = stored_updates.iter().filter_map(|update| {
            update.documents.description.as_ref().map(|described| (update.agent, &described.attributes))
        });
        let sets: Vec<_> = described.map(|(agent, attributes)| attribute_set(agent, attributes)).collect();
        Self::replace_attributes(tx, &sets).await?;
        for update in &stored_updates {
            Self::store_bulky(tx, update).await?;
        }
        // Sorted like the agents: whoever stores the same ones elsewhere must not wait in a circle.
        let mut inventories = stored_updates;
        inventories.sort_unstable_by_key(|update| &update.documents.components_hash);
        for update in inventories {
            Self::store_inventory(tx, update).await?;
        }
        Ok(stored)
    }

    /// Stores the bulky documents of an agent whose row this transaction holds.
    async fn store_bulky(tx: &mut Transaction<'_, D>, update: &AgentUpdate) -> Result<(), StoreError> {
        for (column, document) in DOCUMENTS.into_iter().zip(documents(update)) {
            let Some(document) = document.filter(|document| is_bulky(document)) else { continue };
            sqlx::query(sql(format!("UPDATE agents SET {column} = $1 WHERE id = $2")))
                .bind(Json(document))
                .bind(update.agent.as_uuid())
                .execute(&mut **tx)
                .await
                .map_err(failure::<D>)?;
        }
        Ok(())
    }

    /// Stores the inventory that an agent reported, once per hash.
    async fn store_inventory(tx: &mut Transaction<'_, D>, update: &AgentUpdate) -> Result<(), StoreError> {
        let (Some(hash), Some(components)) =
            (&update.documents.components_hash, &update.documents.components)
        else {
            return Ok(());
        };
        sqlx::query(
            "INSERT INTO component_inventories (hash, components, created_at)
             VALUES ($1, $2, $3) ON CONFLICT (hash) DO NOTHING",
        )
        .bind(hash.clone())
        .bind(Json(components))
        .bind(update.at)
        .execute(&mut **tx)
        .await
        .map_err(failure::<D>)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_document_is_bulky_by_all_its_text() {
        assert!(!is_bulky(&json!({ "body": "x".repeat(BULKY - 4) })));
        assert!(is_bulky(&json!({ "body": "x".repeat(BULKY - 3) })));
        assert!(is_bulky(&json!(["x".repeat(BULKY / 2), { "b": "x".repeat(BULKY / 2) }])));
        assert!(is_bulky(&json!(vec![0; BULKY + 1])));
    }
}
