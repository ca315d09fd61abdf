//! A report on its way in, and where it comes from.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::burden::Share;
use crate::proto::AgentToServer;
use crate::pulse::Link;
use crate::store::Transport;

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
    pub(super) digest: u64,
    pub(super) share: Option<Share>,
}

impl Inbound {
    /// A report that was unfolded under `share`; `digest` is over its bytes, see [`digest_of_bytes`](crate::agent::report::digest_of_bytes).
    #[must_use]
    pub fn new(report: AgentToServer, digest: u64, share: Share) -> Self {
        Self { report, digest, share: Some(share) }
    }

    /// Works on the report: aside where it is large.
    pub(super) async fn work<T: Send + 'static>(
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
