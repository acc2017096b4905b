//! The embedded transactional store behind the metadata server and the storage nodes' index.
//!
//! The servers need little of it: point reads, range scans, atomic batches that survive the death of the
//! process once applied, and a call that makes everything so far survive the death of the machine. They
//! see it through [`Store`], so that a replicated engine can carry them later. The engine is `fjall`;
//! docs/metadata-store.md has the comparison that chose it.

use std::path::{Path, PathBuf};

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
}

/// The engine in use.
pub struct FjallStore {
    path: PathBuf,
    db: Database,
    keys: Keyspace,
}

impl FjallStore {
    /// Opens the store in a directory, or makes it.
    ///
    /// # Errors
    /// [`StoreError`], also where another process has it open.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let fail = |e: fjall::Error| engine_error(path, &e);
        let db = Database::builder(path)
            .manual_journal_persist(false)
            .open()
            .map_err(fail)?;
        let keys = db
            .keyspace("data", KeyspaceCreateOptions::default)
            .map_err(fail)?;
        Ok(Self {
            path: path.to_owned(),
            db,
            keys,
        })
    }

    fn fail(&self, error: &fjall::Error) -> StoreError {
        engine_error(&self.path, error)
    }
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
        Ok(self.keys.get(key).map_err(|e| self.fail(&e))?.map(|v| v.to_vec()))
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<Pair>, StoreError> {
        let mut pairs = Vec::new();
        if from >= to {
            return Ok(pairs);
        }
        for guard in self.keys.range(from.to_vec()..to.to_vec()).take(limit) {
            let (key, value) = guard.into_inner().map_err(|e| self.fail(&e))?;
            pairs.push((key.to_vec(), value.to_vec()));
        }
        Ok(pairs)
    }

    fn apply(&self, batch: Batch) -> Result<(), StoreError> {
        let mut write = self.db.batch();
        for (key, value) in batch.ops {
            match value {
                Some(value) => write.insert(&self.keys, key, value),
                None => write.remove(&self.keys, key),
            }
        }
        write
            .durability(Some(PersistMode::Buffer))
            .commit()
            .map_err(|e| self.fail(&e))
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.db.persist(PersistMode::SyncAll).map_err(|e| self.fail(&e))
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
    fn prefix_ends() {
        assert_eq!(prefix_end(b"a"), b"b");
        assert_eq!(prefix_end(&[1, 255]), vec![2]);
    }
}
