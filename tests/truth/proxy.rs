//! A breakable way to Postgres: it passes bytes on until a test tells it otherwise.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What happens to bytes on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Pass,
    /// Nobody is let in, and whoever was is cut off.
    Refuse,
    /// Nothing moves in either direction.
    Freeze,
    /// Every piece waits so long.
    Delay(Duration),
}

#[derive(Debug)]
struct Shared {
    upstream: SocketAddr,
    mode: watch::Sender<Mode>,
    /// A connection lives as long as this number stays.
    cuts: watch::Sender<u64>,
    /// The next COMMIT that passes is the last thing its connection carries.
    at_commit: AtomicBool,
    commits_cut: AtomicU64,
}

/// The proxy; it ends with this value.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    pub(crate) async fn start(upstream: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream,
            mode: watch::Sender::new(Mode::Pass),
            cuts: watch::Sender::new(0),
            at_commit: AtomicBool::new(false),
            commits_cut: AtomicU64::new(0),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(listen(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, _tasks: tasks })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.shared.mode.send_replace(mode);
        if mode == Mode::Refuse {
            self.cut();
        }
    }

    /// Cuts every connection, once.
    pub(crate) fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// From the next COMMIT that passes Postgres' answer is lost with its connection; answers how often that was so.
    pub(crate) fn cut_at_commit(&self, armed: bool) -> u64 {
        self.shared.at_commit.store(armed, Ordering::Relaxed);
        self.shared.commits_cut.load(Ordering::Relaxed)
    }
}

async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                connections.spawn(carry(client, Arc::clone(&shared)));
            }
            Some(_ended) = connections.join_next() => {}
        }
    }
}

/// Carries one connection until an end hangs up or the proxy cuts it.
async fn carry(client: TcpStream, shared: Arc<Shared>) {
    let mut cuts = shared.cuts.subscribe();
    cuts.mark_unchanged();
    if *shared.mode.borrow() == Mode::Refuse {
        let _on_every_system = client.set_zero_linger();
        return;
    }
    let carrying = async {
        let server = TcpStream::connect(shared.upstream).await?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        let lost = AtomicBool::new(false);
        let up = pump(from_client, to_server, &shared, Some(&lost));
        let down = pump_answers(from_server, to_client, &shared, &lost);
        tokio::select! { done = up => done, done = down => done }
    };
    tokio::select! {
        _hung_up = carrying => {}
        _cut = cuts.changed() => {}
    }
}

/// Waits as the mode says before a piece goes on.
async fn hold(shared: &Shared) {
    let mut mode = shared.mode.subscribe();
    let present = *mode.borrow_and_update();
    match present {
        Mode::Pass | Mode::Refuse => {}
        Mode::Delay(time) => tokio::time::sleep(time).await,
        Mode::Freeze => {
            // The sender lives as long as any connection.
            let _thawed = mode.wait_for(|mode| *mode != Mode::Freeze).await;
        }
    }
}

async fn pump(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    shared: &Shared,
    lost: Option<&AtomicBool>,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        hold(shared).await;
        let piece = &buffer[..length];
        if let Some(lost) = lost
            && carries_commit(piece)
            && shared.at_commit.swap(false, Ordering::Relaxed)
        {
            shared.commits_cut.fetch_add(1, Ordering::Relaxed);
            lost.store(true, Ordering::Relaxed);
        }
        to.write_all(piece).await?;
    }
}

/// As [`pump`], but once an answer is to be lost its first byte ends the connection: Postgres has committed by then.
async fn pump_answers(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    shared: &Shared,
    lost: &AtomicBool,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 || lost.load(Ordering::Relaxed) {
            return Ok(());
        }
        hold(shared).await;
        to.write_all(&buffer[..length]).await?;
    }
}

/// True where a simple query or a statement to parse says COMMIT.
fn carries_commit(piece: &[u8]) -> bool {
    matches!(piece.first(), Some(b'Q' | b'P'))
        && piece.windows(6).any(|six| six.eq_ignore_ascii_case(b"COMMIT"))
}
