//! The blocks of a storage node: which frame each has in memory, which extent on disk, and in what order things happen
//! so that neither the death of the process nor a power cut loses what was promised.
//!
//! - A block is stored *elsewhere* than its last copy, which stays until the index durably names the new one: an entry of
//!   the index always names a whole copy, and its checksum is that of what lies there.
//! - An extent that the index does not name any longer is used again only when that is durable, too. Else a power cut
//!   could bring back an entry that names what belongs to another file by now.
//! - Frames in memory need none of that: when memory is lost all of it is loaded anew.
//!
//! Nothing here knows about connections. Locks: `flushing`, then `space`; no disk is waited for under `space`.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rdma_transport::ConnId;
use rt::channel::{Receiver, Sender};
use rt::sync::Mutex;
use rt::time::Instant;

use super::alloc::Allocator;
use super::disk::Disk;
use super::generation::Generation;
use super::index::{Entry, Index, Place};
use super::pool::Pool;
use super::{StorageError, errno};
use fsd_node::store::Store;
use fsd_proto::layout::BLOCK;
use fsd_proto::layout::{CLASSES, class_for};
use fsd_proto::rpc::Errno;
use fsd_proto::wire::{BlockFrame, BlockWant, Frame, PoolSpace};

/// The backing file grows by so many slabs; the disk's blocks are taken as they are written.
const GROW: u32 = 64;
/// Longest wait for the cleaner to finish the frame it has in hand.
const CLEANER: Duration = Duration::from_millis(200);
/// Free slabs of the pool that are kept backed, so that nobody waits while the system zeroes memory …
pub(super) const STOCK: usize = if cfg!(test) { 2 } else { 64 };
/// … and of the backing file, so that what is stored goes to blocks that the disk has already.
const DISK_STOCK: usize = if cfg!(test) { 0 } else { 128 };
/// Slabs given back at once.
const SURPLUS: usize = 1024;

/// Which frames and extents are in use, by which blocks, and what is reserved for whom; under one lock, so that they agree.
pub struct Space {
    /// Frames of the pool.
    pub alloc: Allocator,
    /// The frame and the stored copy of each block.
    pub index: Index,
    /// Reservations by connection, returned when it ends.
    pub reserved: HashMap<ConnId, u64>,
    /// Extents of the backing file.
    pub extents: Allocator,
    /// Extents that the index has ceased to name, which may not be durable yet.
    pub retired: Vec<Frame>,
}

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
}

/// What went wrong with the disk since the start.
#[derive(Debug, Default)]
pub struct Faults {
    /// Copies on disk found damaged or unreadable by the scrub.
    pub damaged: AtomicU64,
    /// Bytes the scrub has checked.
    pub scrubbed: AtomicU64,
}

/// Memory, disk and index of a storage node.
pub struct Blocks {
    pub(super) pool: Pool,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) disk_path: PathBuf,
    pub(super) store: Arc<dyn Store>,
    pub(super) generation: Generation,
    pub(super) space: Mutex<Space>,
    /// One flush at a time: a later one has read what is at least as new, and is entered later.
    pub(super) flushing: Mutex<()>,
    /// The pool's memory is pinned by a device: all of it is backed at start, and none is given back.
    pub(super) pinned: bool,
    pub(super) clean: (Sender<Frame>, Receiver<Frame>),
    /// Frames handed to the cleaner and not free yet, and their bytes.
    pub(super) cleaning: AtomicU64,
    pub(super) cleaning_bytes: AtomicU64,
    /// Something is to be stored although no dirty counter has moved.
    pub(super) restore: AtomicBool,
    /// Counts of what the disk refused or lost, for the status.
    pub faults: Faults,
    #[cfg(any(test, feature = "flaws"))]
    pub(super) flaw: Option<Flaw>,
}

impl Space {
    /// Uses up to `bytes` of a connection's reservation; returns how much it was.
    pub fn use_reservation(&mut self, conn: ConnId, bytes: u64) -> u64 {
        let have = self.reserved.entry(conn).or_default();
        let used = bytes.min(*have);
        *have -= used;
        self.alloc.unreserve(used);
        used
    }

