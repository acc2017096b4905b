//! Cleaning frames that were freed, and keeping a stock of those that are free.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rt::channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use rt::time::Instant;

use super::alloc::Allocator;
use super::error::StorageError;
use super::media::Media;
use super::space::Space;
use fsd_proto::layout::BLOCK;
use fsd_proto::wire::Frame;

/// Longest wait for the cleaner to finish the frame it has in hand.
const CLEANER: Duration = Duration::from_millis(200);
/// Free slabs of the pool that are kept backed, so that nobody waits while the system zeroes memory …
const STOCK: usize = if cfg!(test) { 2 } else { 64 };
/// … and of the backing file, so that what is stored goes to blocks that the disk has already.
const DISK_STOCK: usize = if cfg!(test) { 0 } else { 128 };
/// Slabs given back at once.
const SURPLUS: usize = 1024;

/// Cleans frames. What is handed to it counts as taken until it is clean.
pub struct Cleaner {
    media: Arc<Media>,
    queue: (Sender<Frame>, Receiver<Frame>),
    /// Frames handed to it and not free yet, and their bytes.
    frames: AtomicU64,
    bytes: AtomicU64,
}

impl Cleaner {
    /// With nothing to clean.
    pub fn new(media: &Arc<Media>) -> Self {
        Self {
            media: Arc::clone(media),
            queue: unbounded(),
            frames: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }
    }

    /// Is there something that will be free?
    pub fn is_at_work(&self) -> bool {
        self.frames.load(Ordering::Acquire) > 0
    }

    /// Bytes that will be free.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Has the system allocate memory at start: all of it if a device is to pin it, else a stock.
    ///
    /// # Errors
    /// All of it is needed, and is not to be had.
    pub fn stock(&self) -> Result<(), StorageError> {
        if self.media.pinned {
            self.stock_up(usize::MAX)?;
        } else if let Err(error) = self.stock_up(STOCK) {
            tracing::warn!("{error}: the pool has no free memory now");
        }
        Ok(())
    }

    /// Cleans what is freed, and keeps a stock of memory, until the node stops.
    pub fn run(&self, stopping: &AtomicBool) {
        while !stopping.load(Ordering::Acquire) {
            match self.queue.1.recv_timeout(Duration::from_millis(100)) {
                Ok(frame) => self.clean(frame),
                Err(RecvTimeoutError::Timeout) => {
                    if let Err(error) = self.stock_up(STOCK) {
                        tracing::debug!("{error}");
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Hands a frame to the cleaner, which zeroes it before it can be used again.
    pub fn release(&self, frame: Frame) {
        self.frames.fetch_add(1, Ordering::AcqRel);
        self.bytes.fetch_add(u64::from(frame.size), Ordering::AcqRel);
        // The other end lives as long as this one.
        let _ = self.queue.0.send(frame);
    }

    /// Zeroes a frame and gives it back.
    fn clean(&self, frame: Frame) {
        if let Err(error) = self
            .media
            .pool
            .mem
            .zero(frame.offset as usize, frame.size as usize)
        {
            tracing::error!("a freed frame cannot be cleaned and is not used again: {error}");
        } else {
            self.media.space.lock().give_back(frame);
        }
        self.bytes.fetch_sub(u64::from(frame.size), Ordering::AcqRel);
        self.frames.fetch_sub(1, Ordering::AcqRel);
    }

    /// Cleans all that waits for it and that nobody has in hand.
    pub fn clean_waiting(&self) {
        for frame in self.queue.1.try_iter() {
            self.clean(frame);
        }
    }

    /// Cleans all that waits for it, here and now.
    pub fn clean_now(&self) {
        self.clean_waiting();
        // The cleaner may have one in hand.
        let start = Instant::now();
        while self.frames.load(Ordering::Acquire) > 0 && self.queue.1.is_empty() && start.elapsed() < CLEANER
        {
            rt::thread::yield_now();
        }
    }

    /// Has the system allocate memory for free slabs, so that there is a stock of them.
    fn stock_up(&self, stock: usize) -> Result<(), StorageError> {
        loop {
            let mut space = self.media.space.lock();
            let Some(offset) = space.alloc.coldest().filter(|_| space.alloc.warm() < stock) else {
                return Ok(());
            };
            self.media.pool.back(offset)?;
            space.alloc.set_backed(offset);
        }
    }

    /// Gives back what has not been needed for a while: memory, and blocks of the disk.
    pub fn give_surplus_back(&self) {
        if !self.media.pinned {
            // Whoever finds nothing free meanwhile waits, as for what is being cleaned.
            self.frames.fetch_add(1, Ordering::AcqRel);
            self.cool(
                "memory stays allocated",
                STOCK,
                |space| &mut space.alloc,
                |offset| {
                    let back = self.media.pool.mem.give_back(offset as usize, BLOCK as usize);
                    back.map_err(|e| e.to_string())
                },
            );
            self.frames.fetch_sub(1, Ordering::AcqRel);
        }
        self.cool(
            "the backing file keeps its blocks",
            DISK_STOCK,
            |space| &mut space.extents,
            |offset| {
                let back = self.media.disk.give_back(offset, BLOCK);
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
        let surplus = which(&mut self.media.space.lock()).surplus(stock, SURPLUS);
        for offset in surplus {
            let result = give_back(offset);
            if let Err(error) = &result {
                tracing::debug!("{failed}: {error}");
            }
            which(&mut self.media.space.lock()).cooled(offset, result.is_err());
        }
    }
}
