//! What messages may cost this node while they are taken in: memory, and the time of those who serve links.
//!
//! A message holds a [`Share`] of the budget (`agents.max_inflight`) from its first bytes until what it
//! changed is stored. Promises: whatever agents send, what their messages take is at most two budgets
//! and one message; a message of up to 64 KiB never waits for a larger one; large ones are worked on
//! aside, a few at a time, so that the links of others are served meanwhile. It must not know what
//! a message says.

use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::PollSemaphore;

/// Up to so many bytes a message is small: it is received without permission and worked on at once.
pub const SMALL: usize = 64 << 10;

/// The budget is counted in pieces of so many bytes.
const PIECE: u64 = 4 << 10;

/// How many pieces a message takes at once while it grows.
const STRIDE: u32 = 16;

/// What a byte of a message takes at most while it is stored, as measured: the message, its document, the batch that
/// carries it and the database's own copies. Text that JSON must escape is counted once more when its document is made.
const PER_BYTE: u64 = 8;

/// What every message takes beside: the report and its documents as they stand, its job, its row in the batch.
const PER_MESSAGE: u64 = 16 << 10;

/// What an element of a message takes while it is unfolded, beside its bytes: in the message and in its document.
const PER_ELEMENT: u64 = 400;

/// What all messages together may hold.
///
/// Small messages have a budget of their own, as large as that of the others: they wait for each
/// other only, and those that the store takes are soon done.
#[derive(Clone, Debug)]
pub struct Budget {
    small: Lane,
    large: Lane,
    /// How many large messages are worked on at once.
    bench: Arc<Semaphore>,
}

/// A budget that is waited for in turn.
#[derive(Clone, Debug)]
struct Lane {
    pieces: Arc<Semaphore>,
    /// One: whose holder needs no pieces. Messages that hold a part each would wait for each other for ever.
    pass: Arc<Semaphore>,
}

impl Lane {
    fn new(bytes: usize) -> Self {
        let pieces = usize::try_from(bytes as u64 / PIECE).unwrap_or(usize::MAX);
        let pieces = Arc::new(Semaphore::new(pieces.clamp(1, Semaphore::MAX_PERMITS)));
        Self { pieces, pass: Arc::new(Semaphore::new(1)) }
    }
}

impl Budget {
    /// A budget of so many bytes.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let bench = Arc::new(Semaphore::new(cores.div_ceil(2)));
        Self { small: Lane::new(bytes), large: Lane::new(bytes), bench }
    }

    /// The share of a message that grows while it is received: the first [`SMALL`] bytes of it are free.
    #[must_use]
    pub fn share(&self) -> Share {
        Share::new(&self.large, Some(Arc::clone(&self.bench)), SMALL as u64)
    }

    /// The share of a message that is whole and small.
    #[must_use]
    pub fn small_share(&self) -> Share {
        Share::new(&self.small, None, 0)
    }
}

/// What one message holds of the budget; given back when dropped.
#[derive(Debug)]
pub struct Share {
    pieces: PollSemaphore,
    held: Option<OwnedSemaphorePermit>,
    pass: PollSemaphore,
    passes: Option<OwnedSemaphorePermit>,
    /// True while it stands in the queue for the pass.
    queues: bool,
    /// Where large messages are worked on.
    bench: Option<Arc<Semaphore>>,
    /// Bytes that need no permission.
    free: u64,
    /// Bytes that were asked for.
    asked: u64,
}

impl Share {
    fn new(lane: &Lane, bench: Option<Arc<Semaphore>>, free: u64) -> Self {
        Self {
            pieces: PollSemaphore::new(Arc::clone(&lane.pieces)),
            held: None,
            pass: PollSemaphore::new(Arc::clone(&lane.pass)),
            passes: None,
            queues: false,
            bench,
            free,
            asked: 0,
        }
    }

