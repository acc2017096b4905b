//! The gate of a lease: who may enter, and how many are inside.
//!
//! One word: `[closed:1 | rank:2 | .. | count:32]`. The rank is the mode of the lease (0 none, 1 shared,
//! 2 exclusive). To enter is one compare-and-swap, to leave one subtraction. Closing keeps new ones out;
//! the last one to leave a closed gate runs what whoever closed it left behind.
//!
//! The closed bit changes only under the lock of `drained`, so that "closed and empty", once seen under
//! that lock, stays true as long as it is held.

use super::sync::{AtomicU64, Mutex, Ordering};

/// Runs once nobody is inside a closed gate.
pub(crate) type Drained = Box<dyn FnOnce() + Send>;

const CLOSED: u64 = 1 << 63;
const RANK_SHIFT: u32 = 61;
const RANK: u64 = 3 << RANK_SHIFT;
const COUNT: u64 = (1 << 32) - 1;

fn rank_of(word: u64) -> u64 {
    (word & RANK) >> RANK_SHIFT
}

/// See the module.
#[repr(C)]
pub(crate) struct Gate {
    word: AtomicU64,
    drained: Mutex<Option<Drained>>,
}

impl Gate {
    /// Closed, and nothing to enter for.
    pub(crate) fn new() -> Self {
        Self {
            word: AtomicU64::new(CLOSED),
            drained: Mutex::new(None),
        }
    }

    /// Enters if the gate is open for this rank.
    pub(crate) fn enter(&self, rank: u64) -> bool {
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            if word & CLOSED != 0 || rank_of(word) < rank {
                return false;
            }
            // Acquire: sees what was written before the gate was opened.
            match self
                .word
                .compare_exchange_weak(word, word + 1, Ordering::Acquire, Ordering::Relaxed)
            {
                Ok(_) => return true,
                Err(now) => word = now,
            }
        }
    }

    /// Leaves; the caller must run what is returned.
    pub(crate) fn leave(&self) -> Option<Drained> {
        // Release: whoever sees the gate empty sees all that was done inside.
        let before = self.word.fetch_sub(1, Ordering::AcqRel);
        if before & CLOSED == 0 || before & COUNT != 1 {
            return None;
        }
        let mut drained = self.drained.lock();
        // It may have been opened, and entered again, in between.
        if self.is_drained() { drained.take() } else { None }
    }

    /// Closes the gate; the caller must run what is returned. If it was closed, `drained` takes the place of
    /// what was to run.
    pub(crate) fn close(&self, drained: Drained) -> Option<Drained> {
        let mut slot = self.drained.lock();
        *slot = Some(drained);
        let before = self.word.fetch_or(CLOSED, Ordering::AcqRel);
        if before & COUNT == 0 { slot.take() } else { None }
    }

    /// Opens the gate for the rank it has.
    pub(crate) fn open(&self) {
        let mut slot = self.drained.lock();
        *slot = None;
        self.word.fetch_and(!CLOSED, Ordering::AcqRel);
    }

    /// Opens the gate for this rank.
    pub(crate) fn grant(&self, rank: u64) {
        let mut slot = self.drained.lock();
        *slot = None;
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let new = word & COUNT | rank << RANK_SHIFT;
            match self
                .word
                .compare_exchange_weak(word, new, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(now) => word = now,
            }
        }
    }

    /// Gives the closed and empty gate a lower rank; it stays closed. False if it is open or entered.
    pub(crate) fn lower(&self, rank: u64) -> bool {
        let _slot = self.drained.lock();
        let drained = self.is_drained();
        if drained {
            // Nobody else writes: entering and leaving do not happen, the rest needs the lock.
            self.word.store(CLOSED | rank << RANK_SHIFT, Ordering::Release);
        }
        drained
    }

    fn is_drained(&self) -> bool {
        let word = self.word.load(Ordering::Acquire);
        word & CLOSED != 0 && word & COUNT == 0
    }

    /// How many are inside.
    pub(crate) fn count(&self) -> u32 {
        (self.word.load(Ordering::Relaxed) & COUNT) as u32
    }
}
