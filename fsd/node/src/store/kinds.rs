//! What the servers need of a store.

use std::path::PathBuf;

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

    /// The same, and the batch is used up.
    #[must_use]
    pub fn into_ops(self) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
        self.ops
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
