//! When an agent was connected, and when it was away, as far as its own record proves it.

use std::time::Duration;

use opamp_server::clock::Moment;

use super::Case;
use crate::bounds::{CLOCK, EARLIEST, LAG, READ, RETURN_TIME, TIMEOUT};
use crate::record::{AgentRecord, End, Stay, Trouble, Way};

/// A time between two moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) from: Moment,
    pub(super) to: Moment,
}

impl Span {
    pub(super) fn holds(self, moment: Moment) -> bool {
        self.from <= moment && moment <= self.to
    }

    /// How long both are.
    pub(super) fn overlap(self, other: Self) -> Duration {
        self.to.min(other.to).since(self.from.max(other.from))
    }
}

/// How long a poller may be silent: three times the longest of its gaps; it may have been longer than any of its stays shows.
pub(crate) fn longest_silence(agent: &AgentRecord) -> Duration {
    let polls = agent.stays.iter().filter(|stay| stay.way == Way::Http);
    let mut longest = polls.clone().map(|stay| stay.longest_gap).max().unwrap_or_default();
    for pair in agent.stays.windows(2) {
        if pair[0].way == Way::Http && pair[1].way == Way::Http {
            longest = longest.max(pair[1].hello.since(pair[0].last_sent));
        }
    }
    TIMEOUT.max(longest * 3)
}

/// When the agent was connected beyond doubt: from an offer it received to a report that was answered later.
///
/// A question for full state proves nothing: a server may ask by itself, before a report is read.
pub(super) fn connected(stay: &Stay) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    let mut proven = false;
    for exchange in &stay.exchanges {
        // A poller proves itself by its polls alone: far from each other, slow, or with one between them
        // that failed, they prove nothing.
        let near = |last: &Span| {
            let failed = stay.failed.iter().any(|failed| last.to <= *failed && *failed <= exchange.answered);
            stay.way == Way::WebSocket
                || (!failed
                    && exchange.answered.since(last.to) < EARLIEST
                    && exchange.answered.since(exchange.sent) < LAG)
        };
        match spans.last_mut() {
            Some(last) if proven && !exchange.asked && near(last) => last.to = exchange.answered,
            _ => spans.push(Span { from: exchange.answered, to: exchange.answered }),
        }
        proven = true;
    }
    for span in &mut spans {
        // The last answer may have come late.
        let last = stay.exchanges.iter().rev().find(|exchange| exchange.answered == span.to);
        span.to = last.map_or(span.to, |last| last.sent.max(span.from));
    }
    spans
}

impl Case<'_> {
    /// When the agent was away beyond doubt: from its end, once a server must have noticed, to its next first report.
    pub(super) fn away(&self) -> Vec<Span> {
        let first = self.agent.stays.first().map_or(self.evidence.now, |stay| stay.hello);
        let mut spans = vec![Span { from: Moment::from_micros(0), to: first }];
        for (index, stay) in self.agent.stays.iter().enumerate() {
            let mut later = self.agent.stays.iter().skip(index + 1);
            let next = later.clone().next();
            // Who polls may try a WebSocket in vain and poll on.
            let polls_before =
                || self.agent.stays[..index].iter().rev().find(|stay| !stay.exchanges.is_empty());
            if stay.exchanges.is_empty() && polls_before().is_some_and(|before| before.way == Way::Http) {
                continue;
            }
            let answered = later.find(|stay| stay.way == Way::Http || !stay.exchanges.is_empty());
            let next = if stay.way == Way::Http { answered } else { next };
            let Some(from) = self.gone_for_good(stay, next) else { continue };
            let to = next.map_or(self.evidence.now, |next| next.hello);
            if from < to {
                spans.push(Span { from, to });
            }
        }
        spans
    }

    /// From when on no row may claim that the stay went on.
    fn gone_for_good(&self, stay: &Stay, next: Option<&Stay>) -> Option<Moment> {
        let (ended, end) = stay.ended.as_ref()?;
        let gone = stay.gone.unwrap_or(*ended);
        let lag = [Trouble::Lag];
        match (stay.way, end) {
            // The answer came after the end was on record, and a server's own end is on record before it is told.
            (_, End::Farewell | End::Told(..) | End::Broken) => Some(gone.after(CLOCK)),
            (_, End::Close | End::Finish | End::Reset) => Some(self.evidence.read_by(*ended, &lag)),
            (_, End::Impatience) => Some(self.evidence.read_by(gone, &lag)),
            // What was sent last may be read as late as a server is stopped: it proves the agent then.
            (_, End::Abandon) | (Way::WebSocket, End::Silence) => {
                Some(self.evidence.read_by(stay.last_sent, &[Trouble::Lag, Trouble::Stopped]))
            }
            (Way::Http, End::Silence) => {
                let goes_on = next.is_some_and(|next| {
                    // A server that could not hear it a moment ago excuses it for the return time.
                    let deaf = || self.evidence.disturbed(None, next.hello.before(RETURN_TIME), next.hello);
                    let in_time = next.hello.since(stay.last_sent) <= longest_silence(self.agent) + READ;
                    next.way == Way::Http && (in_time || deaf())
                });
                let heard = self.evidence.read_by(gone, &[Trouble::Lag, Trouble::Stopped]);
                (!goes_on).then_some(heard)
            }
            (_, End::Refused) => None,
        }
    }
}
