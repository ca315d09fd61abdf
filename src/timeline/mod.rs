//! What is known of an agent's connectedness over time, told from its rows and from who watched. Pure.
//!
//! One rule for a moment, [`look`]; a span is what it says at every moment of it, told in intervals. It promises never
//! to claim more than is proven: connected is what a row proves, disconnected is what somebody watched, and everything
//! else is unknown. It knows nothing of SQL or HTTP.

pub mod fleet;
#[cfg(test)]
mod tests;

use serde::Serialize;
use utoipa::ToSchema;

use crate::clock::Moment;
use crate::store::{Span, Stay, Transport, Watch};

/// What is known of an agent's connectedness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It was connected: a row proves it.
    Connected,
    /// It was not connected: somebody watched, and there is no row.
    Disconnected,
    /// Nobody knows.
    Unknown,
}

impl State {
    /// The word used in the API.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Disconnected => "disconnected",
            Self::Unknown => "unknown",
        }
    }
}

/// What is known of one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Connected or not.
    pub state: State,
    /// The connection that this is known, or not known, of; none where there was none.
    pub connection_id: Option<i64>,
    /// Why the connection before ended; none while connected, within a connection, and where no end is on record.
    pub reason: Option<String>,
    /// True where an agent could have been heard, and the record of that is whole.
    pub watched: bool,
}

/// A stretch of time of which one thing is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Interval {
    /// Its first moment.
    #[schema(value_type = String, format = DateTime)]
    pub from: Moment,
    /// The first moment after it.
    #[schema(value_type = String, format = DateTime)]
    pub to: Moment,
    /// Connected or not, as far as anybody knows.
    pub state: State,
    /// The connection that is proven, or whose end is not known to the moment; null where there was none.
    pub connection_id: Option<i64>,
    /// Why the connection before it ended; null while connected, and where no end is on record.
    pub reason: Option<String>,
    /// False where no node was alive, or where history has been forgotten. A connection that is proven all the same
    /// counts as watched.
    pub watched: bool,
}

/// What a row says of a moment, whoever watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Proven,
    Limbo,
    Over,
}

fn phase(stay: &Stay, moment: Moment) -> Phase {
    let proven_until = stay.disconnected_at.or(stay.confirmed_until);
    if proven_until.is_some_and(|until| moment < until) {
        return Phase::Proven;
    }
    match (stay.disconnected_at, stay.disconnected_by) {
        (None, _) => Phase::Limbo,
        (Some(_), Some(known)) if moment < known => Phase::Limbo,
        (Some(_), _) => Phase::Over,
    }
}

/// What is known of an agent at a moment, by the last of its stays that had begun then.
#[must_use]
pub fn look(stay: Option<&Stay>, watch: &Watch, moment: Moment) -> Finding {
    let watched = watch.at(moment);
    let absent = if watched { State::Disconnected } else { State::Unknown };
    let Some(stay) = stay else {
        return Finding { state: absent, connection_id: None, reason: None, watched };
    };
    match phase(stay, moment) {
        Phase::Proven if watched || stay.transport == Transport::Websocket => {
            Finding { state: State::Connected, connection_id: Some(stay.id), reason: None, watched: true }
        }
        // Its polls may land on any node, and there was none.
        Phase::Proven => {
            Finding { state: State::Unknown, connection_id: Some(stay.id), reason: None, watched }
        }
        Phase::Limbo => Finding {
            state: State::Unknown,
            connection_id: Some(stay.id),
            reason: stay.reason.clone(),
            watched,
        },
        Phase::Over => Finding { state: absent, connection_id: None, reason: stay.reason.clone(), watched },
    }
}

/// The last of `stays`, which are in the order of time, that had begun at a moment.
fn begun(stays: &[Stay], moment: Moment) -> Option<&Stay> {
    let begun = stays.partition_point(|stay| stay.connected_at <= moment);
    begun.checked_sub(1).map(|last| &stays[last])
}

/// The intervals of a span, in the order of time: they cover it exactly once, and neighbours differ.
///
/// `stays` are in the order of time; without the last one that began at or before the span, nothing is known of an
/// earlier connection.
#[must_use]
pub fn intervals(stays: &[Stay], watch: &Watch, span: Span) -> Vec<Interval> {
    let of_stays = stays.iter().flat_map(|stay| {
        [Some(stay.connected_at), stay.disconnected_at.or(stay.confirmed_until), stay.disconnected_by]
    });
    let mut edges: Vec<Moment> = of_stays
        .flatten()
        .chain(watch.edges())
        .filter(|edge| span.from < *edge && *edge < span.to)
        .chain([span.from])
        .collect();
    edges.sort_unstable();
    edges.dedup();
    let mut told: Vec<Interval> = Vec::new();
    if span.from >= span.to {
        return told;
    }
    for (index, from) in edges.iter().copied().enumerate() {
        let to = edges.get(index + 1).copied().unwrap_or(span.to);
        append(&mut told, Interval::new(Span { from, to }, look(begun(stays, from), watch, from)));
    }
    told
}

/// Appends an interval, or lengthens the last one where the same is known of both.
pub fn append(told: &mut Vec<Interval>, next: Interval) {
    match told.last_mut() {
        Some(last) if last.to == next.from && last.says_the_same(&next) => last.to = next.to,
        _ => told.push(next),
    }
}

impl Interval {
    fn new(span: Span, found: Finding) -> Self {
        let Finding { state, connection_id, reason, watched } = found;
        Self { from: span.from, to: span.to, state, connection_id, reason, watched }
    }

    fn says_the_same(&self, other: &Self) -> bool {
        let known = |interval: &Self| (interval.state, interval.connection_id, interval.watched);
        known(self) == known(other) && self.reason == other.reason
    }
}
