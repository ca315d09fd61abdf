//! Bytes to messages and back: the WebSocket header, protobuf and gzip. Pure.
//!
//! Promises: no input makes it panic, and no more than the limit is ever unpacked. It must not
//! know what a message means, who sent it, or which socket it came from.

mod weight;

use std::io::{Cursor, Read, Write};

use flate2::Compression;
use flate2::Crc;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use prost::Message;

use crate::proto::{AgentToServer, ServerToAgent};
use weight::Kind;

/// Why bytes are not a report.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A WebSocket message without the complete varint in front (S-006).
    #[error("the message has no complete OpAMP header")]
    HeaderMissing,
    /// A header other than zero (S-006).
    #[error("the OpAMP header must be 0")]
    HeaderNotZero,
    /// Not an `AgentToServer`.
    #[error("not a valid AgentToServer message: {0}")]
    Protobuf(String),
    /// A body that is not gzip although it says so.
    #[error("the body is not valid gzip")]
    Gzip,
    /// More elements than any agent has: a small message that would take much memory.
    #[error("the message has more than {MAX_ELEMENTS} elements")]
    TooMany,
    /// Larger than the limit, after unpacking where it was packed (S-019).
    #[error("the message is larger than {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: usize,
    },
}

/// The longest part of a decoder's message that is passed on: it repeats the field path of nested messages.
const DECODE_MESSAGE_LIMIT: usize = 200;

/// The most elements that a message may have, those of nested messages included.
pub const MAX_ELEMENTS: usize = 250_000;

/// Messages nested deeper than this are refused by the decoder.
const MAX_DEPTH: usize = 100;

/// A body up to this size, most answers among them, does not shrink, and to try costs more than the answer itself.
const STORED: usize = 64;

/// Messages up to this size are not counted: whatever they hold, it is little.
const UNCOUNTED: usize = 64 << 10;

/// Reads one WebSocket message: the varint header, which must be zero, then an `AgentToServer` (S-004…S-008).
pub fn decode_frame(frame: &[u8]) -> Result<AgentToServer, WireError> {
    decode_body(body_of_frame(frame)?)
}

/// How many elements a report has; [`MAX_ELEMENTS`] at most.
pub fn weigh(body: &[u8]) -> Result<usize, WireError> {
    let left = weight::elements(Kind::Report, body, MAX_DEPTH, MAX_ELEMENTS).ok_or(WireError::TooMany)?;
    Ok(MAX_ELEMENTS - left)
}

/// Reads the body of a plain HTTP request, which has no header in front.
pub fn decode_body(body: &[u8]) -> Result<AgentToServer, WireError> {
    if body.len() > UNCOUNTED {
        weigh(body)?;
    }
    AgentToServer::decode(body).map_err(|error| {
        let mut text = error.to_string();
        if let Some((end, _)) = text.char_indices().nth(DECODE_MESSAGE_LIMIT) {
            text.truncate(end);
            text.push('…');
        }
        WireError::Protobuf(text)
    })
}

/// The part of a WebSocket message behind its header, which must be zero (S-006).
pub fn body_of_frame(frame: &[u8]) -> Result<&[u8], WireError> {
    // A 64-bit varint has at most ten bytes; the value is zero if no byte carries a payload bit.
    for (index, byte) in frame.iter().take(10).enumerate() {
        if byte & 0x7f != 0 {
            return Err(WireError::HeaderNotZero);
        }
        if byte & 0x80 == 0 {
            return Ok(frame.get(index + 1..).unwrap_or_default());
        }
    }
    Err(WireError::HeaderMissing)
}

/// Writes one WebSocket message: header zero, then the offer (S-005).
#[must_use]
pub fn encode_frame(offer: &ServerToAgent) -> Vec<u8> {
    let mut frame = Vec::with_capacity(1 + offer.encoded_len());
    frame.push(0);
    // A vector grows as needed, so encoding cannot fail.
    let _infallible = offer.encode(&mut frame);
    frame
}

/// Writes the body of a plain HTTP answer.
#[must_use]
pub fn encode_body(offer: &ServerToAgent) -> Vec<u8> {
    offer.encode_to_vec()
}

/// A gzip body that is unpacked piece by piece, so that whoever unpacks it can ask for memory in between (S-019).
#[derive(Debug)]
pub struct Unpacking {
    packed: MultiGzDecoder<Cursor<Vec<u8>>>,
    body: Vec<u8>,
    limit: usize,
}

impl Unpacking {
    /// A body that is still packed, and the most bytes that it may have unpacked.
    #[must_use]
    pub fn new(packed: Vec<u8>, limit: usize) -> Self {
        Self { packed: MultiGzDecoder::new(Cursor::new(packed)), body: Vec::new(), limit }
    }

