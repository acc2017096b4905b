//! What the blocks of a storage node are kept in: memory, disk, and the index that says what is where.

use std::path::PathBuf;
use std::sync::Arc;

use rt::sync::Mutex;

use super::disk::Disk;
use super::error::StorageError;
use super::generation::Generation;
use super::index::{Entry, Place};
use super::kept;
use super::pool::Pool;
use super::space::Space;
use fsd_node::store::Store;
use fsd_proto::layout::BLOCK;
use fsd_proto::wire::Frame;

/// A rule left out, so that tests can show what it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// A block that is moved to a larger frame is no longer stored.
    MoveForgets,
    /// A block is stored over its last copy.
    InPlace,
    /// Extents are used again before it is durable that they are free.
    EarlyReuse,
    /// The index names a new copy before that is durable.
    IndexFirst,
    /// A block moved into a slab that is clean counts as stored.
    CleanBySlab,
    /// What cannot be read counts as zeros.
    LostAsZeros,
    /// Memory counts although loading it was not completed.
    MarkedEarly,
    /// Checksums are not looked at.
    NoChecksums,
    /// Pages that were kept after a block's memory was read go with those that its copy has.
    KeptForgotten,
    /// Pages stay over a copy that is newer.
    KeptForEver,
}

/// Puts the pages that are kept of a block over its copy, which memory has.
pub fn put_kept(store: &dyn Store, pool: &Pool, place: Place, frame: Frame) -> Result<(), StorageError> {
    kept::each_of(store, place, |at, bytes| {
        if at + bytes.len() as u32 <= frame.size {
            pool.mem.write_at(frame.offset as usize + at as usize, bytes)?;
        }
        Ok(())
    })
}

/// Memory, disk and index of a storage node.
pub struct Media {
    pub pool: Pool,
    pub disk: Arc<dyn Disk>,
    pub disk_path: PathBuf,
    pub store: Arc<dyn Store>,
    pub generation: Generation,
    pub space: Mutex<Space>,
    /// The pool's memory is pinned by a device: all of it is backed at start, and none is given back.
    pub pinned: bool,
    #[cfg(any(test, feature = "flaws"))]
    pub flaw: Option<Flaw>,
}

impl Media {
    #[cfg(any(test, feature = "flaws"))]
    pub fn flawed(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }

    #[cfg(not(any(test, feature = "flaws")))]
    #[allow(clippy::unused_self)]
    pub const fn flawed(&self, _flaw: Flaw) -> bool {
        false
    }

    /// Bytes of free slabs that the memory file system could not back now.
    pub fn lacking(&self, space: &Space) -> u64 {
        if self.pinned {
            return 0;
        }
        let free = self.pool.mem.file_system_free().unwrap_or(u64::MAX);
        space.alloc.cold_bytes().saturating_sub(free)
    }

    /// Moves when something is written to a block.
    pub fn count(&self, entry: &Entry) -> u64 {
        let counter = self.pool.dirty_count(entry.frame.offset);
        counter.wrapping_add(entry.taken)
    }

    /// Is something of a block not on disk?
    pub fn is_dirty(&self, entry: &Entry) -> bool {
        let clean = entry.stored.is_some() && entry.clean_at == Some(self.count(entry));
        // What could not be read must not be written over with nothing.
        (entry.rewrite || !clean) && !entry.lost
    }

    /// Is something of a block neither on disk nor among the pages that are kept?
    pub fn is_unsafe(&self, entry: &Entry) -> bool {
        let kept = entry.kept_at == Some(self.count(entry));
        self.is_dirty(entry) && !kept
    }

    /// Puts the pages that are kept of a block over its copy, which memory has.
    pub fn put_kept(&self, place: Place, frame: Frame) -> Result<(), StorageError> {
        put_kept(self.store.as_ref(), &self.pool, place, frame)
    }

    /// An entry that named this extent has been changed in the index.
    pub fn retire(&self, space: &mut Space, extent: Frame) {
        if self.flawed(Flaw::EarlyReuse) {
            space.give_extent_back(extent);
        } else {
            space.retired.push(extent);
        }
    }

    /// Makes the index durable, and with it that extents which it no longer names are free.
    pub fn sync_index(&self) -> Result<(), StorageError> {
        // Each of these left the index under this lock, before they were put here: so the sync covers that.
        let retired = std::mem::take(&mut self.space.lock().retired);
        let result = self.generation.sync();
        let mut space = self.space.lock();
        match result {
            Ok(()) => {
                for extent in retired {
                    space.give_extent_back(extent);
                }
                Ok(())
            }
            Err(error) => {
                space.retired.extend(retired);
                Err(error)
            }
        }
    }

    /// An error of the backing file.
    pub fn io(&self, what: &'static str, error: std::io::Error) -> StorageError {
        StorageError::Io {
            what,
            path: self.disk_path.clone(),
            error,
        }
    }

    /// The sum of all dirty counters: if it has not moved, nobody has written.
    pub fn dirty_sum(&self) -> u64 {
        let slabs = self.pool.mem.len() as u64 / BLOCK;
        (0..slabs)
            .map(|s| self.pool.dirty_count(s * BLOCK))
            .fold(0, u64::wrapping_add)
    }
}
