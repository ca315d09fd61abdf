//! What an agent is answered: [`compose`] builds every `ServerToAgent` this server sends.
//!
//! Promises: an error travels alone (S-030), the uid is echoed as the agent wrote it (S-027, R-009),
//! the mask is in every other answer and states nothing that is not served (S-040).
//! Offers of configs, settings and packages join [`Answer`] as further gated fields.

use super::InstanceUid;
use crate::proto::server_error_response::Details;
use crate::proto::{
    AgentIdentification, RetryInfo, ServerCapabilities, ServerErrorResponse, ServerErrorResponseType,
    ServerToAgent, ServerToAgentFlags,
};

/// What this server does (S-035, S-036, S-040).
pub const SERVER_CAPABILITIES: u64 = ServerCapabilities::AcceptsStatus as u64
    | ServerCapabilities::AcceptsEffectiveConfig as u64
    | ServerCapabilities::AcceptsPackagesStatus as u64;

/// The longest uid that is echoed to a sender whose uid has a wrong length, in bytes.
const ECHO_LIMIT: usize = 64;

/// The answer to one report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Ask for full state (S-044).
    pub ask_full_state: bool,
    /// The uid the agent is to use from now on (S-048).
    pub new_uid: Option<InstanceUid>,
}

/// Why a report was not processed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The report is malformed; sending it again does not help (S-135).
    BadRequest(String),
    /// Later; the agent may try again after this many seconds (S-137).
    Unavailable {
        /// Seconds to stay away.
        retry_after_seconds: u64,
    },
}

impl Refusal {
    /// The word used as metric label.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::BadRequest(_) => "bad_request",
            Self::Unavailable { .. } => "unavailable",
        }
    }
}

/// The offer that answers a report of the agent which calls itself `uid` on the wire.
#[must_use]
pub fn compose(uid: &[u8], answer: Answer) -> ServerToAgent {
    let flags = if answer.ask_full_state { ServerToAgentFlags::ReportFullState as u64 } else { 0 };
    let identification =
        answer.new_uid.map(|uid| AgentIdentification { new_instance_uid: uid.as_bytes().to_vec() });
    ServerToAgent {
        instance_uid: uid.to_vec(),
        flags,
        capabilities: SERVER_CAPABILITIES,
        agent_identification: identification,
        ..ServerToAgent::default()
    }
}

/// The offer that says why a report was not processed; it carries nothing else (S-030).
#[must_use]
pub fn refuse(uid: &[u8], refusal: &Refusal) -> ServerToAgent {
    let error = match refusal {
        Refusal::BadRequest(message) => ServerErrorResponse {
            r#type: ServerErrorResponseType::BadRequest.into(),
            error_message: message.clone(),
            details: None,
        },
        Refusal::Unavailable { retry_after_seconds } => ServerErrorResponse {
            r#type: ServerErrorResponseType::Unavailable.into(),
            error_message: "the server cannot take this report now".to_owned(),
            details: Some(Details::RetryInfo(RetryInfo {
                retry_after_nanoseconds: retry_after_seconds.saturating_mul(1_000_000_000),
            })),
        },
    };
    let uid = if uid.len() <= ECHO_LIMIT { uid } else { &[] };
    ServerToAgent { instance_uid: uid.to_vec(), error_response: Some(error), ..ServerToAgent::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s_030_an_error_travels_alone() {
        let offer = refuse(&[7; 16], &Refusal::Unavailable { retry_after_seconds: 30 });
        assert_eq!((offer.capabilities, offer.flags), (0, 0));
        let Some(Details::RetryInfo(retry)) = offer.error_response.unwrap().details else {
            panic!("no retry info")
        };
        assert_eq!(retry.retry_after_nanoseconds, 30_000_000_000);
    }

    #[test]
    fn s_037_the_mask_states_status_effective_config_and_package_statuses() {
        assert_eq!(compose(&[7; 16], Answer::default()).capabilities, 0x1 | 0x4 | 0x10);
    }

    #[test]
    fn an_overlong_uid_is_not_echoed() {
        let refusal = Refusal::BadRequest(String::new());
        assert_eq!(refuse(&[1; 64], &refusal).instance_uid.len(), 64);
        assert!(refuse(&[1; 65], &refusal).instance_uid.is_empty());
    }
}
