//! The label in a storage directory: whose it is, and what was fixed when it was made.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::disk::FileDisk;
use super::error::StorageError;
use fsd_node::config::{Config, Size, StorageConfig};
use fsd_node::files;
use fsd_node::store::{Batch, FjallStore, Store, is_begun};
use fsd_proto::layout::BLOCK;

/// Name of the file in a storage node's directory that says what it belongs to.
const LABEL: &str = "storage.label";
/// Name of the backing file.
pub const BACKING: &str = "pool.data";
/// Name of the directory of the index.
pub const INDEX: &str = "index";
/// Version of what is in the directory: label, index, backing file.
pub const FORMAT: u32 = 3;
/// The version before, whose index has no pages beside its entries: it is taken as it is, and becomes the present one.
const BEFORE: u32 = 2;

/// What a storage directory says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    /// Version of the format.
    pub format: u32,
    /// The index has been made, and says whose it is. Before what a label must have, so that one cut short is none.
    #[serde(default)]
    pub index: bool,
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
            uuid: format!("{:032x}", rt::random::<u128>()),
            pool: section.pool.0 / BLOCK * BLOCK,
            record_bytes: config.lease.record_bytes,
            index: false,
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
        let damaged = || wrong(dir, "has a damaged label (storage.label): restore it from a copy");
        // Part of a label may read like a whole one that says something else.
        if !text.ends_with('\n') {
            return Err(damaged());
        }
        let format = match toml::from_str::<Version>(&text) {
            Ok(version) => version.format,
            // The first format had no version, only lines.
            Err(_) if text.lines().count() == 3 && !text.contains(['=', '\0']) => 1,
            Err(_) => return Err(damaged()),
        };
        if format != FORMAT && format != BEFORE {
            return Err(wrong(
                dir,
                format!(
                    "has storage format {format}, this release reads {FORMAT}: use the release that made it"
                ),
            ));
        }
        toml::from_str(&text).map_err(|_| damaged())
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

    /// Makes it one of the present format, before anything is written that an older release would not find.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn renew(&mut self, dir: &Path) -> Result<(), StorageError> {
        if self.format == FORMAT {
            return Ok(());
        }
        self.format = FORMAT;
        self.write(dir)
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
        files::replace_durably(&dir.join(LABEL), &text).map_err(io)
    }
}

/// Key in the index of the number of the store that it belongs to.
const WHOSE: &[u8] = b"u";

