//! An operator who tells agents to reconnect, now here and now there, through the API of any node.

use std::time::Duration;

use fastrand::Rng;
use opamp_server::agent::InstanceUid;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::agent::Phase;
use crate::node::Place;
use crate::record::{Record, Troubles};
use crate::wire::Socket;

/// How long the operator waits for an answer.
const PATIENCE: Duration = Duration::from_secs(12);

/// Gives orders until the storm is over.
pub(crate) async fn order(
    places: Vec<Place>,
    records: Vec<Record>,
    mut rng: Rng,
    troubles: Troubles,
    mut phase: watch::Receiver<Phase>,
) {
    loop {
        let pause = Duration::from_millis(rng.u64(300..1_500));
        if timeout(pause, phase.wait_for(|phase| *phase != Phase::Storm)).await.is_ok() {
            return;
        }
        let (place, record) = (&places[rng.usize(..places.len())], &records[rng.usize(..records.len())]);
        let uid = record.lock().uid;
        let Ok(Ok(status)) = timeout(PATIENCE, reconnect(place, uid)).await else { continue };
        record.note(format!("is ordered to reconnect: {status}"));
        // Taken; not there or not a WebSocket; never heard of; the store is away.
        if ![202, 409, 404, 503].contains(&status) {
            troubles.outrage(format!("an order to reconnect {uid} is answered with {status}"));
        }
    }
}

async fn reconnect(place: &Place, uid: InstanceUid) -> std::io::Result<u16> {
    let mut socket = Socket::dial(place.operators).await?;
    let head = format!("POST /api/v1/agents/{uid}/reconnect HTTP/1.1\r\nHost: {}\r\n", place.operators);
    Ok(socket.request(&head, &[]).await?.status)
}
