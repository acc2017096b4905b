//! The embedded store.

use std::path::Path;
use std::sync::Arc;

use fjall::PersistMode;

use super::engine::lacks;
use super::kinds::{Batch, Pair, Store, StoreError};
use super::slot::{EngineSlot, RESERVE_MIN};
use super::tidy::Upkeep;

/// Part of the disk that is kept for what must go on when it is full: one in so many bytes, no less than [`RESERVE_MIN`] …
const RESERVE_SHARE: u64 = 16;
/// … and no more than the engine needs to reorganise itself.
const RESERVE_MAX: u64 = 256 << 20;

/// The embedded store.
pub struct FjallStore {
    engine: Arc<EngineSlot>,
    pub(super) upkeep: Arc<Upkeep>,
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
        Ok(Self {
            engine: Arc::new(EngineSlot::open(path)?),
            upkeep: Arc::default(),
        })
    }
}

impl Store for FjallStore {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.engine.with(|e| Ok(e.keys.get(key)?.map(|v| v.to_vec())))
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<Pair>, StoreError> {
        if from >= to {
            return Ok(Vec::new());
        }
        self.engine.with(|e| {
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
        let removed = batch.ops().iter().filter(|(_, value)| value.is_none()).count();
        self.upkeep.applied(removed as u64);
        self.engine.with(|e| {
            let mut write = e.db.batch();
            for (key, value) in batch.into_ops() {
                match value {
                    Some(value) => write.insert(&e.keys, key, value),
                    None => write.remove(&e.keys, key),
                }
            }
            write.durability(Some(PersistMode::Buffer)).commit()
        })
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.engine.with(|e| e.db.persist(PersistMode::SyncAll))
    }

    fn room(&self) -> Result<(), StoreError> {
        let (size, free) = self.engine.disk()?;
        if free < (size / RESERVE_SHARE).clamp(RESERVE_MIN, RESERVE_MAX) {
            return Err(self.engine.full());
        }
        Ok(())
    }

    fn tidy(&self) {
        self.upkeep.tidy(&self.engine);
    }
}