    /// Gives a frame of the pool back, which is zero.
    pub fn give_back(&mut self, frame: Frame) {
        if let Some(class) = class_for(frame.size) {
            self.alloc.free(frame.offset, class);
        }
    }

    /// A place in the backing file for `size` bytes.
    pub fn take_extent(&mut self, size: u32) -> Option<Frame> {
        let class = class_for(size)?;
        let offset = self.extents.allocate(class, true).or_else(|| {
            self.extents.grow(GROW);
            self.extents.allocate(class, true)
        })?;
        self.extents.set_backed(offset);
        Some(Frame {
            offset,
            size: CLASSES[class],
        })
    }

    /// Gives a place in the backing file back that no entry names, not even one that a power cut may bring back.
    pub fn give_extent_back(&mut self, extent: Frame) {
        if let Some(class) = class_for(extent.size) {
            self.extents.free(extent.offset, class);
        }
    }
}

impl Blocks {
    #[cfg(any(test, feature = "flaws"))]
    pub(super) fn flawed(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }

    #[cfg(not(any(test, feature = "flaws")))]
    #[allow(clippy::unused_self)]
    pub(super) const fn flawed(&self, _flaw: Flaw) -> bool {
        false
    }

    /// Bytes of free slabs that the memory file system could not back now.
    pub(super) fn lacking(&self, space: &Space) -> u64 {
        if self.pinned {
            return 0;
        }
        let free = self.pool.mem.file_system_free().unwrap_or(u64::MAX);
        space.alloc.cold_bytes().saturating_sub(free)
    }

    /// How full the pool is. What is being cleaned counts as free: whoever needs it waits for that.
    #[must_use]
    pub fn figures(&self) -> PoolSpace {
        let space = self.space.lock();
        let gone = space.alloc.reserved() + self.lacking(&space);
        PoolSpace {
            total: space.alloc.bytes(),
            free: (space.alloc.free_bytes() + self.cleaning_bytes.load(Ordering::Acquire))
                .saturating_sub(gone),
        }
    }

    /// Sets bytes aside for a connection; returns how many.
    #[must_use]
    pub fn reserve(&self, conn: ConnId, needed: u64, wanted: u64) -> u64 {
        let mut granted = 0;
        loop {
            let mut space = self.space.lock();
            let lacking = self.lacking(&space);
            granted += space
                .alloc
                .reserve(needed - granted, wanted.max(granted) - granted, lacking);
            if granted >= needed || self.cleaning.load(Ordering::Acquire) == 0 {
                *space.reserved.entry(conn).or_default() += granted;
                return granted;
            }
            drop(space);
            self.clean_now();
        }
    }

    /// Returns what a connection that ended had set aside.
    pub fn disconnected(&self, conn: ConnId) {
        let mut space = self.space.lock();
        if let Some(bytes) = space.reserved.remove(&conn) {
            space.alloc.unreserve(bytes);
        }
    }

    /// Frames of the blocks from `first` on, at most `count`.
    #[must_use]
    pub fn lookup(&self, ino: u64, first: u64, count: u32) -> Vec<BlockFrame> {
        self.space
            .lock()
            .index
            .lookup(ino, first, count.min(4096) as usize)
    }

    /// Frames for blocks, all or none; `reserved` bytes of what the connection had set aside are used up for it.
    ///
    /// # Errors
    /// `ENOSPC`; `EIO` for a block whose contents are lost; the store's.
    pub fn allocate(&self, conn: ConnId, wants: &[BlockWant], reserved: u64) -> Result<Vec<Frame>, Errno> {
        loop {
            match self.try_allocate(conn, wants, reserved) {
                // Frames that were freed are not free before they have been cleaned: that is to be waited for.
                Err(Errno(libc::ENOSPC)) if self.cleaning.load(Ordering::Acquire) > 0 => self.clean_now(),
                other => return other,
            }
        }
    }

