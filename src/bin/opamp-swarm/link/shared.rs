//! Several agents on one WebSocket: each has a seat, one task reads and writes for all of them.
//!
//! Promises that the agents of a group share one socket for as long as it lives, that offers find
//! their agent by the uid it reported last, and that the end of the socket is told to every seat.
//! Must not know what reports and offers mean besides whose they are.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use opamp_server::proto::{AgentToServer, ServerToAgent};
use prost::Message;
use tokio::{
    sync::{Mutex, mpsc, oneshot},
    task::JoinSet,
};

use super::websocket::{self, Socket};
use crate::{endpoint::Endpoint, loss::Loss};

/// Reports that wait for the socket; whoever has another one waits with it.
const WAITING_REPORTS: usize = 64;
/// Offers that wait for their agent: as many as it may have asked for, and some unasked ones. An
/// agent that takes none, because it is silent, loses what is beyond.
const WAITING_OFFERS: usize = 2 * websocket::MAX_UNANSWERED;

/// The sockets of a fleet whose agents share them.
pub(crate) struct Sockets {
    seats: usize,
    groups: Box<[Mutex<Group>]>,
}

/// The agents that share a socket.
#[derive(Default)]
struct Group {
    line: Option<Line>,
    /// The task of the socket; it ends with the fleet if not before.
    task: JoinSet<()>,
}

/// The way to a socket; it does not keep the socket open.
struct Line {
    letters: mpsc::WeakSender<Letter>,
    end: Arc<OnceLock<Loss>>,
}

/// A report on its way to the socket.
struct Letter {
    uid: Bytes,
    frame: Bytes,
    offers: mpsc::Sender<Bytes>,
    /// Of a farewell: to be told once it is written.
    written: Option<oneshot::Sender<()>>,
}

/// One agent's place on a shared socket.
pub(crate) struct Seat {
    letters: mpsc::Sender<Letter>,
    offers: mpsc::Receiver<Bytes>,
    /// Goes along with each report.
    address: mpsc::Sender<Bytes>,
    end: Arc<OnceLock<Loss>>,
}

impl Sockets {
    /// For `agents` agents, of which `seats` share a socket; the last one may have fewer.
    pub(crate) fn new(agents: usize, seats: usize) -> Self {
        let groups = (0..agents.div_ceil(seats)).map(|_| Mutex::default()).collect();
        Self { seats, groups }
    }

    /// Whose socket an agent shares.
    fn group(&self, agent: usize) -> usize {
        agent / self.seats
    }

    /// A seat on the socket of the agent's group, which is opened if there is none.
    pub(super) async fn join(&self, endpoint: &Endpoint, agent: usize) -> Result<Seat, Loss> {
        let number = self.group(agent);
        let mut group = self.groups.get(number).ok_or(Loss::Eof)?.lock().await;
        let living = group.line.as_ref().and_then(Line::join);
        if let Some(seat) = living {
            return Ok(seat);
        }
        let socket = Socket::open(endpoint, number).await?;
        let (letters, waiting) = mpsc::channel(WAITING_REPORTS);
        let line = Line { letters: letters.downgrade(), end: Arc::default() };
        let seat = Seat::new(letters, Arc::clone(&line.end));
        while group.task.try_join_next().is_some() {}
        group.task.spawn(serve(socket, waiting, Arc::clone(&line.end)));
        group.line = Some(line);
        Ok(seat)
    }

    /// Returns once every socket has ended, which each does when the last agent has left it.
    pub(crate) async fn closed(&self) {
        for group in &self.groups {
            while group.lock().await.task.join_next().await.is_some() {}
        }
    }
}

impl Line {
    fn join(&self) -> Option<Seat> {
        let letters = self.letters.upgrade().filter(|letters| !letters.is_closed())?;
        Some(Seat::new(letters, Arc::clone(&self.end)))
    }
}

impl Seat {
    fn new(letters: mpsc::Sender<Letter>, end: Arc<OnceLock<Loss>>) -> Self {
        let (address, offers) = mpsc::channel(WAITING_OFFERS);
        Self { letters, offers, address, end }
    }

    pub(super) async fn send(&mut self, report: &AgentToServer) -> Result<(), Loss> {
        self.post(report, None).await
    }