/// Opens the index of a labelled directory; makes it if that has not been done. An index that has been lost, or is another
/// store's, is not made anew: every file would read as zeros.
///
/// # Errors
/// [`StorageError::Format`] for one that is not this store's; the store's.
pub fn open_index(dir: &Path, label: &mut Label) -> Result<Arc<dyn Store>, StorageError> {
    let path = dir.join(INDEX);
    if label.index {
        if !is_begun(&path) {
            return Err(wrong(&path, "the index is missing: put it back where it was"));
        }
        let store = FjallStore::open_existing(&path)?;
        return match store.get(WHOSE)? {
            Some(uuid) if uuid == label.uuid.as_bytes() => Ok(Arc::new(store)),
            Some(_) => Err(wrong(
                &path,
                "is the index of another store: put the right one back",
            )),
            None => Err(wrong(
                &path,
                "is an index that has lost its contents: put back a copy of it, or look at the disk (dmesg)",
            )),
        };
    }
    let store = FjallStore::open(&path)?;
    let mut batch = Batch::default();
    batch.put(WHOSE.to_vec(), label.uuid.clone().into_bytes());
    store.apply(batch)?;
    store.sync()?;
    files::sync_tree(&path)
        .and_then(|()| files::sync_dir(dir))
        .map_err(|error| StorageError::Io {
            what: "cannot sync",
            path,
            error,
        })?;
    label.index = true;
    label.write(dir)?;
    Ok(Arc::new(store))
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
    // An empty backing file is what a power cut has left of an earlier attempt.
    let empty = std::fs::metadata(dir.join(BACKING)).is_ok_and(|m| m.len() == 0);
    for (old, nothing) in [(INDEX, false), (BACKING, empty)] {
        if dir.join(old).exists() && !nothing {
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
    files::make_dir(dir).map_err(io)?;
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
            index: false,
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

    /// What a power cut can leave of formatting, and of a label whose bytes the disk has lost: an error that says what to do,
    /// or what was written. Formatting again works, unless there is something to lose.
    #[test]
    fn what_is_half_made_is_no_store() {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("a/b");
        let read = || Label::read(&store).map_err(|e| e.to_string());
        let says = |what: &str| assert!(read().unwrap_err().contains(what), "{:?}", read());
        says("run fsd format first");
        files::make_dir(&store).unwrap();
        says("run fsd format first");
        std::fs::write(store.join(BACKING), "").unwrap();
        std::fs::write(store.join("storage.label.new"), "format = 2\nclu").unwrap();
        says("run fsd format first");
        format(&store, &label()).unwrap();
        assert_eq!(read(), Ok(label()));
        let text = std::fs::read_to_string(store.join(LABEL)).unwrap();
        for len in 0..text.len() {
            for rest in ["".to_owned(), "\0".repeat(text.len() - len), "\0\n".to_owned()] {
                std::fs::write(store.join(LABEL), text[..len].to_owned() + &rest).unwrap();
                says("damaged label");
            }
        }
        // One that grows.
        let larger = Label {
            pool: 128 << 20,
            ..label()
        };
        std::fs::write(store.join(LABEL), &text).unwrap();
        std::fs::write(store.join("storage.label.new"), &text[..20]).unwrap();
        assert_eq!(read(), Ok(label()));
        larger.write(&store).unwrap();
        assert_eq!(read(), Ok(larger));
        // Something was stored, and the label is gone: no new identity over it.
        std::fs::remove_file(store.join(LABEL)).unwrap();
        std::fs::write(store.join(BACKING), "data").unwrap();
        let refused = format(&store, &label()).unwrap_err().to_string();
        assert!(refused.contains("no label"), "{refused}");
    }

    /// Nor is an index that was lost made anew, whatever of it was.
    #[test]
    fn a_lost_index_is_missed() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let made = |name: &str| {
            let store = dir.path().join(name);
            let label = Label {
                uuid: name.into(),
                ..label()
            };
            format(&store, &label).unwrap();
            let mut label = Label::read(&store).unwrap();
            drop(open_index(&store, &mut label).unwrap());
            store
        };
        let (one, two) = (made("one"), made("two"));
        let open = || {
            let mut label = Label::read(&one).unwrap();
            open_index(&one, &mut label)
                .map(|_| ())
                .map_err(|e| e.to_string())
        };
        assert_eq!((open(), open()), (Ok(()), Ok(())));
        let index = one.join(INDEX);
        for lost in ["", "keyspaces/1", "keyspaces/1/current", "version", "0.jnl"] {
            let (path, kept) = (index.join(lost), dir.path().join("kept"));
            std::fs::rename(&path, &kept).unwrap();
            for _ in 0..2 {
                let error = open().unwrap_err();
                assert!(
                    error.contains("missing") && error.contains("one/index"),
                    "{lost}: {error}"
                );
            }
            std::fs::rename(&kept, &path).unwrap();
            assert_eq!(open(), Ok(()), "{lost}");
        }
        std::fs::write(index.join("0.jnl"), "").unwrap();
        assert!(open().unwrap_err().contains("lost its contents"));
        std::fs::remove_dir_all(&index).unwrap();
        std::fs::rename(two.join(INDEX), &index).unwrap();
        assert!(open().unwrap_err().contains("another store"));
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

    #[test]
    fn the_format_before_becomes_this_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut old = label();
        old.format = BEFORE;
        old.write(dir.path()).unwrap();
        let mut read = Label::read(dir.path()).unwrap();
        read.renew(dir.path()).unwrap();
        assert_eq!(Label::read(dir.path()).unwrap(), label());
    }
}
