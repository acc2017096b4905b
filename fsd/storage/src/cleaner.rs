//! Cleaning frames that were freed, and keeping a stock of those that are free.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rt::channel::{Either, Receiver, Sender, recv_either, unbounded};
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
/// How long nothing must be freed before the stock is filled up.
const PAUSE: Duration = Duration::from_millis(100);
/// How long it is waited before that is tried again, where there is no memory.
const AGAIN: Duration = Duration::from_secs(1);
/// How long the cleaner sleeps if nobody wakes it.
const QUIET: Duration = Duration::from_secs(60);
/// Slabs given back at once.
const SURPLUS: usize = 1024;

/// Cleans frames. What is handed to it counts as taken until it is clean.
pub struct Cleaner {
    media: Arc<Media>,
    queue: (Sender<Frame>, Receiver<Frame>),
    /// Wakes it where the stock is low, or when the node stops.
    wake: (Sender<()>, Receiver<()>),
    /// It knows that the stock is low.
    low: AtomicBool,
    stopping: AtomicBool,
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
            wake: unbounded(),
            low: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
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
    pub fn run(&self) {
        // Whatever the start could not have.
        let mut patience = PAUSE;
        while !self.stopping.load(Ordering::Acquire) {
            match recv_either(&self.wake.1, &self.queue.1, patience) {
                Either::First(Ok(())) => patience = patience.min(PAUSE),
                Either::Second(Ok(frame)) => self.clean(frame),
                Either::Neither => {
                    // Whoever takes from the stock after this wakes the cleaner again.
                    self.low.store(false, Ordering::SeqCst);
                    patience = match self.stock_up(STOCK) {
                        Ok(()) => QUIET,
                        Err(error) => {
                            tracing::debug!("{error}");
                            AGAIN
                        }
                    };
                }
                Either::First(Err(_)) | Either::Second(Err(_)) => return,
            }
        }
    }

    /// Ends [`Cleaner::run`].
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        let _ = self.wake.0.send(());
    }

    /// Something was taken from the stock, or free memory has come that is none of it: the cleaner sees to it.
    pub fn note_stock(&self, alloc: &Allocator) {
        if alloc.warm() < STOCK && alloc.coldest().is_some() && !self.low.swap(true, Ordering::SeqCst) {
            let _ = self.wake.0.send(());
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
            let mut space = self.media.space.lock();
            space.give_back(frame);
            self.note_stock(&space.alloc);
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
