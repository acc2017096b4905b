//! Storms: faults at random on the processes of a cluster, under a workload that knows what it may see.
//!
//! Each mount has a program of its own ([`worker`], `src/bin/storm.rs`) with a few tasks, for whoever starts processes must not have files
//! open on a mount: closing them in the forked child waits for whom it is about to start. Programs and the test share a [`board`] in
//! memory: what was issued, acknowledged and fsynced, and which mounts are *in danger* (a fault was done to them, and it is not known yet
//! whether they have outlived it). Each reader compares what it has read with the board ([`oracle`]).
//!
//! What is tried: [`cells`] of files that one task has to itself, and of one that all write under file locks; [`names`] that are made, moved
//! and removed; [`logs`] that all append to. [`draw`] draws faults from a seed, [`faults`] does them; [`leaks`] compares what processes hold before and after.

pub mod board;
pub mod cells;
pub mod draw;
pub mod faults;
pub mod leaks;
pub mod life;
pub mod locks;
pub mod logs;
pub mod names;
pub mod oracle;
pub mod worker;

/// Mounts of the cluster.
pub const MOUNTS: usize = 3;
/// Tasks of each mount.
pub const TASKS_EACH: usize = 3;
/// Tasks of all mounts.
pub const TASKS: usize = MOUNTS * TASKS_EACH;
/// Files that each task has to itself.
pub const FILES_EACH: usize = 2;
/// Files of cells: those of the tasks, and the last one, whose cells all write under locks.
pub const FILES: usize = TASKS * FILES_EACH + 1;
/// The file whose cells all write under locks.
pub const SHARED: usize = FILES - 1;
/// Cells of a file.
pub const CELLS: usize = 32;
/// Cells of the file that all write.
pub const SHARED_CELLS: usize = 4;
/// Names that each task makes, moves and removes.
pub const NAMES_EACH: usize = 4;
/// Files that all append to.
pub const LOGS: usize = 2;
/// Records that a task appends to a log at most.
pub const RECORDS: usize = 4096;

/// Nanoseconds of the clock that all programs of a host share; never 0.
#[must_use]
pub fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}