    /// Ready once the share covers so many bytes.
    pub fn poll_cover(&mut self, context: &mut Context<'_>, bytes: u64) -> Poll<()> {
        self.asked = self.asked.max(bytes);
        while self.passes.is_none() && self.covered() < bytes {
            // Who is whole takes all it needs at once: if each held a part and waited for the rest, only the one with the
            // pass would go on.
            let missing = (bytes - self.covered()).div_ceil(PIECE);
            let many = if self.bench.is_some() { STRIDE } else { u32::try_from(missing).unwrap_or(u32::MAX) };
            match self.pieces.poll_acquire_many(context, many) {
                Poll::Ready(Some(more)) => match &mut self.held {
                    Some(held) => held.merge(more),
                    None => self.held = Some(more),
                },
                // A closed budget does not exist; were there one, nobody would have to wait for it.
                Poll::Ready(None) => break,
                Poll::Pending => {
                    self.queues = true;
                    self.passes = ready!(self.pass.poll_acquire(context));
                    // Whoever goes on without pieces must not stand in the queue for them.
                    self.pieces = PollSemaphore::new(self.pieces.clone_inner());
                }
            }
        }
        if std::mem::take(&mut self.queues) && self.passes.is_none() {
            // Nor may whoever has its pieces keep the pass from others.
            self.pass = PollSemaphore::new(self.pass.clone_inner());
        }
        Poll::Ready(())
    }

    /// Gives back what is more than so many bytes need, and the pass.
    pub fn shrink(&mut self, bytes: u64) {
        self.passes = None;
        self.asked = bytes;
        let needed = usize::try_from(bytes.saturating_sub(self.free).div_ceil(PIECE)).unwrap_or(usize::MAX);
        if let Some(held) = &mut self.held {
            let surplus = held.num_permits().saturating_sub(needed);
            drop(held.split(surplus));
        }
    }

    /// Holds what `other` held as well.
    pub fn absorb(&mut self, mut other: Self) {
        self.asked = self.asked.saturating_add(other.asked);
        match (&mut self.held, other.held.take()) {
            // Shares of small and of large messages are held from different budgets.
            (Some(held), Some(more)) if Arc::ptr_eq(held.semaphore(), more.semaphore()) => held.merge(more),
            (None, more) => self.held = more,
            (Some(_), _) => {}
        }
    }

    /// Waits until the share covers so many bytes.
    pub async fn cover(&mut self, bytes: u64) {
        std::future::poll_fn(|context| self.poll_cover(context, bytes)).await;
    }

    /// Waits until the share covers what it takes to unfold and to store a message of so many bytes and elements.
    pub async fn cover_message(&mut self, bytes: usize, elements: usize) {
        self.cover(PER_MESSAGE + bytes as u64 * PER_BYTE + elements as u64 * PER_ELEMENT).await;
    }

    /// True for the share of a large message.
    #[must_use]
    pub fn is_large(&self) -> bool {
        self.bench.is_some() && self.asked > self.free
    }

    /// The bytes that were asked for.
    #[must_use]
    pub fn asked(&self) -> u64 {
        self.asked
    }

    /// Works on the message: here and now where it is small, else aside when it is its turn.
    pub async fn work<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let Some(bench) = self.bench.as_ref().filter(|_| self.is_large()) else {
            return work();
        };
        // The bench is never closed.
        let _place = bench.acquire().await;
        match tokio::task::spawn_blocking(work).await {
            Ok(done) => done,
            Err(failed) => match failed.try_into_panic() {
                // It goes on where the work was asked for, as if it had been done there.
                Ok(panic) => std::panic::resume_unwind(panic),
                // The process ends: so does whoever waits.
                Err(_cancelled) => std::future::pending().await,
            },
        }
    }

    fn covered(&self) -> u64 {
        let pieces = self.held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        self.free + PIECE * pieces as u64
    }
}

#[cfg(test)]
mod tests {
    use std::panic::AssertUnwindSafe;

    use futures_util::FutureExt;

    use super::*;

    const FREE: u64 = SMALL as u64;

