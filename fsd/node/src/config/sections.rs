//! The sections of the configuration, and what they say where the file says nothing.

use std::path::PathBuf;

use rdma_transport::{FabricKind, VerbsOptions};
use serde::{Deserialize, Serialize};

use super::size::Size;
use crate::ports::Ports;

/// Which fabric the nodes talk over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum FabricChoice {
    /// Shared memory (all nodes on one host).
    Shm,
    /// TCP.
    Tcp,
    /// RDMA: InfiniBand, RoCE, SoftRoCE.
    Verbs,
}

impl From<FabricChoice> for FabricKind {
    fn from(choice: FabricChoice) -> Self {
        match choice {
            FabricChoice::Shm => Self::Shm,
            FabricChoice::Tcp => Self::Tcp,
            FabricChoice::Verbs => Self::Verbs,
        }
    }
}

/// How a mount lets the kernel cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, Default)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// The best this machine offers.
    #[default]
    Auto,
    /// No kernel data cache.
    Direct,
    /// Page cache for reads, every write to the daemon.
    Writethrough,
    /// Page cache for reads and writes, with single-copy consistency: needs the kernel extension.
    Writeback,
}

/// Choices of the verbs fabric; what is not said is found out. The environment (`DISTFUSE_VERBS_DEVICE` and so on)
/// overrides them on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct VerbsConfig {
    /// Device, as `ibv_devices` lists it.
    pub device: Option<String>,
    /// Port of the device, from 1.
    pub port: Option<u8>,
    /// Index in the port's table of addresses.
    pub gid_index: Option<u8>,
    /// Wait for an acknowledgement: 4.096 µs · 2^this.
    pub timeout: Option<u8>,
    /// How often to send again without one, at most 6.
    pub retry: Option<u8>,
}

impl From<VerbsConfig> for VerbsOptions {
    fn from(config: VerbsConfig) -> Self {
        let default = Self::default();
        Self {
            device: config.device,
            port: config.port,
            gid_index: config.gid_index,
            timeout: config.timeout.unwrap_or(default.timeout),
            retry: config.retry.unwrap_or(default.retry),
        }
    }
}

/// Lease settings (fixed at format time where marked).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LeaseConfig {
    /// Bytes of a lease record: 64, 128, 256 or 512 (fixed at format; 64 allows 128 mounts).
    pub record_bytes: u32,
    /// A granted lease is not given up before this time, microseconds.
    pub min_hold_us: u64,
    /// How long a mount that wrote a file and let others read it keeps the lease record for itself,
    /// milliseconds: meanwhile it writes again without asking the storage node, and the metadata server is
    /// not told of every change.
    pub keep_ms: u64,
    /// Longest wait for a lease before the caller gets an error, milliseconds.
    pub wait_ms: u64,
}

impl Default for LeaseConfig {
    fn default() -> Self {
        Self {
            record_bytes: 64,
            min_hold_us: 0,
            keep_ms: 10,
            wait_ms: 30_000,
        }
    }
}

/// How long mounts may act on what they were told, and when one that is silent is declared dead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MembershipConfig {
    /// For so long after a heartbeat that was answered a mount may act, milliseconds: what a mount has leased that dies with its host is
    /// free again after this and `margin_ms`. 2000 works on a quiet network.
    pub term_ms: u64,
    /// By so much longer the metadata server waits, milliseconds: for clocks that run at different rates, and for busy hosts.
    pub margin_ms: u64,
    /// Between two heartbeats of a mount, milliseconds; at most a third of the term.
    pub heartbeat_ms: u64,
}

impl Default for MembershipConfig {
    fn default() -> Self {
        Self {
            term_ms: 10_000,
            margin_ms: 2_000,
            heartbeat_ms: 1_000,
        }
    }
}

