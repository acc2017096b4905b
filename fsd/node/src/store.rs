//! The embedded transactional store behind the metadata server and the storage nodes' index.
//!
//! The servers need little of it: point reads, range scans, atomic batches that survive the death of the
//! process once applied, and a call that makes everything so far survive the death of the machine. They
//! see it through [`Store`], so that a replicated engine can carry them later. The engine is `fjall`;
//! docs/metadata-store.md has the comparison that chose it.

mod tail;
mod tidy;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rt::sync::{RwLock, RwLockReadGuard};
use rt::time::Instant;

use tidy::Upkeep;

use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};

/// Why the store could not do it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The engine or the system below it failed.
    #[error("the store in {path} failed: {detail}")]
    Engine {
        /// Directory of the store.
        path: PathBuf,
        /// What it said.
        detail: String,
    },
    /// Another process has it open.
    #[error("the store in {path} is in use: the role whose store it is runs already on this host")]
    InUse {
        /// Directory of the store.
        path: PathBuf,
    },
    /// It cannot be opened as it is.
    #[error(
        "the store in {path} is damaged ({detail}): put back a copy of the directory, or look at the disk (dmesg); a new one (fsd format) has none of the files"
    )]
    Damaged {
        /// Directory of the store.
        path: PathBuf,
        /// What the engine says.
        detail: String,
    },
    /// The disk is full.
    #[error("the disk that holds {path} is full: free some space there")]
    Full {
        /// Directory of the store.
        path: PathBuf,
    },
}

/// Changes to be made together.
#[derive(Debug, Default, Clone)]
pub struct Batch {
    ops: Vec<(Vec<u8>, Option<Vec<u8>>)>,
}

impl Batch {
    /// Sets a key.
    pub fn put(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.ops.push((key, Some(value)));
    }

    /// Removes a key.
    pub fn delete(&mut self, key: Vec<u8>) {
        self.ops.push((key, None));
    }

    /// What it sets and removes (no value), in order.
    #[must_use]
    pub fn ops(&self) -> &[(Vec<u8>, Option<Vec<u8>>)] {
        &self.ops
    }

    /// Nothing in it?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }
}

/// A key and its value.
pub type Pair = (Vec<u8>, Vec<u8>);

/// What the servers need of a store. Keys are ordered bytewise.
pub trait Store: Send + Sync {
    /// The value of a key.
    ///
    /// # Errors
    /// [`StoreError`].
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;
    /// At most `limit` pairs with keys in `from .. to`, in order.
    ///
    /// # Errors
    /// [`StoreError`].
    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<Pair>, StoreError>;
    /// Applies a batch atomically. Once this returns, the death of this process cannot undo it.
    ///
    /// # Errors
    /// [`StoreError`]; nothing has then been applied.
    fn apply(&self, batch: Batch) -> Result<(), StoreError>;
    /// Once this returns, the death of the machine cannot undo what was applied before.
    ///
    /// # Errors
    /// [`StoreError`].
    fn sync(&self) -> Result<(), StoreError>;
    /// Is there room for more than is there now? To be asked before what makes the store grow, so that what
    /// makes it smaller, or only keeps it right, still finds some.
    ///
    /// # Errors
    /// [`StoreError::Full`].
    fn room(&self) -> Result<(), StoreError>;
    /// To be called every few seconds: where much was removed and nothing happens, what it took is given back. Returns at
    /// once.
    fn tidy(&self) {}
}

/// Part of the disk that is kept for what must go on when it is full: one in so many bytes …
const RESERVE_SHARE: u64 = 16;
/// … but no less …
const RESERVE_MIN: u64 = 1 << 20;
/// … and no more than the engine needs to reorganise itself.
const RESERVE_MAX: u64 = 256 << 20;
/// Pause between attempts to open an engine again that has failed.
const REOPEN: Duration = Duration::from_secs(1);

struct Engine {
    db: Database,
    keys: Keyspace,
}

/// The engine, if it works, and when it was last tried to bring it back.
struct Slot {
    engine: Option<Engine>,
    tried: Instant,
}

/// The engine in use. After a failed write it refuses everything until it is opened again, as it would be
/// after a crash; that is done here, as soon as the disk allows.
pub struct FjallStore(Arc<Shared>);

/// Shared with the thread that tidies up.
struct Shared {
    path: PathBuf,
    slot: RwLock<Slot>,
    upkeep: Upkeep,
}