    async fn waits(share: &mut Share, bytes: u64) -> bool {
        std::future::poll_fn(|context| Poll::Ready(share.poll_cover(context, bytes).is_pending())).await
    }

    #[tokio::test]
    async fn beyond_the_free_bytes_a_message_waits_for_others() {
        let budget = Budget::new(128 << 10);
        let (mut first, mut second, mut third) = (budget.share(), budget.share(), budget.share());
        first.cover(FREE + (128 << 10)).await;
        assert!(!waits(&mut second, FREE).await, "the beginning never waits");
        assert!(!waits(&mut second, FREE + 1).await, "one goes on without");
        assert!(waits(&mut third, FREE + 1).await, "and only one");
        drop(first);
        assert!(!waits(&mut third, FREE + 1).await, "what was held is free again");
    }

    #[tokio::test]
    async fn small_messages_wait_for_each_other_and_for_no_large_one() {
        let budget = Budget::new(128 << 10);
        let (mut large, mut passing) = (budget.share(), budget.share());
        large.cover(FREE + (128 << 10)).await;
        passing.cover(FREE + 1).await;
        let mut small: Vec<Share> = (0..4).map(|_| budget.small_share()).collect();
        for share in &mut small[..3] {
            assert!(!waits(share, 64 << 10).await, "two within the budget, and one goes on without");
        }
        assert!(waits(&mut small[3], 64 << 10).await);
        small.remove(0);
        assert!(!waits(&mut small[2], 64 << 10).await);
    }

    /// Room for two, one goes on without: of ten that come at once, each moment three are worked on.
    #[tokio::test]
    async fn whole_messages_that_come_at_once_hold_all_they_need_or_nothing() {
        let budget = Budget::new(384 << 10);
        let mut small: Vec<Share> = (0..10).map(|_| budget.small_share()).collect();
        let mut covered = 0;
        for share in &mut small {
            covered += usize::from(!waits(share, 192 << 10).await);
        }
        assert_eq!(covered, 3);
        let holding = small.iter().filter(|share| share.held.is_some()).count();
        assert_eq!(holding, 2, "nobody waits with a part");
    }

    #[tokio::test]
    async fn a_share_gives_back_what_it_does_not_need() {
        let budget = Budget::new(1 << 20);
        let (mut one, mut other) = (budget.small_share(), budget.small_share());
        one.cover(200 << 10).await;
        one.shrink(5 << 10);
        assert_eq!(budget.small.pieces.available_permits(), 256 - 2);
        other.cover(64 << 10).await;
        one.absorb(other);
        assert_eq!((one.asked(), budget.small.pieces.available_permits()), (69 << 10, 256 - 18));
        drop(one);
        assert_eq!(budget.small.pieces.available_permits(), 256);
    }

    #[tokio::test]
    async fn messages_that_hold_a_part_each_come_to_an_end() {
        let budget = Budget::new(256 << 10);
        let message = async |mut share: Share| {
            for grown in 1..=50 {
                share.cover(FREE + grown * (16 << 10)).await;
                tokio::task::yield_now().await;
            }
        };
        let all = (0..8).map(|_| message(budget.share()));
        tokio::time::timeout(std::time::Duration::from_secs(10), futures_util::future::join_all(all))
            .await
            .unwrap();
        assert_eq!(budget.large.pieces.available_permits(), 64, "everything is given back");
    }

    #[tokio::test]
    async fn a_large_message_is_worked_on_aside_and_its_panic_comes_back() {
        let budget = Budget::new(1 << 20);
        let here = std::thread::current().id();
        let mut share = budget.share();
        assert_eq!(share.work(|| std::thread::current().id()).await, here, "a small one is worked on here");
        share.cover(FREE + 1).await;
        assert_ne!(share.work(|| std::thread::current().id()).await, here);
        let panicking = share.work(|| panic!("the fault of this test"));
        assert!(AssertUnwindSafe(panicking).catch_unwind().await.is_err());
    }
}
