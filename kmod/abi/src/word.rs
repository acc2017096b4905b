//! The word of an entry: who holds what, how many are inside, what a revocation has to do.
//!
//! Orders. A grant releases what was written into the entry before, and entering acquires it. Leaving
//! releases what was done inside, and whoever finds the count at 0 acquires it. A flag that one side sets for
//! the other is in the same word as the count or mode that the other changes, so the order of changes of that
//! one word decides who sees whom; no fences are needed.

use crate::sync::{AtomicU64, Ordering};

/// Tasks inside.
pub const COUNT: u64 = 0x00ff_ffff;
/// Where the mode is.
pub const MODE_SHIFT: u32 = 24;
/// The mode's bits.
pub const MODE: u64 = 3 << MODE_SHIFT;
/// Nobody enters any more.
pub const REVOKING: u64 = 1 << 26;
/// Tasks sleep until they are woken.
pub const WAITERS: u64 = 1 << 27;
/// The kernel may have data that the daemon has not.
pub const DIRTY: u64 = 1 << 28;
/// Pages may be in page tables.
pub const MAPPED: u64 = 1 << 29;
/// Somebody was inside since the grant.
pub const USED: u64 = 1 << 30;
/// Where the generation is.
pub const GENERATION_SHIFT: u32 = 32;

/// What a lease allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u64)]
pub enum Mode {
    /// Nothing.
    None = 0,
    /// To read what is cached.
    Shared = 1,
    /// To change it.
    Exclusive = 2,
}

/// A word as it was at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Word(pub u64);

impl Word {
    /// What is held.
    pub fn mode(self) -> Mode {
        match (self.0 & MODE) >> MODE_SHIFT {
            0 => Mode::None,
            1 => Mode::Shared,
            _ => Mode::Exclusive,
        }
    }
    /// How many are inside.
    pub fn count(self) -> u64 {
        self.0 & COUNT
    }
    /// Which tenure it is.
    pub fn generation(self) -> u32 {
        (self.0 >> GENERATION_SHIFT) as u32
    }
    /// Whether all of `bits` are set.
    pub fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }
    /// Whether the lease can go down to `target` without the kernel having to do anything.
    pub fn clean(self, target: Mode) -> bool {
        let mapped = target == Mode::None && self.has(MAPPED);
        self.count() == 0 && !self.has(DIRTY) && !mapped
    }
    fn with_mode(self, mode: Mode) -> Word {
        Word((self.0 & !MODE) | ((mode as u64) << MODE_SHIFT))
    }
    fn pending(self) -> Pending {
        Pending {
            inside: self.count(),
            dirty: self.has(DIRTY),
            mapped: self.has(MAPPED),
        }
    }
}

/// What stands between a revocation and its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pending {
    /// So many are inside; the last one that leaves is told of by an event.
    pub inside: u64,
    /// Data has to be flushed.
    pub dirty: bool,
    /// Pages may be mapped.
    pub mapped: bool,
}

impl Pending {
    /// Whether the kernel has to be sent a flush, or else will say by itself when all have left.
    pub fn needs_flush(self, target: Mode) -> bool {
        self.dirty || (self.mapped && target == Mode::None)
    }
}

/// What became of a revocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revoked {
    /// The lease is down; if `wake`, tasks want it back and are to be woken.
    Done {
        /// Whether tasks wait.
        wake: bool,
    },
    /// Nobody enters any more, and something has to happen first.
    Pending(Pending),
    /// Nobody has been inside since the grant: too early.
    Unused,
}

/// Gives a lease that is not held yet, or more of one that is. The word before it; its [`WAITERS`] bit says
/// whether tasks are to be woken. `None` if a revocation is under way, or as much is held.
pub fn grant(word: &AtomicU64, mode: Mode) -> Option<Word> {
    let mut old = word.load(Ordering::Relaxed);
    loop {
        let was = Word(old);
        if was.has(REVOKING) || was.mode() >= mode {
            return None;
        }
        let mut generation = old >> GENERATION_SHIFT;
        if was.mode() == Mode::None {
            // 0 stands for none in the kernel.
            generation = u64::from((generation as u32).wrapping_add(1).max(1));
        }
        let kept = old & (COUNT | DIRTY | MAPPED);
        let new = Word(kept | generation << GENERATION_SHIFT).with_mode(mode);
        match word.compare_exchange_weak(old, new.0, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => return Some(was),
            Err(now) => old = now,
        }
    }
}

/// Takes a lease down to `target`, if possible in one step. `force` also one that nobody has used yet.
pub fn revoke(word: &AtomicU64, target: Mode, force: bool) -> Revoked {
    let mut old = word.load(Ordering::Relaxed);
    loop {
        let was = Word(old);
        if was.mode() <= target && !was.has(REVOKING) {
            return Revoked::Done { wake: false };
        }
        if !was.has(USED) && !force && !was.has(REVOKING) {
            return Revoked::Unused;
        }
        let clean = was.clean(target);
        if !clean && was.has(REVOKING) {
            return Revoked::Pending(was.pending());
        }
        let new = if clean { down(was, target) } else { old | REVOKING };
        match word.compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) if clean => {
                return Revoked::Done {
                    wake: was.has(WAITERS),
                };
            }
            Ok(_) => return Revoked::Pending(was.pending()),
            Err(now) => old = now,
        }
    }
}

/// Whether somebody has been inside since the grant, or since this was last asked.
pub fn used_again(word: &AtomicU64) -> bool {
    Word(word.fetch_and(!USED, Ordering::Relaxed)).has(USED)
}

/// Ends a revocation when all have left and everything is flushed.
pub fn finish(word: &AtomicU64, target: Mode) -> Revoked {
    revoke(word, target, true)
}

/// Leaves the lease as it was before a revocation that is no longer wanted. Whether tasks are to be woken.
pub fn cancel(word: &AtomicU64) -> bool {
    Word(word.fetch_and(!(REVOKING | WAITERS), Ordering::AcqRel)).has(WAITERS)
}

fn down(was: Word, target: Mode) -> u64 {
    let mode = target.min(was.mode());
    was.with_mode(mode).0 & !(REVOKING | WAITERS)
}

/// Whether a lease of that word lets anybody in to do `mode`.
pub fn admits(word: Word, mode: Mode) -> bool {
    !word.has(REVOKING) && word.mode() >= mode
}

/// What the kernel does to enter, for models and tests.
pub fn enter(word: &AtomicU64, mode: Mode, set: u64) -> bool {
    let mut old = word.load(Ordering::Acquire);
    while admits(Word(old), mode) {
        match word.compare_exchange_weak(old, (old + 1) | USED | set, Ordering::Acquire, Ordering::Acquire) {
            Ok(_) => return true,
            Err(now) => old = now,
        }
    }
    false
}

/// What the kernel does to leave. Whether the daemon has to be told that all have left.
pub fn leave(word: &AtomicU64) -> bool {
    let now = Word(word.fetch_sub(1, Ordering::AcqRel) - 1);
    now.has(REVOKING) && now.count() == 0
}