impl FjallStore {
    /// Opens the store in a directory, or makes it.
    ///
    /// # Errors
    /// [`StoreError`], also where another process has it open.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::opened(path)
    }

    /// Opens a store that has been made. One that lacks some of its files is damaged; the engine would take it for one that
    /// is only being made, remove what is left of it, and begin with an empty one.
    ///
    /// # Errors
    /// [`StoreError`], also where another process has it open.
    pub fn open_existing(path: &Path) -> Result<Self, StoreError> {
        match lacks(path) {
            Some(file) => Err(StoreError::Damaged {
                path: path.to_owned(),
                detail: format!("{file} is missing"),
            }),
            None => Self::opened(path),
        }
    }

    fn opened(path: &Path) -> Result<Self, StoreError> {
        let slot = Slot {
            engine: Some(Engine::open(path)?),
            tried: Instant::now(),
        };
        Ok(Self(Arc::new(Shared {
            path: path.to_owned(),
            slot: RwLock::new(slot),
            upkeep: Upkeep::default(),
        })))
    }
}

impl Shared {
    /// Size of the disk and what is free on it, bytes.
    fn disk(&self) -> Result<(u64, u64), StoreError> {
        let disk = rustix::fs::statvfs(&self.path).map_err(|error| StoreError::Engine {
            path: self.path.clone(),
            detail: format!("its disk cannot be asked: {error}"),
        })?;
        Ok((disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize))
    }

    fn full(&self) -> StoreError {
        StoreError::Full {
            path: self.path.clone(),
        }
    }

    fn engine(&self) -> Result<RwLockReadGuard<'_, Slot>, StoreError> {
        let slot = self.slot.read();
        if slot.engine.is_some() {
            return Ok(slot);
        }
        drop(slot);
        {
            let mut slot = self.slot.write();
            if slot.engine.is_none() {
                if slot.tried.elapsed() < REOPEN {
                    return Err(StoreError::Engine {
                        path: self.path.clone(),
                        detail: "it has failed and is opened again soon".into(),
                    });
                }
                slot.tried = Instant::now();
                // Part of what is kept for such times may be in use.
                if self.disk()?.1 < RESERVE_MIN {
                    return Err(self.full());
                }
                slot.engine = Some(Engine::open(&self.path)?);
                tracing::info!("the store in {} works again", self.path.display());
            }
        }
        Ok(self.slot.read())
    }

    /// Does something with the engine.
    fn with<T>(&self, f: impl FnOnce(&Engine) -> Result<T, fjall::Error>) -> Result<T, StoreError> {
        let failed = |error: &fjall::Error| engine_error(&self.path, error);
        let slot = self.engine()?;
        let Some(engine) = &slot.engine else {
            return Err(failed(&fjall::Error::Poisoned));
        };
        let result = f(engine);
        drop(slot);
        result.map_err(|error| {
            // What it has not acknowledged is not there when it is opened again, as after a crash.
            let mut slot = self.slot.write();
            slot.engine = None;
            slot.tried = Instant::now();
            failed(&error)
        })
    }
}

impl Engine {
    fn open(path: &Path) -> Result<Self, StoreError> {
        let fail = |e: fjall::Error| match (&e, engine_error(path, &e)) {
            (fjall::Error::Locked, _) => StoreError::InUse {
                path: path.to_owned(),
            },
            // Also a system's error: what is too short, or not there, is the engine's file.
            (_, StoreError::Engine { path, detail }) => StoreError::Damaged { path, detail },
            (_, other) => other,
        };
        let open = || Database::builder(path).manual_journal_persist(false).open();
        let io = |error: std::io::Error| fail(fjall::Error::Io(error));
        let db = match open() {
            Err(fjall::Error::JournalRecovery(error)) => match tail::cut(path).map_err(io)? {
                Some(bytes) => {
                    tracing::warn!(
                        "the journal in {} ends with {bytes} bytes that a power cut has left incomplete: they are cut off",
                        path.display()
                    );
                    open()
                }
                None => Err(fjall::Error::JournalRecovery(error)),
            },
            other => other,
        };
        let db = db.map_err(fail)?;
        let keys = db
            .keyspace("data", KeyspaceCreateOptions::default)
            .map_err(fail)?;
        tail::opened(path).map_err(io)?;
        Ok(Self { db, keys })
    }
}

/// A file of the engine that is not there, though each store has one.
fn lacks(path: &Path) -> Option<String> {
    let below = |dir: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).into_iter().flatten();
        entries.filter_map(|e| e.ok().map(|e| e.path())).collect()
    };
    if !path.join("version").exists() {
        return Some("version".into());
    }
    if !below(path)
        .iter()
        .any(|p| p.extension().is_some_and(|e| e == "jnl"))
    {
        return Some("the journal (*.jnl)".into());
    }
    // The engine's own, and ours.
    let keyspaces = below(&path.join("keyspaces"));
    if keyspaces.len() < 2 {
        return Some("a directory in keyspaces".into());
    }
    let current = keyspaces.iter().map(|k| k.join("current"));
    current
        .filter(|c| !c.exists())
        .map(|c| c.display().to_string())
        .next()
}

