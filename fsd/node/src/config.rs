//! The cluster's configuration file, `cluster.toml`, and its key.

mod error;
mod key;
mod sections;
mod size;

pub use error::ConfigError;
pub use key::read_key;
pub use sections::{
    CacheMode, FabricChoice, LeaseConfig, MembershipConfig, MetaConfig, MountConfig, StorageConfig,
    VerbsConfig, default_scrub, default_scrub_pause,
};
pub use size::Size;

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

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
    /// How long mounts may act on what they were told.
    #[serde(default)]
    pub membership: MembershipConfig,
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
        let waits = [
            ("timeout_ms", self.timeout_ms),
            ("lease.wait_ms", self.lease.wait_ms),
        ];
        let hard = self.mount.hard_ms.map(|ms| ("mount.hard_ms", ms));
        for (name, value) in waits.into_iter().chain(hard) {
            if !(MIN_WAIT_MS..=MAX_WAIT_MS).contains(&value) {
                return Err(format!(
                    "{name} = {value}: it must be between {MIN_WAIT_MS} and {MAX_WAIT_MS} milliseconds"
                ));
            }
        }
        self.membership.check()?;
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
    use std::os::unix::fs::PermissionsExt;

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
            ("fabric", "mount = { hard_ms = 1 }\nfabric", "mount.hard_ms = 1"),
            (
                "fabric",
                "membership = { term_ms = 400, heartbeat_ms = 100 }\nfabric",
                "membership.term_ms = 400",
            ),
            (
                "fabric",
                "membership = { margin_ms = 99 }\nfabric",
                "membership.margin_ms = 99",
            ),
            (
                "fabric",
                "membership = { heartbeat_ms = 3334 }\nfabric",
                "membership.heartbeat_ms = 3334",
            ),
            (
                "fabric",
                "membership = { heartbeat_ms = 0 }\nfabric",
                "membership.heartbeat_ms = 0",
            ),
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
