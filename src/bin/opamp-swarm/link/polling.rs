//! The plain HTTP transport: each report is a POST, its response is the offer.
//!
//! Promises at most one request under way and that the TCP connection is kept for the next one; if
//! the server ends it in between, the next report opens another. Must not know what is said.

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use hyper::StatusCode;
use opamp_server::proto::AgentToServer;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout_at},
};

use super::{
    MAX_OFFER,
    http1::{self, Response},
};
use crate::{endpoint::Endpoint, loss::Loss};

const ANSWER_LIMIT: Duration = Duration::from_mins(1);
const READ_AT_ONCE: usize = 4096;

pub(crate) struct Poller {
    endpoint: Arc<Endpoint>,
    turn: usize,
    stream: Option<TcpStream>,
    awaited: Option<Awaited>,
}

/// The response to the request under way, as far as it has come.
struct Awaited {
    received: Vec<u8>,
    until: Instant,
}

impl Poller {
    pub(super) async fn open(endpoint: Arc<Endpoint>, turn: usize) -> Result<Self, Loss> {
        let stream = endpoint.dial(turn).await?;
        Ok(Self { endpoint, turn, stream: Some(stream), awaited: None })
    }

    pub(super) async fn send(&mut self, report: &AgentToServer) -> Result<(), Loss> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            none => none.insert(self.endpoint.dial(self.turn).await?),
        };
        let request = http1::request(&self.endpoint, report);
        let mut rest = &request[..];
        while !rest.is_empty() {
            stream.writable().await?;
            let written = unless_early(stream.try_write(rest))?.unwrap_or(0);
            rest = &rest[written..];
        }
        self.awaited = Some(Awaited { received: Vec::new(), until: Instant::now() + ANSWER_LIMIT });
        Ok(())
    }

    pub(super) async fn next(&mut self) -> Result<Bytes, Loss> {
        while let Some(awaited) = &mut self.awaited {
            let stream = self.stream.as_ref().ok_or(Loss::Eof)?;
            let readable = timeout_at(awaited.until, stream.readable()).await;
            readable.map_err(|_| Loss::TimedOut)??;
            if let Some(response) = awaited.read(stream)? {
                self.awaited = None;
                if !response.reusable {
                    self.stream = None;
                }
                return offer(response);
            }
        }
        self.idle().await
    }

    /// Between two polls nothing comes but the end of the connection, which is no loss.
    async fn idle(&mut self) -> Result<Bytes, Loss> {
        while let Some(stream) = &self.stream {
            let readable = stream.readable().await;
            match readable.and_then(|()| unless_early(stream.try_read(&mut [0]))) {
                Ok(None) => {}
                Ok(Some(0)) | Err(_) => self.stream = None,
                Ok(Some(_)) => return Err(Loss::Malformed("bad_http")),
            }
        }
        std::future::pending().await
    }

    pub(super) async fn leave(&mut self, farewell: &AgentToServer) -> Result<(), Loss> {
        if self.awaited.is_some() {
            self.next().await?;
        }
        self.send(farewell).await?;
        self.next().await.map(drop)
    }
}

impl Awaited {
    /// Takes what has come; the response once it is complete.
    fn read(&mut self, stream: &TcpStream) -> Result<Option<Response>, Loss> {
        let mut buffer = [0; READ_AT_ONCE];
        let Some(length) = unless_early(stream.try_read(&mut buffer))? else {
            return Ok(None);
        };
        self.received.extend_from_slice(&buffer[..length]);
        let ended = length == 0;
        let response = http1::response(&self.received, ended)?;
        if response.is_none() && ended {
            return Err(Loss::Eof);
        }
        if self.received.len() > MAX_OFFER {
            return Err(Loss::Malformed("too_large"));
        }
        Ok(response)
    }
}

fn offer(response: Response) -> Result<Bytes, Loss> {
    if response.status != StatusCode::OK {
        return Err(Loss::refused(response.status, &response.headers));
    }
    Ok(response.unpacked(MAX_OFFER)?.into())
}

/// `None` if the socket was not ready after all.
fn unless_early(done: io::Result<usize>) -> io::Result<Option<usize>> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        done => done.map(Some),
    }
}
