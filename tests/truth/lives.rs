//! The two ways an agent speaks, and the ways it leaves: one WebSocket, or one series of polls.

use opamp_server::clock::host_now;
use opamp_server::proto::ServerToAgent;
use prost::Message as _;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::agent::{Agent, Letter, Phase, Taken};
use crate::bounds::PATIENCE;
use crate::record::{End, Way};
use crate::wire::{Frame, Socket};

/// How often a farewell is polled before the agent goes without an answer.
const FAREWELLS: u32 = 5;

/// Handshakes refused for now, as the agent hears of it.
const UNAVAILABLE: u16 = 503;

impl Agent {
    /// One WebSocket, from its handshake to its end.
    pub(crate) async fn visit(&mut self) -> End {
        let address = self.places[self.node].agents;
        let shaken = timeout(PATIENCE, async {
            let mut socket = Socket::dial(address).await?;
            let status = socket.shake_hands(address).await?;
            Ok::<_, std::io::Error>((socket, status))
        });
        let mut socket = match shaken.await {
            Ok(Ok((socket, 101))) => socket,
            Ok(Ok((_, UNAVAILABLE))) => {
                self.record.note("its handshake is refused with 503");
                self.record.lock().refusals.push(host_now());
                return End::Refused;
            }
            Ok(Ok((_, status))) => {
                self.record.outrage(format!("its handshake is answered with {status}"));
                return End::Refused;
            }
            Ok(Err(_)) | Err(_) => return End::Refused,
        };
        self.record.begin(Way::WebSocket, self.node, Some(&socket));
        match self.converse(&mut socket).await {
            Ok(()) => self.leave(socket).await,
            Err(end) => {
                // Before the socket goes: what the server sees of it comes later.
                self.record.ended(end.clone());
                socket.reset();
                self.record.gone();
                end
            }
        }
    }

    /// Reports until it is time to leave.
    async fn converse(&mut self, socket: &mut Socket) -> Result<(), End> {
        let letter = self.first_letter();
        self.exchange(socket, &letter).await?;
        let leaves = Instant::now() + self.between(200, 4_500);
        loop {
            if !self.owes() {
                let pause = self.between(150, 900);
                self.listen(socket, Instant::now() + pause).await?;
                if self.chance(5) {
                    // Busy with itself: nobody answers pings, but for less than the time-out.
                    sleep(self.between(500, 1_500)).await;
                }
            }
            match self.phase() {
                Phase::Over => return Ok(()),
                Phase::Storm if Instant::now() >= leaves && !self.owes() => return Ok(()),
                Phase::Storm | Phase::Calm | Phase::Return => {}
            }
            let letter = self.next_letter();
            if self.exchange(socket, &letter).await? == Taken::Refused {
                let pause = self.between(700, 1_500);
                self.listen(socket, Instant::now() + pause).await?;
            }
        }
    }

