//! One direction of a connection: what is sent arrives after a while, in order.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// What is on its way, and when it arrives.
#[derive(Debug)]
pub(crate) struct Pipe<T> {
    queue: Mutex<VecDeque<(Instant, T)>>,
    arrived: Notify,
}

impl<T> Pipe<T> {
    pub(crate) fn new() -> Self {
        Self { queue: Mutex::default(), arrived: Notify::new() }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<(Instant, T)>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends; answers when it arrives.
    pub(crate) fn push(&self, takes: Duration, item: T) -> Instant {
        let mut queue = self.queue();
        let due = Instant::now() + takes;
        let due = queue.back().map_or(due, |(last, _)| due.max(*last));
        queue.push_back((due, item));
        drop(queue);
        self.arrived.notify_one();
        due
    }

    /// The next item once it has arrived, and when it did; may be dropped at any time.
    pub(crate) async fn next(&self) -> (Instant, T) {
        loop {
            let due = {
                let mut queue = self.queue();
                let due = queue.front().map(|(due, _)| *due);
                if due.is_some_and(|due| due <= Instant::now())
                    && let Some(item) = queue.pop_front()
                {
                    return item;
                }
                due
            };
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => self.arrived.notified().await,
            }
        }
    }
}
