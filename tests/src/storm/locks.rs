//! Cells that all tasks write, each under a file lock.

use std::fs::File;
use std::sync::Mutex;
use std::sync::atomic::Ordering::SeqCst;

use rand::Rng;

use super::board::Count;
use super::life::{Step, Task};
use super::{MOUNTS, SHARED, SHARED_CELLS, TASKS_EACH, cells};
use crate::sys;

/// The file that is locked.
pub const NAME: &str = "locks";

/// The files that the tasks of a mount lock and write; POSIX locks are the process's, so its tasks take turns.
#[derive(Debug)]
pub struct Shared {
    locks: File,
    cells: File,
    turns: [Mutex<()>; SHARED_CELLS],
}

impl Shared {
    /// Opens them.
    ///
    /// # Errors
    /// A call fails.
    pub fn open(task: &Task<'_>) -> Step<Self> {
        let flags = libc::O_RDWR | libc::O_CREAT;
        let shared = Self {
            locks: task.must("open of the locks", || task.life.open(NAME, flags))?,
            cells: task.must("open of cells", || task.life.open(&cells::name(SHARED), flags))?,
            turns: Default::default(),
        };
        task.must("fsync of cells", || shared.cells.sync_all())?;
        // Nothing of a former life is due.
        for cell in 0..SHARED_CELLS {
            task.board.cell(SHARED, cell).acked[task.mount()].store(0, SeqCst);
        }
        Ok(shared)
    }
}

/// Takes a lock, if nobody has it, changes its cell, and lets it go.
///
/// # Errors
/// A call fails.
pub fn turn(task: &mut Task<'_>, shared: &Shared) -> Step<()> {
    let cell = task.rng.random_range(0..SHARED_CELLS);
    let Ok(_turn) = shared.turns[cell].try_lock() else {
        return Ok(());
    };
    let before = task.board.safe();
    let at = cell as i64;
    let busy = [libc::EAGAIN, libc::EACCES];
    let kind = libc::F_WRLCK;
    let taken = if cell.is_multiple_of(2) {
        task.call("lock", &busy, || sys::lock(&shared.locks, kind, at, 1, false))?
    } else {
        task.call("lock", &busy, || sys::ofd_lock(&shared.locks, kind, at, 1))?
    };
    if taken.is_err() {
        return Ok(());
    }
    let me = task.number as u64 + 1;
    let other = task.board.holder(cell).swap(me, SeqCst);
    let result = hold(task, shared, cell, other, before);
    // Only what is still this task's: somebody may have got the lock after this mount's death.
    let _ = task.board.holder(cell).compare_exchange(me, 0, SeqCst, SeqCst);
    let free = libc::F_UNLCK;
    if cell.is_multiple_of(2) {
        task.must("unlock", || sys::lock(&shared.locks, free, at, 1, false))?;
    } else {
        task.must("unlock", || sys::ofd_lock(&shared.locks, free, at, 1))?;
    }
    result
}

fn hold(
    task: &mut Task<'_>,
    shared: &Shared,
    cell: usize,
    other: u64,
    before: [Option<u64>; MOUNTS],
) -> Step<()> {
    if other != 0 {
        let holder = (other as usize - 1) / TASKS_EACH;
        if task.still_safe(before).is_some_and(|safe| safe[holder]) {
            task.wrong(&format!("lock {cell} is held by task {} as well", other - 1));
        }
    }
    cells::look(task, &shared.cells, SHARED, cell..cell + 1)?;
    let number = task.board.next();
    let durable = task.rng.random_range(0..4) == 0;
    cells::write(task, &shared.cells, SHARED, cell..cell + 1, number, durable)?;
    if task.rng.random_range(0..4) == 0 {
        cells::sync(task, &shared.cells, SHARED)?;
    }
    cells::look(task, &shared.cells, SHARED, cell..cell + 1)?;
    task.board.add(Count::Locks, 1);
    Ok(())
}
