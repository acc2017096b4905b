//! What nodes tell each other of who takes part: epochs, heartbeats, and what becomes of the dead.

use serde::{Deserialize, Serialize};

/// A life of a mount that has been declared dead, and what it had is taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DeadMount {
    /// Its node number.
    pub node: u16,
    /// Its incarnation.
    pub incarnation: u8,
    /// Its life ([`super::Hello::life`]).
    pub life: u64,
}

/// Who takes part, as a mount is told by the metadata server. Each death makes a new epoch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Counts declared deaths; never less than before.
    pub epoch: u64,
    /// The dead whose leases are being taken back. While there are any the mount asks nobody for a lease, and says when nothing
    /// of its earlier epochs is under way any more. None: those that wait for leases ask again.
    pub dead: Vec<DeadMount>,
}

/// How long a mount may act on what it was told, milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// From the sending of a heartbeat that is answered.
    pub term_ms: u64,
    /// By so much longer the metadata server waits before it declares a mount dead.
    pub margin_ms: u64,
    /// Between two heartbeats.
    pub heartbeat_ms: u64,
}

/// Lease records of a storage node that were asked for, by their indices in its table; a part of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Records {
    /// Those that were found.
    pub found: Vec<u64>,
    /// The record from which on there may be more; none: that was all.
    pub next: Option<u64>,
}
