//! Locks of files.

use serde::{Deserialize, Serialize};

/// Owner of a file lock, unique in the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LockOwner {
    /// The mount.
    pub node: u16,
    /// The kernel's owner number on it.
    pub owner: u64,
    /// Of an `flock` lock. Those and `fcntl` locks do not meet, as on other file systems of Linux.
    pub flock: bool,
}

/// Kind of lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockKind {
    /// `F_RDLCK`.
    Read,
    /// `F_WRLCK`.
    Write,
}

/// Bytes `start ..= end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockRange {
    /// First byte.
    pub start: u64,
    /// Last byte.
    pub end: u64,
}

/// A lock that is held or asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockSpec {
    /// Inode.
    pub ino: u64,
    /// Owner.
    pub owner: LockOwner,
    /// Process, for `F_GETLK`.
    pub pid: u32,
    /// Bytes.
    pub range: LockRange,
    /// `None` unlocks.
    pub kind: Option<LockKind>,
}
