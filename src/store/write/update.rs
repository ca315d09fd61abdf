//! What agents reported: records, indexed attributes, inventories.
//!
//! Most documents travel in the batch. A bulky one goes by itself, bound as it is: inside a batch the
//! databases would read and copy it many times over.

use std::collections::HashSet;

use serde::ser::{Serialize, SerializeTuple, Serializer};
use sqlx::types::Json;
use sqlx::{ColumnIndex, Decode, Encode, Executor, FromRow, IntoArguments, Transaction, Type};
use uuid::Uuid;

use super::{AgentUpdate, LockedAgent, Newcomer, OpenRow, Seen};
use crate::agent::document::{Document, Documents};
use crate::agent::{Capabilities, InstanceUid};
use crate::clock::Moment;
use crate::store::StoreError;
use crate::store::attributes::AttributeSet;
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

/// What an agent reported, on its way into its row.
#[derive(Clone, Copy)]
pub(super) struct Reported<'a> {
    agent: InstanceUid,
    connection_id: i64,
    at: Moment,
    read_at: Moment,
    late: bool,
    sequence_num: Option<u64>,
    capabilities: Capabilities,
    documents: &'a Documents,
}

impl<'a> From<&'a AgentUpdate> for Reported<'a> {
    fn from(update: &'a AgentUpdate) -> Self {
        Self {
            agent: update.agent,
            connection_id: update.connection_id,
            at: update.at,
            read_at: update.read_at,
            late: update.late,
            sequence_num: update.sequence_num,
            capabilities: update.capabilities,
            documents: &update.documents,
        }
    }
}

impl<'a> Reported<'a> {
    /// The first report of a newcomer with this connection, where it is stored with it.
    pub(super) fn first(newcomer: &'a Newcomer<'_>, connection_id: i64) -> Option<Self> {
        let report = newcomer.first_report()?;
        Some(Self {
            agent: newcomer.new.agent,
            connection_id,
            at: newcomer.at,
            read_at: newcomer.at,
            late: false,
            sequence_num: report.sequence_num,
            capabilities: report.capabilities,
            documents: &report.documents,
        })
    }
}

/// An inventory that an agent reported.
pub(super) struct Inventory<'a> {
    hash: &'a str,
    components: &'a Document,
    at: Moment,
}

impl<'a> Inventory<'a> {
    /// The inventory among the documents of a report, if there is one.
    pub(super) fn of(documents: &'a Documents, at: Moment) -> Option<Self> {
        let (hash, components) = (documents.components_hash.as_deref()?, documents.components.as_ref()?);
        Some(Self { hash, components, at })
    }
}

/// Whose reports are stored.
#[derive(Clone, Copy)]
enum Whose {
    /// Those of the connections that hold the fences.
    Holders,
    /// Those of newcomers of whom nothing is on record: they get the fences.
    Newcomers,
}