    /// Sends a letter and waits for its answer.
    async fn exchange(&mut self, socket: &mut Socket, letter: &Letter) -> Result<Taken, End> {
        let sent = host_now();
        self.sends();
        socket.send(&letter.report).await.map_err(|_| End::Broken)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match timeout_at(deadline, self.next(socket)).await {
                Err(_elapsed) => return Err(End::Impatience),
                Ok(Err(end)) => return Err(end),
                Ok(Ok(None)) => {}
                Ok(Ok(Some(offer))) => return Ok(self.take(&offer, letter, sent)),
            }
        }
    }

    /// Answers what comes until `until`.
    async fn listen(&mut self, socket: &mut Socket, until: Instant) -> Result<(), End> {
        while let Ok(next) = timeout_at(until, self.next(socket)).await {
            if let Some(offer) = next? {
                self.hear(&offer);
                if self.owes() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The next frame: an offer, none where a ping was answered, or the end.
    async fn next(&self, socket: &mut Socket) -> Result<Option<ServerToAgent>, End> {
        match socket.receive().await {
            Ok(Some(Frame::Offer(offer))) => Ok(Some(*offer)),
            Ok(Some(Frame::Ping(payload))) => {
                self.record.sending();
                socket.pong(&payload).await.map_err(|_| End::Broken)?;
                Ok(None)
            }
            Ok(Some(Frame::Close(code, reason))) => {
                let end = End::Told(code, reason);
                self.record.ended(end.clone());
                let _the_server_may_be_gone = socket.close(code).await;
                Err(end)
            }
            Ok(None) => Err(End::Broken),
            Err(error) => {
                if error.kind() == std::io::ErrorKind::InvalidData {
                    self.record.outrage(format!("is sent what is no frame: {error}"));
                }
                Err(End::Broken)
            }
        }
    }

    /// Leaves in one of six ways.
    async fn leave(&mut self, mut socket: Socket) -> End {
        match self.rng.u8(..12) {
            0..=1 => return self.say_farewell(socket).await,
            2..=3 => {
                self.record.ended(End::Close);
                let _the_server_may_be_gone = socket.close(1000).await;
            }
            4..=5 => {
                self.record.ended(End::Finish);
                let _the_server_may_be_gone = socket.finish().await;
            }
            6..=7 => {
                self.record.ended(End::Reset);
                socket.reset();
                self.record.gone();
                return End::Reset;
            }
            8..=9 => {
                let hold = self.between(500, 6_000);
                self.record.ended(End::Abandon);
                self.record.gone();
                self.record.stay(|stay| stay.released = Some(host_now().after(hold)));
                self.forgotten.spawn(async move {
                    sleep(hold).await;
                    socket.reset();
                });
                return End::Abandon;
            }
            _ => {
                self.record.ended(End::Silence);
                self.record.gone();
                self.be_silent().await;
                self.record.note("gives up its silent socket");
                self.record.stay(|stay| stay.released = Some(host_now()));
                socket.reset();
                return End::Silence;
            }
        }
        self.record.gone();
        if self.chance(70) {
            // Waits for the server's side, as a good client does.
            let _in_time = timeout(self.between(500, 2_000), async {
                while let Ok(Some(_)) = socket.receive().await {}
            })
            .await;
        }
        let end = self.record.stay(|stay| stay.ended.clone());
        end.flatten().map_or(End::Broken, |(_, end)| end)
    }

    /// Says nothing with an open socket: longer than the time-out or not; in the calm until it is over.
    async fn be_silent(&mut self) {
        let until = Instant::now() + self.between(1_000, 7_000);
        loop {
            let phase = *self.phase.borrow_and_update();
            let changed = match phase {
                Phase::Storm => timeout_at(until, self.phase.changed()).await.is_ok(),
                Phase::Calm => self.phase.changed().await.is_ok(),
                Phase::Return | Phase::Over => false,
            };
            if !changed {
                return;
            }
        }
    }

    async fn say_farewell(&mut self, mut socket: Socket) -> End {
        let letter = self.farewell();
        self.record.stay(|stay| stay.farewell = true);
        match self.exchange(&mut socket, &letter).await {
            Ok(Taken::Accepted) => {
                let end = self.end(End::Farewell);
                let _the_server_may_be_gone = socket.close(1000).await;
                end
            }
            Ok(Taken::Refused) => {
                self.record.ended(End::Close);
                let _the_server_may_be_gone = socket.close(1000).await;
                self.record.gone();
                End::Close
            }
            Err(end) => {
                self.record.ended(end.clone());
                socket.reset();
                self.record.gone();
                end
            }
        }
    }

    /// Polls until it is time to stop.
    pub(crate) async fn poll_along(&mut self) -> End {
        self.record.begin(Way::Http, self.node, None);
        let mut line = None;
        let mut letter = self.first_letter();
        let leaves = Instant::now() + self.between(800, 6_000);
        loop {
            let taken = self.poll(&mut line, &letter).await;
            let answered = taken == Some(Taken::Accepted);
            if !answered {
                if self.phase() == Phase::Over {
                    return self.end(End::Silence);
                }
                if self.chance(40) {
                    line = None;
                    self.hop();
                }
                sleep(self.between(300, 1_500)).await;
                if taken == Some(Taken::Refused) {
                    letter = self.next_letter();
                }
                continue;
            }
            if !self.owes() {
                sleep(self.between(200, 800)).await;
            }
            match self.phase() {
                Phase::Over => return self.stop_polling(&mut line).await,
                Phase::Storm if Instant::now() >= leaves && !self.owes() => {
                    return self.stop_polling(&mut line).await;
                }
                Phase::Storm | Phase::Calm | Phase::Return => {}
            }
            if self.chance(10) {
                // Polls may land anywhere.
                line = None;
                self.hop();
            }
            letter = self.next_letter();
        }
    }

    /// One poll; none where it was not answered for good, and the same letter is to be sent once more.
    async fn poll(&mut self, line: &mut Option<Socket>, letter: &Letter) -> Option<Taken> {
        let address = self.places[self.node].agents;
        let sent = host_now();
        self.sends();
        let polling = async {
            let socket = match line {
                Some(socket) => socket,
                None => line.insert(Socket::dial(address).await?),
            };
            socket.poll(address, &letter.report).await
        };
        let polled = timeout(PATIENCE, polling).await;
        let answer = match polled {
            Ok(Ok(answer)) if answer.status == UNAVAILABLE => {
                self.record.failed("its poll is refused with 503");
                self.record.lock().refusals.push(host_now());
                return None;
            }
            Ok(Ok(answer)) if answer.status == 200 => answer,
            Ok(Ok(answer)) => {
                self.record.outrage(format!("its poll is answered with {}", answer.status));
                return None;
            }
            Ok(Err(_)) | Err(_) => {
                *line = None;
                self.record.failed("its poll is not answered");
                return None;
            }
        };
        match ServerToAgent::decode(answer.body.as_slice()) {
            Ok(offer) => Some(self.take(&offer, letter, sent)),
            Err(error) => {
                self.record.outrage(format!("its poll is answered with no offer: {error}"));
                None
            }
        }
    }

    /// Stops polling, with a farewell or without.
    async fn stop_polling(&mut self, line: &mut Option<Socket>) -> End {
        if self.chance(50) {
            return self.end(End::Silence);
        }
        let letter = self.farewell();
        self.record.stay(|stay| stay.farewell = true);
        for _ in 0..FAREWELLS {
            if self.poll(line, &letter).await == Some(Taken::Accepted) {
                return self.end(End::Farewell);
            }
            sleep(self.between(300, 1_000)).await;
        }
        self.end(End::Silence)
    }
}
