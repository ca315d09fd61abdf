//! What an agent is: its identity, its capabilities, what it last reported and what it is told.
//!
//! Pure: no async, no clock, no I/O. [`report`] turns reports into changes, [`document`] turns
//! changed parts into what is stored, [`offer`] composes what is answered. Wanted state (configs,
//! settings, packages, commands) will meet a report here too: beside `offer`, gated by [`Capabilities`].

pub mod document;
pub mod offer;
pub mod report;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::proto::{AgentCapabilities, AgentToServer, AgentToServerFlags};

/// The identity of an agent instance: any 16 bytes, written as UUID text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InstanceUid(Uuid);

impl InstanceUid {
    /// The uid with these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    /// The 16 bytes as they travel in OpAMP messages.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// A new uid as the server issues them: a UUID of version 7 (S-052).
    #[must_use]
    pub fn generate() -> Self {
        Self(Uuid::now_v7())
    }

    /// The uid as a UUID, for the store.
    #[must_use]
    pub const fn as_uuid(&self) -> Uuid {
        self.0
    }
}

impl From<Uuid> for InstanceUid {
    fn from(uuid: Uuid) -> Self {
        Self(uuid)
    }
}

impl FromStr for InstanceUid {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl fmt::Display for InstanceUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for InstanceUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Who sent a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// An agent with a uid of its own; it may be a temporary one.
    Agent(InstanceUid),
    /// Nobody yet: no uid or 16 zero bytes, together with a request for a uid.
    Anonymous,
}

impl Sender {
    /// Reads the sender of `report`; the error is the text of a `BadRequest`.
    pub fn of(report: &AgentToServer) -> Result<Self, String> {
        let asks = requests_uid(report);
        match report.instance_uid.as_slice() {
            [] | [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] if asks => Ok(Self::Anonymous),
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] => {
                Err("instance_uid must not be 16 zero bytes".to_owned())
            }
            bytes => match (<[u8; 16]>::try_from(bytes), ulid(bytes)) {
                (Ok(uid), _) | (Err(_), Some(uid)) => Ok(Self::Agent(InstanceUid::from_bytes(uid))),
                (Err(_), None) => Err(format!("instance_uid must be 16 bytes, got {}", bytes.len())),
            },
        }
    }
}

/// True where `report` asks the server for a uid (S-048).
#[must_use]
pub fn requests_uid(report: &AgentToServer) -> bool {
    report.flags & AgentToServerFlags::RequestInstanceUid as u64 != 0
}

/// True where a uid on the wire is the legacy text form, whose senders understand no `agent_identification`.
#[must_use]
pub fn is_legacy(uid: &[u8]) -> bool {
    uid.len() == ULID_LENGTH
}

/// Length of a ULID in Crockford's base 32.
const ULID_LENGTH: usize = 26;

/// The 16 bytes behind a legacy uid in text form.
fn ulid(text: &[u8]) -> Option<[u8; 16]> {
    const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    if text.len() != ULID_LENGTH || !matches!(text.first(), Some(b'0'..=b'7')) {
        return None;
    }
    let mut value: u128 = 0;
    for byte in text {
        let digit = ALPHABET.iter().position(|letter| *letter == byte.to_ascii_uppercase())?;
        value = value << 5 | u128::try_from(digit).ok()?;
    }
    Some(value.to_be_bytes())
}

/// What an agent says it can do: the mask of `AgentCapabilities`, unknown bits kept (S-142).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// True where the agent stated `capability`.
    #[must_use]
    pub const fn has(self, capability: AgentCapabilities) -> bool {
        self.0 & capability as u64 != 0
    }

    /// The stated capabilities by their OpAMP names, without prefix; unknown bits are left out.
    #[must_use]
    pub fn names(self) -> Vec<&'static str> {
        (0..u64::BITS)
            .filter(|bit| self.0 & (1 << bit) != 0)
            .filter_map(|bit| AgentCapabilities::try_from(1_i32.checked_shl(bit)?).ok())
            .map(|capability| capability.as_str_name().trim_start_matches("AgentCapabilities_"))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(uid: &[u8], flags: u64) -> Result<Sender, String> {
        Sender::of(&AgentToServer { instance_uid: uid.to_vec(), flags, ..AgentToServer::default() })
    }

    #[test]
    fn r_007_any_16_bytes_are_a_uid_and_r_008_other_lengths_are_not() {
        assert_eq!(
            from(b"0000000000000000", 0),
            Ok(Sender::Agent(InstanceUid::from_bytes(*b"0000000000000000")))
        );
        assert_eq!(from(&[1, 2, 3, 4, 5], 0), Err("instance_uid must be 16 bytes, got 5".to_owned()));
        assert!(from(b"0190d3c2-7a10-7b3e-9c41-5d2e8f60a1b2", 0).is_err());
        assert!(from(&[], 0).is_err());
        assert!(from(&[0; 16], 0).is_err());
    }

    #[test]
    fn r_008_who_asks_for_a_uid_may_come_without_one() {
        assert_eq!(from(&[], 1), Ok(Sender::Anonymous));
        assert_eq!(from(&[0; 16], 1), Ok(Sender::Anonymous));
        assert!(from(&[1, 2], 1).is_err());
    }

    #[test]
    fn r_009_a_legacy_uid_in_text_form_is_its_16_bytes() {
        let expected = Uuid::parse_str("0190d48b-f7df-0044-3214-c74254b635cf").unwrap();
        for text in [&b"01J3A8QXYZ0123456789ABCDEF"[..], b"01j3a8qxyz0123456789abcdef"] {
            assert_eq!(from(text, 0), Ok(Sender::Agent(expected.into())));
        }
        assert!(from(b"81J3A8QXYZ0123456789ABCDEF", 0).is_err(), "more than 128 bits");
        assert!(from(b"01J3A8QXYZ0123456789ABCDEU", 0).is_err(), "no letter of the alphabet");
    }

    #[test]
    fn capabilities_are_named_and_unknown_bits_ignored() {
        assert_eq!(Capabilities(0x1 | 0x800 | 1 << 40).names(), ["ReportsStatus", "ReportsHealth"]);
        assert_eq!(Capabilities(0xffff).names().len(), 16);
        assert_eq!(Capabilities(u64::MAX).names().len(), 16);
    }
}