    fn try_allocate(&self, conn: ConnId, wants: &[BlockWant], reserved: u64) -> Result<Vec<Frame>, Errno> {
        let mut space = self.space.lock();
        let has = |w: &BlockWant| {
            let entry = space.index.get(w.ino, w.block);
            entry.is_some_and(|e| e.frame.size >= w.size)
        };
        if !wants.iter().all(has) {
            space.index.room().map_err(|e| errno(&e.into()))?;
        }
        let reserved = space.use_reservation(conn, reserved);
        let mut covered = reserved;
        let mut frames = Vec::with_capacity(wants.len());
        let mut fresh: Vec<(Place, Entry)> = Vec::new();
        let mut replaced: Vec<(Frame, Frame)> = Vec::new();
        let mut failed = None;
        for want in wants {
            let old = space.index.get(want.ino, want.block);
            if old.is_some_and(|e| e.lost) {
                failed = Some(Errno(libc::EIO));
                break;
            }
            if let Some(old) = old.filter(|e| e.frame.size >= want.size) {
                frames.push(old.frame);
                continue;
            }
            let Some(frame) = self.take_frame(&mut space, want.size, &mut covered) else {
                failed = Some(Errno(libc::ENOSPC));
                break;
            };
            let entry = match old {
                Some(old) => {
                    replaced.push((old.frame, frame));
                    self.moved(&space, old, frame)
                }
                None => Entry {
                    id: space.index.new_id(),
                    ..Entry::fresh(frame)
                },
            };
            fresh.push(((want.ino, want.block), entry));
            frames.push(frame);
        }
        if let Some(error) = failed {
            for (_, entry) in &fresh {
                space.give_back(entry.frame);
            }
            // What was reserved stays so.
            space.alloc.restore(reserved);
            *space.reserved.entry(conn).or_default() += reserved;
            return Err(error);
        }
        let moved = replaced.iter().try_for_each(|(old, new)| {
            self.pool
                .mem
                .copy_within(old.offset as usize, new.offset as usize, old.size as usize)
        });
        let noted = moved
            .map_err(StorageError::from)
            .and_then(|()| Ok(space.index.set(&fresh)?));
        drop(space);
        if let Err(error) = noted {
            for (_, entry) in fresh {
                // Something may have been copied into it.
                self.release(entry.frame);
            }
            return Err(errno(&error));
        }
        for (old, _) in replaced {
            self.release(old);
        }
        Ok(frames)
    }

    /// A frame whose memory is there.
    fn take_frame(&self, space: &mut Space, size: u32, covered: &mut u64) -> Option<Frame> {
        let class = class_for(size)?;
        let size = CLASSES[class];
        let is_covered = *covered >= u64::from(size);
        *covered = covered.saturating_sub(u64::from(size));
        let frame = Frame {
            offset: space.alloc.allocate(class, is_covered)?,
            size,
        };
        if !space.alloc.is_backed(frame.offset) {
            if let Err(error) = self.pool.back(frame.offset) {
                tracing::warn!("no memory for the pool: {error}");
                space.give_back(frame);
                return None;
            }
            space.alloc.set_backed(frame.offset);
        }
        Some(frame)
    }

    /// What is known of a block that moves to a larger frame: its copy on disk stays what it was, and the new frame is to
    /// be stored whatever the counter of its slab says.
    fn moved(&self, space: &Space, old: Entry, frame: Frame) -> Entry {
        if self.flawed(Flaw::MoveForgets) {
            return Entry {
                id: old.id,
                ..Entry::fresh(frame)
            };
        }
        if self.flawed(Flaw::CleanBySlab) {
            let slab = frame.offset / BLOCK;
            let mut others = space.index.all().filter(|(_, e)| e.frame.offset / BLOCK == slab);
            let clean = others.all(|(_, e)| !self.is_dirty(&e));
            return Entry {
                frame,
                clean_at: clean.then(|| self.pool.dirty_count(frame.offset)),
                ..old
            };
        }
        Entry {
            frame,
            clean_at: None,
            ..old
        }
    }

