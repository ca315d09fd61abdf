//! The bytes of a WebSocket as a client sends them: framing, the OpAMP header, the decoder.
//!
//! Three read the same bytes: the WebSocket library, the follower beside it ([`FrameMeter`]), and a plain reading
//! of RFC 6455 here. As long as the library finds nothing wrong, they agree on where messages end.

use std::io::{self, Read, Write};
use std::time::Duration;

use fastrand::Rng;
use opamp_server::wire::{self, Unpacking, WireError};
use prost::Message as _;
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocket, WebSocketConfig};

use crate::engine::{Happened, Outcome, Target, guarded};
use crate::frames::FrameMeter;
use crate::mutate;

/// The target.
pub(crate) struct Frame;

/// The largest message the library takes here.
const LIMIT: usize = 16 << 10;

impl Target for Frame {
    const NAME: &'static str = "frame";
    const LARGEST: usize = 32 << 10;
    const PATIENCE: Duration = Duration::from_secs(1);

    fn mutate(&self, rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
        mutate(rng, input, other)
    }

    fn run(&mut self, inputs: &[Vec<u8>]) -> Vec<Outcome> {
        inputs.iter().map(|input| guarded(|happened| check(input, happened))).collect()
    }
}

fn check(input: &[u8], happened: &mut Happened) -> Result<(), String> {
    decode(input, happened)?;
    unpack(input, happened)?;
    follow(input, happened)
}

/// What a message means to the decoder, and to a plain reading of the header.
fn decode(message: &[u8], happened: &mut Happened) -> Result<(), String> {
    let decoded = wire::decode_frame(message);
    let header = message.iter().take(10).position(|byte| byte & 0x80 == 0);
    let zero = |last: usize| message[..=last].iter().all(|byte| byte << 1 == 0);
    match (header, &decoded) {
        (Some(last), Ok(report)) => {
            if !zero(last) {
                return Err("a header that is not zero was taken".to_owned());
            }
            let body = wire::decode_body(&message[last + 1..]).map_err(|error| error.to_string())?;
            let written = report.encode_to_vec();
            if body.encode_to_vec() != written {
                return Err("the message differs with and without its header".to_owned());
            }
            let again = wire::decode_body(&written).map_err(|error| format!("not read again: {error}"))?;
            if again.encode_to_vec() != written {
                return Err("what was read is written and read as something else".to_owned());
            }
            shape(report, happened);
        }
        (Some(last), Err(WireError::HeaderNotZero)) if zero(last) => {
            return Err("a header of zero was refused".to_owned());
        }
        (Some(last), Err(WireError::Protobuf(text))) if zero(last) => {
            if text.chars().count() > 201 {
                return Err(format!("an error of {} characters", text.len()));
            }
            // Without the numbers in it, of which there are very many.
            happened.note(text.replace(|letter: char| letter.is_ascii_digit(), ""));
        }
        (Some(_), Err(WireError::HeaderMissing)) => return Err("a complete header was missed".to_owned()),
        (Some(last), Err(WireError::Protobuf(_) | WireError::TooMany)) if !zero(last) => {
            return Err("looked behind a header that is not zero".to_owned());
        }
        (None, Ok(_)) => return Err("an incomplete header was taken".to_owned()),
        _ => {}
    }
    if let Err(error) = &decoded {
        happened.note(std::mem::discriminant(error));
    }
    Ok(())
}

/// Which fields a report has, and how large they are.
fn shape(report: &opamp_server::proto::AgentToServer, happened: &mut Happened) {
    let sizes = [
        report.agent_description.as_ref().map(prost::Message::encoded_len),
        report.health.as_ref().map(prost::Message::encoded_len),
        report.effective_config.as_ref().map(prost::Message::encoded_len),
        report.package_statuses.as_ref().map(prost::Message::encoded_len),
        report.custom_message.as_ref().map(prost::Message::encoded_len),
        report.available_components.as_ref().map(prost::Message::encoded_len),
        report.connection_settings_request.as_ref().map(prost::Message::encoded_len),
    ];
    for (field, size) in sizes.into_iter().enumerate() {
        happened.note((field, size.map(usize::checked_ilog2)));
    }
    happened.note(("uid", report.instance_uid.len().min(40)));
}

/// Unpacking holds no more than it may.
fn unpack(input: &[u8], happened: &mut Happened) -> Result<(), String> {
    if !input.starts_with(&[0x1f, 0x8b]) {
        return Ok(());
    }
    let mut unpacking = Unpacking::new(input.to_vec(), LIMIT);
    loop {
        match unpacking.step(LIMIT / 3) {
            Ok(false) if unpacking.held() > input.len() + LIMIT => {
                return Err(format!("{} bytes are held", unpacking.held()));
            }
            Ok(false) => {}
            Ok(true) => {
                happened.note(("unpacked", unpacking.into_body().len().checked_ilog2()));
                return Ok(());
            }
            Err(error) => {
                happened.note(("packed", std::mem::discriminant(&error)));
                return Ok(());
            }
        }
    }
}

