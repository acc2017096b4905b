//! What a manager needs of its surroundings, and what it is told.

use std::sync::Arc;
use std::time::Duration;

use rdma_transport::{Connection, RemoteAddr};

use crate::LeaseError;
use crate::ids::{Mode, NodeId, RecordId};
use crate::record::RecordLayout;

/// Finds records and peers. Nothing here may block.
pub trait Directory: Send + Sync {
    /// The connection to the storage node with the record, and the record's address there.
    ///
    /// # Errors
    /// [`LeaseError::NoSuchRecord`] if it will never exist: enters fail with it at once. Anything else is
    /// taken for a storage node that is away for now; the batch is posted after
    /// [`super::LeaseManager::storage_reconnected`].
    fn record(&self, id: RecordId) -> Result<(Arc<dyn Connection>, RemoteAddr), LeaseError>;

    /// Sends to a peer; messages to the same peer arrive in this order.
    ///
    /// # Errors
    /// The peer cannot be reached; what waits for it then fails at its deadline, naming it.
    fn send(&self, to: NodeId, msg: &[u8]) -> Result<(), LeaseError>;
}

/// The owner of the caches that leases protect. Called from any thread, the fabric's progress thread
/// included, with no lock of the manager held. Nothing here may block.
pub trait LeaseUser: Send + Sync {
    /// Bring the caches of the record down from `from` to `to`, and call [`super::LeaseManager::relinquished`]
    /// when that is done. Until [`super::LeaseManager::close_gate`] local operations go on under the lease.
    fn revoke(&self, id: RecordId, from: Mode, to: Option<Mode>);

    /// A lease has been granted; no local operation runs before this returns. Caches kept under the same
    /// version are valid. `payload` is what the last holder (this node itself, where it kept a shared lease)
    /// relinquished with; none where the lease was taken from a free record.
    fn granted(&self, id: RecordId, mode: Mode, version: u64, payload: Option<&[u8]>);

    /// The lease was granted so long ago: how much longer is it kept before it is asked back for others; zero: no longer. Asked
    /// when it is granted, and whenever that time is over.
    fn keep(&self, _id: RecordId, _mode: Mode, _since: Duration) -> Duration {
        Duration::ZERO
    }

    /// A record whose lease was relinquished with `needs_confirm` is about to become free: tell the authority
    /// of the attributes of this version, unless it knows them, and call [`super::LeaseManager::confirmed`].
    fn confirm(&self, id: RecordId, version: u64);
}

/// How a manager is set up.
#[derive(Debug, Clone, Copy)]
pub struct ManagerConfig {
    /// This node.
    pub node: NodeId,
    /// Its incarnation.
    pub incarnation: u8,
    /// Layout of all records.
    pub layout: RecordLayout,
    /// A grant is not asked back earlier.
    pub min_hold: Duration,
    /// Keep a shared lease when an exclusive one is given up to readers.
    pub keep_shared: bool,
    /// How long an owner that has let readers in keeps the record for itself, to write again without a
    /// round trip to the storage node; zero: not at all. Needs [`super::LeaseManager::run_timers`].
    pub keep_word: Duration,
    /// Rules to break, one bit for each [`crate::fsm::Flaw`]; tests only.
    #[cfg(any(test, feature = "flaws"))]
    pub flaws: u32,
}

impl ManagerConfig {
    /// No minimum hold time; shared leases are kept, records are not.
    #[must_use]
    pub fn new(node: NodeId, incarnation: u8, layout: RecordLayout) -> Self {
        Self {
            node,
            incarnation,
            layout,
            min_hold: Duration::ZERO,
            keep_shared: true,
            keep_word: Duration::ZERO,
            #[cfg(any(test, feature = "flaws"))]
            flaws: 0,
        }
    }
}

/// How the user gave a lease down.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Relinquish {
    /// Data or attributes were changed under the exclusive lease: the version moves.
    pub modified: bool,
    /// The record must not become free before [`super::LeaseManager::confirmed`] for the version after this; if
    /// nobody has, [`LeaseUser::confirm`] asks for it. A hand-over does not wait: if
    /// the payload is news to the authority, it must say so, and the next holder relinquishes with
    /// `needs_confirm` in its turn, even if it changed nothing.
    pub needs_confirm: bool,
    /// Attributes for the next holder, at most [`crate::msg::MAX_PAYLOAD`] bytes; empty: none.
    pub payload: Vec<u8>,
}
