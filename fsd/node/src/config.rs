//! The cluster's configuration file, `cluster.toml`, and its key.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rdma_transport::{FabricKind, VerbsOptions};
use serde::{Deserialize, Serialize};

use crate::ports::Ports;

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {error}")]
    Read {
        /// File.
        path: PathBuf,
        /// The system's answer.
        error: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{path}: {detail}")]
    Syntax {
        /// File.
        path: PathBuf,
        /// Where and what.
        detail: String,
    },
    /// The values contradict each other or a limit.
    #[error("{path}: {detail}")]
    Value {
        /// File.
        path: PathBuf,
        /// What, and what to do.
        detail: String,
    },
    /// The key file is not protected.
    #[error("the key file {path} can be read by others (mode {mode:o}): run chmod 600 {path}")]
    KeyExposed {
        /// File.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
}

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

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of the cluster.
    pub cluster: String,
    /// File with the cluster key (at least 16 bytes, mode 0600), relative to this file.
    pub key_file: PathBuf,
    /// Fabric.
    pub fabric: FabricChoice,
    /// Spin time of a progress thread, and of the daemon and the kernel's tasks for each other, before they sleep;
    /// microseconds.
    #[serde(default = "default_spin")]
    pub spin_us: u64,
    /// Longest wait for an answer of a peer, milliseconds.
    #[serde(default = "default_timeout")]
    pub timeout_ms: u64,
    /// Which RDMA device and address, and how patient; for `fabric = "verbs"`.
    #[serde(default)]
    pub verbs: VerbsConfig,
    /// Lease settings.
    #[serde(default)]
    pub lease: LeaseConfig,
    /// The metadata server.
    pub meta: MetaConfig,
    /// The storage nodes.
    pub storage: Vec<StorageConfig>,
    /// Defaults of mounts.
    #[serde(default)]
    pub mount: MountConfig,
}

/// Spin time where the configuration says nothing, microseconds.
#[must_use]
pub fn default_spin() -> u64 {
    20
}
fn default_timeout() -> u64 {
    10_000
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
    /// Bytes of a lease record: 64, 128, 256 or 512 (fixed at format; 64 allows 192 mounts).
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
            loops: 2,
            writeback_ms: 2_000,
            max_inodes: 100_000,
            lease_table: 1 << 15,
            ports: None,
        }
    }
}

/// A size in bytes; in the file a number or a string with KiB, MiB, GiB, TiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl std::str::FromStr for Size {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, unit) = text.split_at(split);
        let bad = || format!("'{text}' is not a size: write for example 512MiB or 4GiB");
        let number: u64 = digits.parse().map_err(|_| bad())?;
        let shift = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => return Err(bad()),
        };
        number.checked_mul(1 << shift).map(Self).ok_or_else(bad)
    }
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 >= 1 << shift && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl Serialize for Size {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(u64),
            Text(String),
        }
        match Either::deserialize(d)? {
            Either::Number(n) => Ok(Self(n)),
            Either::Text(t) => t.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// Reads a key file: it must be its reader's alone.
///
/// # Errors
/// [`ConfigError`] with the file and what to do.
pub fn read_key(path: &Path) -> Result<Vec<u8>, ConfigError> {
    let read = |error| ConfigError::Read {
        path: path.to_owned(),
        error,
    };
    let meta = match fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(ConfigError::Value {
                path: path.to_owned(),
                detail: format!(
                    "there is no cluster key: make one with fsd keygen {}, and copy it to every host",
                    path.display()
                ),
            });
        }
        meta => meta.map_err(read)?,
    };
    let mode = meta.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(ConfigError::KeyExposed {
            path: path.to_owned(),
            mode,
        });
    }
    let me = rustix::process::geteuid().as_raw();
    if me != 0 && meta.uid() != me {
        let detail = format!(
            "belongs to uid {}, not to the user running fsd ({me})",
            meta.uid()
        );
        return Err(ConfigError::Value {
            path: path.to_owned(),
            detail,
        });
    }
    let key = fs::read(path).map_err(read)?;
    if key.len() < 16 {
        let detail = format!(
            "the key has {} bytes, at least 16 are needed: run fsd keygen",
            key.len()
        );
        return Err(ConfigError::Value {
            path: path.to_owned(),
            detail,
        });
    }
    Ok(key)
}

