//! What all programs of a storm know: words in memory that they share.

use std::io;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

use super::{CELLS, FILES, LOGS, MOUNTS, NAMES_EACH, RECORDS, TASKS};
use crate::sys;

/// What is counted, with the names it is printed by.
pub const COUNTS: [&str; 15] = [
    "writes",
    "fsyncs",
    "appends",
    "name changes",
    "locks held",
    "cells read strictly",
    "cells read loosely",
    "cells after a death",
    "names looked at strictly",
    "listings",
    "records looked at",
    "errors of the dying",
    "errors beside a storage node's fault",
    "errors of writes forwarded to the dying",
    "lives",
];

/// Places in [`COUNTS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Count {
    /// Calls of write(2) that succeeded.
    Writes,
    /// Calls of fsync(2) that succeeded.
    Fsyncs,
    /// Records appended.
    Appends,
    /// Names made, moved, removed.
    Names,
    /// Locks that were held.
    Locks,
    /// Cells compared with what was acknowledged.
    Strict,
    /// Cells compared with what was fsynced, for their writer was in danger.
    Loose,
    /// Cells that their writer's next life has looked at.
    Recovered,
    /// Names compared with what was acknowledged.
    Looks,
    /// Listings compared.
    Lists,
    /// Records of logs compared.
    Records,
    /// Calls that failed on a mount in danger.
    Dying,
    /// Calls that failed while, or shortly after, a fault was done to a storage node.
    Outage,
    /// Writes that failed because the mount died which they were forwarded to.
    Forwarded,
    /// Lives of mounts that tasks have worked in.
    Lives,
}

const HEAD: usize = 8;
const OF_MOUNT: usize = 8;
const OF_TASK: usize = 2;
const OF_CELL: usize = 3 + MOUNTS;
const OF_NAME: usize = 3;
const OF_LOG: usize = 3 + RECORDS / 64;

const MOUNT_AT: usize = HEAD;
const COUNT_AT: usize = MOUNT_AT + MOUNTS * OF_MOUNT;
const TASK_AT: usize = COUNT_AT + COUNTS.len();
const HELD_AT: usize = TASK_AT + TASKS * OF_TASK;
const CELL_AT: usize = HELD_AT + CELLS;
const NAME_AT: usize = CELL_AT + FILES * CELLS * OF_CELL;
const LOG_AT: usize = NAME_AT + TASKS * NAMES_EACH * OF_NAME;
const DIGEST_AT: usize = LOG_AT + LOGS * TASKS * OF_LOG;
const WORDS: usize = DIGEST_AT + MOUNTS;

/// How far a storm is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u64)]
pub enum Phase {
    /// Tasks work.
    Work = 0,
    /// They stop.
    Stop = 1,
    /// Each mount looks at everything.
    Look = 2,
    /// Programs end.
    End = 3,
}

/// The words.
pub struct Board(sys::Map);

/// The words of a cell.
#[derive(Debug, Clone, Copy)]
pub struct CellWords<'a> {
    /// The latest number that anybody has begun to write.
    pub issued: &'a AtomicU64,
    /// The latest one that an fsync has acknowledged.
    pub synced: &'a AtomicU64,
    /// Numbers above that of the last life's end up to this one were lost with it.
    pub gap: &'a AtomicU64,
    /// What each mount has acknowledged in its life.
    pub acked: [&'a AtomicU64; MOUNTS],
}

/// The words of a name.
#[derive(Debug, Clone, Copy)]
pub struct NameWords<'a> {
    /// Odd while it is changed.
    pub turn: &'a AtomicU64,
    /// Its state, see `names`.
    pub state: &'a AtomicU64,
    /// The latest contents that were begun to be written.
    pub issued: &'a AtomicU64,
}

/// The words of what a task has in a log.
#[derive(Debug, Clone, Copy)]
pub struct LogWords<'a> {
    /// Records up to this one belong to former lives: of these those must be there that were fsynced.
    pub base: &'a AtomicU64,
    /// Records up to this one are acknowledged.
    pub acked: &'a AtomicU64,
    /// Records up to this one have been begun.
    pub issued: &'a AtomicU64,
}