/// A socket that gives what has arrived and takes everything.
struct Socket<'a> {
    bytes: &'a [u8],
    read: usize,
    arrived: usize,
}

impl Read for Socket<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let ready = &self.bytes[self.read..self.arrived];
        if ready.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let taken = ready.len().min(buffer.len());
        buffer[..taken].copy_from_slice(&ready[..taken]);
        self.read += taken;
        Ok(taken)
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Gives the same bytes to the library and to the follower, byte by byte, and compares.
fn follow(input: &[u8], happened: &mut Happened) -> Result<(), String> {
    let config = WebSocketConfig::default()
        .read_buffer_size(1 << 10)
        .write_buffer_size(0)
        .max_message_size(Some(LIMIT))
        .max_frame_size(Some(LIMIT));
    let mut library =
        WebSocket::from_raw_socket(Socket { bytes: input, read: 0, arrived: 0 }, Role::Server, Some(config));
    let (mut meter, ends) = (FrameMeter::default(), ends(input));
    let mut expected = ends.iter().copied().peekable();
    let mut valid = true;
    let mut last = "";
    for (at, byte) in input.iter().enumerate() {
        let before = meter.unfinished();
        meter.feed(std::slice::from_ref(byte));
        let ended = before > 0 && meter.unfinished() == 0;
        if !ended && meter.unfinished() != before + 1 {
            return Err(format!("at {at}: {before} bytes became {}", meter.unfinished()));
        }
        if (expected.next_if_eq(&at).is_some()) != ended {
            return Err(format!("at {at}: the follower disagrees with RFC 6455, ended: {ended}"));
        }
        if !valid {
            continue;
        }
        library.get_mut().arrived = at + 1;
        let (mut messages, mut data) = (0, false);
        loop {
            let word = match library.read() {
                Ok(Message::Binary(message)) => {
                    decode(&message, happened)?;
                    data = true;
                    "binary"
                }
                Ok(Message::Text(_)) => {
                    data = true;
                    "text"
                }
                Ok(Message::Ping(_)) => "ping",
                Ok(Message::Pong(_)) => "pong",
                Ok(Message::Close(_)) => {
                    valid = false;
                    "close"
                }
                Ok(Message::Frame(_)) => "frame",
                Err(tokio_tungstenite::tungstenite::Error::Io(error))
                    if error.kind() == io::ErrorKind::WouldBlock =>
                {
                    break;
                }
                Err(error) => {
                    // What is not valid is the library's to judge; nobody compares beyond.
                    let mut words = error.to_string();
                    words.truncate(words.find(|letter: char| letter.is_ascii_digit()).unwrap_or(words.len()));
                    happened.note((last, words));
                    valid = false;
                    messages = 0;
                    break;
                }
            };
            messages += 1;
            happened.note((last, word, meter.unfinished().checked_ilog2()));
            last = word;
            if !valid {
                break;
            }
        }
        if !valid {
            continue;
        }
        if messages > 1 {
            return Err(format!("at {at}: one byte ended {messages} messages"));
        }
        if data && !ended {
            return Err(format!(
                "at {at}: the library has a message, the follower holds {}",
                meter.unfinished()
            ));
        }
        if ended && messages == 0 {
            return Err(format!("at {at}: the follower sees the end of a message that the library does not"));
        }
    }
    // However the bytes are cut, the follower ends in the same place.
    let (mut whole, mut pieces) = (FrameMeter::default(), FrameMeter::default());
    whole.feed(input);
    for piece in input.chunks(1 + input.len() % 7) {
        pieces.feed(piece);
    }
    if [whole.unfinished(), pieces.unfinished()] != [meter.unfinished(); 2] {
        return Err("the follower depends on how the bytes are cut".to_owned());
    }
    Ok(())
}

/// One frame, read plainly: head, masked or not, and where its payload lies.
struct Plain {
    head: u8,
    payload: std::ops::Range<usize>,
}

/// The complete frames at the front of `bytes`, and the rest.
fn plain(bytes: &[u8]) -> Vec<Plain> {
    let mut frames = Vec::new();
    let mut at = 0;
    while let Some([head, second]) = bytes.get(at..at + 2) {
        let (start, length) = match second & 0x7f {
            126 => match bytes.get(at + 2..at + 4) {
                Some(&[a, b]) => (at + 4, u64::from(u16::from_be_bytes([a, b]))),
                _ => break,
            },
            127 => match bytes.get(at + 2..at + 10).and_then(|long| <[u8; 8]>::try_from(long).ok()) {
                Some(long) => (at + 10, u64::from_be_bytes(long)),
                None => break,
            },
            short => (at + 2, u64::from(short)),
        };
        let start = start + if second & 0x80 == 0 { 0 } else { 4 };
        let Some(end) = usize::try_from(length).ok().and_then(|length| start.checked_add(length)) else {
            break;
        };
        if end > bytes.len() {
            break;
        }
        frames.push(Plain { head: *head, payload: start..end });
        at = end;
    }
    frames
}

