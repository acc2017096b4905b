//! What a tool, or another mount, may ask a mount.

use serde::{Deserialize, Serialize};

use super::membership::View;
use crate::errno::Errno;

/// Requests to a mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountRequest {
    /// For `fsd status`.
    Status,
    /// From another mount: to be done here, where the exclusive lease is.
    Visit {
        /// On what.
        ino: u64,
        /// Offset in the file.
        offset: u64,
        /// What.
        act: Act,
    },
    /// From the metadata server: who takes part. Answered when the mount has got there.
    View(View),
    /// From the metadata server: the lease tables that there are, by storage node. Who trusts another one has lost its leases.
    Tables(Vec<u64>),
    /// From the metadata server: a frame of lease messages of a mount that cannot reach this one.
    Relay {
        /// The other mount.
        from: u16,
        /// Its life.
        life: u64,
        /// The frame.
        #[serde(with = "serde_bytes")]
        frame: Vec<u8>,
    },
}

/// What a forwarded operation is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Act {
    /// Reading so many bytes.
    Read(u32),
    /// Writing.
    Write {
        /// What.
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
        /// Set-user-id bits are to be cleared.
        kill_priv: bool,
    },
}

/// Answers to [`MountRequest::Visit`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Visited {
    /// What was read, up to the end of the file.
    Read(#[serde(with = "serde_bytes")] Vec<u8>),
    /// It is written, and with the storage nodes.
    Written,
    /// The exclusive lease is not here; the mount that was heard of last in this matter.
    Elsewhere(Option<u16>),
    /// It is here, but is better taken. Nothing was done.
    Take,
    /// The storage nodes could not be given what was written.
    Failed(Errno),
}

/// State of a mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountStatus {
    /// Node number.
    pub node: u16,
    /// Cache mode.
    pub cache: String,
    /// Shared leases held.
    pub shared: u64,
    /// Exclusive leases held.
    pub exclusive: u64,
    /// Requests that wait for a lease.
    pub waiting: u64,
    /// Inodes known.
    pub inodes: u64,
    /// Size of the buffer cache, bytes.
    pub cached_bytes: u64,
    /// Files with something to write back.
    pub dirty_files: u64,
    /// Requests of the kernel since the start.
    pub requests: u64,
    /// Of those, handed to another thread because they had to wait.
    pub parked: u64,
    /// Messages sent to servers and other mounts, and batches of one-sided operations.
    pub messages: u64,
    /// Leases given up on request.
    pub revocations: u64,
    /// Invalidations repeated because a read slipped in.
    pub repeats: u64,
    /// Reads and writes done by another mount, which had the lease.
    pub sent: u64,
    /// Reads and writes done for other mounts.
    pub visits: u64,
    /// Counters of the kernel extension, by name; none without it.
    pub kernel: Vec<(String, u64)>,
    /// What is wrong as seen from there, one sentence each.
    pub troubles: Vec<String>,
}
