//! The threads on which links live: each with a runtime, a poller and timers of its own.
//!
//! A runtime that shares its work among threads wakes a second thread with nearly every heartbeat, which finds nothing
//! to do. Two threads that share the links are woken twice as often as one. Both cost as much as the heartbeat itself.
//! So a link stays where it was put, and a thread is filled before the next one is used, unless it does not keep up.
//! What the whole server does once (store, monitor, operators) stays on the shared runtime, where it keeps no link
//! waiting. One more thread, the door, lets newcomers in. It knows of links only how many there are.

use std::io;
use std::sync::Arc;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// How many links a thread takes before another one is used: with heartbeats every 30 s, 1,100 a second.
const FULL: usize = 32_768;

/// With so many links waiting to be taken in, a thread does not keep up.
const BEHIND: usize = 64;

/// Handles to the threads, cheap to clone; the default has none.
#[derive(Clone, Debug, Default)]
pub struct Lanes {
    /// The door first.
    threads: Arc<[Handle]>,
}

/// What there is for a thread.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Links that it has, about.
    pub links: usize,
    /// Links that wait to be taken in.
    pub waiting: usize,
}

impl Lanes {
    /// Starts the threads for so many links, two at least and one per core at most, and the door. They end, and whatever
    /// runs on them is dropped, when `stop` is cancelled: after all that may have been opened there, such as a connection
    /// to the database.
    pub async fn start(links: usize, stop: &CancellationToken) -> io::Result<Self> {
        let cores = std::thread::available_parallelism()?.get();
        let mut threads = vec![thread("door".to_owned(), stop.clone()).await?];
        for number in 0..links.div_ceil(FULL).max(2).min(cores) {
            threads.push(thread(format!("lane-{number}"), stop.clone()).await?);
        }
        Ok(Self { threads: threads.into() })
    }

    /// Where newcomers are let in; where there are no threads, the runtime that asks.
    #[must_use]
    pub fn door(&self) -> Handle {
        self.threads.first().cloned().unwrap_or_else(Handle::current)
    }

    /// Where links live.
    pub fn iter(&self) -> impl Iterator<Item = &Handle> {
        self.threads.iter().skip(1)
    }

    /// Which lane takes the next link: the first that is not full and keeps up, else the emptiest that keeps up, else the
    /// one for which the fewest wait.
    pub fn next(loads: impl Iterator<Item = Load> + Clone) -> Option<usize> {
        let keeping_up = loads.clone().enumerate().filter(|(_, load)| load.waiting < BEHIND);
        let room = keeping_up.clone().find(|(_, load)| load.links < FULL);
        let emptiest = || keeping_up.min_by_key(|(_, load)| load.links);
        let shortest = || loads.enumerate().min_by_key(|(_, load)| load.waiting);
        room.or_else(emptiest).or_else(shortest).map(|(lane, _)| lane)
    }

    /// Waits until each thread has asked once what came for it, and has come to what that set going: of a thousand
    /// sockets at a time. False where one is gone.
    pub async fn come_round(&self) -> bool {
        // A task that gives way goes on after the thread has asked its poller, behind whatever that woke.
        let rounds: Vec<_> = self.threads.iter().map(|lane| lane.spawn(tokio::task::yield_now())).collect();
        for round in rounds {
            if round.await.is_err() {
                return false;
            }
        }
        true
    }
}

/// Starts a thread with a runtime of its own.
async fn thread(name: String, stop: CancellationToken) -> io::Result<Handle> {
    let (tell, told) = oneshot::channel();
    std::thread::Builder::new().name(name).spawn(move || run_thread(tell, &stop))?;
    told.await.map_err(|_ended| io::ErrorKind::BrokenPipe)?
}

fn run_thread(tell: oneshot::Sender<io::Result<Handle>>, stop: &CancellationToken) {
    let runtime = match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return drop(tell.send(Err(error))),
    };
    if tell.send(Ok(runtime.handle().clone())).is_ok() {
        runtime.block_on(stop.cancelled());
    }
    // What works aside goes on until it is done; nobody waits for it.
    runtime.shutdown_background();
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_lane_that_is_stuck_is_waited_for() {
        let stop = CancellationToken::new();
        let lanes = Lanes::start(100, &stop).await.unwrap();
        assert!(lanes.come_round().await);
        let (release, released) = std::sync::mpsc::channel::<()>();
        let stuck = lanes.iter().last().unwrap().spawn(async move { released.recv().is_err() });
        let round = tokio::time::timeout(Duration::from_millis(50), lanes.come_round());
        assert!(round.await.is_err(), "one thread asks for nothing");
        drop(release);
        assert!(stuck.await.unwrap());
        assert!(lanes.come_round().await);
        stop.cancel();
    }

    #[test]
    fn a_lane_is_filled_before_the_next_one_is_used() {
        let next = |loads: &[(usize, usize)]| {
            Lanes::next(loads.iter().map(|(links, waiting)| Load { links: *links, waiting: *waiting }))
        };
        assert_eq!(next(&[(FULL - 1, 0), (0, 0)]), Some(0));
        assert_eq!(next(&[(FULL, 0), (7, 0)]), Some(1));
        assert_eq!(next(&[(FULL + 2, 0), (FULL + 1, 0), (FULL + 1, 0)]), Some(1), "all are full");
        assert_eq!(next(&[(5, BEHIND), (7, 0)]), Some(1), "the first one does not keep up");
        assert_eq!(next(&[(5, BEHIND), (FULL, 0)]), Some(1), "rather a full one than one that is stuck");
        assert_eq!(next(&[(4, BEHIND + 1), (5, BEHIND)]), Some(1));
        assert_eq!(next(&[]), None);
    }

    #[tokio::test]
    async fn lanes_end_when_they_are_told_to() {
        let stop = CancellationToken::new();
        let lanes = Lanes::start(1, &stop).await.unwrap();
        let forever = lanes.iter().next().unwrap().spawn(std::future::pending::<()>());
        stop.cancel();
        assert!(forever.await.unwrap_err().is_cancelled(), "what ran there is dropped");
        assert!(!lanes.come_round().await);
        assert!(Lanes::default().come_round().await, "where there is none, nobody is waited for");
    }
}