    /// The bytes that are held: what came, and what was unpacked of it.
    #[must_use]
    pub fn held(&self) -> usize {
        self.packed.get_ref().get_ref().len() + self.body.len()
    }

    /// Unpacks up to so many bytes more; true where nothing is left.
    pub fn step(&mut self, bytes: usize) -> Result<bool, WireError> {
        // One byte beyond the limit is enough to know.
        let bytes = bytes.min(self.limit.saturating_add(1).saturating_sub(self.body.len()));
        self.body.reserve_exact(bytes);
        let bound = u64::try_from(bytes).unwrap_or(u64::MAX);
        let got = (&mut self.packed).take(bound).read_to_end(&mut self.body).map_err(|_| WireError::Gzip)?;
        if self.body.len() > self.limit {
            return Err(WireError::TooLarge { limit: self.limit });
        }
        Ok(got < bytes)
    }

    /// What was unpacked.
    #[must_use]
    pub fn into_body(self) -> Vec<u8> {
        self.body
    }
}

/// Packs a body with gzip; `None` where that fails, so that the plain body is sent instead.
#[must_use]
pub fn gzip(body: &[u8]) -> Option<Vec<u8>> {
    if body.len() <= STORED {
        return Some(gzip_stored(body));
    }
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(body).ok()?;
    encoder.finish().ok()
}

