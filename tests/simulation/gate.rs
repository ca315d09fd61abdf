//! The gate around the tasks of one simulated process: it can stop them, let them go on, or end them all at once.
//!
//! A stopped process is not polled, whatever wakes it; a killed one is dropped without another poll.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use fastrand::Rng;
use tokio::time::Instant;

/// What a process is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It runs.
    Running,
    /// It is stopped, as by SIGSTOP.
    Frozen,
    /// It was killed.
    Dead,
}

/// The gate of one process.
#[derive(Debug)]
pub(crate) struct Gate {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: State,
    /// Where a task of this process waits; a place is used again once its task is done.
    waiting: Vec<Option<Waker>>,
    free: Vec<usize>,
    /// How often tasks were polled in the present moment.
    polls: (Instant, u32),
}

/// How often the tasks of a process may be polled before time passes: beyond it, one of them spins.
const BUSIEST: u32 = 200_000;

/// What a task's panic said.
pub(crate) type OnPanic = Arc<dyn Fn(String) + Send + Sync>;

/// A task of the process.
struct Gated<F> {
    gate: Arc<Gate>,
    place: usize,
    task: Option<Pin<Box<F>>>,
    on_panic: OnPanic,
}

impl Gate {
    pub(crate) fn new() -> Arc<Self> {
        let polls = (Instant::now(), 0);
        let inner = Inner { state: State::Running, waiting: Vec::new(), free: Vec::new(), polls };
        Arc::new(Self { inner: Mutex::new(inner) })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn state(&self) -> State {
        self.inner().state
    }

    fn spins(&self) -> bool {
        self.inner().polls.1 > BUSIEST
    }

    /// The task as one of this process.
    pub(crate) fn through<F>(
        self: &Arc<Self>,
        task: F,
        on_panic: OnPanic,
    ) -> impl Future<Output = ()> + Send + 'static
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let place = {
            let mut inner = self.inner();
            inner.free.pop().unwrap_or_else(|| {
                inner.waiting.push(None);
                inner.waiting.len() - 1
            })
        };
        Gated { gate: Arc::clone(self), place, task: Some(Box::pin(task)), on_panic }
    }

    pub(crate) fn freeze(&self) {
        let mut inner = self.inner();
        if inner.state == State::Running {
            inner.state = State::Frozen;
        }
    }

    /// Lets the process go on; which of its tasks is first is anybody's guess.
    pub(crate) fn thaw(&self, rng: &mut Rng) {
        self.change(State::Frozen, State::Running, rng);
    }

    /// Ends the process.
    pub(crate) fn kill(&self, rng: &mut Rng) {
        self.change(State::Frozen, State::Dead, rng);
        self.change(State::Running, State::Dead, rng);
    }

    fn change(&self, from: State, to: State, rng: &mut Rng) {
        let mut wakers: Vec<Waker> = {
            let mut inner = self.inner();
            if inner.state != from {
                return;
            }
            inner.state = to;
            inner.waiting.iter().flatten().cloned().collect()
        };
        rng.shuffle(&mut wakers);
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl Inner {
    fn count_poll(&mut self) {
        let now = Instant::now();
        self.polls = if self.polls.0 == now { (now, self.polls.1 + 1) } else { (now, 0) };
        if self.polls.1 > BUSIEST {
            self.state = State::Dead;
        }
    }
}

impl<F: Future<Output = ()>> Future for Gated<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let state = {
            let mut inner = self.gate.inner();
            let place = &mut inner.waiting[self.place];
            if !place.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                *place = Some(context.waker().clone());
            }
            inner.count_poll();
            inner.state
        };
        if state == State::Dead && self.task.is_some() && self.gate.spins() {
            (self.on_panic)("it is polled for ever, and no time passes".to_owned());
        }
        let polled = match (state, &mut self.task) {
            (State::Frozen, _) => return Poll::Pending,
            (State::Dead, _) | (_, None) => Ok(Poll::Ready(())),
            (State::Running, Some(task)) => catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(context))),
        };
        if matches!(polled, Ok(Poll::Pending)) {
            return Poll::Pending;
        }
        if let Err(panic) = polled {
            let words = panic.downcast_ref::<String>().cloned();
            let words = words.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            (self.on_panic)(words.unwrap_or_default());
        }
        self.task = None;
        Poll::Ready(())
    }
}

impl<F> Drop for Gated<F> {
    fn drop(&mut self) {
        let mut inner = self.gate.inner();
        inner.waiting[self.place] = None;
        inner.free.push(self.place);
    }
}
