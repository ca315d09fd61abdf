//! Every way a connection ends: one closed list that serves rows, logs, metric labels, API and Close frames.
//!
//! The word of a reason is the same everywhere. Whose end it is decides about the agent's status:
//! an end the agent caused makes it `offline` at once, an end the server caused never does.

use std::fmt;

/// Who caused an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The agent left, fell silent or broke the rules.
    Agent,
    /// The server, one of its nodes or an operator ended it.
    Server,
}

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CloseReason {
    /// The agent said so with `agent_disconnect` (S-061).
    AgentDisconnect,
    /// A Close frame came from the peer.
    ClosedByAgent,
    /// The transport broke without a Close frame.
    ConnectionLost,
    /// Nothing was heard until the deadline.
    HeartbeatTimeout,
    /// The peer broke the framing or sent too many malformed messages in a row.
    ProtocolError,
    /// A message was larger than the limit (S-010).
    MessageTooLarge,
    /// The peer stopped reading until its deadline.
    SlowReader,
    /// A newer connection of the same agent took over.
    Superseded,
    /// The agent was given another instance uid (S-048).
    UidReassigned,
    /// The agent kept on using an instance uid it was told to give up.
    UidRefused,
    /// An operator asked the agent to reconnect.
    ReconnectRequested,
    /// An operator deleted the agent.
    Deleted,
    /// The agent's credentials were revoked.
    CredentialsRevoked,
    /// The server was stopped in an orderly way.
    ServerShutdown,
    /// The node that held the connection is gone.
    ServerLost,
    /// A fault inside the server.
    InternalError,
}

impl CloseReason {
    /// All reasons, in the order of the documentation.
    pub const ALL: [Self; 16] = [
        Self::AgentDisconnect,
        Self::ClosedByAgent,
        Self::ConnectionLost,
        Self::HeartbeatTimeout,
        Self::ProtocolError,
        Self::MessageTooLarge,
        Self::SlowReader,
        Self::Superseded,
        Self::UidReassigned,
        Self::UidRefused,
        Self::ReconnectRequested,
        Self::Deleted,
        Self::CredentialsRevoked,
        Self::ServerShutdown,
        Self::ServerLost,
        Self::InternalError,
    ];

    /// The word used in rows, logs, metric labels and the API.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::AgentDisconnect => "agent_disconnect",
            Self::ClosedByAgent => "closed_by_agent",
            Self::ConnectionLost => "connection_lost",
            Self::HeartbeatTimeout => "heartbeat_timeout",
            Self::ProtocolError => "protocol_error",
            Self::MessageTooLarge => "message_too_large",
            Self::SlowReader => "slow_reader",
            Self::Superseded => "superseded",
            Self::UidReassigned => "uid_reassigned",
            Self::UidRefused => "uid_refused",
            Self::ReconnectRequested => "reconnect_requested",
            Self::Deleted => "deleted",
            Self::CredentialsRevoked => "credentials_revoked",
            Self::ServerShutdown => "server_shutdown",
            Self::ServerLost => "server_lost",
            Self::InternalError => "internal_error",
        }
    }

    /// Reads a [`label`](Self::label).
    #[must_use]
    pub fn from_label(label: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.label() == label)
    }

    /// Who caused such an end.
    #[must_use]
    pub const fn cause(self) -> Cause {
        match self {
            Self::AgentDisconnect
            | Self::ClosedByAgent
            | Self::ConnectionLost
            | Self::HeartbeatTimeout
            | Self::ProtocolError
            | Self::MessageTooLarge
            | Self::SlowReader => Cause::Agent,
            Self::Superseded
            | Self::UidReassigned
            | Self::UidRefused
            | Self::ReconnectRequested
            | Self::Deleted
            | Self::CredentialsRevoked
            | Self::ServerShutdown
            | Self::ServerLost
            | Self::InternalError => Cause::Server,
        }
    }

    /// True where an operator wants the link closed: what its agent still reports on it is not taken.
    #[must_use]
    pub const fn is_ordered(self) -> bool {
        matches!(self, Self::ReconnectRequested | Self::Deleted | Self::CredentialsRevoked)
    }

    /// The status code of the Close frame that tells the peer.
    #[must_use]
    pub const fn code(self) -> u16 {
        match self {
            Self::AgentDisconnect | Self::ClosedByAgent | Self::ConnectionLost => 1000,
            Self::HeartbeatTimeout => 1001,
            Self::ProtocolError => 1002,
            Self::MessageTooLarge => 1009,
            Self::InternalError => 1011,
            Self::ReconnectRequested | Self::ServerShutdown | Self::ServerLost => 1012,
            Self::SlowReader
            | Self::Superseded
            | Self::UidReassigned
            | Self::UidRefused
            | Self::Deleted
            | Self::CredentialsRevoked => 1008,
        }
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_label_reads_back_and_is_unique() {
        for reason in CloseReason::ALL {
            assert_eq!(CloseReason::from_label(reason.label()), Some(reason));
        }
        assert_eq!(CloseReason::from_label("gone"), None);
    }
}
