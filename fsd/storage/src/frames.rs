//! Frames for blocks: allocated, reserved, freed.

use std::sync::Arc;

use rdma_transport::ConnId;

use super::cleaner::Cleaner;
use super::error::{StorageError, errno};
use super::index::{Entry, Place};
use super::media::{Flaw, Media};
use super::space::Space;
use fsd_proto::layout::{BLOCK, CLASSES, class_for};
use fsd_proto::rpc::Errno;
use fsd_proto::wire::{BlockFrame, BlockRange, BlockWant, Frame, PoolSpace};

/// The frames of blocks.
pub struct Frames {
    pub media: Arc<Media>,
    pub cleaner: Arc<Cleaner>,
}

impl Frames {
    /// How full the pool is. What is being cleaned counts as free: whoever needs it waits for that.
    pub fn figures(&self) -> PoolSpace {
        let space = self.media.space.lock();
        let gone = space.alloc.reserved() + self.media.lacking(&space);
        PoolSpace {
            total: space.alloc.bytes(),
            free: (space.alloc.free_bytes() + self.cleaner.bytes()).saturating_sub(gone),
        }
    }

    /// Sets bytes aside for a connection; returns how many.
    pub fn reserve(&self, conn: ConnId, needed: u64, wanted: u64) -> u64 {
        let mut granted = 0;
        loop {
            let mut space = self.media.space.lock();
            let lacking = self.media.lacking(&space);
            granted += space
                .alloc
                .reserve(needed - granted, wanted.max(granted) - granted, lacking);
            if granted >= needed || !self.cleaner.is_at_work() {
                *space.reserved.entry(conn).or_default() += granted;
                return granted;
            }
            drop(space);
            self.cleaner.clean_now();
        }
    }

    /// Returns what a connection that ended had set aside.
    pub fn disconnected(&self, conn: ConnId) {
        let mut space = self.media.space.lock();
        if let Some(bytes) = space.reserved.remove(&conn) {
            space.alloc.unreserve(bytes);
        }
    }

    /// Frames of the blocks from `first` on, at most `count`.
    pub fn lookup(&self, ino: u64, first: u64, count: u32) -> Vec<BlockFrame> {
        self.media
            .space
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
                Err(Errno(libc::ENOSPC)) if self.cleaner.is_at_work() => self.cleaner.clean_now(),
                other => return other,
            }
        }
    }

    fn try_allocate(&self, conn: ConnId, wants: &[BlockWant], reserved: u64) -> Result<Vec<Frame>, Errno> {
        let mut space = self.media.space.lock();
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
            self.media
                .pool
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
                self.cleaner.release(entry.frame);
            }
            return Err(errno(&error));
        }
        for (old, _) in replaced {
            self.cleaner.release(old);
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
        self.cleaner.note_stock(&space.alloc);
        if !space.alloc.is_backed(frame.offset) {
            if let Err(error) = self.media.pool.back(frame.offset) {
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
        if self.media.flawed(Flaw::MoveForgets) {
            return Entry {
                id: old.id,
                ..Entry::fresh(frame)
            };
        }
        if self.media.flawed(Flaw::CleanBySlab) {
            let slab = frame.offset / BLOCK;
            let mut others = space.index.all().filter(|(_, e)| e.frame.offset / BLOCK == slab);
            let clean = others.all(|(_, e)| !self.media.is_dirty(&e));
            return Entry {
                frame,
                clean_at: clean.then(|| self.media.count(&Entry { frame, ..old })),
                ..old
            };
        }
        Entry {
            frame,
            clean_at: None,
            kept_at: None,
            ..old
        }
    }

    /// Frees blocks, all or none; returns their bytes.
    ///
    /// # Errors
    /// The store's.
    pub fn free(&self, ranges: &[BlockRange]) -> Result<u64, StorageError> {
        let mut space = self.media.space.lock();
        let gone = space.index.remove(ranges)?;
        for extent in gone.iter().filter_map(|e| e.stored.map(|s| s.extent)) {
            self.media.retire(&mut space, extent);
        }
        drop(space);
        let bytes = gone.iter().map(|e| u64::from(e.frame.size)).sum();
        for entry in gone {
            self.cleaner.release(entry.frame);
        }
        Ok(bytes)
    }
}
