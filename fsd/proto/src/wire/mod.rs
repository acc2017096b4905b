//! The messages between nodes, in postcard encoding, and the frame around them.
//!
//! A frame is one fabric message: a kind byte, then for requests and responses a request number (u64,
//! little endian), then the body.

mod attr;
mod flat;
#[cfg(test)]
mod fuzz_tests;
mod locks;
mod membership;
mod meta;
mod mount;
mod names;
mod storage;

pub use attr::{Attr, AttrUpdate, Kind, Places, Time};
pub use locks::{LockKind, LockOwner, LockRange, LockSpec};
pub use membership::{DeadMount, Records, Terms, View};
pub use meta::{
    BEHIND_ALL, DirEntry, InoRange, JoinReply, Logged, Mark, MetaReply, MetaRequest, MetaStatus, NodeInfo,
    Page, PeerState, StatFs, StorageInfo,
};
pub use mount::{Act, MountRequest, MountStatus, Visited};
pub use names::{Carried, Created, NamespaceOp, Touched, Written};
pub use storage::{
    Attached, BlockFrame, BlockRange, BlockWant, Frame, MOST_RANGES, Part, PoolSpace, StorageReply,
    StorageRequest, StorageStatus,
};

use serde::{Deserialize, Serialize};

/// Version of these messages; nodes of different versions refuse each other.
pub const PROTOCOL: u32 = 16;

/// What a node says it is when it connects (authenticated by the transport's handshake).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL`] of the sender.
    pub protocol: u32,
    /// Name of the cluster.
    pub cluster: String,
    /// What it is.
    pub role: Role,
    /// Distinguishes two lives of one node: a random number drawn at process start.
    pub life: u64,
}

/// Role of a process on one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Role {
    /// The metadata server.
    Meta,
    /// Storage node with this id.
    Storage(u16),
    /// A mount; its node number once it has joined.
    Client(Option<u16>),
    /// A command such as `fsd status`.
    Tool,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Meta => write!(f, "metadata server"),
            Self::Storage(id) => write!(f, "storage node {id}"),
            Self::Client(Some(n)) => write!(f, "mount {n}"),
            Self::Client(None) => write!(f, "joining mount"),
            Self::Tool => write!(f, "tool"),
        }
    }
}

impl Hello {
    /// Of this build.
    #[must_use]
    pub fn new(cluster: &str, role: Role, life: u64) -> Self {
        Self {
            protocol: PROTOCOL,
            cluster: cluster.to_owned(),
            role,
            life,
        }
    }

    /// Encodes it for the handshake.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        // A Hello has no type that postcard can refuse.
        postcard::to_stdvec(self).unwrap_or_default()
    }

    /// Decodes it, of whatever protocol and cluster. None: it is no greeting.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        postcard::from_bytes(bytes).ok()
    }

    /// Decodes and checks protocol and cluster against ours.
    ///
    /// # Errors
    /// One sentence for the other side.
    pub fn check(bytes: &[u8], cluster: &str) -> Result<Self, String> {
        let hello = Self::decode(bytes).ok_or("the greeting cannot be read")?;
        if hello.protocol != PROTOCOL {
            return Err(format!(
                "message protocol version {} meets version {PROTOCOL}: run the same release on every node",
                hello.protocol
            ));
        }
        if hello.cluster != cluster {
            return Err(format!(
                "this node belongs to cluster '{cluster}', not to '{}'",
                hello.cluster
            ));
        }
        Ok(hello)
    }
}

/// Kinds of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// A request, answered by a response of the same number.
    Request = 1,
    /// The answer.
    Response = 2,
    /// A lease message of `lockmgr`.
    Lease = 3,
}

/// A frame taken apart.
#[derive(Debug, PartialEq, Eq)]
pub enum FrameView<'a> {
    /// Request number and body.
    Request(u64, &'a [u8]),
    /// Request number and body.
    Response(u64, &'a [u8]),
    /// Body.
    Lease(&'a [u8]),
}

/// Why bytes are not a message.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("a message cannot be read: {0}")]
pub struct WireError(pub String);

/// Takes a frame apart.
///
/// # Errors
/// [`WireError`] for anything that is not a frame.
pub fn parse(frame: &[u8]) -> Result<FrameView<'_>, WireError> {
    let (&kind, rest) = frame
        .split_first()
        .ok_or_else(|| WireError("empty frame".into()))?;
    let numbered = || -> Result<(u64, &[u8]), WireError> {
        let (number, body) = rest
            .split_first_chunk::<8>()
            .ok_or_else(|| WireError("truncated frame".into()))?;
        Ok((u64::from_le_bytes(*number), body))
    };
    match kind {
        k if k == FrameKind::Request as u8 => numbered().map(|(n, b)| FrameView::Request(n, b)),
        k if k == FrameKind::Response as u8 => numbered().map(|(n, b)| FrameView::Response(n, b)),
        k if k == FrameKind::Lease as u8 => Ok(FrameView::Lease(rest)),
        k => Err(WireError(format!("unknown frame kind {k}"))),
    }
}

/// Builds a numbered frame around a value.
///
/// # Errors
/// [`WireError`] if the value cannot be encoded.
pub fn numbered<T: Serialize>(kind: FrameKind, number: u64, value: &T) -> Result<Vec<u8>, WireError> {
    let mut frame = Vec::with_capacity(64);
    frame.push(kind as u8);
    frame.extend_from_slice(&number.to_le_bytes());
    postcard::to_extend(value, frame).map_err(|e| WireError(e.to_string()))
}

/// Length of a value's encoding, bytes.
#[must_use]
pub fn encoded_len<T: Serialize>(value: &T) -> usize {
    postcard::experimental::serialized_size(value).unwrap_or(0)
}

/// Builds a frame without a number around raw bytes.
#[must_use]
pub fn plain(kind: FrameKind, body: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(1 + body.len());
    frame.push(kind as u8);
    frame.extend_from_slice(body);
    frame
}

/// Decodes a body.
///
/// # Errors
/// [`WireError`] for bytes that are not this type.
pub fn decode<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, WireError> {
    postcard::from_bytes(body).map_err(|e| WireError(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_go_round() {
        let frame = numbered(FrameKind::Request, 77, &MetaRequest::Status).unwrap();
        let FrameView::Request(n, body) = parse(&frame).unwrap() else {
            panic!("not a request")
        };
        assert_eq!(n, 77);
        assert_eq!(decode::<MetaRequest>(body).unwrap(), MetaRequest::Status);
    }
}
