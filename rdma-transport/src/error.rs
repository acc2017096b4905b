//! What can go wrong on a fabric.

use std::io;

/// An error of the fabric. Every variant's text is one sentence that a user can act on.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The peer could not be reached at all.
    #[error("cannot reach {addr}: {reason}")]
    Unreachable {
        /// Address that was tried.
        addr: String,
        /// What the operating system or the peer said.
        reason: String,
    },
    /// The two sides do not hold the same cluster key.
    #[error("the cluster key of {addr} differs from ours: use the same key file on every node")]
    WrongKey {
        /// Address of the other side.
        addr: String,
    },
    /// The peer speaks another version of the transport protocol.
    #[error(
        "{addr} speaks transport protocol version {theirs}, this build speaks {ours}: run the same release on every node"
    )]
    VersionMismatch {
        /// Address of the other side.
        addr: String,
        /// Version of this build.
        ours: u32,
        /// Version the other side announced.
        theirs: u32,
    },
    /// The peer's application refused the connection, and said why.
    #[error("{addr} refused the connection: {reason}")]
    Refused {
        /// Address of the other side.
        addr: String,
        /// The peer's sentence.
        reason: String,
    },
    /// The peer sent something that is not this protocol.
    #[error("{addr} sent something that is not this protocol ({detail})")]
    Protocol {
        /// Address of the other side.
        addr: String,
        /// What was wrong with it.
        detail: String,
    },
    /// The connection ended: the peer left, died, or the link failed.
    #[error("connection to {addr} lost: {reason}")]
    Disconnected {
        /// Address of the other side.
        addr: String,
        /// Why.
        reason: String,
    },
    /// A remote region is unknown, was deregistered, or does not permit the access.
    #[error("remote access to region {key:#x} offset {offset} length {len} refused: {reason}")]
    RemoteAccess {
        /// Region key used.
        key: u64,
        /// Offset used, bytes.
        offset: u64,
        /// Length used, bytes.
        len: u64,
        /// Why.
        reason: String,
    },
    /// The caller's arguments break a limit of the fabric (message too long, misaligned atomic…).
    #[error("invalid request: {0}")]
    Invalid(String),
    /// Nothing happened within the time allowed.
    #[error("no answer from {addr} within {millis} ms")]
    Timeout {
        /// Address of the other side.
        addr: String,
        /// Time waited, milliseconds.
        millis: u64,
    },
    /// This endpoint has been shut down.
    #[error("the local endpoint is shut down")]
    Shutdown,
    /// Somebody listens at the address already.
    #[error("listen on {addr}: address in use by a running process")]
    AddressInUse {
        /// The address.
        addr: String,
    },
    /// The local operating system refused something.
    #[error("{what}: {reason}")]
    Os {
        /// What was tried.
        what: String,
        /// The system's answer.
        reason: String,
    },
}

impl TransportError {
    /// Wraps an I/O error of the local system, saying what was tried.
    pub fn os(what: impl Into<String>, error: &io::Error) -> Self {
        Self::Os {
            what: what.into(),
            reason: error.to_string(),
        }
    }
}
