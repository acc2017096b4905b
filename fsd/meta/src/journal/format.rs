//! A metadata store: how it is made, and whether it is the one that the configuration means.

use std::path::Path;

use super::records::{LAYOUT, Superblock, Txn, decode, encode, key, new_root};
use crate::error::MetaError;
use fsd_node::config::Config;
use fsd_node::files;
use fsd_node::store::{FjallStore, Store, is_begun};
use fsd_proto::wire::Time;

/// Is there no store in a directory yet?
///
/// # Errors
/// There is one, or what may be one.
pub fn check_unformatted(dir: &Path) -> Result<(), MetaError> {
    if !is_begun(dir) {
        return Ok(());
    }
    let formatted = FjallStore::open_existing(dir).is_ok_and(|store| {
        let superblock = store.get(&key::superblock());
        superblock.is_ok_and(|s| s.is_some())
    });
    let what = if formatted {
        "is formatted already"
    } else {
        "has a metadata store that is damaged, in use, or was not made to the end"
    };
    Err(MetaError::Format {
        path: dir.to_owned(),
        detail: format!("{what}: remove it first if its contents are not wanted"),
    })
}

/// Makes a metadata store with an empty root directory.
///
/// # Errors
/// It is formatted already, or the disk refuses.
pub fn format(config: &Config, uuid: &str) -> Result<(), MetaError> {
    let dir = &config.meta.dir;
    let io = |error| MetaError::Io {
        what: format!("cannot make {}", dir.display()),
        error,
    };
    check_unformatted(dir)?;
    files::make_dir(dir).map_err(io)?;
    let store = FjallStore::open(dir)?;
    make(&store, config, uuid)?;
    files::sync_tree(dir).map_err(io)
}

/// Writes what every store begins with.
///
/// # Errors
/// The store failed.
pub fn make(store: &dyn Store, config: &Config, uuid: &str) -> Result<(), MetaError> {
    let superblock = Superblock {
        layout: LAYOUT,
        cluster: config.cluster.clone(),
        uuid: uuid.to_owned(),
        record_bytes: config.lease.record_bytes,
        shards: config.storage.len() as u16,
        era: 0,
        tables: Vec::new(),
    };
    let mut txn = Txn::new(store);
    txn.put(key::superblock(), encode(&superblock));
    txn.set_inode(&new_root(
        Time::now(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    ));
    txn.commit()?;
    Ok(store.sync()?)
}

/// What format fixed, if it fits the configuration.
pub fn read_superblock(store: &dyn Store, config: &Config) -> Result<Superblock, MetaError> {
    let format = |detail: String| MetaError::Format {
        path: config.meta.dir.clone(),
        detail,
    };
    let bytes = store
        .get(&key::superblock())?
        .ok_or_else(|| format("is not a formatted metadata directory: run fsd format first".into()))?;
    let superblock: Superblock = decode(&bytes)?;
    if superblock.layout != LAYOUT {
        return Err(format(format!(
            "has layout version {}, this build reads {LAYOUT}: use the release that made it",
            superblock.layout
        )));
    }
    if superblock.cluster != config.cluster {
        return Err(format(format!(
            "belongs to cluster '{}', not '{}'",
            superblock.cluster, config.cluster
        )));
    }
    if usize::from(superblock.shards) != config.storage.len() {
        return Err(format(format!(
            "was formatted for {} storage nodes, the configuration has {}",
            superblock.shards,
            config.storage.len()
        )));
    }
    if superblock.record_bytes != config.lease.record_bytes {
        return Err(format(format!(
            "was formatted with lease.record_bytes = {}, the configuration says {}",
            superblock.record_bytes, config.lease.record_bytes
        )));
    }
    Ok(superblock)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crash_tests::world::config;
    use fsd_proto::ino;
    use std::path::PathBuf;

    fn at(dir: &Path) -> Config {
        let mut config = config().clone();
        config.meta.dir = dir.to_owned();
        config
    }

    /// Every file below a directory.
    fn files(dir: &Path) -> Vec<PathBuf> {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                all.extend(files(&path));
            } else {
                all.push(path);
            }
        }
        all.sort();
        all
    }

    fn identity(config: &Config) -> Result<String, String> {
        let store = FjallStore::open_existing(&config.meta.dir).map_err(|e| e.to_string())?;
        let superblock = read_superblock(&store, config).map_err(|e| e.to_string())?;
        let root = Txn::new(&store).inode(ino::ROOT);
        root.map_err(|e| e.errno().to_string())?;
        Ok(superblock.uuid)
    }

    /// A power cut while the store is made, or a disk that loses files: some are missing, empty, or end early. It is what was
    /// made, or an error that names the directory; formatting again never gives it another identity.
    #[test]
    fn what_is_half_made_is_no_store() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let config = at(&dir.path().join("a/meta"));
        let mut whole = 0;
        for what in 0..3 {
            for n in 0.. {
                let _ = std::fs::remove_dir_all(&config.meta.dir);
                format(&config, "one").unwrap();
                let all = files(&config.meta.dir);
                let Some(path) = all.get(n) else { break };
                let bytes = std::fs::read(path).unwrap();
                match what {
                    0 => std::fs::remove_file(path).unwrap(),
                    1 => std::fs::write(path, b"").unwrap(),
                    _ => std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap(),
                }
                let place = config.meta.dir.display().to_string();
                for _ in 0..2 {
                    match identity(&config) {
                        Ok(uuid) => {
                            whole += 1;
                            assert_eq!(uuid, "one");
                        }
                        Err(error) => assert!(error.contains(&place), "{error}"),
                    }
                    let refused = format(&config, "two").unwrap_err().to_string();
                    assert!(refused.contains("remove it first"), "{refused}");
                }
            }
        }
        assert!(whole > 0);
    }
}
