//! The pool: registered memory, its backing file, and what of it has changed since it was stored.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rdma_transport::mem::SharedMem;

use super::{BLOCK, StorageError};
use crate::wire::Frame;

/// Memory, backing file and dirty counters of a storage node.
pub struct Pool {
    /// The registered memory.
    pub mem: Arc<SharedMem>,
    /// One counter for each slab, incremented by clients after they wrote to it.
    pub dirty: Arc<SharedMem>,
    backing: File,
    backing_path: PathBuf,
    memory_path: PathBuf,
    dirty_path: PathBuf,
    /// Memory left by an earlier life of this node was found and kept.
    pub inherited: bool,
}

impl Pool {
    /// Opens pool and backing file. `memory` is the path of the pool's file in a memory file system; one
    /// of the right size there is what an earlier life of this node left, and is kept.
    ///
    /// # Errors
    /// Not enough memory or disk, with the paths.
    pub fn open(memory: &Path, backing_path: &Path, bytes: u64) -> Result<Self, StorageError> {
        let dirty_path = memory.with_extension("dirty");
        let inherited = std::fs::metadata(memory).is_ok_and(|m| m.len() == bytes) && dirty_path.exists();
        if !inherited {
            // A leftover of another size is of no use to anyone.
            let _ = std::fs::remove_file(memory);
            let _ = std::fs::remove_file(&dirty_path);
        }
        let backing = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(backing_path)
            .and_then(|f| f.set_len(bytes).map(|()| f))
            .map_err(|error| StorageError::Io {
                what: "cannot open the backing file",
                path: backing_path.to_owned(),
                error,
            })?;
        let mem = Arc::new(SharedMem::open_file(memory, bytes as usize, !inherited)?);
        let dirty = Arc::new(SharedMem::open_file(
            &dirty_path,
            (bytes / BLOCK * 8).max(4096) as usize,
            false,
        )?);
        Ok(Self {
            mem,
            dirty,
            backing,
            backing_path: backing_path.to_owned(),
            memory_path: memory.to_owned(),
            dirty_path,
            inherited,
        })
    }

    fn io(&self, what: &'static str) -> impl FnOnce(std::io::Error) -> StorageError {
        let path = self.backing_path.clone();
        move |error| StorageError::Io { what, path, error }
    }

    /// Reads a frame from the backing file into memory.
    ///
    /// # Errors
    /// Reading failed.
    pub fn load(&self, frame: Frame) -> Result<(), StorageError> {
        let mut bytes = vec![0; frame.size as usize];
        self.backing
            .read_exact_at(&mut bytes, frame.offset)
            .map_err(self.io("cannot read"))?;
        Ok(self.mem.write_at(frame.offset as usize, &bytes)?)
    }

    /// Writes a frame from memory to the backing file (durable only after [`Pool::sync`]).
    ///
    /// # Errors
    /// Writing failed, for example because the disk is full.
    pub fn store(&self, frame: Frame, scratch: &mut Vec<u8>) -> Result<(), StorageError> {
        scratch.resize(frame.size as usize, 0);
        self.mem.read_at(frame.offset as usize, scratch)?;
        self.backing
            .write_all_at(scratch, frame.offset)
            .map_err(self.io("cannot write"))
    }

    /// Makes everything stored so far durable.
    ///
    /// # Errors
    /// The disk failed.
    pub fn sync(&self) -> Result<(), StorageError> {
        self.backing.sync_data().map_err(self.io("cannot sync"))
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
        // Files that are gone already are as good.
        let _ = std::fs::remove_file(&self.memory_path);
        let _ = std::fs::remove_file(&self.dirty_path);
    }
}
