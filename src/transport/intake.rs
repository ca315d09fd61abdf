//! From the bytes of a message to a report that a session can take, within the budget for messages.
//!
//! Both transports come through here. A large message asks for what it will cost before it is
//! unfolded, and is unfolded aside. Nothing here knows whose message it is.

use std::time::Duration;

use bytes::Bytes;

use crate::agent::report::Outline;
use crate::burden::{Budget, SMALL, Share};
use crate::proto::AgentToServer;
use crate::session::Inbound;
use crate::wire::{self, Unpacking, WireError};

/// How long a message waits for memory, in each stage of its way.
const PATIENCE: Duration = Duration::from_secs(30);

/// Messages with no more elements than this become little: an ordinary description has some dozens.
const FEW: usize = 500;

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
async fn cover(waiting: impl Future<Output = ()>) -> Result<(), Unfit> {
    tokio::time::timeout(PATIENCE, waiting).await.map_err(|_elapsed| Unfit::Crowded)
}

/// Unpacks a gzip body of at most `limit` bytes; the share grows ahead of it.
pub(super) async fn unpack(packed: Vec<u8>, limit: usize, share: &mut Share) -> Result<Vec<u8>, Unfit> {
    let mut unpacking = Unpacking::new(packed, limit);
    let mut step = SMALL;
    loop {
        cover(share.cover((unpacking.held() + step) as u64)).await?;
        let work = move || {
            let done = unpacking.step(step);
            (unpacking, done)
        };
        let (unpacked, done) = share.work(work).await;
        if done.map_err(Unfit::Wire)? {
            return Ok(unpacked.into_body());
        }
        (unpacking, step) = (unpacked, STEP);
    }
}

/// Takes a whole message apart, once there is memory for what it becomes. A large one was received under `share`.
pub(super) async fn unfold(body: Bytes, share: Option<Share>, budget: &Budget) -> Result<Inbound, Unfit> {
    let small = body.len() <= SMALL;
    let mut share = if small { budget.small_share() } else { share.unwrap_or_else(|| budget.share()) };
    if !small {
        cover(share.cover(body.len() as u64)).await?;
    }
    let weighing = body.clone();
    let elements = share.work(move || wire::weigh(&weighing)).await.map_err(Unfit::Wire)?;
    cover(share.cover_message(body.len(), elements)).await?;
    let work = move || {
        let report = wire::decode_body(&body)?;
        let outline = Outline::of(&report, &body);
        Ok((report, outline))
    };
    let (report, outline) = share.work(work).await.map_err(Unfit::Wire)?;
    Ok(Inbound::new(report, outline, share))
}

/// A light report that is decoded already.
pub(super) struct Light {
    pub(super) report: AgentToServer,
    pub(super) outline: Outline,
    /// The length of its message.
    pub(super) bytes: usize,
    /// How many elements it has.
    pub(super) elements: usize,
}

/// Takes in a light report: it waits only for others like it.
pub(super) async fn weighed(light: Light, budget: &Budget) -> Result<Inbound, Unfit> {
    let mut share = budget.small_share();
    cover(share.cover_message(light.bytes, light.elements)).await?;
    Ok(Inbound::new(light.report, light.outline, share))
}

/// How many elements a message has that may be decoded at once, as whatever it says becomes little; none for another.
pub(super) fn light(body: &[u8]) -> Option<usize> {
    let elements = (body.len() <= SMALL).then(|| wire::weigh(body))?.ok()?;
    (elements <= FEW).then_some(elements)
}