    /// Frees the blocks `first ..= last` of an inode; returns their bytes.
    ///
    /// # Errors
    /// The store's; nothing has then changed.
    pub fn free(&self, ino: u64, first: u64, last: u64) -> Result<u64, StorageError> {
        let mut space = self.space.lock();
        let gone = space.index.remove(ino, first, last)?;
        for extent in gone.iter().filter_map(|e| e.stored.map(|s| s.extent)) {
            self.retire(&mut space, extent);
        }
        drop(space);
        let bytes = gone.iter().map(|e| u64::from(e.frame.size)).sum();
        for entry in gone {
            self.release(entry.frame);
        }
        Ok(bytes)
    }

    /// An entry that named this extent has been changed in the index.
    pub(super) fn retire(&self, space: &mut Space, extent: Frame) {
        if self.flawed(Flaw::EarlyReuse) {
            space.give_extent_back(extent);
        } else {
            space.retired.push(extent);
        }
    }

    /// Makes the index durable, and with it that extents which it no longer names are free.
    ///
    /// # Errors
    /// The store's.
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

    /// Hands a frame to the cleaner, which zeroes it before it can be used again.
    fn release(&self, frame: Frame) {
        self.cleaning.fetch_add(1, Ordering::AcqRel);
        self.cleaning_bytes
            .fetch_add(u64::from(frame.size), Ordering::AcqRel);
        // The other end lives as long as this one.
        let _ = self.clean.0.send(frame);
    }

    /// Zeroes a frame and gives it back.
    pub(super) fn clean(&self, frame: Frame) {
        if let Err(error) = self.pool.mem.zero(frame.offset as usize, frame.size as usize) {
            tracing::error!("a freed frame cannot be cleaned and is not used again: {error}");
        } else {
            self.space.lock().give_back(frame);
        }
        self.cleaning_bytes
            .fetch_sub(u64::from(frame.size), Ordering::AcqRel);
        self.cleaning.fetch_sub(1, Ordering::AcqRel);
    }

    /// Cleans all that waits for it, here and now.
    fn clean_now(&self) {
        for frame in self.clean.1.try_iter() {
            self.clean(frame);
        }
        // The cleaner may have one in hand.
        let start = Instant::now();
        while self.cleaning.load(Ordering::Acquire) > 0
            && self.clean.1.is_empty()
            && start.elapsed() < CLEANER
        {
            rt::thread::yield_now();
        }
    }

    /// Has the system allocate memory for free slabs, so that there is a stock of them.
    pub(super) fn stock_up(&self, stock: usize) -> Result<(), StorageError> {
        loop {
            let mut space = self.space.lock();
            let Some(offset) = space.alloc.coldest().filter(|_| space.alloc.warm() < stock) else {
                return Ok(());
            };
            self.pool.back(offset)?;
            space.alloc.set_backed(offset);
        }
    }

    /// Gives back what has not been needed for a while: memory, and blocks of the disk.
    pub(super) fn give_surplus_back(&self) {
        if !self.pinned {
            // Whoever finds nothing free meanwhile waits, as for what is being cleaned.
            self.cleaning.fetch_add(1, Ordering::AcqRel);
            self.cool(
                "memory stays allocated",
                STOCK,
                |space| &mut space.alloc,
                |offset| {
                    let back = self.pool.mem.give_back(offset as usize, BLOCK as usize);
                    back.map_err(|e| e.to_string())
                },
            );
            self.cleaning.fetch_sub(1, Ordering::AcqRel);
        }
        self.cool(
            "the backing file keeps its blocks",
            DISK_STOCK,
            |space| &mut space.extents,
            |offset| {
                let back = self.disk.give_back(offset, BLOCK);
                back.map_err(|e| e.to_string())
            },
        );
    }

    fn cool(
        &self,
        failed: &str,
        stock: usize,
        which: impl Fn(&mut Space) -> &mut Allocator,
        give_back: impl Fn(u64) -> Result<(), String>,
    ) {
        let surplus = which(&mut self.space.lock()).surplus(stock, SURPLUS);
        for offset in surplus {
            let result = give_back(offset);
            if let Err(error) = &result {
                tracing::debug!("{failed}: {error}");
            }
            which(&mut self.space.lock()).cooled(offset, result.is_err());
        }
    }
}