    async fn post(&self, report: &AgentToServer, written: Option<oneshot::Sender<()>>) -> Result<(), Loss> {
        let uid = Bytes::copy_from_slice(&report.instance_uid);
        let frame = websocket::frame(report).into();
        let letter = Letter { uid, frame, offers: self.address.clone(), written };
        self.letters.send(letter).await.map_err(|_| self.ended())
    }

    pub(super) async fn next(&mut self) -> Result<Bytes, Loss> {
        tokio::select! {
            biased;
            // Never empty for good: the seat itself holds a sender.
            Some(offer) = self.offers.recv() => Ok(offer),
            () = self.letters.closed() => Err(self.ended()),
        }
    }

    /// The others stay on the socket; the last one to leave closes it.
    pub(super) async fn leave(&mut self, farewell: &AgentToServer) -> Result<(), Loss> {
        let (written, done) = oneshot::channel();
        self.post(farewell, Some(written)).await?;
        done.await.map_err(|_| self.ended())
    }

    fn ended(&self) -> Loss {
        self.end.get().copied().unwrap_or(Loss::Eof)
    }
}

/// Lives until the socket ends or nobody sits on it any more.
async fn serve(mut socket: Socket, mut letters: mpsc::Receiver<Letter>, end: Arc<OnceLock<Loss>>) {
    let mut seats = HashMap::new();
    match converse(&mut socket, &mut letters, &mut seats).await {
        Ok(()) => {}
        Err(loss) => {
            // Before `letters` closes, which is how the seats learn of it.
            let _first = end.set(loss);
            drop(letters);
            socket.hang_up(&loss).await;
        }
    }
}

async fn converse(
    socket: &mut Socket,
    letters: &mut mpsc::Receiver<Letter>,
    seats: &mut HashMap<Bytes, mpsc::Sender<Bytes>>,
) -> Result<(), Loss> {
    let mut farewell = false;
    loop {
        tokio::select! {
            letter = letters.recv() => match letter {
                Some(letter) => {
                    seats.insert(letter.uid, letter.offers);
                    farewell = letter.written.is_some();
                    socket.send_frame(letter.frame).await?;
                    let _gone = letter.written.map(|written| written.send(()));
                }
                // Who was cut off without a farewell closes nothing.
                None if farewell => return socket.close_and_wait().await,
                None => return Ok(()),
            },
            offer = socket.next() => deliver(seats, offer?)?,
        }
    }
}

/// An offer whose uid nobody has goes to anybody, who will count it as misaddressed.
fn deliver(seats: &mut HashMap<Bytes, mpsc::Sender<Bytes>>, offer: Bytes) -> Result<(), Loss> {
    let uid = ServerToAgent::decode(&*offer).map_err(|_| Loss::Malformed("bad_offer"))?.instance_uid;
    let seat = seats.get(&uid[..]).or_else(|| seats.values().next());
    if let Some(Err(mpsc::error::TrySendError::Closed(_))) = seat.map(|seat| seat.try_send(offer)) {
        seats.remove(&uid[..]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_share_a_socket() {
        let sockets = Sockets::new(10, 4);
        let groups: Vec<_> = (0..10).map(|agent| sockets.group(agent)).collect();
        assert_eq!(groups, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]);
        assert_eq!(sockets.groups.len(), 3);
    }

    #[test]
    fn an_offer_finds_its_agent_and_a_stranger_s_finds_somebody() {
        let (mut seats, mut offers) = (HashMap::new(), Vec::new());
        for uid in [1_u8, 2] {
            let (sender, receiver) = mpsc::channel(4);
            seats.insert(Bytes::copy_from_slice(&[uid; 16]), sender);
            offers.push(receiver);
        }
        let offer = |uid: u8| -> Bytes {
            ServerToAgent { instance_uid: vec![uid; 16], ..ServerToAgent::default() }.encode_to_vec().into()
        };
        assert!(deliver(&mut seats, offer(2)).is_ok());
        assert!(offers[0].try_recv().is_err());
        assert_eq!(offers[1].try_recv().ok(), Some(offer(2)));
        assert!(deliver(&mut seats, offer(3)).is_ok());
        let found = offers.iter_mut().filter_map(|offers| offers.try_recv().ok()).count();
        assert_eq!(found, 1);
        assert!(deliver(&mut seats, Bytes::from_static(&[0xff])).is_err());
    }
}
