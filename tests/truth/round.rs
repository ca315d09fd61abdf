//! One round: servers, agents and faults from one seed, and then the truth.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use opamp_server::clock::{Moment, host_now};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::agent::{Agent, Phase};
use crate::bounds::SETTLE;
use crate::check::Evidence;
use crate::database::{Books, Database, Kind};
use crate::node::{Node, Place};
use crate::record::{Content, Record, Trouble, Troubles};
use crate::settle::{disagreements, is_there, shown};
use crate::timeline::timeline;
use crate::{faults, operator};

/// What is to be played.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) kind: Kind,
    pub(crate) seed: u64,
    pub(crate) agents: usize,
    pub(crate) storm: Duration,
    /// Rules that are left out.
    pub(crate) without: Vec<String>,
}

/// What a round came to.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) faults: BTreeMap<Trouble, u32>,
    pub(crate) stays: usize,
    pub(crate) exchanges: usize,
    pub(crate) rows: usize,
    pub(crate) changes: usize,
    /// How many rows ended by each reason.
    pub(crate) ends: BTreeMap<String, u32>,
    /// Each with its timeline.
    pub(crate) contradictions: Vec<String>,
}

/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// How many timelines are printed in full.
const TIMELINES: usize = 4;

struct Stage {
    plan: Plan,
    start: Moment,
    database: Arc<Database>,
    places: Vec<Place>,
    troubles: Troubles,
    records: Vec<Record>,
    phase: watch::Sender<Phase>,
    /// Found on the way: of an agent, or of nobody.
    found: Vec<(Option<usize>, String)>,
}

/// Plays a round; none where there is no database for it.
pub(crate) async fn play(plan: Plan) -> Option<Outcome> {
    let database = Arc::new(Database::create(plan.kind).await?);
    let mut rng = Rng::with_seed(plan.seed);
    let troubles = Troubles::default();
    let (phase, watching) = watch::channel(Phase::Storm);
    let mut servers = JoinSet::new();
    let mut places = Vec::new();
    for (number, url) in database.urls.iter().enumerate() {
        let (node, place) = Node::new(number, url.clone(), troubles.clone());
        servers.spawn(node.run());
        places.push(place);
    }
    let mut stage = Stage {
        start: host_now(),
        plan,
        database,
        places,
        troubles,
        records: Vec::new(),
        phase,
        found: Vec::new(),
    };
    stage.ready().await;
    servers.spawn(faults::watch_host(stage.troubles.clone()));
    stage.start_faults(&mut servers, &mut rng, &watching);
    let mut agents = JoinSet::new();
    for _ in 0..stage.plan.agents {
        let agent = Agent::new(rng.fork(), stage.places.clone(), watching.clone());
        stage.records.push(agent.record());
        agents.spawn(agent.live());
    }
    let orders = operator::order(
        stage.places.clone(),
        stage.records.clone(),
        rng.fork(),
        stage.troubles.clone(),
        watching.clone(),
    );
    servers.spawn(orders);
    sleep(stage.plan.storm).await;
    let outcome = stage.judge().await;
    stage.phase.send_replace(Phase::Over);
    let _the_rest_is_dropped = timeout(Duration::from_secs(2), async {
        while let Some(ended) = agents.join_next().await {
            ended.expect("no agent panics");
        }
    })
    .await;
    Some(outcome)
}

impl Stage {
    /// Waits until every node is up and nothing is broken.
    async fn ready(&mut self) {
        let deadline = Instant::now() + SETTLE;
        loop {
            let up = self.places.iter().all(|place| *place.ready.borrow() && place.blows.capacity() == 1);
            let whole = self.troubles.windows().iter().all(|window| window.to.is_some());
            if up && whole {
                return;
            }
            if Instant::now() > deadline {
                self.found.push((None, format!("no server came up within {SETTLE:?}")));
                return;
            }
            sleep(LOOK).await;
        }
    }

    fn start_faults(&self, tasks: &mut JoinSet<()>, rng: &mut Rng, phase: &watch::Receiver<Phase>) {
        for place in &self.places {
            tasks.spawn(faults::strike(place.clone(), rng.fork(), phase.clone()));
        }
        for (node, proxy) in self.database.proxies.iter().enumerate() {
            let (proxy, troubles) = (Arc::clone(proxy), self.troubles.clone());
            tasks.spawn(faults::break_store(node, proxy, rng.fork(), troubles, phase.clone()));
        }
        let (database, troubles) = (Arc::clone(&self.database), self.troubles.clone());
        tasks.spawn(faults::seize_store(self.plan.kind, database, rng.fork(), troubles, phase.clone()));
    }

    async fn books(&self) -> Books {
        self.database.read().await.expect("the checker reads past the servers")
    }

    /// Lets everything come to rest, and holds the books against what happened.
    async fn judge(&mut self) -> Outcome {
        self.phase.send_replace(Phase::Calm);
        self.ready().await;
        self.agree().await;
        let missing = self.look_at_contents(true).await;
        let returning = host_now();
        self.phase.send_replace(Phase::Return);
        self.all_home().await;
        self.agree().await;
        self.look_at_contents(false).await;
        self.asked_again(&missing, returning);
        self.outcome().await
    }

    /// Waits until the books and the simulator agree.
    async fn agree(&mut self) {
        let deadline = Instant::now() + SETTLE;
        loop {
            let disagreements = disagreements(&self.books().await, &self.records, host_now());
            if disagreements.is_empty() {
                return;
            }
            if Instant::now() > deadline {
                let phase = *self.phase.borrow();
                self.found.extend(
                    disagreements
                        .into_iter()
                        .map(|(agent, text)| (Some(agent), format!("at rest ({phase:?}): {text}"))),
                );
                return;
            }
            sleep(LOOK).await;
        }
    }