/// The places of the bytes that end a message, control frames between messages included.
fn ends(bytes: &[u8]) -> Vec<usize> {
    let mut fragmented = false;
    let mut ends = Vec::new();
    for frame in plain(bytes) {
        if frame.head & 0x0f < 8 {
            fragmented = frame.head & 0x80 == 0;
        }
        if !fragmented {
            ends.push(frame.payload.end - 1);
        }
    }
    ends
}

/// A masked frame.
pub(crate) fn masked(head: u8, payload: &[u8], mask: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![head];
    let length = payload.len();
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(short @ 0..126), _) => frame.push(0x80 | short),
        (_, Ok(long)) => {
            frame.push(0xfe);
            frame.extend(long.to_be_bytes());
        }
        _ => {
            frame.push(0xff);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend(mask);
    frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

fn unmasked(bytes: &[u8], frame: &Plain) -> Vec<u8> {
    let mask = bytes.get(frame.payload.start.wrapping_sub(4)..frame.payload.start).unwrap_or_default();
    let payload = &bytes[frame.payload.clone()];
    if mask.len() < 4 {
        return payload.to_vec();
    }
    payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect()
}

/// One mutation of a stream of frames; of its bytes where it is none.
pub(crate) fn mutate(rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
    let frames = plain(input);
    if frames.is_empty() || rng.u8(0..6) == 0 {
        return mutate::bytes(rng, input, other);
    }
    let mut parts: Vec<(u8, Vec<u8>)> =
        frames.iter().map(|frame| (frame.head, unmasked(input, frame))).collect();
    let rest = frames.last().map_or(0, |frame| frame.payload.end);
    let donors = plain(other);
    let at = rng.usize(0..parts.len());
    match rng.u8(0..10) {
        0..=3 => {
            let donor = donors.first().map(|frame| unmasked(other, frame)).unwrap_or_default();
            let (header, body) = parts[at].1.split_at(parts[at].1.len().min(1));
            let body = mutate::message(rng, body, donor.get(1..).unwrap_or_default());
            parts[at].1 = [header, &body].concat();
        }
        4 => {
            // Cut into fragments, with or without something between them.
            let (head, payload) = parts.remove(at);
            let cut = rng.usize(0..=payload.len());
            let mut pieces = vec![(head & 0x7f, payload[..cut].to_vec())];
            if rng.bool() {
                pieces.push((0x89 + rng.u8(0..2), vec![7; rng.usize(0..126)]));
            }
            if rng.u8(0..4) == 0 {
                pieces.push((0x00, Vec::new()));
            }
            pieces.push((head & 0x80, payload[cut..].to_vec()));
            parts.splice(at..at, pieces);
        }
        5 => {
            parts[at].0 =
                [0x82, 0x81, 0x02, 0x00, 0x80, 0x88, 0x89, 0x8a, 0xc2, rng.u8(..)][rng.usize(0..10)];
        }
        6 => {
            let (copy, to) = (parts[at].clone(), rng.usize(0..=parts.len()));
            parts.insert(to, copy);
        }
        7 => {
            parts.remove(at);
        }
        8 => {
            if let Some(frame) = rng.choice(&donors) {
                parts.insert(at, (frame.head, unmasked(other, frame)));
            }
        }
        _ => {
            // A size at which the length is written in another way.
            let size = [0, 1, 124, 125, 126, 127, 128, 255, 256, 1_024, LIMIT - 1, LIMIT, LIMIT + 1]
                [rng.usize(0..13)];
            parts[at].1.resize(size, 0);
        }
    }
    let mut out = Vec::new();
    for (head, payload) in &parts {
        let mask = if rng.bool() { [0; 4] } else { rng.u32(..).to_be_bytes() };
        let mut frame = masked(*head, payload, mask);
        if payload.len() < 126 && rng.u8(0..16) == 0 {
            // The same length, written longer than it must be.
            let long = (payload.len() as u64).to_be_bytes();
            frame.splice(
                1..2,
                if rng.bool() {
                    [&[0xff_u8][..], &long].concat()
                } else {
                    [&[0xfe][..], &long[6..]].concat()
                },
            );
        }
        out.extend(frame);
    }
    out.extend(&input[rest..]);
    out
}
