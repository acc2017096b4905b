//! The backing file behind a trait, so that tests can lose what was not synced.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{Advice, FallocateFlags};

/// What the storage node needs of the file that keeps its blocks. Between two syncs a power cut may leave any part of
/// what was written, down to single sectors.
pub trait Disk: Send + Sync {
    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    /// The disk's; the end of the file is one.
    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()>;
    /// Writes; the file grows if need be.
    ///
    /// # Errors
    /// The disk's, for example because it is full.
    fn write(&self, offset: u64, from: &[u8]) -> std::io::Result<()>;
    /// Once this returns, a power cut cannot undo what was written before.
    ///
    /// # Errors
    /// The disk's; what was written since the last sync must then be written again.
    fn sync(&self) -> std::io::Result<()>;
    /// Gives the disk's blocks behind a range back.
    ///
    /// # Errors
    /// The file system cannot do that.
    fn give_back(&self, offset: u64, len: u64) -> std::io::Result<()>;
    /// What is read next shall come from the disk, not from memory, as far as that can be had.
    fn uncache(&self, offset: u64, len: u64);
}

/// A file of a file system.
pub struct FileDisk(File);

impl FileDisk {
    /// Opens the file, or makes it; it is its owner's alone.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
        Ok(Self(file))
    }

    /// Opens a file that is there to be read.
    ///
    /// # Errors
    /// The system's.
    pub fn open_to_read(path: &Path) -> std::io::Result<Self> {
        File::open(path).map(Self)
    }
}

impl Disk for FileDisk {
    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.0.read_exact_at(into, offset)
    }

    fn write(&self, offset: u64, from: &[u8]) -> std::io::Result<()> {
        self.0.write_all_at(from, offset)
    }

    fn sync(&self) -> std::io::Result<()> {
        self.0.sync_data()
    }

    fn give_back(&self, offset: u64, len: u64) -> std::io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.0, flags, offset, len)?)
    }

    fn uncache(&self, offset: u64, len: u64) {
        // Without it the check is of what the system remembers, which is still a check.
        let _ = rustix::fs::fadvise(&self.0, offset, std::num::NonZeroU64::new(len), Advice::DontNeed);
    }
}

/// Checksum of what is stored of a block.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u64 {
    twox_hash::XxHash3_64::oneshot(bytes)
}