impl Board {
    /// Opens one, or makes it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = sys::open(path, libc::O_RDWR | libc::O_CREAT)?;
        file.set_len(WORDS as u64 * 8)?;
        Ok(Self(sys::Map::writable(&file, WORDS * 8)?))
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at < WORDS, "no such word");
        self.0.word(at * 8)
    }

    /// How far the storm is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.word(0).load(SeqCst) {
            0 => Phase::Work,
            1 => Phase::Stop,
            2 => Phase::Look,
            _ => Phase::End,
        }
    }

    /// Says how far it is.
    pub fn set_phase(&self, phase: Phase) {
        self.word(0).store(phase as u64, SeqCst);
    }

    /// What is wrong: how often.
    #[must_use]
    pub fn wrong(&self) -> &AtomicU64 {
        self.word(1)
    }

    /// Programs that have looked at everything.
    #[must_use]
    pub fn looked(&self) -> &AtomicU64 {
        self.word(2)
    }

    /// Faults done to storage nodes that are not over.
    #[must_use]
    pub fn outages(&self) -> &AtomicU64 {
        self.word(3)
    }

    /// When the last one was over.
    #[must_use]
    pub fn outage_ended(&self) -> &AtomicU64 {
        self.word(4)
    }

    /// The next number of a cell that all write.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.word(5).fetch_add(1, SeqCst) + 1
    }

    /// Nothing is in kernels' caches.
    #[must_use]
    pub fn uncached(&self) -> &AtomicU64 {
        self.word(6)
    }

    /// A mount that was stopped shows nothing old: its kernel has nothing by itself, or looks at the mount's term.
    #[must_use]
    pub fn mindful(&self) -> &AtomicU64 {
        self.word(7)
    }

    /// Mounts have the kernel extension: one may do what is called on another.
    #[must_use]
    pub fn forwards(&self) -> bool {
        self.mindful().load(SeqCst) == 1 && self.uncached().load(SeqCst) == 0
    }

    /// What a mount shows is not old, whatever is being done to it: it was stopped at most.
    #[must_use]
    pub fn honest(&self, mount: usize) -> bool {
        let evicted = self.deadly(mount).load(SeqCst) > self.settled(mount).load(SeqCst);
        self.mindful().load(SeqCst) == 1 && !evicted
    }

    /// Faults that were begun at a mount.
    #[must_use]
    pub fn begun(&self, mount: usize) -> &AtomicU64 {
        self.word(MOUNT_AT + mount * OF_MOUNT)
    }

    /// Faults whose doing is over: it runs again.
    #[must_use]
    pub fn done(&self, mount: usize) -> &AtomicU64 {
        self.word(MOUNT_AT + mount * OF_MOUNT + 1)
    }

    /// Faults of which its tasks know what came of them.
    #[must_use]
    pub fn settled(&self, mount: usize) -> &AtomicU64 {
        self.word(MOUNT_AT + mount * OF_MOUNT + 2)
    }

    /// The latest fault that ends a life of the mount for sure.
    #[must_use]
    pub fn deadly(&self, mount: usize) -> &AtomicU64 {
        self.word(MOUNT_AT + mount * OF_MOUNT + 3)
    }

    /// The latest fault that a new life began after.
    #[must_use]
    pub fn reborn(&self, mount: usize) -> &AtomicU64 {
        self.word(MOUNT_AT + mount * OF_MOUNT + 4)
    }

    /// Something was done to a mount; each is in danger once, before its first life.
    #[must_use]
    pub fn ever(&self) -> bool {
        (0..MOUNTS).any(|m| self.begun(m).load(SeqCst) > 1)
    }

    /// For each mount the faults begun at it, or nothing where it is in danger.
    #[must_use]
    pub fn safe(&self) -> [Option<u64>; MOUNTS] {
        std::array::from_fn(|m| {
            let settled = self.settled(m).load(SeqCst);
            (self.begun(m).load(SeqCst) == settled).then_some(settled)
        })
    }

    /// A mount is in danger from now on; the number of the fault.
    pub fn begin(&self, mount: usize, deadly: bool) -> u64 {
        let fault = self.begun(mount).fetch_add(1, SeqCst) + 1;
        if deadly {
            self.deadly(mount).fetch_max(fault, SeqCst);
        }
        fault
    }

    /// Counts.
    #[must_use]
    pub fn count(&self, what: Count) -> &AtomicU64 {
        self.word(COUNT_AT + what as usize)
    }

    /// Counts so many.
    pub fn add(&self, what: Count, n: usize) {
        self.count(what).fetch_add(n as u64, SeqCst);
    }

    /// All counts by name.
    #[must_use]
    pub fn counts(&self) -> Vec<(&'static str, u64)> {
        let of = |(i, name): (usize, &&'static str)| (*name, self.word(COUNT_AT + i).load(SeqCst));
        COUNTS.iter().enumerate().map(of).collect()
    }

    /// Since when a task is in a call, 0 for not; and in which one.
    #[must_use]
    pub fn call(&self, task: usize) -> (&AtomicU64, &AtomicU64) {
        let at = TASK_AT + task * OF_TASK;
        (self.word(at), self.word(at + 1))
    }

    /// Who has a lock: the number of the task and one.
    #[must_use]
    pub fn holder(&self, lock: usize) -> &AtomicU64 {
        self.word(HELD_AT + lock)
    }

    /// A cell of a file.
    #[must_use]
    pub fn cell(&self, file: usize, cell: usize) -> CellWords<'_> {
        let at = CELL_AT + (file * CELLS + cell) * OF_CELL;
        CellWords {
            issued: self.word(at),
            synced: self.word(at + 1),
            gap: self.word(at + 2),
            acked: std::array::from_fn(|m| self.word(at + 3 + m)),
        }
    }

    /// A name of a task.
    #[must_use]
    pub fn name(&self, task: usize, name: usize) -> NameWords<'_> {
        let at = NAME_AT + (task * NAMES_EACH + name) * OF_NAME;
        NameWords {
            turn: self.word(at),
            state: self.word(at + 1),
            issued: self.word(at + 2),
        }
    }

    /// What a task has in a log.
    #[must_use]
    pub fn log(&self, log: usize, task: usize) -> LogWords<'_> {
        let at = LOG_AT + (log * TASKS + task) * OF_LOG;
        LogWords {
            base: self.word(at),
            acked: self.word(at + 1),
            issued: self.word(at + 2),
        }
    }

    /// Which records of a task were fsynced: those from `64 * n` on.
    #[must_use]
    pub fn durable(&self, log: usize, task: usize, n: usize) -> &AtomicU64 {
        self.word(LOG_AT + (log * TASKS + task) * OF_LOG + 3 + n)
    }

    /// What a mount has seen at the end.
    #[must_use]
    pub fn digest(&self, mount: usize) -> &AtomicU64 {
        self.word(DIGEST_AT + mount)
    }
}
