//! How many elements a report holds, counted on its bytes before anything is unfolded.
//!
//! Two bytes can be an attribute that takes fifty times as much in memory, so that the limit of a
//! message's size alone is no limit of what it costs. Only what the decoder would keep is counted.

/// The messages in which a report's elements stand.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Report,
    Description,
    KeyValue,
    AnyValue,
    Array,
    KeyValueList,
    Health,
    HealthEntry,
    EffectiveConfig,
    ConfigMap,
    Packages,
    Components,
    ComponentEntry,
    Component,
    /// Has elements, and none of them has any.
    Flat,
}

impl Kind {
    /// What the message in field `number` is; none for texts, bytes, numbers and unknown fields.
    fn nested(self, number: u64) -> Option<Self> {
        Some(match (self, number) {
            (Self::Report, 3) => Self::Description,
            (Self::Report, 5) | (Self::HealthEntry, 2) => Self::Health,
            (Self::Report, 6) => Self::EffectiveConfig,
            (Self::Report, 8) => Self::Packages,
            (Self::Report, 12) | (Self::ConfigMap | Self::Packages, 1) => Self::Flat,
            (Self::Report, 14) => Self::Components,
            (Self::Description, 1 | 2) | (Self::Health, 7) | (Self::KeyValueList | Self::Component, 1) => {
                Self::KeyValue
            }
            (Self::KeyValue, 2) | (Self::Array, 1) => Self::AnyValue,
            (Self::AnyValue, 5) => Self::Array,
            (Self::AnyValue, 6) => Self::KeyValueList,
            (Self::Health, 6) => Self::HealthEntry,
            (Self::EffectiveConfig, 1) => Self::ConfigMap,
            (Self::Components, 1) | (Self::Component, 2) => Self::ComponentEntry,
            (Self::ComponentEntry, 2) => Self::Component,
            _ => return None,
        })
    }
}

/// Counts down from `left` the elements of a message; answers what is left, none where it is not enough.
///
/// Messages nested deeper than `depth` are the decoder's to refuse. It ends where the bytes are no
/// message, which is the decoder's to say as well.
pub(super) fn elements(kind: Kind, mut message: &[u8], depth: usize, mut left: usize) -> Option<usize> {
    while let Some((tag, rest)) = varint(message) {
        left = left.checked_sub(1)?;
        let rest = match tag & 7 {
            0 => varint(rest).map(|(_, rest)| rest),
            1 => rest.get(8..),
            2 => match varint(rest)
                .and_then(|(length, rest)| rest.split_at_checked(usize::try_from(length).ok()?))
            {
                Some((content, rest)) => {
                    if let Some(nested) = kind.nested(tag >> 3)
                        && depth > 0
                    {
                        left = elements(nested, content, depth - 1, left)?;
                    }
                    Some(rest)
                }
                None => None,
            },
            // The marks around an unknown group, whose fields follow like any others.
            3 | 4 => Some(rest),
            5 => rest.get(4..),
            _ => None,
        };
        let Some(rest) = rest else { break };
        message = rest;
    }
    Some(left)
}

/// The number at the front of `bytes`, and what follows it.
fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (index, byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f) << (7 * index).min(63);
        if byte & 0x80 == 0 {
            return Some((value, bytes.get(index + 1..).unwrap_or_default()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{AgentDescription, AgentToServer, AvailableComponents, ComponentDetails, KeyValue};
    use prost::Message;

    fn count(report: &AgentToServer) -> usize {
        1_000_000 - elements(Kind::Report, &report.encode_to_vec(), 100, 1_000_000).unwrap()
    }

    #[test]
    fn every_nested_element_counts_once() {
        let pair = KeyValue { key: "k".to_owned(), value: None };
        let description = AgentDescription {
            identifying_attributes: vec![pair.clone(); 10],
            non_identifying_attributes: vec![KeyValue::default(); 5],
        };
        let report = AgentToServer { agent_description: Some(description), ..AgentToServer::default() };
        assert_eq!(count(&report), 1 + 10 * 2 + 5, "the field, ten pairs with a key each, five empty ones");
        let part = ComponentDetails { metadata: vec![pair; 3], ..ComponentDetails::default() };
        let whole =
            ComponentDetails { sub_component_map: [("p".to_owned(), part)].into(), ..Default::default() };
        let components = AvailableComponents { components: [("c".to_owned(), whole)].into(), hash: vec![1] };
        let report = AgentToServer { available_components: Some(components), ..AgentToServer::default() };
        assert_eq!(count(&report), 1 + 2 + 2 + 1 + 2 + 3 * 2);
    }
}
