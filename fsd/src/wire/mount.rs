//! What a tool may ask a mount.

use serde::{Deserialize, Serialize};

/// Requests to a mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountRequest {
    /// For `fsd status`.
    Status,
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
    /// Messages sent to servers and other mounts, and one-sided operations.
    pub messages: u64,
    /// Leases given up on request.
    pub revocations: u64,
    /// Invalidations repeated because a read slipped in.
    pub repeats: u64,
    /// Counters of the kernel extension, by name; none without it.
    pub kernel: Vec<(String, u64)>,
}
