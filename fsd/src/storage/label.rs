//! The label in a storage directory: whose it is, and what was fixed when it was made.

use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::disk::FileDisk;
use super::{BLOCK, StorageError};
use crate::config::{Config, Size, StorageConfig};

/// Name of the file in a storage node's directory that says what it belongs to.
const LABEL: &str = "storage.label";
/// Name of the backing file.
pub const BACKING: &str = "pool.data";
/// Name of the directory of the index.
pub const INDEX: &str = "index";
/// Version of what is in the directory: label, index, backing file.
pub const FORMAT: u32 = 2;

/// What a storage directory says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    /// Version of the format.
    pub format: u32,
    /// Name of the cluster.
    pub cluster: String,
    /// Number of the storage node.
    pub node: u16,
    /// Names this store: no other one has it.
    pub uuid: String,
    /// Largest size the pool has had, bytes.
    pub pool: u64,
    /// Bytes of a lease record.
    pub record_bytes: u32,
}

/// Enough of a label to tell whether the rest can be read.
#[derive(Deserialize)]
struct Version {
    format: u32,
}

fn wrong(dir: &Path, detail: impl Into<String>) -> StorageError {
    StorageError::Format {
        path: dir.to_owned(),
        detail: detail.into(),
    }
}

impl Label {
    /// The label of a new store for a node of a configuration.
    #[must_use]
    pub fn new(config: &Config, section: &StorageConfig) -> Self {
        Self {
            format: FORMAT,
            cluster: config.cluster.clone(),
            node: section.id,
            uuid: format!("{:032x}", rand::random::<u128>()),
            pool: section.pool.0 / BLOCK * BLOCK,
            record_bytes: config.lease.record_bytes,
        }
    }

    /// Reads the label of a directory.
    ///
    /// # Errors
    /// [`StorageError::Format`]: there is none, or it is of another format.
    pub fn read(dir: &Path) -> Result<Self, StorageError> {
        let text = std::fs::read_to_string(dir.join(LABEL)).map_err(|error| {
            if error.kind() == std::io::ErrorKind::NotFound {
                wrong(dir, "is not a formatted storage directory: run fsd format first")
            } else {
                wrong(dir, format!("its label cannot be read: {error}"))
            }
        })?;
        // The first format had no version, only lines.
        let format = toml::from_str::<Version>(&text).map_or(1, |v| v.format);
        if format != FORMAT {
            return Err(wrong(
                dir,
                format!(
                    "has storage format {format}, this release reads {FORMAT}: use the release that made it"
                ),
            ));
        }
        toml::from_str(&text).map_err(|_| wrong(dir, "has a damaged label: restore it from a copy"))
    }

    /// Reads the label of a directory and checks it against what the configuration says.
    ///
    /// # Errors
    /// [`StorageError::Format`] with what differs, and what to do.
    pub fn check(
        dir: &Path,
        cluster: &str,
        node: u16,
        pool: u64,
        record_bytes: u32,
    ) -> Result<Self, StorageError> {
        let label = Self::read(dir)?;
        if label.cluster != cluster || label.node != node {
            return Err(wrong(
                dir,
                format!(
                    "belongs to storage node {} of cluster '{}', not to node {node} of '{cluster}'",
                    label.node, label.cluster
                ),
            ));
        }
        if pool < label.pool {
            return Err(wrong(
                dir,
                format!(
                    "has a pool of {}, the configuration says {}: a pool can be made larger, not smaller; put the size right",
                    Size(label.pool),
                    Size(pool)
                ),
            ));
        }
        if record_bytes != label.record_bytes {
            return Err(wrong(
                dir,
                format!(
                    "was formatted with lease.record_bytes = {}, the configuration says {record_bytes}: put it right",
                    label.record_bytes
                ),
            ));
        }
        Ok(label)
    }

    /// Writes the label so that a power cut leaves the old one or the new one.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn write(&self, dir: &Path) -> Result<(), StorageError> {
        let io = |error| StorageError::Io {
            what: "cannot write the label in",
            path: dir.to_owned(),
            error,
        };
        let text = toml::to_string(self).map_err(|e| io(std::io::Error::other(e)))?;
        let new = dir.join("storage.label.new");
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .map_err(io)?;
        file.write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .and_then(|()| std::fs::rename(&new, dir.join(LABEL)))
            .and_then(|()| File::open(dir)?.sync_all())
            .map_err(io)
    }
}

/// Makes a directory its owner's alone, whatever the umask was when it was made.
///
/// # Errors
/// The system refuses.
pub fn make_private(dir: &Path) -> Result<(), StorageError> {
    std::fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(|error| StorageError::Io {
        what: "cannot make private",
        path: dir.to_owned(),
        error,
    })
}

/// Is there no store in a directory yet?
///
/// # Errors
/// There is one, or a part of one.
pub fn check_unformatted(dir: &Path) -> Result<(), StorageError> {
    if dir.join(LABEL).exists() {
        return Err(wrong(
            dir,
            "is formatted already: remove it first if its contents are not wanted",
        ));
    }
    for old in [INDEX, BACKING] {
        if dir.join(old).exists() {
            return Err(wrong(
                dir,
                format!(
                    "has {old} of a storage node, but no label: remove it first if its contents are not wanted"
                ),
            ));
        }
    }
    Ok(())
}

/// Makes a storage directory. The label comes last: without it the rest is nothing.
///
/// # Errors
/// It is formatted already, or the disk refuses.
pub fn format(dir: &Path, label: &Label) -> Result<(), StorageError> {
    let io = |error| StorageError::Io {
        what: "cannot format",
        path: dir.to_owned(),
        error,
    };
    check_unformatted(dir)?;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(io)?;
    make_private(dir)?;
    FileDisk::open(&dir.join(BACKING)).map_err(io)?;
    label.write(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label() -> Label {
        Label {
            format: FORMAT,
            cluster: "c".into(),
            node: 3,
            uuid: "0123".into(),
            pool: 64 << 20,
            record_bytes: 64,
        }
    }

    #[test]
    fn what_differs_is_said() {
        let dir = tempfile::tempdir().unwrap();
        format(dir.path(), &label()).unwrap();
        assert!(format(dir.path(), &label()).is_err());
        let check = |cluster: &str, node, pool: u64, record| {
            Label::check(dir.path(), cluster, node, pool << 20, record).map_err(|e| e.to_string())
        };
        assert_eq!(check("c", 3, 64, 64), Ok(label()));
        assert_eq!(check("c", 3, 65, 64), Ok(label()), "it may grow");
        for (error, what) in [
            (check("d", 3, 64, 64), "of cluster 'c'"),
            (check("c", 2, 64, 64), "storage node 3"),
            (check("c", 3, 63, 64), "not smaller"),
            (check("c", 3, 64, 128), "record_bytes = 64"),
        ] {
            let error = error.unwrap_err();
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn a_store_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("a/b");
        format(&store, &label()).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&store), 0o700);
        assert_eq!(mode(&store.join(BACKING)), 0o600);
        assert_eq!(mode(&store.join(LABEL)), 0o600);
    }

    #[test]
    fn other_formats_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |text: &str, what: &str| {
            std::fs::write(dir.path().join(LABEL), text).unwrap();
            let error = Label::read(dir.path()).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        };
        refused("c\n3\n0123\n", "storage format 1");
        refused("format = 99\nwhatever = true\n", "storage format 99");
        refused(&format!("format = {FORMAT}\n"), "damaged label");
    }
}
