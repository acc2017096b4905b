//! What a mount and its successor tell each other.
//!
//! | from | message | then |
//! | --- | --- | --- |
//! | mount | [`Message::Begin`], with descriptors | the successor joins the cluster |
//! | successor | [`Message::Ready`] | |
//! | mount | [`Message::Ahead`] | the successor opens what is open |
//! | successor | [`Message::Done`] | the event loops are held |
//! | mount | [`Message::Pass`] | the successor takes everything in |
//! | successor | [`Message::Done`], or [`Message::NotYet`] | locks change hands |
//! | mount | [`Message::Go`] | the successor serves the kernel |
//! | successor | [`Message::Done`] | the mount leaves, and closes the socket before |
//!
//! From the second [`Message::Ahead`] on it may begin again, after [`Message::NotYet`] or [`Message::Undo`]. The socket closed at any other
//! time: nothing has passed.

use serde::{Deserialize, Serialize};

use crate::files::locks::PassedWaiter;
use crate::files::passed_locks::PassedLock;
use crate::fuse::handshake::Handshake;
use crate::opens::passed::PassedHandle;

/// The first message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Begin {
    /// Number of the mount.
    pub(super) node: u16,
    /// What is mounted ([`crate::mount::Mounted::to_text`]).
    pub(super) mounted: String,
    /// How the kernel caches: not at all, but for mappings and attributes.
    pub(super) direct: bool,
    /// Shared files through the page cache too.
    pub(super) cache_shared: bool,
    /// What the kernel was answered first.
    pub(super) handshake: Handshake,
}

/// A file that is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(super) struct OpenFile {
    /// Number.
    pub(super) ino: u64,
    /// It is open for writing.
    pub(super) writer: bool,
    /// The kernel may have pages or attributes of it.
    pub(super) cached: bool,
}

/// An inode that the kernel knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PassedInode {
    /// Number.
    pub(super) ino: u64,
    /// Lookups the kernel has not forgotten.
    pub(super) lookups: u64,
    /// The kernel may have pages or attributes of it.
    pub(super) cached: bool,
    /// Reads have brought pages since they were dropped.
    pub(super) refilled: bool,
    /// Delayed errors: how many there were, and the last one.
    pub(super) errors: (u64, Option<i32>),
    /// Where a directory was found.
    pub(super) place: Option<(u64, Vec<u8>)>,
}

/// Everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pass {
    /// Inodes.
    pub(super) inodes: Vec<PassedInode>,
    /// Open files.
    pub(super) handles: Vec<PassedHandle>,
    /// The number that was given last to an open file.
    pub(super) last_handle: u64,
    /// File locks that are held.
    pub(super) locks: Vec<PassedLock>,
    /// Requests that wait for one.
    pub(super) waiting: Vec<PassedWaiter>,
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Message {
    /// What is to be taken over.
    Begin(Begin),
    /// The successor has joined, with this number.
    Ready(u16),
    /// Files that are open.
    Ahead(Vec<OpenFile>),
    /// Everything.
    Pass(Pass),
    /// It could not be taken in now, and was not.
    NotYet(String),
    /// What was taken in is not the successor's.
    Undo,
    /// The kernel is the successor's.
    Go,
    /// What was asked for is done.
    Done,
    /// It cannot be done.
    Failed(String),
}