/// A body of at most [`STORED`] bytes as gzip (RFC 1952) whose one block is stored (RFC 1951, 3.2.4).
fn gzip_stored(body: &[u8]) -> Vec<u8> {
    // Magic, deflate, no flags, no time, nothing about the effort, system unknown; then the block, which is the last.
    const HEAD: [u8; 11] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff, 1];
    let mut sum = Crc::new();
    sum.update(body);
    let length = u16::try_from(body.len()).unwrap_or_default();
    let mut packed = Vec::with_capacity(HEAD.len() + body.len() + 12);
    packed.extend(HEAD);
    packed.extend(length.to_le_bytes());
    packed.extend((!length).to_le_bytes());
    packed.extend(body);
    packed.extend(sum.sum().to_le_bytes());
    packed.extend(sum.amount().to_le_bytes());
    packed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A minimal report and the verdicts on its framings, from the must-reject and must-accept list.
    const MINIMAL: &str = "0a100190d3c27a107b3e9c415d2e8f60a1b210072001";

    fn unhex(text: &str) -> Vec<u8> {
        (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
    }

    fn frame(header: &str, data: &str) -> Vec<u8> {
        unhex(&format!("{header}{data}"))
    }

    #[test]
    fn s_006_a_header_must_be_zero_in_any_length() {
        assert_eq!(decode_frame(&frame("00", MINIMAL)).unwrap().sequence_num, 7);
        assert_eq!(decode_frame(&frame("8000", MINIMAL)).unwrap().sequence_num, 7);
        assert_eq!(decode_frame(&frame("01", MINIMAL)), Err(WireError::HeaderNotZero));
        assert_eq!(decode_frame(&frame("", MINIMAL)), Err(WireError::HeaderNotZero));
        assert_eq!(decode_frame(&unhex("ffffffffffffffffff010a00")), Err(WireError::HeaderNotZero));
        assert_eq!(decode_frame(&unhex("80808080808080808080800000")), Err(WireError::HeaderMissing));
        assert_eq!(decode_frame(&[]), Err(WireError::HeaderMissing));
        assert_eq!(decode_frame(&[0x80]), Err(WireError::HeaderMissing));
    }

    #[test]
    fn s_008_an_empty_data_part_is_the_default_message() {
        assert_eq!(decode_frame(&[0]), Ok(AgentToServer::default()));
    }

    #[test]
    fn malformed_protobuf_is_an_error_with_a_short_text() {
        for bad in ["000a100190", "000000", "00020161", "000e", "009c06", "002a031a01ff", "000801"] {
            assert!(matches!(decode_frame(&unhex(bad)), Err(WireError::Protobuf(_))), "{bad}");
        }
        let mut nested = Vec::new();
        for _ in 0..120 {
            let mut outer = vec![0x32];
            prost::encoding::encode_varint(
                nested.len() as u64 + 2 + varint_len(nested.len() as u64),
                &mut outer,
            );
            outer.push(0x12);
            prost::encoding::encode_varint(nested.len() as u64, &mut outer);
            outer.append(&mut nested);
            nested = outer;
        }
        let mut report = vec![0x00, 0x2a];
        prost::encoding::encode_varint(nested.len() as u64, &mut report);
        report.extend(nested);
        let Err(WireError::Protobuf(text)) = decode_frame(&report) else { panic!("too deep must fail") };
        assert!(text.chars().count() <= DECODE_MESSAGE_LIMIT + 1, "{text}");
    }

    fn varint_len(value: u64) -> u64 {
        prost::encoding::encoded_len_varint(value) as u64 - 1
    }

    #[test]
    fn s_019_gzip_is_unpacked_up_to_the_limit_and_no_further() {
        let bomb = gzip(&vec![0; 1 << 20]).unwrap();
        assert!(bomb.len() < 1 << 14);
        for step in [1_000, 1 << 20, usize::MAX] {
            assert_eq!(gunzip(&bomb, 1 << 10, step), Err(WireError::TooLarge { limit: 1 << 10 }));
            assert_eq!(gunzip(&bomb, 1 << 20, step).map(|body| body.len()), Ok(1 << 20));
            assert_eq!(gunzip(b"plain", 1 << 20, step), Err(WireError::Gzip));
            assert_eq!(gunzip(&bomb[..bomb.len() - 4], 1 << 20, step), Err(WireError::Gzip));
            let members = [gzip(b"one").unwrap(), gzip(b"two").unwrap()].concat();
            assert_eq!(gunzip(&members, 6, step), Ok(b"onetwo".to_vec()));
        }
    }

    #[test]
    fn s_016_a_body_of_any_size_is_packed_and_a_small_one_at_little_cost() {
        for size in [0, 1, 22, STORED - 1, STORED, STORED + 1, 10_000] {
            let body: Vec<u8> = (0_u8..=255).cycle().take(size).collect();
            let packed = gzip(&body).unwrap();
            assert!(size > STORED || packed.len() == size + 23, "{size}: {}", packed.len());
            assert_eq!(gunzip(&packed, size, 1 << 20).unwrap(), body);
        }
    }

    fn gunzip(packed: &[u8], limit: usize, step: usize) -> Result<Vec<u8>, WireError> {
        let mut unpacking = Unpacking::new(packed.to_vec(), limit);
        while !unpacking.step(step)? {
            assert!(unpacking.held() <= packed.len() + limit);
        }
        Ok(unpacking.into_body())
    }

    /// A message of one field that holds `content`.
    fn wrapped(tag: u8, content: &[u8]) -> Vec<u8> {
        let mut message = vec![tag];
        prost::encoding::encode_varint(content.len() as u64, &mut message);
        message.extend(content);
        message
    }

    #[test]
    fn r_032_a_message_of_very_many_elements_is_refused_before_it_is_unfolded() {
        // Empty attributes of a description: two bytes each, many times as much in memory.
        let attributes = |count| wrapped(0x1a, &[0x0a, 0x00].repeat(count));
        assert!(decode_body(&attributes(100_000)).is_ok());
        assert_eq!(decode_body(&attributes(MAX_ELEMENTS)), Err(WireError::TooMany));
        let behind_a_group = [vec![0xfb, 0x07, 0xfc, 0x07], attributes(MAX_ELEMENTS)].concat();
        assert_eq!(decode_body(&behind_a_group), Err(WireError::TooMany));
        let text =
            wrapped(0x1a, &wrapped(0x0a, &wrapped(0x0a, "receivers: {}\n".repeat(100_000).as_bytes())));
        assert!(decode_body(&text).is_ok(), "a long text is one element");
    }

    #[test]
    fn r_032_any_depth_is_counted_without_a_stack_of_its_own() {
        let mut nested = vec![0x0a; 1 << 20];
        nested.push(0x00);
        let _any_answer = decode_body(&nested);
        let mut deep = Vec::new();
        for _ in 0..20_000 {
            // A list in a list.
            deep = wrapped(0x2a, &wrapped(0x0a, &deep));
        }
        let report = wrapped(0x1a, &wrapped(0x0a, &wrapped(0x12, &deep)));
        assert!(matches!(decode_body(&report), Err(WireError::Protobuf(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512), limit in 0_usize..1024) {
            let _ = decode_frame(&bytes);
            let _ = decode_body(&bytes);
            let _ = gunzip(&bytes, limit, limit / 3 + 1);
        }

        #[test]
        fn a_frame_is_its_header_and_the_body(uid in any::<[u8; 16]>(), flags in any::<u64>()) {
            let offer = ServerToAgent { instance_uid: uid.to_vec(), flags, ..ServerToAgent::default() };
            let frame = encode_frame(&offer);
            prop_assert_eq!(frame[0], 0);
            prop_assert_eq!(frame[1..].to_vec(), encode_body(&offer));
        }
    }
}
