//! What cluster to make.

use std::time::Duration;

/// What the nodes talk over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fabric {
    /// Shared memory.
    Shm,
    /// TCP.
    Tcp,
    /// RDMA, between the addresses in `LAB_IPS`, as in a guest of the lab.
    Verbs,
}

impl Fabric {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Tcp => "tcp",
            Self::Verbs => "verbs",
        }
    }
}

/// How the kernel may cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// Not at all.
    Direct,
    /// Pages for reading.
    Writethrough,
    /// Pages for reading and writing: only with the kernel extension.
    Writeback,
}

impl Cache {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Writethrough => "writethrough",
            Self::Writeback => "writeback",
        }
    }
}

/// What cluster to make.
#[derive(Debug, Clone)]
pub struct Options {
    /// Fabric.
    pub fabric: Fabric,
    /// Kernel caching.
    pub cache: Cache,
    /// Mounts.
    pub mounts: usize,
    /// Storage nodes.
    pub storage: usize,
    /// MiB of the pool of each storage node.
    pub pool_mib: u64,
    /// Longest wait for a lease.
    pub lease_wait: Duration,
    /// Longest wait for an answer.
    pub timeout: Duration,
    /// How long programs wait for a server that is away; for ever without it.
    pub hard: Option<Duration>,
    /// How long a mount may act without being heard; a fifth of it is the margin and the time between two heartbeats.
    pub term: Duration,
    /// Inodes a mount keeps that the kernel has forgotten.
    pub max_inodes: usize,
    /// Entries of the lease table shared with the kernel extension.
    pub lease_table: u32,
    /// How long is looked for what may come before sleeping for it, microseconds.
    pub spin_us: u64,
    /// Shared mappings on a stock kernel also of files that other mounts have open.
    pub shared_mappings: bool,
    /// The metadata server's disk has this many MiB only.
    pub meta_disk_mib: Option<u64>,
    /// Mounts reach the servers through proxies; over TCP.
    pub proxied: bool,
    /// Each process on a host of its own, a network namespace; over TCP. Links between them can be cut.
    pub apart: bool,
    /// Each mount is a keeper with a daemon.
    pub keep: bool,
}

impl Options {
    /// Two mounts that write back, for guests that have the kernel extension and RDMA.
    #[must_use]
    pub fn extension() -> Self {
        Self {
            fabric: Fabric::Verbs,
            cache: Cache::Writeback,
            storage: 1,
            pool_mib: 64,
            ..Self::default()
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            fabric: Fabric::Shm,
            cache: Cache::Direct,
            mounts: 2,
            storage: 2,
            pool_mib: 128,
            lease_wait: Duration::from_secs(30),
            timeout: Duration::from_secs(10),
            hard: None,
            term: Duration::from_secs(10),
            max_inodes: 100_000,
            lease_table: 1 << 15,
            spin_us: 20,
            shared_mappings: false,
            meta_disk_mib: None,
            proxied: false,
            apart: false,
            keep: false,
        }
    }
}
