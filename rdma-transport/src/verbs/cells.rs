//! Registered memory that operations and messages pass through, in cells of three sizes.
//!
//! What the adapter sends from or receives into must be registered, and registering a caller's buffer for one
//! operation costs more than copying it. Small cells are made whenever they are short (what is under way at once
//! bounds their number); large ones are limited, and blocking callers wait for them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::ffi::{Mr, Pd};
use super::region;
use super::wire::FRAGMENT;
use crate::TransportError;
use crate::mem::SharedMem;

/// Longest piece of a transfer.
pub(super) const LARGE: usize = 64 * 1024;
/// Cell size, cells registered at once, most cells that blocking callers make.
const CLASSES: [(usize, usize, usize); 3] = [
    (512, 128, usize::MAX),
    (FRAGMENT, 32, usize::MAX),
    (LARGE, 16, 256),
];

#[derive(Default)]
struct Free {
    cells: Vec<(Arc<Mr>, usize)>,
    made: usize,
}

#[derive(Default)]
struct Class {
    free: Mutex<Free>,
    freed: Condvar,
}

/// The cells of an endpoint.
pub(super) struct Cells {
    pd: Arc<Pd>,
    classes: [Class; CLASSES.len()],
}

/// A piece of registered memory; back in its pool when dropped.
pub(super) struct Cell {
    pool: Arc<Cells>,
    class: usize,
    mr: Arc<Mr>,
    off: usize,
}

impl Cells {
    pub(super) fn new(pd: &Arc<Pd>) -> Arc<Self> {
        Arc::new(Self {
            pd: Arc::clone(pd),
            classes: Default::default(),
        })
    }

    fn class(len: usize) -> usize {
        CLASSES
            .iter()
            .position(|(size, ..)| len <= *size)
            .unwrap_or(CLASSES.len() - 1)
    }

    /// A cell of at least `len` bytes (at most [`LARGE`]).
    pub(super) fn take(self: &Arc<Self>, len: usize) -> Result<Cell, TransportError> {
        let class = Self::class(len);
        let mut free = self.classes[class].free.lock();
        if free.cells.is_empty() {
            self.make(class, &mut free)?;
        }
        let (mr, off) = free.cells.pop().ok_or(TransportError::Shutdown)?;
        Ok(Cell {
            pool: Arc::clone(self),
            class,
            mr,
            off,
        })
    }

    /// As [`Cells::take`], but no more than the limit; waits until `deadline`, if there is one.
    pub(super) fn take_some(
        self: &Arc<Self>,
        len: usize,
        deadline: Option<Instant>,
    ) -> Result<Option<Cell>, TransportError> {
        let class = Self::class(len);
        {
            let this = &self.classes[class];
            let mut free = this.free.lock();
            while free.cells.is_empty() && free.made >= CLASSES[class].2 {
                let Some(deadline) = deadline else { return Ok(None) };
                if this.freed.wait_until(&mut free, deadline).timed_out() {
                    return Ok(None);
                }
            }
        }
        self.take(len).map(Some)
    }

    fn make(&self, class: usize, free: &mut Free) -> Result<(), TransportError> {
        let (size, count, _) = CLASSES[class];
        let mem = Arc::new(SharedMem::anonymous(size * count)?);
        let mr = Arc::new(region::local(&self.pd, &mem)?);
        free.cells.extend((0..count).map(|n| (Arc::clone(&mr), n * size)));
        free.made += count;
        Ok(())
    }
}

impl Cell {
    pub(super) fn address(&self) -> u64 {
        self.mr.mem.address() + self.off as u64
    }

    pub(super) fn lkey(&self) -> u32 {
        self.mr.lkey()
    }

    /// Puts bytes at the position `at`.
    pub(super) fn fill(&self, at: usize, bytes: &[u8]) -> Result<(), TransportError> {
        self.mr.mem.write_at(self.off + at, bytes)
    }

    pub(super) fn copy_to(&self, into: &mut [u8]) -> Result<(), TransportError> {
        self.mr.mem.read_at(self.off, into)
    }

    pub(super) fn words(&self, count: usize) -> Result<Vec<u64>, TransportError> {
        (0..count)
            .map(|n| Ok(self.mr.mem.word(self.off + 8 * n)?.load(Ordering::Acquire)))
            .collect()
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        let class = &self.pool.classes[self.class];
        class.free.lock().cells.push((Arc::clone(&self.mr), self.off));
        class.freed.notify_one();
    }
}