/// The documents of a report, in the order of [`DOCUMENTS`].
fn documents<'a>(report: &Reported<'a>) -> [Option<&'a Document>; DOCUMENTS.len()] {
    let documents = report.documents;
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
fn is_bulky(document: &Document) -> bool {
    document.text().len() > BULKY
}

/// A report as an element of its batch, in the order of [`UPDATE_COLUMNS`], written from where it stands.
struct UpdateRow<'a> {
    report: &'a Reported<'a>,
    /// The documents that go with the batch.
    documents: [Option<&'a Document>; DOCUMENTS.len()],
}

impl Serialize for UpdateRow<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let described = self.report.documents.description.as_ref();
        let mut row = serializer.serialize_tuple(UPDATE_COLUMNS.len())?;
        row.serialize_element(&self.report.agent)?;
        row.serialize_element(&self.report.connection_id)?;
        row.serialize_element(&self.report.at.as_micros())?;
        row.serialize_element(&self.report.capabilities.0.cast_signed())?;
        row.serialize_element(&described.is_some())?;
        row.serialize_element(&described.and_then(|described| described.name.as_ref()))?;
        row.serialize_element(&described.and_then(|described| described.host.as_ref()))?;
        row.serialize_element(&described.map(|described| &described.groups))?;
        row.serialize_element(&described.is_some_and(|described| described.ephemeral))?;
        row.serialize_element(&described.map_or(0, |described| described.clients_count))?;
        row.serialize_element(&self.report.documents.healthy)?;
        row.serialize_element(&self.report.documents.sync_revision)?;
        row.serialize_element(&self.report.documents.components_hash)?;
        row.serialize_element(&self.report.late)?;
        row.serialize_element(&self.report.read_at.as_micros())?;
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
    for<'q> Json<&'q Document>: Encode<'q, D> + Type<D>,
    for<'q> Moment: Encode<'q, D> + Type<D>,
{
    /// Stores what agents reported whose connections hold the fences; answers whose report was stored.
    pub(super) async fn update_agents(
        tx: &mut Transaction<'_, D>,
        reports: &[Reported<'_>],
    ) -> Result<HashSet<InstanceUid>, StoreError> {
        let stored = Self::store_states(tx, reports, Whose::Holders).await?;
        let reports: Vec<_> =
            reports.iter().copied().filter(|report| stored.contains(&report.agent)).collect();
        let seen = |report: &Reported<'_>| Seen {
            agent: report.agent,
            at: report.at,
            number: report.sequence_num,
            unsaved: false,
        };
        Self::update_liveness(tx, reports.iter().map(seen)).await?;
        Self::store_beside(tx, &reports).await?;
        Ok(stored)
    }

    /// Stores the first reports of newcomers, and makes them the ones whose writes count, and their agents online.
    pub(super) async fn store_first_reports(
        tx: &mut Transaction<'_, D>,
        reports: &[Reported<'_>],
    ) -> Result<(), StoreError> {
        Self::store_states(tx, reports, Whose::Newcomers).await?;
        Self::store_beside(tx, reports).await
    }

    /// Stores reports in their agents' rows; answers those agents.
    async fn store_states(
        tx: &mut Transaction<'_, D>,
        reports: &[Reported<'_>],
        whose: Whose,
    ) -> Result<HashSet<InstanceUid>, StoreError> {
        if reports.is_empty() {
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
        let (arrival, holds) = match whose {
            Whose::Holders => (
                "",
                "a.connection_id = r.connection_id
                 AND NOT (r.late AND EXISTS (SELECT 1 FROM agent_liveness l
                                             WHERE l.agent_id = a.id AND l.last_seen_at > r.read_at))",
            ),
            Whose::Newcomers => (
                "connection_id = r.connection_id, status = 'online', status_since = r.at, last_connected_at = r.at,
                 offline_at = NULL, stale_from = NULL, retired_at = NULL, ",
                "true",
            ),
        };
        let text = format!(
            "UPDATE agents AS a SET {}{described}{arrival}
                 capabilities = r.capabilities, updated_at = {}(a.updated_at, r.at)
             FROM {} r WHERE a.id = r.agent AND {holds}
             RETURNING id",
            kept.concat(),
            D::GREATEST,
            rows::<D>(&UPDATE_COLUMNS)
        );
        let row = |report| UpdateRow {
            report,
            documents: documents(report).map(|document| document.filter(|document| !is_bulky(document))),
        };
        let values: Vec<UpdateRow<'_>> = reports.iter().map(row).collect();
        let stored: Vec<(Uuid,)> = sqlx::query_as(sql(text))
            .bind(batch(&values))
            .fetch_all(&mut **tx)
            .await
            .map_err(failure::<D>)?;
        Ok(stored.into_iter().map(|(id,)| id.into()).collect())
    }

    /// Stores what stands beside the rows of agents that this transaction holds: attributes, bulky documents.
    async fn store_beside(tx: &mut Transaction<'_, D>, reports: &[Reported<'_>]) -> Result<(), StoreError> {
        let sets: Vec<_> = reports
            .iter()
            .filter_map(|report| {
                let described = report.documents.description.as_ref()?;
                Some(AttributeSet { agent: report.agent, attributes: &described.attributes })
            })
            .collect();
        Self::replace_attributes(tx, &sets).await?;
        for report in reports {
            Self::store_bulky(tx, report).await?;
        }
        Ok(())
    }

    /// Stores the bulky documents of an agent whose row this transaction holds.
    async fn store_bulky(tx: &mut Transaction<'_, D>, report: &Reported<'_>) -> Result<(), StoreError> {
        for (column, document) in DOCUMENTS.into_iter().zip(documents(report)) {
            let Some(document) = document.filter(|document| is_bulky(document)) else { continue };
            sqlx::query(sql(format!("UPDATE agents SET {column} = $1 WHERE id = $2")))
                .bind(Json(document))
                .bind(report.agent.as_uuid())
                .execute(&mut **tx)
                .await
                .map_err(failure::<D>)?;
        }
        Ok(())
    }

    /// Stores the inventories that agents reported, once per hash.
    pub(super) async fn store_inventories(
        tx: &mut Transaction<'_, D>,
        mut inventories: Vec<Inventory<'_>>,
    ) -> Result<(), StoreError> {
        // All of a batch in one order: whoever stores the same ones elsewhere must not wait in a circle.
        inventories.sort_unstable_by_key(|inventory| inventory.hash);
        inventories.dedup_by_key(|inventory| inventory.hash);
        for inventory in inventories {
            sqlx::query(
                "INSERT INTO component_inventories (hash, components, created_at)
                 VALUES ($1, $2, $3) ON CONFLICT (hash) DO NOTHING",
            )
            .bind(inventory.hash.to_owned())
            .bind(Json(inventory.components))
            .bind(inventory.at)
            .execute(&mut **tx)
            .await
            .map_err(failure::<D>)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn a_document_is_bulky_by_its_text() {
        let of = |length: usize| Document::from(Value::from("x".repeat(length)));
        assert!(!is_bulky(&of(BULKY - 2)), "two quotes make it whole");
        assert!(is_bulky(&of(BULKY - 1)));
    }
}
