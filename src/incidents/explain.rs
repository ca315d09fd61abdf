//! Causes: which value of which dimension explains a burst best, again and again until none is left.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use super::burst::{Departure, Tally, Usual, WINDOWS, bursts, usual};
use super::observation::{AgentNumber, Kept, Observation, ValueNumber};
use super::{Cause, CauseKind, Incident, LEAST_AGENTS, LISTED_AGENTS, SAME_INCIDENT};
use crate::clock::Moment;
use crate::close::CloseReason;

/// Explanations of which the worse is this share of the better are equally good: the narrower one is told.
const TIE: f64 = 0.9;

/// What this share of the connected fleet has in common tells nobody apart.
const COMMON: f64 = 0.9;

/// Half of a value's agents, or of a burst's.
const HALF: f64 = 0.5;

/// The share of its agents that must have left where a node or an address is [`COMMON`].
const NEARLY_ALL: f64 = 0.8;

/// Every value, with the connections that have it, in the order of their ends.
struct Scene<'a> {
    stays: &'a [Kept],
    values: Vec<Value>,
    /// The number of the value that all connections have.
    fleet: ValueNumber,
    /// Connections whose end is explained, by their place in `stays`.
    explained: Vec<bool>,
    tally: Tally,
}

/// One value of one dimension.
struct Value {
    cause: Cause,
    /// Places in `Scene::stays`.
    stays: Vec<u32>,
    /// None where so few agents ever left that no burst is possible.
    watched: Option<Watched>,
}

/// What a value's bursts are measured by.
#[derive(Clone, Copy)]
struct Watched {
    usual: Usual,
    thresholds: [u32; 3],
}

/// A burst of one value, and how well the value explains it.
struct Candidate {
    value: ValueNumber,
    first: Moment,
    last: Moment,
    population: u32,
    precision: f64,
    /// 0 where the value does not explain it.
    score: f64,
}

