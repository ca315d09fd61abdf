//! The course of a run: connect everybody, last as long as wanted, leave, tell the result.
//!
//! Promises that a run can be ended at any time, by a signal or by its controlling process, and
//! that the result is told in every case. Must not know how agents do what they do.

use std::{
    future::pending,
    io::{IsTerminal, stderr},
    pin::pin,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use tokio::time::{Instant, sleep};

use crate::{
    agent::Common,
    args::{Args, Leave},
    control::{Command, Control},
    counts::Counts,
    endpoint::Endpoint,
    fleet::Fleet,
    link::Sockets,
    manners::{Manners, Pace, Share},
    orders::Round,
    output::{self, Course, Event, Outcome},
};

/// True if the first report of every agent was answered and nothing went wrong in the swarm itself.
pub(crate) async fn run(args: Args) -> anyhow::Result<bool> {
    let sources = args.sources();
    let endpoint = Endpoint::resolve(args.url.clone(), sources, args.token.as_deref(), args.gzip).await?;
    let common = Arc::new(Common {
        endpoint: Arc::new(endpoint),
        shared: args.shares_links().then(|| Sockets::new(args.agents, args.multiplex)),
        interval: args.interval,
        redial_pause: args.redial_pause,
        report_bytes: args.report_bytes,
        manners: Manners {
            changes: Pace::new(args.health_change_rate, args.agents),
            restarts: Pace::new(args.churn, args.agents),
            silent: Share::new(args.silence),
            slow: Share::new(args.slow_readers),
        },
        leave: args.leave,
        silence: AtomicBool::new(false),
        counts: Counts::new(args.agents),
        round: Round::default(),
    });
    let conductor = Conductor {
        common: Arc::clone(&common),
        control: Control::new(args.control)?,
        started: Instant::now(),
        args,
    };
    if !conductor.args.progress && !stderr().is_terminal() {
        return Ok(conductor.conduct().await);
    }
    tokio::select! {
        fine = conductor.conduct() => Ok(fine),
        never = output::progress(&common.counts) => match never {},
    }
}

struct Conductor {
    args: Args,
    common: Arc<Common>,
    control: Control,
    started: Instant,
}

/// Why a phase of the run is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    Done,
    Quit,
}

impl Conductor {
    async fn conduct(mut self) -> bool {
        let mut fleet = Fleet::new(Arc::clone(&self.common), self.args.seed, self.args.connect_rate);
        let mut connect_time = None;
        if self.connect(&mut fleet).await == Over::Done {
            let time = self.started.elapsed();
            connect_time = Some(time);
            self.tell(&Event::connected(self.args.agents, time));
            fleet.silence();
            self.last(&fleet).await;
        }
        let connected = self.common.counts.connected();
        let run_time = self.started.elapsed();
        let failed_tasks = self.leave(fleet).await;
        let course = Course {
            transport: self.common.endpoint.transport.to_string(),
            connected,
            connect_time,
            run_time,
            failed_tasks,
        };
        let outcome = Outcome::new(&self.common.counts, course);
        self.tell(&Event::Result(Box::new(outcome)));
        connect_time.is_some() && failed_tasks == 0
    }

    /// Done when every agent's first report has been answered; quits also when that takes too long.
    async fn connect(&mut self, fleet: &mut Fleet) -> Over {
        let (common, patience) = (Arc::clone(&self.common), self.args.connect_timeout);
        let mut connecting = pin!(async {
            fleet.launch().await;
            tokio::select! {
                () = common.counts.all_acknowledged() => Over::Done,
                () = sleep(patience), if !patience.is_zero() => Over::Quit,
            }
        });
        loop {
            tokio::select! {
                over = &mut connecting => return over,
                command = self.control.next() => match command {
                    Command::Quit => return Over::Quit,
                    Command::Beat(_) => self.complain("not all agents are connected yet".to_owned()),
                    Command::Mistake(message) => self.complain(message),
                },
            }
        }
    }

    /// Lets the fleet live, obeying commands, for as long as wanted.
    async fn last(&mut self, fleet: &Fleet) {
        let duration = self.args.duration();
        let mut end = pin!(sleep(duration.unwrap_or(Duration::ZERO)));
        let common = Arc::clone(&self.common);
        loop {
            tokio::select! {
                () = &mut end, if duration.is_some() => return,
                away = all_back(&common) => self.tell(&Event::returned(self.args.agents, away)),
                command = self.control.next() => match command {
                    Command::Quit => return,
                    Command::Beat(reports) => {
                        if self.beat(fleet, reports).await == Over::Quit {
                            return;
                        }
                    }
                    Command::Mistake(message) => self.complain(message),
                },
            }
        }
    }

    /// One round of heartbeats; commands wait for its end, but for the one to quit.
    async fn beat(&mut self, fleet: &Fleet, reports: u32) -> Over {
        let start = Instant::now();
        let agents = u64::try_from(self.args.agents).unwrap_or(u64::MAX);
        tokio::select! {
            answered = fleet.beat(reports) => {
                let wanted = agents.saturating_mul(reports.into());
                self.tell(&Event::beaten(answered, wanted, start.elapsed()));
                Over::Done
            }
            () = self.control.quit() => Over::Quit,
        }
    }

    async fn leave(&mut self, fleet: Fleet) -> usize {
        let how = self.args.leave;
        tokio::select! {
            failed = fleet.leave(how) => failed,
            // Whoever asks twice does not want to wait.
            () = self.control.signal(), if how == Leave::Orderly => 0,
        }
    }

    fn tell(&self, event: &Event) {
        event.write(self.args.json());
    }

    fn complain(&self, message: String) {
        self.tell(&Event::Error { message });
    }
}

/// Waits until everybody is back; where agents come and go all the time, that means nothing.
async fn all_back(common: &Common) -> Duration {
    if common.manners.restarts.is_never() { common.counts.all_back().await } else { pending().await }
}
