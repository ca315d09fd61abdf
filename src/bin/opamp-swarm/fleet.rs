//! The fleet: starts the agents at the wanted pace, gives them orders, brings them home.
//!
//! Promises that every agent's task has an owner and that leaving ends in bounded time. Must not
//! know when to do what, nor how results are shown.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use crate::{
    agent::{Agent, Common},
    args::Leave,
    identity::Identity,
    orders::Order,
};

/// The longest that a whole fleet may take to leave in good order.
const LEAVE_LIMIT: Duration = Duration::from_mins(1);

pub(crate) struct Fleet {
    common: Arc<Common>,
    orders: watch::Sender<Order>,
    tasks: JoinSet<()>,
    seed: u64,
    connect_rate: u32,
}

impl Fleet {
    pub(crate) fn new(common: Arc<Common>, seed: u64, connect_rate: u32) -> Self {
        Self { common, orders: watch::Sender::new(Order::Live), tasks: JoinSet::new(), seed, connect_rate }
    }

    /// Starts every agent; does not wait for their connections.
    pub(crate) async fn launch(&mut self) {
        let start = Instant::now();
        for index in 0..self.common.counts.agents {
            if let Some(since_start) = self.turn(index) {
                sleep_until(start + since_start).await;
            }
            let identity = Identity::new(self.seed, index);
            let orders = self.orders.subscribe();
            let agent = Agent::new(Arc::clone(&self.common), orders, identity);
            self.tasks.spawn(agent.run());
        }
    }

    /// When the agent of this index starts, unless all start at once.
    fn turn(&self, index: usize) -> Option<Duration> {
        let rate = u64::from(self.connect_rate);
        let micros = u64::try_from(index).ok()? * 1_000_000;
        micros.checked_div(rate).map(Duration::from_micros)
    }

    /// Every agent sends that many heartbeats now; how many of them were answered. Only after
    /// `launch`.
    pub(crate) async fn beat(&self, reports: u32) -> u64 {
        let round = &self.common.round;
        round.begin(self.tasks.len());
        self.orders.send_replace(Order::Beat(reports));
        round.finish().await
    }

    /// Those who are to fall silent do so now.
    pub(crate) fn silence(&self) {
        self.common.silence.store(true, Relaxed);
        // Nothing new: it makes every agent look.
        self.orders.send_replace(Order::Live);
    }

    /// Ends every agent; how many of their tasks failed on the way or did not end in time.
    pub(crate) async fn leave(mut self, how: Leave) -> usize {
        if how == Leave::Abrupt {
            self.tasks.abort_all();
        }
        self.orders.send_replace(Order::Leave);
        let mut failed = 0;
        let all = async {
            while let Some(ended) = self.tasks.join_next().await {
                failed += usize::from(ended.is_err_and(|error| error.is_panic()));
            }
            if let Some(shared) = self.common.shared.as_ref().filter(|_| how == Leave::Orderly) {
                shared.closed().await;
            }
        };
        let in_time = timeout(LEAVE_LIMIT, all).await;
        if in_time.is_err() {
            failed += self.tasks.len();
        }
        failed
    }
}
