//! Where WebSocket messages begin and end in the bytes as they come: what an unfinished one holds.
//!
//! The WebSocket library says nothing about a message before it is whole. [`FrameMeter`] follows the
//! frame headers (RFC 6455, section 5.2) beside it, in constant memory and without looking at
//! payloads, so that a message that never ends can be told from an idle link, pings in between or not.
//! It judges nothing: broken framing is the library's to find.

/// Follows the frames of one direction of one link.
#[derive(Debug, Default)]
pub(super) struct FrameMeter {
    part: Part,
    /// True between the first fragment of a message and its last.
    fragmented: bool,
    /// Bytes of the unfinished message, headers included.
    held: u64,
}

/// What the next byte belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Part {
    /// The first byte of a frame.
    #[default]
    Start,
    /// The second, with mask bit and short length.
    Length { head: u8 },
    /// A longer length: so many bytes are to come.
    LongLength { head: u8, masked: bool, left: u8, length: u64 },
    /// The mask and the payload: so many bytes are to come.
    Payload { head: u8, left: u64 },
}

const FIN: u8 = 0x80;
const OPCODE: u8 = 0x0f;
const MASKED: u8 = 0x80;
const MASK_LENGTH: u64 = 4;

impl FrameMeter {
    /// Takes the next bytes; true where a message ended among them.
    pub(super) fn feed(&mut self, mut bytes: &[u8]) -> bool {
        let mut ended = false;
        while let Some((&byte, rest)) = bytes.split_first() {
            if let Part::Payload { head, left } = self.part {
                let taken = left.min(bytes.len() as u64);
                bytes = bytes.get(usize::try_from(taken).unwrap_or(usize::MAX)..).unwrap_or_default();
                self.held = self.held.saturating_add(taken);
                self.payload(head, left - taken);
                ended |= self.held == 0;
                continue;
            }
            bytes = rest;
            self.held = self.held.saturating_add(1);
            self.header(byte);
            ended |= self.held == 0;
        }
        ended
    }

    /// Bytes of the message that is not whole yet; 0 where none is.
    pub(super) fn unfinished(&self) -> u64 {
        self.held
    }

    fn header(&mut self, byte: u8) {
        match self.part {
            Part::Start => self.part = Part::Length { head: byte },
            Part::Length { head } => {
                let masked = byte & MASKED != 0;
                match byte & !MASKED {
                    126 => self.part = Part::LongLength { head, masked, left: 2, length: 0 },
                    127 => self.part = Part::LongLength { head, masked, left: 8, length: 0 },
                    short => self.begin(head, masked, short.into()),
                }
            }
            Part::LongLength { head, masked, left, length } => {
                let length = length << 8 | u64::from(byte);
                match left {
                    1 => self.begin(head, masked, length),
                    _ => self.part = Part::LongLength { head, masked, left: left - 1, length },
                }
            }
            Part::Payload { .. } => {}
        }
    }

    fn begin(&mut self, head: u8, masked: bool, length: u64) {
        let mask = if masked { MASK_LENGTH } else { 0 };
        self.payload(head, length.saturating_add(mask));
    }

    fn payload(&mut self, head: u8, left: u64) {
        if left > 0 {
            self.part = Part::Payload { head, left };
            return;
        }
        self.part = Part::Start;
        // Control frames may stand between the fragments of a message and end none.
        if head & OPCODE < 8 {
            self.fragmented = head & FIN == 0;
        }
        if !self.fragmented {
            self.held = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A masked frame.
    fn frame(head: u8, payload: usize) -> Vec<u8> {
        let mut frame = vec![head];
        match payload {
            0..126 => frame.push(0x80 | u8::try_from(payload).unwrap()),
            126..65_536 => {
                frame.push(0xfe);
                frame.extend(u16::try_from(payload).unwrap().to_be_bytes());
            }
            _ => {
                frame.push(0xff);
                frame.extend((payload as u64).to_be_bytes());
            }
        }
        frame.extend([0; 4]);
        frame.resize(frame.len() + payload, 0xff);
        frame
    }

    #[test]
    fn a_message_is_held_until_its_last_byte() {
        for payload in [0, 1, 125, 126, 65_535, 65_536] {
            let bytes = frame(0x82, payload);
            let mut meter = FrameMeter::default();
            meter.feed(&bytes[..bytes.len() - 1]);
            assert_eq!(meter.unfinished(), bytes.len() as u64 - 1, "{payload}");
            meter.feed(&bytes[bytes.len() - 1..]);
            assert_eq!(meter.unfinished(), 0, "{payload}");
        }
    }

    #[test]
    fn pings_between_fragments_end_no_message() {
        let mut meter = FrameMeter::default();
        assert!(!meter.feed(&frame(0x02, 10)));
        let held = meter.unfinished();
        meter.feed(&frame(0x89, 3));
        assert!(held > 0 && meter.unfinished() > held, "the message is still not whole");
        meter.feed(&frame(0x80, 5));
        assert_eq!(meter.unfinished(), 0);
        meter.feed(&frame(0x89, 3));
        assert_eq!(meter.unfinished(), 0, "an idle link with pings holds nothing");
    }

    #[test]
    fn a_length_of_all_bits_overflows_nothing() {
        let mut meter = FrameMeter::default();
        meter.feed(&[0x82, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        meter.feed(&[0; 100]);
        assert_eq!(meter.unfinished(), 110);
    }

    proptest! {
        /// However the bytes are cut, the meter ends in the same place.
        #[test]
        fn cuts_do_not_matter(payloads in proptest::collection::vec(0_usize..300, 1..6), cut in 1_usize..50) {
            let bytes: Vec<u8> = payloads.iter().flat_map(|payload| frame(0x82, *payload)).collect();
            let (mut whole, mut pieces) = (FrameMeter::default(), FrameMeter::default());
            let ended = whole.feed(&bytes[..bytes.len() - 1]);
            let ends = bytes[..bytes.len() - 1].chunks(cut).filter(|chunk| pieces.feed(chunk)).count();
            prop_assert_eq!((ended, ends > 0, ends < payloads.len()), (payloads.len() > 1, payloads.len() > 1, true));
            prop_assert_eq!(whole.unfinished(), pieces.unfinished());
            prop_assert!(whole.unfinished() > 0);
        }
    }
}
