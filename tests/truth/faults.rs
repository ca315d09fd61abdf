//! What goes wrong in a round, and when: drawn from the seed, over each node's process and each node's way to the store.

use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::agent::Phase;
use crate::database::{Database, Kind};
use crate::node::{Blow, Place};
use crate::proxy::{Mode, Proxy};
use crate::record::{Trouble, Troubles};

/// How long an armed cut waits for a COMMIT.
const NEXT_COMMIT: Duration = Duration::from_secs(2);

/// Deals blows to a node until the storm is over.
pub(crate) async fn strike(mut place: Place, mut rng: Rng, mut phase: watch::Receiver<Phase>) {
    loop {
        let pause = Duration::from_millis(rng.u64(500..5_000));
        let blow = match rng.u8(..10) {
            0..=3 => Blow::Kill(Duration::from_millis(rng.u64(100..2_500))),
            4..=6 => Blow::Stop(Duration::from_millis(rng.u64(1_000..8_000))),
            _ => Blow::Terminate(Duration::from_millis(rng.u64(100..2_000))),
        };
        // Once the blow before is over; then the agents have some time to come.
        let up = tokio::select! {
            up = place.ready.wait_for(|ready| *ready) => up.is_ok(),
            _over = phase.wait_for(|phase| *phase != Phase::Storm) => false,
        };
        if !up || wait(&mut phase, pause).await || place.blows.send(blow).await.is_err() {
            return;
        }
        // It is dealt at once, or as soon as the node is up.
        let _struck = timeout(Duration::from_secs(1), place.ready.wait_for(|ready| !*ready)).await;
    }
}

/// Waits so long; true where the storm was over before.
async fn wait(phase: &mut watch::Receiver<Phase>, time: Duration) -> bool {
    timeout(time, phase.wait_for(|phase| *phase != Phase::Storm)).await.is_ok()
}

/// Breaks a node's way to Postgres now and then until the storm is over.
pub(crate) async fn break_store(
    node: usize,
    proxy: Arc<Proxy>,
    mut rng: Rng,
    troubles: Troubles,
    mut phase: watch::Receiver<Phase>,
) {
    loop {
        let pause = Duration::from_millis(rng.u64(1_000..7_000));
        if wait(&mut phase, pause).await {
            return;
        }
        let some = Duration::from_millis(rng.u64(300..4_000));
        let (trouble, time) = match rng.u8(..12) {
            0..=2 => (Trouble::StoreRefused, some * 2),
            3..=4 => (Trouble::StoreCut, Duration::ZERO),
            // Longer than the deadline of a call, now and then.
            5 => (Trouble::StoreFrozen, some + Duration::from_secs(10)),
            6..=7 => (Trouble::StoreFrozen, some),
            8..=9 => (Trouble::StoreDelayed, some),
            _ => (Trouble::CommitCut, NEXT_COMMIT),
        };
        let delay = Duration::from_millis(rng.u64(20..400));
        let number = troubles.begin(Some(node), trouble);
        match trouble {
            Trouble::StoreRefused => proxy.set(Mode::Refuse),
            Trouble::StoreFrozen => proxy.set(Mode::Freeze),
            Trouble::StoreDelayed => proxy.set(Mode::Delay(delay)),
            Trouble::CommitCut => {
                proxy.cut_at_commit(true);
            }
            Trouble::StoreCut => proxy.cut(),
            Trouble::Down
            | Trouble::Killed
            | Trouble::Terminated
            | Trouble::Stopped
            | Trouble::StoreLocked
            | Trouble::StoreRestarted
            | Trouble::Lag => {}
        }
        let over = wait(&mut phase, time).await;
        proxy.cut_at_commit(false);
        proxy.set(Mode::Pass);
        troubles.end(number);
        if over {
            return;
        }
    }
}

/// Takes the database from all servers now and then until the storm is over.
pub(crate) async fn seize_store(
    kind: Kind,
    database: Arc<Database>,
    mut rng: Rng,
    troubles: Troubles,
    mut phase: watch::Receiver<Phase>,
) {
    loop {
        let pause = Duration::from_millis(rng.u64(2_000..8_000));
        let (pause, trouble) = match kind {
            Kind::Sqlite => (pause, Trouble::StoreLocked),
            Kind::Postgres | Kind::TwoNodes => (pause * 2, Trouble::StoreRestarted),
        };
        if wait(&mut phase, pause).await {
            return;
        }
        let long = rng.u8(..6) == 0;
        let time =
            Duration::from_millis(rng.u64(300..4_000)) + Duration::from_secs(if long { 10 } else { 0 });
        let number = troubles.begin(None, trouble);
        let seized = database.seize(async {
            wait(&mut phase, time).await;
        });
        if let Err(error) = seized.await {
            troubles.note(format!("the database could not be seized: {error}"));
        }
        troubles.end(number);
    }
}

/// Looks at the clock: what comes late was kept from running by the host, and the record is blurred there.
pub(crate) async fn watch_host(troubles: Troubles) {
    use crate::bounds::LAG;
    use opamp_server::clock::host_now;
    let pace = Duration::from_millis(100);
    let mut last = host_now();
    loop {
        sleep(pace).await;
        let now = host_now();
        if now.since(last) > LAG {
            troubles.past(None, Trouble::Lag, last, now);
        }
        last = now;
    }
}
