//! Operators' orders on their way to the links: read from the store, carried out where the connection lives.
//!
//! A wake carries nothing but "look in the store again", so wakes may double or get lost. They come
//! from this node's own API at once and from other nodes through the database; while nobody listens
//! there, and as a safety net, the task looks at a pace. An order names its connection: one that
//! lives here with that very id is ended on record, and its link tells the peer after that.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::close::CloseReason;
use crate::config::Secret;
use crate::history::{History, Noticed, OpenConnection};
use crate::session::hub::Hub;
use crate::store::{Store, StoreError, Transport};

/// How often to look while wakes of other nodes are not heard, or an order waits for its connection.
const PACE: Duration = Duration::from_secs(1);

/// Carries out the orders for the connections of this node.
pub struct Orders {
    /// Where they stand.
    pub store: Arc<dyn Store>,
    /// Where connections are ended.
    pub history: History,
    /// Which connections live here.
    pub hub: Arc<Hub>,
    /// This node.
    pub node_id: Uuid,
    /// Told when an order was written on this node.
    pub written: Arc<Notify>,
    /// Where to listen, if not at the store's own URL.
    pub listen_url: Option<Secret>,
    /// Pace of the safety net.
    pub check_interval: Duration,
}

impl std::fmt::Debug for Orders {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Orders").field("node_id", &self.node_id).finish_non_exhaustive()
    }
}

impl Orders {
    /// Works until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let listening = AtomicBool::new(false);
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.listen(&listening) => {}
            () = self.obey(&listening) => {}
        }
    }

    /// Listens for the wakes of other nodes, again and again.
    async fn listen(&self, listening: &AtomicBool) {
        let heard = || {
            listening.store(true, Ordering::Relaxed);
            self.written.notify_one();
        };
        loop {
            let error = self.store.hear_orders(self.listen_url.as_ref().map(Secret::expose), &heard).await;
            if listening.swap(false, Ordering::Relaxed) {
                tracing::warn!(%error, "orders of other nodes are looked for every {PACE:?}: nothing is heard of them");
            } else {
                tracing::debug!(%error, "orders of other nodes are still not heard");
            }
            // Who waits for a wake waits no longer than while it was heard.
            self.written.notify_one();
            tokio::time::sleep(PACE).await;
        }
    }

    async fn obey(&self, listening: &AtomicBool) {
        loop {
            let settled = self.carry_out().await.unwrap_or_else(|error| {
                tracing::warn!(%error, "orders wait for the store");
                false
            });
            let at_ease = settled && listening.load(Ordering::Relaxed);
            let pause = if at_ease { self.check_interval } else { PACE.min(self.check_interval) };
            tokio::select! {
                () = self.written.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Looks once; false where an order is for a connection that did not enter this node's hub yet.
    async fn carry_out(&self) -> Result<bool, StoreError> {
        let mut settled = true;
        for order in self.store.list_close_orders(self.node_id).await? {
            let here = self.hub.get(order.agent).filter(|connection| connection.id == order.connection_id);
            match here {
                Some(connection) => {
                    // The link is told once that is on record.
                    let _told = self.history.end(&connection, order.reason, Noticed::Concluded);
                }
                None => settled = false,
            }
        }
        self.release_pollers().await?;
        Ok(settled)
    }

    /// Lets go of pollers whose connection was ended in the store, so that their next poll opens a new one.
    async fn release_pollers(&self) -> Result<(), StoreError> {
        let mut polling: HashMap<i64, Arc<OpenConnection>> = self
            .hub
            .connections()
            .into_iter()
            .filter(|connection| connection.transport == Transport::Http)
            .map(|connection| (connection.id, connection))
            .collect();
        if polling.is_empty() {
            return Ok(());
        }
        let ids: Vec<i64> = polling.keys().copied().collect();
        for id in self.store.list_ended_connections(&ids).await? {
            if let Some(connection) = polling.remove(&id) {
                connection.abandon(CloseReason::Deleted);
                self.hub.leave(&connection);
            }
        }
        Ok(())
    }
}
