//! What the sessions of a node share: its parts, as they are put together at the start.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::hub::Hub;
use crate::clock::{Clock, Rate};
use crate::heartbeat::Watch;
use crate::history::History;
use crate::metrics::{Metrics, Refused};
use crate::outage::Outage;
use crate::peers::Peers;
use crate::sight::Sight;
use crate::store::Store;

/// What every session of a node works with.
pub struct Services {
    /// Where uids are assigned and polls on record are looked up.
    pub store: Arc<dyn Store>,
    /// Where connections are opened, saved and ended.
    pub history: History,
    /// Who lives on this node.
    pub hub: Arc<Hub>,
    /// Who says that an agent fell silent.
    pub watch: Watch,
    /// Time.
    pub clock: Clock,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Whether the store is away.
    pub outage: Arc<Outage>,
    /// Whether the server itself was blind.
    pub sight: Arc<Sight>,
    /// The other nodes, on which polls may land.
    pub peers: Arc<Peers>,
    /// Whose turn it is to be asked for full state.
    pub questions: Rate,
    /// True once the server stops: no session opens any more.
    pub closing: AtomicBool,
}

impl Services {
    /// Counts a newcomer, or a message, that was refused; who was refused for want of room may return later
    /// than else.
    pub fn note_refusal(&self, cause: Refused) {
        self.metrics.refused.of(cause).increment(1);
        if matches!(cause, Refused::Connections | Refused::Rate | Refused::Store) {
            self.sight.refuse(self.clock.tick());
        }
    }
}

impl std::fmt::Debug for Services {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Services").field("history", &self.history).finish_non_exhaustive()
    }
}
