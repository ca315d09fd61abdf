//! Signs of life on their way to the store: one statement every `store.flush_interval` for all agents.
//!
//! Sessions only write into their own pulse; this task looks at all of them. It skips whoever has
//! an unsaved change, so that the stored number never passes the stored state.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::Services;
use crate::outage::Witness;
use crate::store::Sighting;

/// Stores signs of life until `stop` is cancelled, and once more then.
pub async fn run(services: Arc<Services>, interval: Duration, stop: CancellationToken) {
    while stop.run_until_cancelled(tokio::time::sleep(interval)).await.is_some() {
        flush(&services).await;
    }
    flush(&services).await;
}

async fn flush(services: &Services) {
    let (mut sightings, mut told) = (Vec::new(), Vec::new());
    for connection in services.hub.connections() {
        count(services, &connection);
        if connection.ended().is_some() {
            continue;
        }
        if let Some((seen, sequence_num)) = connection.pulse.untold(connection.last_seen()) {
            // Never before what is on record: the number would not be stored with it.
            let proof = services.clock.moment(connection.proof(&services.sight, seen));
            let at = proof.max(connection.sighted());
            connection.note_sighting(at);
            sightings.push(Sighting {
                agent: connection.agent,
                connection_id: connection.id,
                at,
                sequence_num,
                poll_silence: connection.poll_silence(services.history.expected()),
            });
            told.push((connection, (seen, sequence_num)));
        }
    }
    if sightings.is_empty() {
        services.outage.withdraw(Witness::Flush);
        return;
    }
    // Neighbours lie on one page.
    sightings.sort_unstable_by_key(|sighting| sighting.agent);
    match services.store.update_last_seen(&sightings).await {
        Ok(stored) => {
            services.outage.written(Witness::Flush);
            services.metrics.sightings.increment(stored);
            for (connection, sighting) in told {
                connection.pulse.told(sighting);
            }
        }
        Err(error) => {
            let work = format!("the signs of life of {} agents", sightings.len());
            services.outage.failed(Witness::Flush, &work, &error);
        }
    }
}

/// Adds to the metrics what the connection and its link counted for themselves.
fn count(services: &Services, connection: &crate::history::OpenConnection) {
    services.metrics.count_quiet(connection.pulse.harvest());
    services.metrics.count_bytes(connection.link.harvest());
}