impl Candidate {
    fn overlaps(&self, other: &Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

impl Observation {
    /// The incidents that reach into the span from `from` to the end of the observation, by their first moment.
    #[must_use]
    pub fn incidents(&self, from: Moment) -> Vec<Incident> {
        let mut incidents = incidents(self);
        incidents.retain(|incident| incident.last >= from);
        incidents
    }
}

/// The most causes that are told of an observation, those that explain best.
const MOST_INCIDENTS: usize = 200;

/// The incidents of an observation, by their first moment.
fn incidents(observation: &Observation) -> Vec<Incident> {
    let mut stays = observation.stays.clone();
    stays.sort_unstable_by_key(|stay| (stay.until(), stay.since, stay.agent));
    let mut scene = Scene::of(observation, &stays);
    scene.watch(observation);
    let all: Vec<ValueNumber> = (0..).zip(&scene.values).map(|(number, _)| number).collect();
    let span = (observation.begins, observation.ends);
    let mut candidates: Vec<Candidate> =
        all.into_iter().flat_map(|value| scene.candidates(value, span)).collect();
    let mut found: Vec<(ValueNumber, Vec<u32>, Candidate)> = Vec::new();
    while found.len() < MOST_INCIDENTS
        && let Some(best) = best(&candidates, &scene)
    {
        let best = candidates.swap_remove(best);
        let members: Vec<u32> = scene.departed(best.value, best.first, best.last).collect();
        for place in &members {
            scene.explained[*place as usize] = true;
        }
        let (touched, apart): (Vec<_>, Vec<_>) =
            candidates.into_iter().partition(|candidate| candidate.overlaps(&best));
        candidates = apart;
        for candidate in touched {
            candidates.extend(scene.candidates(candidate.value, (candidate.first, candidate.last)));
        }
        found.push((best.value, members, best));
    }
    let mut incidents = scene.tell(observation, found);
    incidents.sort_by(|a, b| (a.first, &a.cause.value).cmp(&(b.first, &b.cause.value)));
    incidents
}

/// The candidate that is explained best: of those that are nearly as good and of the same time, the narrowest.
fn best(candidates: &[Candidate], scene: &Scene<'_>) -> Option<usize> {
    let explained = || candidates.iter().enumerate().filter(|(_, candidate)| candidate.score > 0.0);
    let (_, top) = explained().max_by(|(_, a), (_, b)| a.score.total_cmp(&b.score))?;
    let ties = || {
        let near = |candidate: &Candidate| candidate.score >= top.score * TIE && candidate.overlaps(top);
        explained().filter(move |(_, candidate)| near(candidate))
    };
    // Who comes and goes meanwhile makes two counts of the same agents differ a little.
    let narrow = ties().map(|(_, candidate)| f64::from(candidate.population)).fold(f64::INFINITY, f64::min);
    let rank = |candidate: &Candidate| {
        let kind = scene.values[candidate.value as usize].cause.kind;
        (kind, candidate.first, candidate.value)
    };
    ties()
        .filter(|(_, candidate)| f64::from(candidate.population) * COMMON <= narrow)
        .min_by_key(|(_, candidate)| rank(candidate))
        .map(|(place, _)| place)
}

impl<'a> Scene<'a> {
    fn of(observation: &Observation, stays: &'a [Kept]) -> Self {
        let value = |kind: CauseKind, value: Option<String>| Value {
            cause: Cause { kind, value, node_name: None },
            stays: Vec::new(),
            watched: None,
        };
        let mut values: Vec<Value> =
            observation.values.iter().map(|(kind, text)| value(*kind, Some(text.clone()))).collect();
        for (number, name) in &observation.node_names {
            values[*number as usize].cause.node_name = Some(name.clone());
        }
        let mut reasons: HashMap<CloseReason, usize> = HashMap::new();
        let fleet = values.len();
        values.push(value(CauseKind::Fleet, None));
        for (place, stay) in (0..).zip(stays) {
            let own = stay.values.iter().flatten().chain(&observation.attributes[stay.agent as usize]);
            for number in own {
                values[*number as usize].stays.push(place);
            }
            values[fleet].stays.push(place);
            if let Some(end) = stay.end.filter(|_| stay.counts(CauseKind::Reason)) {
                let reason = *reasons.entry(end.reason).or_insert_with(|| {
                    values.push(value(CauseKind::Reason, Some(end.reason.label().to_owned())));
                    values.len() - 1
                });
                values[reason].stays.push(place);
            }
        }
        Self {
            stays,
            values,
            fleet: u32::try_from(fleet).unwrap_or(u32::MAX),
            explained: vec![false; stays.len()],
            tally: Tally::new(observation.agents.len()),
        }
    }

    /// Measures what is usual for every value of which enough agents ever left.
    fn watch(&mut self, observation: &Observation) {
        let (begins, ends) = (observation.begins, observation.ends);
        let everybody = self.departures(&self.values[self.fleet as usize]);
        let fleet = usual(&everybody, begins, ends, &mut self.tally);
        let agents = f64::from(self.agents(self.fleet as usize).max(1));
        let mut watched: Vec<(usize, Usual)> = Vec::new();
        for number in 0..self.values.len() {
            let Value { cause, stays: own, .. } = &self.values[number];
            if own.len() < LEAST_AGENTS as usize {
                continue;
            }
            let departures = self.departures(&self.values[number]);
            if self.tally.count(departures.iter().map(|(_, agent)| *agent)) < LEAST_AGENTS {
                continue;
            }
            let mut measured = usual(&departures, begins, ends, &mut self.tally);
            if cause.kind != CauseKind::Reason {
                let share = f64::from(self.agents(number)) / agents;
                measured = measured.max(fleet.share(share));
            }
            watched.push((number, measured));
        }
        let minutes = ends.since(begins).as_secs_f64() / WINDOWS[0].as_secs_f64();
        let values = u32::try_from(watched.len()).unwrap_or(u32::MAX);
        let trials = (minutes * f64::from(values)).max(1.0);
        for (number, usual) in watched {
            self.values[number].watched = Some(Watched { usual, thresholds: usual.thresholds(trials) });
        }
    }

    /// How many agents ever had a value.
    fn agents(&mut self, value: usize) -> u32 {
        let stays = self.values[value].stays.iter().map(|place| &self.stays[*place as usize]);
        self.tally.count(stays.map(|stay| stay.agent))
    }

    /// All disconnects of a value.
    fn departures(&self, value: &Value) -> Vec<Departure> {
        let stays = value.stays.iter().map(|place| &self.stays[*place as usize]);
        stays.filter(|stay| stay.counts(value.cause.kind)).map(|stay| (stay.until(), stay.agent)).collect()
    }

    /// The disconnects of a value in a span that nothing explains yet.
    fn departed(&self, value: ValueNumber, first: Moment, last: Moment) -> impl Iterator<Item = u32> {
        let Value { cause, stays, .. } = &self.values[value as usize];
        let begin = stays.partition_point(|place| self.stays[*place as usize].until() < first);
        stays[begin..]
            .iter()
            .copied()
            .take_while(move |place| self.stays[*place as usize].until() <= last)
            .filter(|place| {
                !self.explained[*place as usize] && self.stays[*place as usize].counts(cause.kind)
            })
    }

    /// The agents of [`departed`](Self::departed), each time they left.
    fn leavers(&self, value: ValueNumber, first: Moment, last: Moment) -> Vec<AgentNumber> {
        self.departed(value, first, last).map(|place| self.stays[place as usize].agent).collect()
    }

    /// The bursts of a value within a span.
    fn candidates(&mut self, value: ValueNumber, span: (Moment, Moment)) -> Vec<Candidate> {
        let Some(Watched { usual, thresholds }) = self.values[value as usize].watched else {
            return Vec::new();
        };
        let departures: Vec<Departure> = self
            .departed(value, span.0, span.1)
            .map(|place| &self.stays[place as usize])
            .map(|stay| (stay.until(), stay.agent))
            .collect();
        let spans = bursts(&departures, thresholds, &mut self.tally);
        spans.into_iter().map(|(first, last)| self.candidate(value, usual, first, last)).collect()
    }

    /// Judges how well a value explains a burst.
    fn candidate(&mut self, value: ValueNumber, usual: Usual, first: Moment, last: Moment) -> Candidate {
        let leavers = self.leavers(value, first, last);
        let everybody = self.leavers(self.fleet, first, last);
        let members = self.tally.count(leavers.iter().copied());
        let left = self.tally.count(everybody);
        let population = self.population(value, first, &leavers);
        let fleet = self.population(self.fleet, first, &leavers);
        let span = last.since(first);
        let (own, noise) = (usual.within(span), self.noise(span));
        let excess = (f64::from(members) - own).max(1.0);
        let precision = excess / beyond_noise(left, noise).max(excess);
        let recall = beyond_noise(members, own) / f64::from(population.max(1));
        let held = f64::from(population) / f64::from(fleet.max(1));
        let kind = self.values[value as usize].cause.kind;
        let explains = if matches!(kind, CauseKind::Reason | CauseKind::Fleet) {
            true
        } else if held >= COMMON {
            matches!(kind, CauseKind::Node | CauseKind::RemoteAddress) && recall >= NEARLY_ALL
        } else {
            recall >= HALF || stands_out(excess, (f64::from(left) - noise).max(excess), held)
        };
        let score = if explains { 2.0 * precision * recall / (precision + recall) } else { 0.0 };
        Candidate { value, first, last, population, precision, score }
    }

    /// How many agents of the fleet leave within `span` as a rule.
    fn noise(&self, span: Duration) -> f64 {
        self.values[self.fleet as usize].watched.map_or(0.0, |fleet| fleet.usual.within(span))
    }

    /// How many agents with this value were connected at `at`, or are among `leavers`.
    fn population(&mut self, value: ValueNumber, at: Moment, leavers: &[AgentNumber]) -> u32 {
        let Value { cause, stays: own, .. } = &self.values[value as usize];
        // A reason is a value that ends have, not agents: everybody might have left for it.
        let own = if cause.kind == CauseKind::Reason { &self.values[self.fleet as usize].stays } else { own };
        let begin = own.partition_point(|place| self.stays[*place as usize].until() < at);
        let stays = own[begin..].iter().map(|place| &self.stays[*place as usize]);
        let connected = stays.filter(|stay| stay.since <= at).map(|stay| stay.agent);
        self.tally.count(connected.chain(leavers.iter().copied()))
    }

    /// Writes the incidents down; those of one cause that follow each other closely are one.
    fn tell(
        &mut self,
        observation: &Observation,
        mut found: Vec<(ValueNumber, Vec<u32>, Candidate)>,
    ) -> Vec<Incident> {
        found.sort_by_key(|(value, _, candidate)| (*value, candidate.first));
        let mut whole: Vec<(ValueNumber, Vec<u32>, Candidate)> = Vec::new();
        for (value, members, candidate) in found {
            match whole.last_mut() {
                Some((same, all, before))
                    if *same == value && candidate.first <= before.last.after(SAME_INCIDENT) =>
                {
                    all.extend(members);
                    before.last = before.last.max(candidate.last);
                    before.precision = before.precision.min(candidate.precision);
                    before.population = before.population.max(candidate.population);
                }
                _ => whole.push((value, members, candidate)),
            }
        }
        whole
            .into_iter()
            .map(|(value, members, candidate)| self.incident(observation, value, members, &candidate))
            .collect()
    }

    fn incident(
        &mut self,
        observation: &Observation,
        value: ValueNumber,
        mut members: Vec<u32>,
        candidate: &Candidate,
    ) -> Incident {
        members.sort_unstable();
        let mut reasons: BTreeMap<&'static str, u32> = BTreeMap::new();
        let mut agents = Vec::new();
        let mut known_by = candidate.last;
        self.tally.clear();
        for place in &members {
            let stay = &self.stays[*place as usize];
            if let Some(end) = stay.end {
                *reasons.entry(end.reason.label()).or_default() += 1;
                known_by = known_by.max(end.known);
            }
            if self.tally.add(stay.agent) && agents.len() < LISTED_AGENTS {
                agents.push(observation.agents[stay.agent as usize]);
            }
        }
        let agents_count = self.tally.different();
        let Value { cause, watched, .. } = &self.values[value as usize];
        let usual = watched.map_or(0.0, |watched| watched.usual.per_minute());
        let lasted = candidate.last.since(candidate.first).max(Duration::from_mins(1));
        Incident {
            cause: cause.clone(),
            reasons,
            first: candidate.first,
            last: candidate.last,
            known_by,
            agents_count,
            disconnects: u32::try_from(members.len()).unwrap_or(u32::MAX),
            connected_before: candidate.population.max(agents_count),
            share_of_disconnects: rounded(candidate.precision),
            usual_per_minute: rounded(usual),
            times_usual: rounded(f64::from(agents_count) * 60.0 / lasted.as_secs_f64() / usual),
            agents,
        }
    }
}

/// How many of `count` agents chance does not explain: it adds up to two standard deviations to what is usual.
fn beyond_noise(count: u32, usual: f64) -> f64 {
    (f64::from(count) - usual - 2.0 * usual.sqrt()).max(1.0)
}

/// True where at least half of a burst has a value, and markedly more than of the fleet.
fn stands_out(excess: f64, burst: f64, held: f64) -> bool {
    let share = excess / burst;
    let beyond_chance = (share - held) * burst.sqrt() > 4.0 * (held * (1.0 - held)).sqrt();
    beyond_chance && (share >= HALF && share >= 1.5 * held || share >= 0.95)
}

/// With three digits behind the point: more would pretend to be known.
fn rounded(number: f64) -> f64 {
    (number * 1_000.0).round() / 1_000.0
}
