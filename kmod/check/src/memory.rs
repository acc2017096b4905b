//! A file mapped.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::SeqCst};

use anyhow::{Result, bail};

/// A shared mapping of a file's beginning.
///
/// The stock driver writes an inode's times back as a mapping goes, with the address space locked; the lease
/// manager, which that may have to wait for, is in this process. So the file is synced before, and mappings
/// have to outlive the tasks that write to the file. A daemon is a process of its own.
pub struct Mapping {
    file: File,
    base: *mut libc::c_void,
    len: usize,
}

// SAFETY: reached by atomics only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps it, to be read and written.
    pub fn new(file: &File, len: usize) -> Result<Mapping> {
        // SAFETY: a new mapping, where the kernel likes.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            bail!("mmap: {}", std::io::Error::last_os_error());
        }
        Ok(Mapping {
            file: file.try_clone()?,
            base,
            len,
        })
    }

    /// A byte of it.
    pub fn byte(&self, at: usize) -> &AtomicU8 {
        assert!(at < self.len);
        // SAFETY: inside the mapping, which lives as long as self.
        unsafe { &*self.base.cast::<AtomicU8>().add(at) }
    }

    /// A word of it.
    pub fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.len);
        // SAFETY: inside the mapping, and aligned.
        unsafe { &*self.base.cast::<u8>().add(at).cast::<AtomicU64>() }
    }

    /// Reads a byte.
    pub fn get(&self, at: usize) -> u8 {
        self.byte(at).load(SeqCst)
    }

    /// Writes one.
    pub fn set(&self, at: usize, value: u8) {
        self.byte(at).store(value, SeqCst);
    }

    fn range(&self, at: usize, len: usize) -> *mut libc::c_void {
        assert!(at + len <= self.len);
        // SAFETY: inside the mapping.
        unsafe { self.base.cast::<u8>().add(at).cast() }
    }

    /// write(2) out of the mapping; how much it came to.
    pub fn write_some_to(&self, file: &File, at: usize, len: usize, offset: i64) -> Result<usize> {
        // SAFETY: the range is inside the mapping.
        let done = unsafe { libc::pwrite(file.as_raw_fd(), self.range(at, len), len, offset) };
        come_to("pwrite", done)
    }

    /// write(2) of all of a range of the mapping.
    pub fn write_to(&self, file: &File, at: usize, len: usize, offset: i64) -> Result<()> {
        all_of("pwrite", self.write_some_to(file, at, len, offset)?, len)
    }

    /// read(2) into the mapping.
    pub fn read_from(&self, file: &File, at: usize, len: usize, offset: i64) -> Result<()> {
        // SAFETY: the range is inside the mapping, whose contents are used by atomics only.
        let done = unsafe { libc::pread(file.as_raw_fd(), self.range(at, len), len, offset) };
        all_of("pread", come_to("pread", done)?, len)
    }
}

fn come_to(what: &str, done: isize) -> Result<usize> {
    match usize::try_from(done) {
        Ok(done) => Ok(done),
        Err(_) => bail!("{what}: {}", std::io::Error::last_os_error()),
    }
}

fn all_of(what: &str, done: usize, len: usize) -> Result<()> {
    if done != len {
        bail!("{what}: {done} of {len} bytes");
    }
    Ok(())
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let _ = self.file.sync_all();
        // SAFETY: mapped by new(), and nothing borrows from it any more.
        unsafe { libc::munmap(self.base, self.len) };
    }
}
