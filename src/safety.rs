//! The safety net: open rows on record compared with the sessions of this node, both ways.
//!
//! It looks every `heartbeat.check_interval` and after every trouble of the store. A row that nobody
//! holds is ended; a connection whose row is gone is opened again; polls that no node hears come
//! under watch. What could be on its way is believed only when it is seen twice. It finds what no
//! rule foresaw, and must not become the way in which anything is done.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::clock::Tick;
use crate::close::CloseReason;
use crate::history::OpenConnection;
use crate::pulse::{Link, Pulse};
use crate::session::Services;
use crate::store::{Held, PolledConnection, StoreError, Transport};

/// How many connections are opened again in one look: agents report their full state for it.
const REOPENED: usize = 500;

/// How soon the net looks again where something was suspicious.
const SOON: Duration = Duration::from_secs(1);

/// Compares what is on record with what is here.
pub struct Safety {
    /// The sessions of this node and the store.
    pub services: Arc<Services>,
    /// This node.
    pub node_id: Uuid,
    /// Pace of the looks.
    pub check_interval: Duration,
    /// How long signs of life of another node may be on their way to the store.
    pub flush_interval: Duration,
}

impl std::fmt::Debug for Safety {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Safety").field("check_interval", &self.check_interval).finish_non_exhaustive()
    }
}

/// What was suspicious at the last look, by connection.
#[derive(Debug, Default)]
struct Suspects {
    strays: HashSet<i64>,
    missing: HashSet<i64>,
}

impl Safety {
    /// Looks until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let mut suspects = Suspects::default();
        loop {
            let any = !(suspects.strays.is_empty() && suspects.missing.is_empty());
            let pause = if any { SOON.min(self.check_interval) } else { self.check_interval };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
                () = self.services.outage.back() => {}
            }
            if let Err(error) = self.look(&mut suspects).await {
                self.services.outage.stumbled("comparing open rows", &error);
            }
        }
    }

    async fn look(&self, suspects: &mut Suspects) -> Result<(), StoreError> {
        let services = &self.services;
        // Those that were here before the record is read, and are still here after it, must be in it.
        let before = self.holding();
        let held = services.store.list_held_connections(self.node_id).await?;
        let polled = services.store.list_polled_connections().await?;
        let after: HashSet<i64> = self.holding().iter().map(|connection| connection.id).collect();
        let here: HashSet<i64> =
            before.iter().map(|connection| connection.id).chain(after.iter().copied()).collect();

        let strays: Vec<&Held> = held
            .iter()
            .filter(|row| !here.contains(&row.id) && !services.history.is_at_work_on(row.agent))
            .collect();
        for stray in strays.iter().filter(|row| suspects.strays.contains(&row.id)) {
            tracing::warn!(agent_id = %stray.agent, connection_id = stray.id, "an open row that nobody holds is ended");
            if let Some(ticket) = services.history.end_stray(stray) {
                ticket.recorded().await;
            }
        }
        suspects.strays = strays.iter().map(|row| row.id).collect();

        let open: HashSet<i64> =
            held.iter().map(|row| row.id).chain(polled.iter().map(|row| row.id)).collect();
        let missing: Vec<&Arc<OpenConnection>> = before
            .iter()
            .filter(|connection| {
                !open.contains(&connection.id)
                    && after.contains(&connection.id)
                    && connection.ended().is_none()
            })
            .collect();
        for connection in
            missing.iter().filter(|connection| suspects.missing.contains(&connection.id)).take(REOPENED)
        {
            self.reopen(connection).await?;
        }
        suspects.missing = missing.iter().map(|connection| connection.id).collect();

        let unheard = polled.into_iter().filter(|row| !here.contains(&row.id) && self.is_unheard(row));
        watch_polls(services, &unheard.collect::<Vec<_>>()).await;

        let ended = services.store.end_strays(&services.history.heir()).await?;
        services.metrics.connections_ended.of(CloseReason::ServerLost).increment(ended);
        if ended > 0 {
            tracing::warn!(
                connections = ended,
                "connections that a lost server left open were ended as server_lost"
            );
            services.history.expect_verdicts();
        }
        Ok(())
    }

    /// The connections that hold their rows. Whose end is taken for recorded does not: should its row be open all the
    /// same, nobody else would end it.
    fn holding(&self) -> Vec<Arc<OpenConnection>> {
        let mut connections = self.services.hub.connections();
        connections.retain(|connection| !connection.is_recorded());
        connections
    }

    /// A connection lives here whose row is not open: it gets a new one, unless a newer connection has taken over.
    async fn reopen(&self, connection: &Arc<OpenConnection>) -> Result<(), StoreError> {
        let active = self.services.store.get_active_connection(connection.agent).await?;
        let reason = match active {
            Some(row) if row.id == connection.id => return Ok(()),
            Some(_) => CloseReason::Superseded,
            None => CloseReason::ServerLost,
        };
        // The row of polls may be ended by any node, in good order.
        if reason == CloseReason::ServerLost && connection.transport == Transport::Websocket {
            tracing::warn!(
                agent_id = %connection.agent,
                connection_id = connection.id,
                "a connected agent has no open row; it is asked to report, and gets one"
            );
        }
        connection.abandon(reason);
        self.services.hub.leave(connection);
        Ok(())
    }

    /// True where no node can have heard a poller lately: whoever hears it tells the store.
    fn is_unheard(&self, row: &PolledConnection) -> bool {
        let silence = silence(row).unwrap_or(self.services.history.expected().first_poll());
        row.last_seen_at.after(silence + self.flush_interval * 2) < self.services.history.now()
    }
}

fn silence(row: &PolledConnection) -> Option<Duration> {
    row.poll_silence_ms.map(|ms| Duration::from_millis(ms.unsigned_abs()))
}

/// Takes polls on record under watch that no session of this node holds; nobody is judged before the
/// time in which agents return after a loss.
pub async fn watch_polls(services: &Services, polled: &[PolledConnection]) {
    let (tick, now) = (services.clock.tick(), services.clock.now());
    let not_before: Tick = tick.after(services.history.expected().return_time());
    for row in polled {
        let seen = tick.before(now.since(row.last_seen_at));
        let pulse = Pulse::resuming(seen, row.sequence_num.map(i64::cast_unsigned), silence(row));
        let link = Arc::new(Link::heard_at(seen));
        let connection = OpenConnection::new(row.agent_id, row.id, Transport::Http, link, pulse);
        connection.note_sighting(row.last_seen_at);
        let connection = Arc::new(connection);
        services.hub.enter(&connection);
        services.watch.over(connection, not_before).await;
    }
}
