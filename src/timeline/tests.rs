//! What holds for every history: intervals tile the span, and the fleet's counts are sums of what is known of each.

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use uuid::Uuid;

use super::fleet::{Step, steps};
use super::*;
use crate::store::{FleetPast, Status};

fn at(second: i64) -> Moment {
    Moment::from_micros(second * 1_000_000)
}

/// Seconds between the parts of one stay: the wait before it, its length, how long nobody knew; over HTTP or not.
type Shape = (i64, i64, Option<i64>, bool);

/// The stays of one agent; `open` leaves the last one without an end, confirmed up to its length.
fn stays_of(shapes: &[Shape], open: bool) -> Vec<Stay> {
    let mut now = 0;
    let mut stays = Vec::new();
    for (index, (wait, length, unknown, polled)) in shapes.iter().enumerate() {
        let connected = now + wait;
        let left = connected + length;
        let last = open && index + 1 == shapes.len();
        now = left + unknown.unwrap_or(0);
        stays.push(Stay {
            id: i64::try_from(index).unwrap() + 1,
            connected_at: at(connected),
            disconnected_at: (!last).then(|| at(left)),
            disconnected_by: unknown.filter(|_| !last).map(|_| at(now)),
            reason: (!last).then(|| ["server_lost", "closed_by_agent"][index % 2].to_owned()),
            transport: if *polled { Transport::Http } else { Transport::Websocket },
            confirmed_until: last.then(|| at(left)),
        });
    }
    stays
}

fn history() -> impl Strategy<Value = Vec<Stay>> {
    let shape = (0..8_i64, 0..12_i64, proptest::option::of(0..6_i64), any::<bool>());
    (vec(shape, 0..8), any::<bool>()).prop_map(|(shapes, open)| stays_of(&shapes, open))
}

fn watch() -> impl Strategy<Value = Watch> {
    (proptest::option::of(0..40_i64), vec((0..100_i64, 0..40_i64), 0..5)).prop_map(|(horizon, lives)| {
        Watch::new(horizon.map(at), lives.into_iter().map(|(from, length)| (at(from), at(from + length))))
    })
}

fn span() -> impl Strategy<Value = Span> {
    (0..120_i64, 0..120_i64).prop_map(|(from, length)| Span { from: at(from), to: at(from + length) })
}

/// The states a fleet's agents had, told at one moment.
fn counted(past: &FleetPast, moment: Moment) -> (i64, i64, i64, i64) {
    let mut counts = (0, 0, 0, 0);
    for (agent, first) in &past.agents {
        let last = past.changes.iter().rfind(|(whose, when, _)| whose == agent && *when <= moment);
        let Some(status) = last.map_or(*first, |(_, _, to)| Some(*to)) else { continue };
        match status {
            Status::Online => counts.0 += 1,
            Status::Offline => counts.1 += 1,
            Status::Error => counts.2 += 1,
            Status::Retired => continue,
        }
        let stay = past.stays.iter().rfind(|(whose, stay)| whose == agent && stay.connected_at <= moment);
        let found = look(stay.map(|(_, stay)| stay), &past.watch, moment);
        counts.3 += i64::from(found.state == State::Unknown);
    }
    counts
}