/// Shortest and longest wait for an answer or a lease, milliseconds: what is shorter ends before a busy host has answered.
const MIN_WAIT_MS: u64 = 50;
const MAX_WAIT_MS: u64 = 3_600_000;

/// Smallest pool of a storage node, bytes.
pub const MIN_POOL: u64 = 8 << 20;

impl Config {
    /// Reads and checks a configuration file; relative paths in it, those of `shm` sockets too, are made
    /// absolute to its folder.
    ///
    /// # Errors
    /// [`ConfigError`] with the file and what to do.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |error| ConfigError::Read {
            path: path.to_owned(),
            error,
        };
        let text = fs::read_to_string(path).map_err(read)?;
        let mut config: Self = toml::from_str(&text).map_err(|e| ConfigError::Syntax {
            path: path.to_owned(),
            detail: e.to_string(),
        })?;
        let base = path
            .canonicalize()
            .map_err(read)?
            .parent()
            .map(Path::to_owned)
            .unwrap_or_default();
        for p in std::iter::once(&mut config.key_file)
            .chain(std::iter::once(&mut config.meta.dir))
            .chain(config.storage.iter_mut().map(|s| &mut s.dir))
        {
            *p = base.join(&*p);
        }
        if config.fabric == FabricChoice::Shm {
            // Addresses are sockets in the file system.
            let storage = config.storage.iter_mut().map(|s| &mut s.listen);
            for listen in std::iter::once(&mut config.meta.listen).chain(storage) {
                *listen = base.join(&*listen).to_string_lossy().into_owned();
            }
        }
        config.check().map_err(|detail| ConfigError::Value {
            path: path.to_owned(),
            detail,
        })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if self.storage.is_empty() {
            return Err("no storage node: add a [[storage]] section".into());
        }
        if self.storage.len() > usize::from(fsd_proto::ino::MAX_SHARDS) {
            return Err(format!("more than {} storage nodes", fsd_proto::ino::MAX_SHARDS));
        }
        for (i, node) in self.storage.iter().enumerate() {
            if let Some(other) = self.storage[..i].iter().find(|o| o.id == node.id) {
                return Err(format!(
                    "two storage nodes have the id {} ({} and {}): give each its own",
                    node.id, other.listen, node.listen
                ));
            }
            if usize::from(node.id) >= self.storage.len() {
                return Err(format!(
                    "storage node ids must run from 0 without gaps, {} does not fit",
                    node.id
                ));
            }
            if node.pool.0 < MIN_POOL {
                return Err(format!(
                    "the pool of storage node {} is too small ({}): it needs at least {}",
                    node.id,
                    node.pool,
                    Size(MIN_POOL)
                ));
            }
        }
        let mut addresses: Vec<&str> = self
            .storage
            .iter()
            .map(|s| s.listen.as_str())
            .chain([self.meta.listen.as_str()])
            .collect();
        addresses.sort_unstable();
        if let Some(w) = addresses.windows(2).find(|w| w[0] == w[1]) {
            return Err(format!("two roles listen on {}: give each its own address", w[0]));
        }
        if ![64, 128, 256, 512].contains(&self.lease.record_bytes) {
            return Err(format!(
                "lease.record_bytes must be 64, 128, 256 or 512, not {}",
                self.lease.record_bytes
            ));
        }
        if self.fabric != FabricChoice::Shm {
            let has_port = |address: &str| {
                let port = address
                    .rsplit_once(':')
                    .and_then(|(_, port)| port.parse::<u16>().ok());
                port.is_some_and(|port| port > 0)
            };
            if let Some(address) = addresses.iter().find(|address| !has_port(address)) {
                return Err(format!("the address {address} has no port: write host:port"));
            }
        }
        for (name, value) in [
            ("timeout_ms", self.timeout_ms),
            ("lease.wait_ms", self.lease.wait_ms),
        ] {
            if !(MIN_WAIT_MS..=MAX_WAIT_MS).contains(&value) {
                return Err(format!(
                    "{name} = {value}: it must be between {MIN_WAIT_MS} and {MAX_WAIT_MS} milliseconds"
                ));
            }
        }
        if self.mount.loops == 0 || self.mount.loops > 64 {
            return Err("mount.loops must be between 1 and 64".into());
        }
        Ok(())
    }

    /// Reads the cluster key and checks that nobody else can.
    ///
    /// # Errors
    /// [`ConfigError::KeyExposed`] and the others.
    pub fn key(&self) -> Result<Vec<u8>, ConfigError> {
        read_key(&self.key_file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        cluster = "test"
        key_file = "key"
        fabric = "shm"
        [meta]
        listen = "/tmp/m.sock"
        dir = "meta"
        [[storage]]
        id = 0
        listen = "/tmp/s0.sock"
        dir = "s0"
        pool = "64MiB"
    "#;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cluster.toml");
        fs::write(&path, text).unwrap();
        Config::load(&path)
    }

    #[test]
    fn a_good_file_loads_and_goes_round() {
        let config = load(GOOD).unwrap();
        assert_eq!(config.storage[0].pool, Size(64 << 20));
        assert!(config.meta.dir.is_absolute());
        let text = toml::to_string(&config).unwrap();
        assert_eq!(load(&text).unwrap(), config);
    }

    #[test]
    fn unknown_keys_are_named() {
        let error = load(&GOOD.replace("fabric", "fabrik = 1\nfabric"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("fabrik"), "{error}");
    }

    #[test]
    fn one_id_twice_is_refused() {
        let second = "[[storage]]\nid = 0\nlisten = \"/tmp/s1.sock\"\ndir = \"s1\"\npool = \"64MiB\"\n";
        let error = load(&format!("{GOOD}\n{second}")).unwrap_err().to_string();
        assert!(error.contains("two storage nodes have the id 0"), "{error}");
    }

    #[test]
    fn a_small_pool_is_refused() {
        let error = load(&GOOD.replace("64MiB", "1MiB")).unwrap_err().to_string();
        assert!(error.contains("too small") && error.contains("8MiB"), "{error}");
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        let tcp = GOOD
            .replace("shm", "tcp")
            .replace("/tmp/m.sock", "10.0.0.1:7000")
            .replace("/tmp/s0.sock", "10.0.0.1:7100");
        load(&tcp).unwrap();
        for (from, to, told) in [
            ("10.0.0.1:7100", "10.0.0.1", "10.0.0.1 has no port"),
            ("10.0.0.1:7000", "10.0.0.1:0", "10.0.0.1:0 has no port"),
            ("fabric", "timeout_ms = 0\nfabric", "timeout_ms = 0"),
            ("fabric", "lease = { wait_ms = 1 }\nfabric", "lease.wait_ms = 1"),
            (
                "fabric",
                "mount = { ports = '9-8' }\nfabric",
                "'9-8' names no ports",
            ),
        ] {
            let error = load(&tcp.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn a_key_that_is_not_there_is_to_be_made() {
        let error = read_key(Path::new("/nowhere/key")).unwrap_err().to_string();
        assert!(error.contains("fsd keygen /nowhere/key"), "{error}");
    }

    #[test]
    fn an_exposed_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cluster.toml");
        fs::write(&path, GOOD).unwrap();
        let key = dir.path().join("key");
        fs::write(&key, [7u8; 32]).unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
        let config = Config::load(&path).unwrap();
        assert!(matches!(config.key(), Err(ConfigError::KeyExposed { .. })));
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(config.key().unwrap().len(), 32);
    }
}
