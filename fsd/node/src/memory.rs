//! Memory files: whose they are.
//!
//! A server keeps what must outlive its process in files of a memory file system (`/dev/shm`). All names of one store begin
//! alike, and beside the files lies a *note* that says which store that is and where. The server holds a lock on its note as
//! long as it runs, so another process can tell memory that is in use from memory that was left by a server that was killed.
//! The note is made before the first file and removed after the last one: no file is ever without it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rt::time::Instant;
use serde::{Deserialize, Serialize};

/// Memory file system that is used unless the configuration names another.
pub const DEFAULT_DIR: &str = "/dev/shm";
/// How all names begin.
pub const PREFIX: &str = "distfuse-";
/// How the name of a note ends.
pub const NOTE: &str = "note";
/// How long a server waits for its own note: who only looks at it has it for a moment.
const PATIENCE: Duration = Duration::from_secs(5);

/// Which store memory belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Name of the cluster.
    pub cluster: String,
    /// Number of the storage node; none: the metadata server's.
    pub storage: Option<u16>,
    /// Directory of the store.
    pub store: PathBuf,
    /// Random number of the store, as in its label.
    pub uuid: String,
}

impl std::fmt::Display for Note {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.storage {
            Some(id) => write!(f, "storage node {id}")?,
            None => write!(f, "metadata server")?,
        }
        write!(
            f,
            " of cluster '{}', store {}",
            self.cluster,
            self.store.display()
        )
    }
}

impl Note {
    /// How the names of the memory files of this store begin. The store's number is random, so nobody can make a file of such
    /// a name beforehand.
    #[must_use]
    pub fn stem(&self) -> String {
        match self.storage {
            Some(id) => format!("{PREFIX}{}-{id}", self.uuid),
            None => format!("{PREFIX}meta-{}", self.uuid),
        }
    }

    fn path(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{}.{NOTE}", self.stem()))
    }
}

/// Memory that a running server holds; others see that until this is dropped.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    _lock: File,
}

/// Opens a note, following no link.
///
/// # Errors
/// The system refuses.
pub fn open_note(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

/// Is the file still the one that has this name?
///
/// # Errors
/// The system refuses.
pub fn is_at(file: &File, path: &Path) -> std::io::Result<bool> {
    let ours = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

impl Claim {
    /// Writes the note of a server that starts, and holds it.
    ///
    /// # Errors
    /// The memory file system refuses; another process holds it.
    pub fn take(dir: &Path, note: &Note) -> std::io::Result<Self> {
        let path = note.path(dir);
        let text = toml::to_string(note).map_err(std::io::Error::other)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)?;
            match file.try_lock() {
                // Not where somebody has removed it between the two calls.
                Ok(()) if is_at(&file, &path)? => {
                    file.set_len(0)?;
                    file.write_all(text.as_bytes())?;
                    return Ok(Self { path, _lock: file });
                }
                Ok(()) => {}
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    rt::thread::sleep(Duration::from_millis(10));
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(std::io::Error::new(
                        std::io::ErrorKind::WouldBlock,
                        "another process uses the memory of this store",
                    ));
                }
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
    }

    /// The memory is gone, so nobody needs to know whose it was.
    pub fn remove(self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}
