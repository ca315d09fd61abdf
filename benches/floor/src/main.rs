//! The floor under every figure: accepts WebSockets with the buffers that the server gives them and
//! answers each frame with a frame of the size of the server's answer. No protobuf, no state, no
//! store, no deadlines: what is measured here is the price of the sockets.
//!
//! `floor ADDRESS` listens there until it is killed.

use std::process::ExitCode;

use futures_util::{SinkExt, StreamExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::accept_async_with_config;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};

/// As the server has it.
const READ_BUFFER: usize = 1024;
/// What stands before the uid in a report and in an offer: the header, and field 1 of 16 bytes.
const BEFORE_UID: [u8; 3] = [0x00, 0x0a, 0x10];
const UID: usize = 16;
/// What follows it in an offer that asks for nothing: field 7, the capabilities.
const AFTER_UID: [u8; 2] = [0x38, 0x15];

fn main() -> ExitCode {
    let Some(address) = std::env::args().nth(1) else {
        eprintln!("floor: the address to listen on is the one argument");
        return ExitCode::from(2);
    };
    let Err(error) = serve(&address);
    eprintln!("floor: {error}");
    ExitCode::FAILURE
}

fn serve(address: &str) -> Result<std::convert::Infallible, Box<dyn std::error::Error>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        // As the server listens, so that a storm of connects meets the same backlog.
        let listener = TcpListener::bind(address).await?;
        loop {
            let (stream, _) = listener.accept().await?;
            tokio::spawn(async move {
                // However it ends, nobody is to be told.
                let _ended = answer(stream).await;
            });
        }
    })
}

async fn answer(stream: TcpStream) -> Result<(), Error> {
    stream.set_nodelay(true)?;
    let config = WebSocketConfig::default().read_buffer_size(READ_BUFFER).write_buffer_size(0);
    let mut socket = accept_async_with_config(stream, Some(config)).await?;
    while let Some(message) = socket.next().await {
        let message = message?;
        if let Message::Binary(report) = &message
            && let Some(uid) = report.strip_prefix(&BEFORE_UID).and_then(|rest| rest.get(..UID))
        {
            let offer = [&BEFORE_UID[..], uid, &AFTER_UID].concat();
            socket.send(Message::Binary(offer.into())).await?;
        }
    }
    Ok(())
}
