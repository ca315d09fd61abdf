//! A socket that notes when bytes came and how many went each way, and that ends what is never finished.
//!
//! Before an upgrade [`Phase`] tells which part of an exchange the socket is in, so that its task can
//! end slow heads and idle connections. After it the socket follows the frames itself: a message
//! that is not whole in time fails the read, and a large one is read on only as the budget allows.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

use super::frames::FrameMeter;
use crate::burden::{Budget, SMALL, Share};
use crate::clock::{Clock, Tick};
use crate::pulse::Link;

/// How long a message or a body may take from its first byte.
pub(super) const UNFINISHED: Duration = Duration::from_secs(30);

/// How long a new connection may be silent, and how long the head of a request may take from its first byte.
const HEAD: Duration = Duration::from_secs(10);

/// How long a kept-alive connection may be idle.
const IDLE: Duration = Duration::from_mins(2);

/// The part of an exchange over plain HTTP that a socket is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nothing came yet.
    New,
    /// The head of a request is on its way.
    Head,
    /// A request is being answered.
    Busy,
    /// It is kept alive for the next request.
    Idle,
}

/// The present stage of a socket, and since when.
#[derive(Debug)]
pub(super) struct Phase {
    stage: Mutex<(Stage, Tick)>,
    link: Arc<Link>,
}

impl Phase {
    /// A new connection.
    pub(super) fn new(link: Arc<Link>, now: Tick) -> Arc<Self> {
        Arc::new(Self { stage: Mutex::new((Stage::New, now)), link })
    }

    fn get(&self) -> (Stage, Tick) {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a stage.
    pub(super) fn enter(&self, stage: Stage, now: Tick) {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) = (stage, now);
        self.link.wake();
    }

    fn heard(&self, now: Tick) {
        if matches!(self.get().0, Stage::New | Stage::Idle) {
            self.enter(Stage::Head, now);
        }
    }

    /// Waits until a stage has taken longer than it may.
    pub(super) async fn overdue(&self, clock: &Clock) {
        loop {
            let (stage, since) = self.get();
            let patience = match stage {
                Stage::New | Stage::Head => HEAD,
                Stage::Idle => IDLE,
                Stage::Busy => {
                    self.link.woken().await;
                    continue;
                }
            };
            let deadline = clock.instant(since.after(patience));
            let passed = tokio::time::timeout_at(deadline, self.link.woken()).await.is_err();
            if passed && self.get() == (stage, since) {
                return;
            }
        }
    }
}

/// What a socket carries.
#[derive(Debug)]
enum Traffic {
    Http(Arc<Phase>),
    Websocket(FrameMeter),
}

/// A message that is not whole yet.
#[derive(Debug)]
struct Stall {
    deadline: Pin<Box<Sleep>>,
    share: Share,
}

/// A socket with a pulse.
#[derive(Debug)]
pub(super) struct Metered {
    socket: TcpStream,
    link: Arc<Link>,
    clock: Clock,
    budget: Budget,
    traffic: Traffic,
    /// Made only where a message keeps the link waiting: an idle link pays a pointer for it.
    stall: Option<Box<Stall>>,
    /// What the message holds that became whole last.
    whole: Option<Box<Share>>,
}

/// A socket that pays for what it receives.
pub(super) trait Bearer {
    /// The share of the large message that became whole last: now its reader's.
    fn take_share(&mut self) -> Option<Box<Share>>;
}

impl Bearer for Metered {
    fn take_share(&mut self) -> Option<Box<Share>> {
        self.whole.take()
    }
}

impl Metered {
    /// A socket that speaks HTTP so far.
    pub(super) fn new(socket: TcpStream, phase: Arc<Phase>, clock: Clock, budget: Budget) -> Self {
        let link = Arc::clone(&phase.link);
        Self { socket, link, clock, budget, traffic: Traffic::Http(phase), stall: None, whole: None }
    }

    /// From now on it carries WebSocket frames, of which `read_ahead` were read already.
    pub(super) fn upgrade(&mut self, read_ahead: &[u8]) {
        let mut meter = FrameMeter::default();
        meter.feed(read_ahead);
        self.traffic = Traffic::Websocket(meter);
    }
}

impl Metered {
    /// Bytes of a WebSocket message that is not whole yet.
    fn unfinished(&self) -> u64 {
        match &self.traffic {
            Traffic::Http(_) => 0,
            Traffic::Websocket(meter) => meter.unfinished(),
        }
    }

    fn stall(&mut self) -> &mut Stall {
        let budget = &self.budget;
        self.stall.get_or_insert_with(|| {
            Box::new(Stall { deadline: Box::pin(tokio::time::sleep(UNFINISHED)), share: budget.share() })
        })
    }

    /// Notes what was read.
    fn note(&mut self, bytes: &[u8]) {
        let now = self.clock.tick();
        self.link.heard(now, bytes.len());
        match &mut self.traffic {
            Traffic::Http(phase) => phase.heard(now),
            Traffic::Websocket(meter) => {
                let ended = meter.feed(bytes);
                self.link.set_receiving(meter.unfinished() > 0);
                if ended {
                    // Whatever follows in the same bytes is another message, with a time and a share of its own.
                    let share = self.stall.take().map(|stall| stall.share).filter(|share| share.asked() > 0);
                    self.whole = share.map(Box::new).or(self.whole.take());
                }
            }
        }
    }

    /// Ready once the message that is being read may grow by `more` bytes.
    fn poll_room(&mut self, context: &mut Context<'_>, more: usize) -> Poll<io::Result<()>> {
        let unfinished = self.unfinished();
        if unfinished <= SMALL as u64 {
            return Poll::Ready(Ok(()));
        }
        let stall = self.stall();
        let late = stall.deadline.as_mut().poll(context).is_ready();
        let room = stall.share.poll_cover(context, unfinished.saturating_add(more as u64));
        match (late, room) {
            (true, Poll::Ready(())) => Poll::Ready(Err(out_of_time())),
            // Its sender did not keep us waiting.
            (true, Poll::Pending) => Poll::Ready(Err(io::ErrorKind::OutOfMemory.into())),
            (false, room) => room.map(Ok),
        }
    }
}

/// How a message that was not whole in time fails the read.
fn out_of_time() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the message was not whole in time")
}

impl AsyncRead for Metered {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_room(context, buf.remaining()))?;
        let before = buf.filled().len();
        match Pin::new(&mut this.socket).poll_read(context, buf)? {
            Poll::Ready(()) => {
                let read = buf.filled().get(before..).unwrap_or_default();
                if !read.is_empty() {
                    this.note(read);
                }
                Poll::Ready(Ok(()))
            }
            Poll::Pending if this.unfinished() > 0 => {
                this.stall().deadline.as_mut().poll(context).map(|()| Err(out_of_time()))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncWrite for Metered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let bytes = ready!(Pin::new(&mut self.socket).poll_write(cx, buf))?;
        self.link.sent(bytes);
        Poll::Ready(Ok(bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let bytes = ready!(Pin::new(&mut self.socket).poll_write_vectored(cx, bufs))?;
        self.link.sent(bytes);
        Poll::Ready(Ok(bytes))
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
