//! A report on its way in, and where it comes from.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::agent::document::Documents;
use crate::agent::report::{AgentState, Change, KnownAgent, Outline, PartSet};
use crate::burden::Share;
use crate::proto::AgentToServer;
use crate::pulse::Link;
use crate::store::{FirstReport, Transport};

/// Where reports come from.
#[derive(Clone, Debug)]
pub struct Origin {
    /// How they travel.
    pub transport: Transport,
    /// The peer.
    pub remote_addr: SocketAddr,
    /// The link.
    pub link: Arc<Link>,
}

/// A report as it came in, and what it holds of the budget for messages until it is answered.
#[derive(Debug)]
pub struct Inbound {
    /// What it says. Parts that are stored are taken out of it.
    pub report: AgentToServer,
    pub(super) outline: Outline,
    /// The documents of all its parts, where they were made before it was known whose it is.
    prepared: Option<Arc<FirstReport>>,
    pub(super) share: Option<Share>,
}

impl Inbound {
    /// A report that was unfolded under `share`.
    #[must_use]
    pub fn new(report: AgentToServer, outline: Outline, share: Share) -> Self {
        Self { report, outline, prepared: None, share: Some(share) }
    }

    /// What it makes of an agent of which nothing is on record. None for one that changes nothing or asks for more than
    /// to be stored, and for a large one, which is not to be carried along in vain.
    pub(super) fn as_first(&mut self) -> Option<(AgentState, Change, Arc<FirstReport>)> {
        let (state, change) = AgentState::restore(&KnownAgent::default()).absorb(&self.outline);
        let plain = change.must_save && !change.leaves && !change.requests_uid;
        if !plain || self.share.as_ref().is_none_or(Share::is_large) {
            return None;
        }
        let report = self.prepared.get_or_insert_with(|| {
            Arc::new(FirstReport {
                sequence_num: state.stored_number(),
                capabilities: state.capabilities(),
                documents: Documents::take(&mut self.report, change.parts),
            })
        });
        Some((state, change, Arc::clone(report)))
    }

    /// The documents of these parts, which are taken out of the report.
    pub(super) async fn documents(&mut self, parts: PartSet) -> Documents {
        if let Some(report) = self.prepared.take() {
            // All parts that came: those that are known are stored once more as they are.
            return Arc::unwrap_or_clone(report).documents;
        }
        let documents = self.work(move |report| Documents::take(report, parts)).await;
        if let Some(share) = &mut self.share {
            // Text that JSON must escape is longer than what came.
            share.cover_message(documents.size(), 0).await;
        }
        documents
    }

    /// Works on the report: aside where it is large.
    async fn work<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut AgentToServer) -> T + Send + 'static,
    ) -> T {
        let Some(share) = &self.share else { return work(&mut self.report) };
        let mut report = std::mem::take(&mut self.report);
        let work = move || {
            let done = work(&mut report);
            (report, done)
        };
        let (report, done) = share.work(work).await;
        self.report = report;
        done
    }
}