/// Is there anything of a store in a directory?
#[must_use]
pub fn is_begun(path: &Path) -> bool {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|e| e.path()).any(|p| {
        p.extension().is_some_and(|e| e == "jnl")
            || p.file_name().is_some_and(|n| n == "version" || n == "keyspaces")
    })
}

fn engine_error(path: &Path, error: &fjall::Error) -> StoreError {
    let detail = error.to_string();
    let mut source: Option<&dyn std::error::Error> = Some(error);
    while let Some(e) = source {
        if let Some(io) = e.downcast_ref::<std::io::Error>()
            && io.raw_os_error() == Some(libc::ENOSPC)
        {
            return StoreError::Full {
                path: path.to_owned(),
            };
        }
        source = e.source();
    }
    StoreError::Engine {
        path: path.to_owned(),
        detail,
    }
}

impl Store for FjallStore {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.0.with(|e| Ok(e.keys.get(key)?.map(|v| v.to_vec())))
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<Pair>, StoreError> {
        if from >= to {
            return Ok(Vec::new());
        }
        self.0.with(|e| {
            let range = e.keys.range(from.to_vec()..to.to_vec()).take(limit);
            range
                .map(|guard| {
                    guard
                        .into_inner()
                        .map(|(key, value)| (key.to_vec(), value.to_vec()))
                })
                .collect()
        })
    }

    fn apply(&self, batch: Batch) -> Result<(), StoreError> {
        let removed = batch.ops.iter().filter(|(_, value)| value.is_none()).count();
        self.0.upkeep.applied(removed as u64);
        self.0.with(|e| {
            let mut write = e.db.batch();
            for (key, value) in batch.ops {
                match value {
                    Some(value) => write.insert(&e.keys, key, value),
                    None => write.remove(&e.keys, key),
                }
            }
            write.durability(Some(PersistMode::Buffer)).commit()
        })
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.0.with(|e| e.db.persist(PersistMode::SyncAll))
    }

    fn room(&self) -> Result<(), StoreError> {
        let (size, free) = self.0.disk()?;
        if free < (size / RESERVE_SHARE).clamp(RESERVE_MIN, RESERVE_MAX) {
            return Err(self.0.full());
        }
        Ok(())
    }

    fn tidy(&self) {
        self.0.tidy();
    }
}

/// The smallest key greater than every key with this prefix.
#[must_use]
pub fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.last_mut() {
        if *last < u8::MAX {
            *last += 1;
            return end;
        }
        end.pop();
    }
    vec![u8::MAX; prefix.len() + 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_apply_and_come_back_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        {
            let store = FjallStore::open(dir.path()).unwrap();
            let mut batch = Batch::default();
            batch.put(b"a1".to_vec(), b"x".to_vec());
            batch.put(b"a2".to_vec(), b"y".to_vec());
            batch.put(b"b".to_vec(), b"z".to_vec());
            store.apply(batch).unwrap();
            let mut batch = Batch::default();
            batch.delete(b"a1".to_vec());
            store.apply(batch).unwrap();
            store.sync().unwrap();
        }
        let store = FjallStore::open(dir.path()).unwrap();
        assert_eq!(store.get(b"a1").unwrap(), None);
        let all = store.scan(b"a", &prefix_end(b"a"), 10).unwrap();
        assert_eq!(all, vec![(b"a2".to_vec(), b"y".to_vec())]);
    }

    #[test]
    fn what_cannot_be_opened_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let store = FjallStore::open(dir.path()).unwrap();
        let again = FjallStore::open(dir.path()).err().unwrap();
        assert!(matches!(again, StoreError::InUse { .. }), "{again}");
        drop(store);
        std::fs::write(dir.path().join("version"), b"x").unwrap();
        let damaged = FjallStore::open(dir.path()).err().unwrap();
        assert!(matches!(damaged, StoreError::Damaged { .. }), "{damaged}");
        assert!(damaged.to_string().contains(&*dir.path().to_string_lossy()));
    }

    #[test]
    fn prefix_ends() {
        assert_eq!(prefix_end(b"a"), b"b");
        assert_eq!(prefix_end(&[1, 255]), vec![2]);
    }
}
