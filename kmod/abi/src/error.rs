//! What can go wrong.

use std::io;
use std::path::PathBuf;

use crate::layout::ABI_VERSION;

/// Why the extension cannot be used, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device is not there: the module is not loaded.
    #[error("{}: no such device: load the kernel module distfuse (modprobe distfuse)", .0.display())]
    NotLoaded(PathBuf),
    /// The device may not be opened.
    #[error("{}: permission denied: the kernel extension is for root", .0.display())]
    NotAllowed(PathBuf),
    /// The module is of another version.
    #[error(
        "the loaded kernel module distfuse speaks version {kernel} of the interface, this program version {}: \
         install the module that came with this program, then rmmod distfuse and modprobe distfuse",
        ABI_VERSION
    )]
    Version {
        /// What the module speaks.
        kernel: u32,
    },
    /// The mount is attached to already, or files of it are open.
    #[error("the mount is in use already: the kernel extension attaches before the first file is opened")]
    Busy,
    /// Not the root of a FUSE mount of this machine, or one of a kernel that the module does not know.
    #[error("not the root of a FUSE mount that the kernel extension can attach to")]
    NotAMount,
    /// The mount has ended.
    #[error("the mount has ended")]
    Gone,
    /// No entry for an inode: every way of its set is in use.
    #[error("no free entry in the set of inode {0:#x}")]
    Full(u64),
    /// There is no entry for the inode.
    #[error("inode {0:#x} has no entry")]
    Absent(u64),
    /// A grant while a revocation is under way, or of less than is held.
    #[error("inode {0:#x} cannot be granted that lease now")]
    NotNow(u64),
    /// The kernel does not read the command ring.
    #[error("the command ring is full and the kernel does not read it")]
    Stuck,
    /// A system call failed otherwise.
    #[error("{what}: {source}")]
    System {
        /// Which.
        what: &'static str,
        /// How.
        source: io::Error,
    },
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        match error {
            Error::System { source, .. } => source,
            other => io::Error::other(other),
        }
    }
}
