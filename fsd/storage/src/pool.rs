//! The pool: registered memory, and what of it has changed since it was stored.
//!
//! Its files are in a memory file system and outlive the process, not the machine. What is in them counts only beside
//! a *marker*, which is made when everything has been loaded: a process that dies while it loads leaves none.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rdma_transport::TransportError;
use rdma_transport::mem::SharedMem;

use super::error::StorageError;
use super::generation::Generation;
use fsd_node::files;
use fsd_proto::layout::BLOCK;

/// Memory and dirty counters of a storage node.
pub struct Pool {
    /// The registered memory.
    pub mem: Arc<SharedMem>,
    /// One counter for each slab, incremented by clients after they wrote to it.
    pub dirty: Arc<SharedMem>,
    path: PathBuf,
    marker: Marker,
    /// Memory left by an earlier life of this node was found and kept.
    pub inherited: bool,
}

/// What memory belongs to: another store, another boot of the machine, or a larger pool make it worthless.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Marker {
    store: String,
    boot: String,
    bytes: u64,
}

impl Marker {
    fn now(store: &str, bytes: u64) -> Self {
        // Where the system has no such number, memory cannot outlive a boot unnoticed either: it is then a memory
        // file system, as it should be.
        Self {
            store: store.to_owned(),
            boot: files::boot(),
            bytes,
        }
    }

    fn read(path: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(path).ok()?;
        let mut lines = text.lines();
        Some(Self {
            store: lines.next()?.to_owned(),
            boot: lines.next()?.to_owned(),
            bytes: lines.next()?.parse().ok()?,
        })
    }

    /// Is memory with this marker what a node left that had the same store, and a pool of at most our size?
    fn fits(&self, ours: &Self) -> bool {
        self.store == ours.store && self.boot == ours.boot && self.bytes <= ours.bytes
    }
}

fn dirty_path(pool: &Path) -> PathBuf {
    pool.with_extension("dirty")
}

fn marker_path(pool: &Path) -> PathBuf {
    pool.with_extension("loaded")
}

impl Pool {
    /// Opens the memory of a pool: what an earlier life of this node left, or new. `path` is that of its file in a memory
    /// file system, `store` the number of the node's store.
    ///
    /// # Errors
    /// The memory file system refuses, or is full.
    pub fn open(path: &Path, store: &str, bytes: u64) -> Result<Self, StorageError> {
        let marker = Marker::now(store, bytes);
        let found = Marker::read(&marker_path(path));
        let old = found.filter(|old| old.fits(&marker));
        let there = |old: &Marker| std::fs::metadata(path).is_ok_and(|m| m.len() >= old.bytes);
        let inherited = old.as_ref().is_some_and(there) && dirty_path(path).exists();
        if !inherited {
            remove(path)?;
        }
        let mem = Arc::new(SharedMem::open_file(path, bytes as usize, false)?);
        let counters = (bytes / BLOCK * 8).max(4096) as usize;
        let dirty = Arc::new(SharedMem::open_file(&dirty_path(path), counters, true)?);
        Ok(Self {
            mem,
            dirty,
            path: path.to_owned(),
            marker,
            inherited,
        })
    }

    /// Everything is loaded: from now on the memory counts.
    ///
    /// # Errors
    /// The memory file system refuses.
    pub fn loaded(&self) -> Result<(), StorageError> {
        let Marker { store, boot, bytes } = &self.marker;
        let path = marker_path(&self.path);
        files::replace(&path, &format!("{store}\n{boot}\n{bytes}\n")).map_err(|error| StorageError::Io {
            what: "cannot write",
            path,
            error,
        })
    }

    /// Has the system allocate the slab that holds `offset`.
    ///
    /// # Errors
    /// The memory file system is full.
    pub fn back(&self, offset: u64) -> Result<(), TransportError> {
        self.mem
            .reserve((offset / BLOCK * BLOCK) as usize, BLOCK as usize)
    }

    /// The counter of the slab that holds `offset`.
    #[must_use]
    pub fn dirty_count(&self, offset: u64) -> u64 {
        // A plain load: whoever incremented it did so through the fabric, this node never does.
        self.dirty
            .word((offset / BLOCK * 8) as usize)
            .map_or(0, |w| w.load(Ordering::Acquire))
    }

    /// Removes the memory files: everything is stored and the node leaves.
    pub fn remove_memory(&self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!("{error}");
        }
    }

    /// Removes what an earlier life has left, which does not fit to the store.
    ///
    /// # Errors
    /// The system refuses.
    pub fn forget(path: &Path) -> Result<(), StorageError> {
        remove(path)
    }
}

/// Removes the files of a pool, the marker first: whenever that is interrupted, the rest is worth nothing.
fn remove(path: &Path) -> Result<(), StorageError> {
    for path in [marker_path(path), path.to_owned(), dirty_path(path)] {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(StorageError::Io {
                    what: "cannot remove",
                    path,
                    error,
                });
            }
            _ => {}
        }
    }
    Generation::forget(path).map_err(|error| StorageError::Io {
        what: "cannot remove the generation beside",
        path: path.to_owned(),
        error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_counts_only_with_its_marker() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pool");
        let open = |store: &str, blocks: u64| Pool::open(&path, store, blocks * BLOCK).unwrap();
        let word = |pool: &Pool| pool.mem.word(64).unwrap().load(Ordering::Relaxed);
        let pool = open("a", 32);
        assert!(!pool.inherited);
        pool.mem.word(64).unwrap().store(7, Ordering::Relaxed);
        // Not loaded to the end.
        let pool = open("a", 32);
        assert!(!pool.inherited && word(&pool) == 0);
        pool.mem.word(64).unwrap().store(7, Ordering::Relaxed);
        pool.loaded().unwrap();
        let pool = open("a", 32);
        assert!(pool.inherited && word(&pool) == 7);
        // A pool may be made larger, with what is in it.
        let pool = open("a", 40);
        assert!(pool.inherited && word(&pool) == 7);
        pool.loaded().unwrap();
        // Another store's memory is nobody's.
        let pool = open("b", 40);
        assert!(!pool.inherited && word(&pool) == 0);
        pool.loaded().unwrap();
        // Nor is that of another boot.
        let marker = std::fs::read_to_string(marker_path(&path)).unwrap();
        let boot = marker.lines().nth(1).unwrap();
        std::fs::write(marker_path(&path), marker.replace(boot, "other")).unwrap();
        assert!(!open("b", 40).inherited);
    }
}
