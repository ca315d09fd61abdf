//! The memory for unfinished messages, shared by all links: `agents.max_inflight`.
//!
//! The first 64 KiB of a message are free, so that ordinary reports never wait for anybody. Beyond
//! it a message takes from the budget as it grows, and where nothing is left it is not read on. So
//! that messages which hold a part each do not wait for each other for ever, one at a time goes on
//! without: all together never hold more than the budget and one message.

use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::PollSemaphore;

/// Bytes of a message that need no permission.
pub(super) const EXEMPT: u64 = 64 << 10;

/// The budget is counted in pieces of so many bytes.
const PIECE: u64 = 4 << 10;

/// How many pieces are taken at once.
const STRIDE: u32 = 16;

/// What all links together may hold.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    pieces: Arc<Semaphore>,
    /// One: whose holder needs no pieces.
    pass: Arc<Semaphore>,
}

impl Budget {
    /// A budget of so many bytes.
    pub(super) fn new(bytes: usize) -> Self {
        let pieces = usize::try_from(bytes as u64 / PIECE).unwrap_or(usize::MAX);
        let pieces = Arc::new(Semaphore::new(pieces.clamp(1, Semaphore::MAX_PERMITS)));
        Self { pieces, pass: Arc::new(Semaphore::new(1)) }
    }

    /// A share of the budget, empty at first.
    pub(super) fn share(&self) -> Share {
        Share {
            pieces: PollSemaphore::new(Arc::clone(&self.pieces)),
            held: None,
            pass: PollSemaphore::new(Arc::clone(&self.pass)),
            passes: None,
        }
    }
}

/// What one message holds of the budget; given back when dropped.
#[derive(Debug)]
pub(super) struct Share {
    pieces: PollSemaphore,
    held: Option<OwnedSemaphorePermit>,
    pass: PollSemaphore,
    passes: Option<OwnedSemaphorePermit>,
}

impl Share {
    /// Ready once the share covers a message of `bytes` bytes.
    pub(super) fn poll_cover(&mut self, context: &mut Context<'_>, bytes: u64) -> Poll<()> {
        while self.passes.is_none() && self.covered() < bytes {
            match self.pieces.poll_acquire_many(context, STRIDE) {
                Poll::Ready(Some(more)) => match &mut self.held {
                    Some(held) => held.merge(more),
                    None => self.held = Some(more),
                },
                // A closed budget does not exist; were there one, nobody would have to wait for it.
                Poll::Ready(None) => break,
                Poll::Pending => {
                    self.passes = ready!(self.pass.poll_acquire(context));
                    // Whoever goes on without pieces must not stand in the queue for them.
                    self.pieces = PollSemaphore::new(self.pieces.clone_inner());
                }
            }
        }
        Poll::Ready(())
    }

    /// Waits until the share covers a message of `bytes` bytes.
    pub(super) async fn cover(&mut self, bytes: u64) {
        std::future::poll_fn(|context| self.poll_cover(context, bytes)).await;
    }

    fn covered(&self) -> u64 {
        let pieces = self.held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        EXEMPT + PIECE * pieces as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn waits(share: &mut Share, bytes: u64) -> bool {
        std::future::poll_fn(|context| Poll::Ready(share.poll_cover(context, bytes).is_pending())).await
    }

    #[tokio::test]
    async fn beyond_the_exempt_bytes_a_message_waits_for_others() {
        let budget = Budget::new(128 << 10);
        let (mut first, mut second, mut third) = (budget.share(), budget.share(), budget.share());
        first.cover(EXEMPT + (128 << 10)).await;
        assert!(!waits(&mut second, EXEMPT).await, "small messages never wait");
        assert!(!waits(&mut second, EXEMPT + 1).await, "one goes on without");
        assert!(waits(&mut third, EXEMPT + 1).await, "and only one");
        drop(first);
        assert!(!waits(&mut third, EXEMPT + 1).await, "what was held is free again");
    }

    #[tokio::test]
    async fn messages_that_hold_a_part_each_come_to_an_end() {
        let budget = Budget::new(256 << 10);
        let message = async |mut share: Share| {
            for grown in 1..=50 {
                share.cover(EXEMPT + grown * (16 << 10)).await;
                tokio::task::yield_now().await;
            }
        };
        let all = (0..8).map(|_| message(budget.share()));
        tokio::time::timeout(std::time::Duration::from_secs(10), futures_util::future::join_all(all))
            .await
            .unwrap();
        assert_eq!(budget.pieces.available_permits(), 64, "everything is given back");
    }
}