proptest! {
    #[test]
    fn intervals_tile_the_span_and_say_what_each_moment_says(
        stays in history(), watch in watch(), span in span()
    ) {
        let told = intervals(&stays, &watch, span);
        prop_assert_eq!(told.is_empty(), span.from == span.to);
        prop_assert!(told.iter().all(|interval| interval.from < interval.to), "no empty one: {:?}", told);
        prop_assert!(told.windows(2).all(|pair| pair[0].to == pair[1].from), "no gap: {:?}", told);
        prop_assert!(told.windows(2).all(|pair| !pair[0].says_the_same(&pair[1])), "merged: {:?}", told);
        if let (Some(first), Some(last)) = (told.first(), told.last()) {
            prop_assert_eq!((first.from, last.to), (span.from, span.to));
        }
        for half_second in 0..600_i64 {
            let moment = Moment::from_micros(half_second * 500_000);
            let holding = told.iter().filter(|interval| interval.from <= moment && moment < interval.to);
            let inside = span.from <= moment && moment < span.to;
            prop_assert_eq!(holding.clone().count(), usize::from(inside));
            for interval in holding {
                let found = look(begun(&stays, moment), &watch, moment);
                prop_assert_eq!(&Interval::new(Span { from: interval.from, to: interval.to }, found), interval);
            }
        }
    }

    #[test]
    fn nothing_is_claimed_that_no_row_proves_and_nobody_watched(
        stays in history(), watch in watch(), second in 0..200_i64
    ) {
        let moment = at(second);
        let found = look(begun(&stays, moment), &watch, moment);
        let covers = |stay: &&Stay| {
            stay.connected_at <= moment && stay.disconnected_at.or(stay.confirmed_until).is_some_and(|end| moment < end)
        };
        match found.state {
            State::Connected => {
                let proof = stays.iter().find(covers).unwrap();
                prop_assert_eq!(found.connection_id, Some(proof.id));
                prop_assert!(proof.transport == Transport::Websocket || watch.at(moment));
                prop_assert_eq!((found.reason, found.watched), (None, true));
            }
            State::Disconnected => {
                prop_assert!(watch.at(moment) && found.watched);
                prop_assert!(!stays.iter().any(|stay| covers(&stay)));
                prop_assert_eq!(found.connection_id, None);
            }
            State::Unknown => prop_assert_eq!(found.watched, watch.at(moment)),
        }
    }

    #[test]
    fn the_counts_of_a_fleet_are_sums_of_what_is_known_of_each(
        histories in vec((history(), 0..4_usize, vec((1..150_i64, 0..4_usize), 0..5)), 0..6),
        watch in watch(), from in 0..60_i64, length in 1..100_i64, step in 1..30_u64
    ) {
        let statuses = [Status::Online, Status::Offline, Status::Error, Status::Retired];
        let mut past =
            FleetPast { agents: Vec::new(), stays: Vec::new(), changes: Vec::new(), ends: Vec::new(), watch };
        for (index, (stays, first, changes)) in histories.iter().enumerate() {
            let agent = Uuid::from_u128(index as u128);
            past.agents.push((agent, statuses.get(*first).copied().filter(|_| index % 3 != 2)));
            past.ends.extend(stays.iter().filter_map(|stay| stay.disconnected_at));
            past.stays.extend(stays.iter().map(|stay| (agent, stay.clone())));
            past.changes.extend(changes.iter().map(|(second, to)| (agent, at(*second), statuses[*to])));
        }
        past.changes.sort_by_key(|(_, when, _)| *when);
        past.changes.retain(|(_, when, _)| *when > at(from));
        let span = Span { from: at(from), to: at(from + length) };
        let told = steps(past.clone(), span, Duration::from_secs(step));
        let mut moments = Vec::new();
        let mut moment = span.from;
        while moment < span.to {
            moments.push(moment);
            moment = moment.after(Duration::from_secs(step));
        }
        prop_assert_eq!(told.iter().map(|step| step.at).collect::<Vec<_>>(), moments);
        for Step { at, online, offline, error, unknown, .. } in &told {
            prop_assert_eq!((*online, *offline, *error, *unknown), counted(&past, *at));
        }
        let came = past.stays.iter().filter(|(_, stay)| span.from <= stay.connected_at && stay.connected_at < moment);
        prop_assert_eq!(told.iter().map(|step| step.came).sum::<i64>(), i64::try_from(came.count()).unwrap());
        let went = past.ends.iter().filter(|end| span.from <= **end && **end < moment).count();
        prop_assert_eq!(told.iter().map(|step| step.went).sum::<i64>(), i64::try_from(went).unwrap());
    }
}

/// A crash as the record has it: proven, then nobody knows, then nobody was there, then seen again.
#[test]
fn a_crash_is_told_in_the_words_of_what_is_known() {
    let stays = [
        Stay {
            id: 1,
            connected_at: at(10),
            disconnected_at: Some(at(50)),
            disconnected_by: Some(at(60)),
            reason: Some("server_lost".to_owned()),
            transport: Transport::Websocket,
            confirmed_until: None,
        },
        Stay {
            id: 2,
            connected_at: at(65),
            disconnected_at: None,
            disconnected_by: None,
            reason: None,
            transport: Transport::Websocket,
            confirmed_until: Some(at(80)),
        },
    ];
    let watch = Watch::new(None, [(at(0), at(52)), (at(60), at(90))]);
    let told = intervals(&stays, &watch, Span { from: at(5), to: at(85) });
    let told: Vec<_> = told
        .iter()
        .map(|i| {
            let seconds = |moment: Moment| moment.as_micros() / 1_000_000;
            (seconds(i.from), seconds(i.to), i.state.label(), i.connection_id, i.reason.as_deref(), i.watched)
        })
        .collect();
    assert_eq!(
        told,
        [
            (5, 10, "disconnected", None, None, true),
            (10, 50, "connected", Some(1), None, true),
            (50, 52, "unknown", Some(1), Some("server_lost"), true),
            (52, 60, "unknown", Some(1), Some("server_lost"), false),
            (60, 65, "disconnected", None, Some("server_lost"), true),
            (65, 80, "connected", Some(2), None, true),
            (80, 85, "unknown", Some(2), None, true),
        ]
    );
}
