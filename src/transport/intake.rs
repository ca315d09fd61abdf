//! From the bytes of a message to a report that a session can take, within the budget for messages.
//!
//! Both transports come through here. A large message asks for what it will cost before it is
//! unfolded, and is unfolded aside. Nothing here knows whose message it is.

use std::time::Duration;

use bytes::Bytes;

use crate::agent::report::digest_of_bytes;
use crate::burden::{Budget, SMALL, Share};
use crate::proto::AgentToServer;
use crate::session::Inbound;
use crate::wire::{self, Unpacking, WireError};

/// How long a message waits for memory, in each stage of its way.
const PATIENCE: Duration = Duration::from_secs(30);

/// How many bytes are unpacked at once.
const STEP: usize = 4 << 20;

/// Why a message does not become a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// It is none.
    Wire(WireError),
    /// There was no memory for it in time: it may come again.
    Crowded,
}

/// Waits for memory, within reason.
async fn patiently<T>(work: impl Future<Output = Result<T, WireError>>) -> Result<T, Unfit> {
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(done) => done.map_err(Unfit::Wire),
        Err(_elapsed) => Err(Unfit::Crowded),
    }
}

/// Unpacks a gzip body of at most `limit` bytes; the share grows ahead of it.
pub(super) async fn unpack(packed: Vec<u8>, limit: usize, share: &mut Share) -> Result<Vec<u8>, Unfit> {
    patiently(async {
        let mut unpacking = Unpacking::new(packed, limit);
        let mut step = SMALL;
        loop {
            share.cover((unpacking.held() + step) as u64).await;
            let work = move || {
                let done = unpacking.step(step);
                (unpacking, done)
            };
            let (unpacked, done) = share.work(work).await;
            if done? {
                return Ok(unpacked.into_body());
            }
            (unpacking, step) = (unpacked, STEP);
        }
    })
    .await
}

/// Takes a whole message apart that was received under `share`.
pub(super) async fn unfold(body: Bytes, mut share: Share, budget: &Budget) -> Result<Inbound, Unfit> {
    if body.len() <= SMALL {
        let report = wire::decode_body(&body).map_err(Unfit::Wire)?;
        return weighed(report, &body, budget).await;
    }
    patiently(async {
        share.cover(body.len() as u64).await;
        let weighing = body.clone();
        let elements = share.work(move || wire::weigh(&weighing)).await?;
        share.cover_message(body.len(), elements).await;
        let work = move || wire::decode_body(&body).map(|report| (report, digest_of_bytes(&body)));
        let (report, digest) = share.work(work).await?;
        Ok(Inbound::new(report, digest, share))
    })
    .await
}

/// A small report that is decoded already: it waits only for others like it.
pub(super) async fn weighed(report: AgentToServer, body: &[u8], budget: &Budget) -> Result<Inbound, Unfit> {
    patiently(async {
        let mut share = budget.small_share();
        share.cover_message(body.len(), wire::weigh(body)?).await;
        Ok(Inbound::new(report, digest_of_bytes(body), share))
    })
    .await
}
