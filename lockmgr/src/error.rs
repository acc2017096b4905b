//! What can go wrong, in sentences a user can act on.

use std::time::Duration;

use crate::ids::{Mode, NodeId, RecordId};

/// Errors of the lease manager.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// A record size that does not exist.
    #[error("a lease record cannot be {bytes} bytes long; use 64, 128, 256 or 512 at format time")]
    RecordSize {
        /// The size asked for.
        bytes: u32,
    },
    /// The node number has no bit in the record.
    #[error(
        "{node} has no bit in lease records for {max_nodes} nodes; format the cluster with larger records"
    )]
    NodeTooLarge {
        /// The node.
        node: NodeId,
        /// Nodes a record has bits for.
        max_nodes: u16,
    },
    /// No such record.
    #[error("{record} does not exist: no storage node serves shard {} or its table ends before it", record.shard())]
    NoSuchRecord {
        /// The record.
        record: RecordId,
    },
    /// The lease did not come in time, and nothing is known to be broken.
    #[error(
        "no {mode} lease on {record} within {waited:?} ({state}); its holder is slow or still writing back"
    )]
    Timeout {
        /// The record.
        record: RecordId,
        /// The mode wanted.
        mode: Mode,
        /// How long it was waited for.
        waited: Duration,
        /// Where in the protocol this node is.
        state: &'static str,
    },
    /// The lease did not come in time, and the connection to a node it depends on is broken.
    #[error(
        "{record} is held up by {node}, which cannot be reached; it is served when the node is back or declared dead"
    )]
    Unreachable {
        /// The record.
        record: RecordId,
        /// The node it waits for.
        node: NodeId,
    },
    /// The storage node with the record cannot be reached.
    #[error("the storage node of shard {shard} cannot be reached: {why}")]
    StorageLost {
        /// The shard.
        shard: u32,
        /// What the transport said.
        why: String,
    },
    /// This node is leaving the cluster.
    #[error("this node is leaving the cluster and takes no more leases")]
    Leaving,
    /// A message that cannot be decoded.
    #[error("a lease message is not valid: {why}; the peer runs another version or is faulty")]
    BadMessage {
        /// What is wrong with it.
        why: &'static str,
    },
    /// The attributes that travel with a grant are too long.
    #[error("{bytes} bytes of attributes do not fit in a grant, which carries at most {max}")]
    PayloadTooLong {
        /// Bytes given.
        bytes: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// The caller has no such lease, or nothing was asked of it.
    #[error("{record}: {what}")]
    Misuse {
        /// The record.
        record: RecordId,
        /// What was expected of the caller.
        what: &'static str,
    },
    /// A rule of the protocol was broken.
    #[error("{record}: {violation}; the record is left alone until this node has been restarted")]
    Violation {
        /// The record.
        record: RecordId,
        /// The rule.
        violation: crate::fsm::Violation,
    },
}