    /// Waits until everybody is connected, and the servers have everything that it is.
    async fn all_home(&mut self) {
        let deadline = Instant::now() + SETTLE;
        loop {
            let missing = self.not_home().await;
            if missing.is_empty() {
                return;
            }
            if Instant::now() > deadline {
                let lost = missing.into_iter().map(|index| (Some(index), "it cannot come home".to_owned()));
                self.found.extend(lost);
                return;
            }
            sleep(LOOK).await;
        }
    }

    async fn not_home(&self) -> Vec<usize> {
        let mut missing = Vec::new();
        for (index, record) in self.records.iter().enumerate() {
            let (uid, acknowledged, content) = {
                let agent = record.lock();
                (agent.uid.to_string(), agent.acknowledged, agent.content)
            };
            // Where an answer was lost on its way, the server may have what it was about all the same.
            let is_known = async || {
                acknowledged == content
                    || matches!(shown(self.place(index), &uid).await, Ok(Some((shown, _))) if shown == content)
            };
            if !is_there(record) || !is_known().await {
                missing.push(index);
            }
        }
        missing
    }

    /// The node that is asked about this agent.
    fn place(&self, agent: usize) -> &Place {
        &self.places[agent % self.places.len()]
    }

    /// Compares what is shown with what was answered; answers whose answered changes are missing, if that may be.
    async fn look_at_contents(&mut self, at_rest: bool) -> Vec<usize> {
        let mut missing = Vec::new();
        for index in 0..self.records.len() {
            let (uid, acknowledged, content) = {
                let agent = self.records[index].lock();
                (agent.uid.to_string(), agent.acknowledged, agent.content)
            };
            if acknowledged == Content::default() {
                continue;
            }
            match shown(self.place(index), &uid).await {
                Ok(Some((shown, _))) if shown.covers(acknowledged) && content.covers(shown) => {}
                Ok(Some((shown, _))) if at_rest && content.covers(shown) && self.may_miss() => {
                    self.records[index].note(format!("shows {shown:?}, answered was {acknowledged:?}"));
                    missing.push(index);
                }
                Ok(Some((shown, body))) => self.found.push((
                    Some(index),
                    format!("shown is {shown:?}, answered {acknowledged:?}, and it is {content:?}: {body}"),
                )),
                Ok(None) => self.found.push((Some(index), "it is not known".to_owned())),
                Err(error) => self.found.push((Some(index), format!("nothing is shown: {error}"))),
            }
        }
        missing
    }

    /// True where a process died while its store was away: what it answered meanwhile is lost with it.
    fn may_miss(&self) -> bool {
        let windows = self.troubles.windows();
        let away = windows.iter().filter(|window| window.trouble.is_of_store());
        away.into_iter().any(|away| {
            windows.iter().any(|window| {
                matches!(window.trouble, Trouble::Killed | Trouble::Terminated)
                    && window.from >= away.from
                    && away.to.is_none_or(|to| window.from <= to.after(Duration::from_secs(1)))
            })
        })
    }

    /// Whoever's answered changes were lost with a process is asked for full state when it returns.
    fn asked_again(&mut self, missing: &[usize], returning: Moment) {
        for index in missing {
            let asked = self.records[*index].lock().asked.iter().any(|ask| ask.at >= returning);
            if !asked {
                self.found.push((
                    Some(*index),
                    "its answered changes were lost, and nobody asked for them".to_owned(),
                ));
            }
        }
    }

    async fn outcome(&mut self) -> Outcome {
        let books = self.books().await;
        let evidence =
            Evidence { kind: self.plan.kind, windows: self.troubles.windows(), books, now: host_now() };
        let mut outcome = Outcome {
            faults: self.troubles.faults(),
            rows: evidence.books.rows.len(),
            changes: evidence.books.changes.len(),
            ..Outcome::default()
        };
        for reason in evidence.books.rows.iter().filter_map(|row| row.disconnect_reason.clone()) {
            *outcome.ends.entry(reason).or_default() += 1;
        }
        for (index, record) in self.records.iter().enumerate() {
            let agent = record.lock();
            outcome.stays += agent.stays.len();
            outcome.exchanges += agent.stays.iter().map(|stay| stay.exchanges.len()).sum::<usize>();
            let found = evidence.contradictions(&agent, &self.plan.without);
            self.found.extend(found.into_iter().map(|text| (Some(index), text)));
        }
        self.found.extend(self.troubles.outrages().into_iter().map(|text| (None, text)));
        outcome.contradictions = self.told(&evidence);
        outcome
    }

    /// The contradictions in words, agent by agent, the first ones with their timelines.
    fn told(&self, evidence: &Evidence) -> Vec<String> {
        let notes = self.troubles.notes();
        let head = format!("seed {}, {}", self.plan.seed, self.plan.kind.word());
        let mut told = Vec::new();
        let nobodys = self.found.iter().filter(|(agent, _)| agent.is_none());
        told.extend(nobodys.map(|(_, text)| format!("{head}: {text}")));
        let mut timelines = 0;
        for (index, record) in self.records.iter().enumerate() {
            let texts = self.found.iter().filter(|(agent, _)| *agent == Some(index));
            let texts: Vec<&str> = texts.map(|(_, text)| &**text).collect();
            if texts.is_empty() {
                continue;
            }
            let agent = record.lock();
            let mut text = format!("{head}, agent {}:\n  {}", agent.uid, texts.join("\n  "));
            if timelines < TIMELINES {
                timelines += 1;
                text.push_str("\n\n");
                text.push_str(&timeline(self.start, evidence, &agent, &notes));
            }
            told.push(text);
        }
        told
    }
}