impl MembershipConfig {
    /// Is it something by which a mount can live?
    pub(super) fn check(&self) -> Result<(), String> {
        const MIN_TERM_MS: u64 = 500;
        const MIN_MARGIN_MS: u64 = 100;
        const MAX_MS: u64 = 3_600_000;
        let Self {
            term_ms,
            margin_ms,
            heartbeat_ms,
        } = self;
        for (name, value, least) in [
            ("term_ms", term_ms, MIN_TERM_MS),
            ("margin_ms", margin_ms, MIN_MARGIN_MS),
        ] {
            if !(least..=MAX_MS).contains(value) {
                return Err(format!(
                    "membership.{name} = {value}: it must be between {least} and {MAX_MS} milliseconds"
                ));
            }
        }
        if *heartbeat_ms == 0 || *heartbeat_ms > term_ms / 3 {
            return Err(format!(
                "membership.heartbeat_ms = {heartbeat_ms}: it must be between 1 and a third of membership.term_ms, {}",
                term_ms / 3
            ));
        }
        Ok(())
    }
}

/// The metadata server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetaConfig {
    /// Address it listens on (socket path for shm, host:port for tcp).
    pub listen: String,
    /// Directory of its store.
    pub dir: PathBuf,
    /// Directory of a memory file system, in which it notes how far it has got: that outlives the process, not the host.
    #[serde(default = "default_memory_dir")]
    pub memory_dir: PathBuf,
}

/// One storage node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StorageConfig {
    /// Its number, from 0 without gaps (fixed at format).
    pub id: u16,
    /// Address it listens on.
    pub listen: String,
    /// Directory of its index and backing file.
    pub dir: PathBuf,
    /// Size of its pool, e.g. "1GiB"; it can be made larger later, not smaller.
    pub pool: Size,
    /// Directory of a memory file system for the registered pool.
    #[serde(default = "default_memory_dir")]
    pub memory_dir: PathBuf,
    /// So much of the backing file is checked each second; zero: not at all.
    #[serde(default = "default_scrub")]
    pub scrub: Size,
    /// A pass of that check begins so many seconds after the one before has ended.
    #[serde(default = "default_scrub_pause")]
    pub scrub_pause_s: u64,
}

/// Pause between two passes where the configuration says nothing, seconds: a disk that is idle stays so for most of the time.
#[must_use]
pub fn default_scrub_pause() -> u64 {
    3600
}

/// Rate of the check of a backing file where the configuration says nothing, bytes a second.
#[must_use]
pub fn default_scrub() -> Size {
    Size(8 << 20)
}

fn default_memory_dir() -> PathBuf {
    PathBuf::from("/dev/shm")
}

/// Defaults of mounts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MountConfig {
    /// Kernel caching.
    pub cache: CacheMode,
    /// In mode `writethrough`: files that several mounts have open go through the page cache too, though a stock
    /// kernel does not keep them coherent. For comparisons with the paper's baseline, which does that.
    pub cache_shared: bool,
    /// On a stock kernel: shared mappings also of files that other mounts have open, which then see stores late, or lose
    /// them to each other. Else such a file cannot be mapped shared, nor any file in mode `direct`: mmap says ENODEV.
    pub shared_mappings: bool,
    /// Size of the user-space buffer cache.
    pub buffer_cache: Size,
    /// How much the kernel reads ahead of a program that reads a file from front to back, and asks for at once; zero:
    /// what it does by itself, 128 KiB.
    pub read_ahead: Size,
    /// Programs wait so long for a server that is away before they get an error, milliseconds; for ever where it is not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hard_ms: Option<u64>,
    /// FUSE event loops.
    pub loops: usize,
    /// Longest time data stays only in the mount's memory, milliseconds.
    pub writeback_ms: u64,
    /// Beyond this many known inodes, those are forgotten that the kernel has forgotten.
    pub max_inodes: usize,
    /// Entries of the lease table shared with the kernel extension, 128 bytes each.
    pub lease_table: u32,
    /// Ports that mounts listen at, where firewalls have to know; else the system chooses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ports: Option<Ports>,
}

impl Default for MountConfig {
    fn default() -> Self {
        Self {
            cache: CacheMode::Auto,
            cache_shared: false,
            shared_mappings: false,
            buffer_cache: Size(256 << 20),
            read_ahead: Size(1 << 20),
            hard_ms: None,
            loops: 2,
            writeback_ms: 2_000,
            max_inodes: 100_000,
            lease_table: 1 << 15,
            ports: None,
        }
    }
}
