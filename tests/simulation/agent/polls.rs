//! The polls of a simulated agent: each of them is sent, answered or not, repeated or given up.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use super::{Agent, PATIENCE, Say, Sent};
use crate::link::{Polled, poll};
use crate::node::Process;
use crate::truth::PARTS;

impl Agent {
    /// Polls for a while; answers how long to stay away.
    pub(super) async fn poll(&mut self) -> Duration {
        self.give_up_older();
        let mut until = Instant::now() + self.between(1, 1_800_000);
        let world = Arc::clone(&self.world);
        let mut again: Option<(Vec<u8>, Sent)> = None;
        let mut say = if self.full_first || self.number <= 1 { Say::Full } else { Say::Nothing };
        let mut answered_at: Option<Instant> = None;
        loop {
            let calm = self.world.is_calm();
            if calm && self.stays {
                until = Instant::now() + Duration::from_hours(10_000);
            }
            let leaves = Instant::now() >= until || calm && !self.stays;
            if leaves {
                // A farewell of somebody who is not connected is not looked at.
                let connected = answered_at.is_some_and(|at| at.elapsed() < world.config.heartbeat.timeout);
                if !connected || self.rng.bool() {
                    self.say(format_args!("stops polling"));
                    self.excuse("it stopped polling");
                    break;
                }
                say = Say::Farewell;
                again = None;
            }
            let (bytes, sent) = again.take().unwrap_or_else(|| self.report(say));
            let mut pause = self.pace;
            match self.post(bytes.clone(), say).await {
                Some((process, Polled::Offer(offer))) => {
                    let asked = self.on_offer(&process, &offer, sent, Instant::now());
                    answered_at = Some(Instant::now());
                    if leaves {
                        break;
                    }
                    say = if asked {
                        pause = Duration::from_millis(self.rng.u64(1..500));
                        Say::Full
                    } else if self.rng.u8(0..5) == 0 && !self.world.is_quiet() {
                        Say::Part(self.rng.usize(0..PARTS))
                    } else {
                        Say::Nothing
                    };
                }
                Some((_, Polled::Later)) => {
                    self.say(format_args!("is told to come later"));
                    self.excuse("a poll was refused");
                    again = Some((bytes, sent));
                    pause = Duration::from_millis(self.rng.u64(30_000..60_000));
                }
                None => {
                    self.say(format_args!("has no answer to its poll"));
                    self.excuse_longer("a poll was not answered", Duration::from_mins(10));
                    again = Some((bytes, sent));
                    pause = self.between(500, 30_000);
                }
            }
            if again.is_some() && self.rng.u8(0..4) == 0 {
                // It gives the message up; who has just started tells everything once more.
                again = None;
                say = if self.full_first { Say::Full } else { Say::Nothing };
            }
            if leaves {
                break;
            }
            if !calm && self.rng.u8(0..40) == 0 {
                pause = self.between(1_000, 400_000);
            }
            tokio::select! {
                biased;
                () = sleep(pause) => {}
                () = world.calmed(), if !calm => {}
            }
        }
        self.excuse_overtaken();
        if self.rng.u8(0..6) == 0 && !self.world.is_calm() {
            self.restart();
        }
        if self.rng.u8(0..4) == 0 { self.between(60_000, 1_800_000) } else { self.between(1, 120_000) }
    }

    /// One poll, and who answered it; none where nobody did.
    async fn post(&mut self, bytes: Vec<u8>, say: Say) -> Option<(Arc<Process>, Polled)> {
        let place = self.place();
        let process = self.world.process(place)?;
        let takes = Duration::from_millis(self.rng.u64(0..30));
        self.say(format_args!("polls node-{place}.{}: report {} {say:?}", process.number, self.number));
        sleep(takes).await;
        let (answer, answered) = oneshot::channel();
        let number = self.world.next_wire();
        let (truth, uid) = (Arc::clone(&self.world.truth), self.uid);
        let (poller, farewell) = (Arc::clone(&process), say == Say::Farewell);
        process.spawn(async move {
            let now = truth.now();
            truth.own(uid, |own| {
                if farewell {
                    own.farewells.push(now);
                }
            });
            poll(poller, bytes, Self::peer(number), answer).await;
        });
        let before = self.polled.replace(process.number);
        if say == Say::Farewell && before != self.polled {
            // Who is not connected there is not looked at.
            self.excuse_longer("it said farewell to another process", Duration::from_mins(10));
        }
        let hasty = self.rng.u8(0..50) == 0 && !self.world.is_calm();
        let patience = if hasty { takes } else { PATIENCE };
        let answer = timeout(patience, answered).await.ok()?.ok()?;
        Some((process, answer))
    }
}
