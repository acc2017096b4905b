//! Shared memory: the only place where raw pointers into it are used.
//!
//! Nothing here ever forms a reference to shared bytes other than `&AtomicU64`: other processes change them
//! at any time. Bulk copies race by design of the fabric (as DMA does); who may race with whom is decided by
//! the leases above, and a racing copy yields stale or mixed *values*, never a broken invariant of this
//! process. Small aligned copies go word by word, so a reader never sees a torn word.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::TransportError;

/// Aligned copies up to this length are made word by word with atomic loads and stores.
const WORDWISE: usize = 512;

/// A mapping of memory that other processes may map, too.
#[derive(Debug)]
pub struct SharedMem {
    fd: OwnedFd,
    base: NonNull<u8>,
    len: usize,
    name: String,
}

// SAFETY: the mapping is owned by this value, lives until drop, and is only accessed by bounds-checked raw
// copies and atomics, which may be done from any thread.
unsafe impl Send for SharedMem {}
// SAFETY: as above; no method hands out a reference to plain (non-atomic) shared bytes.
unsafe impl Sync for SharedMem {}

impl SharedMem {
    /// Memory without a name that lives as long as somebody has it mapped. Zeroed.
    ///
    /// # Errors
    /// [`TransportError::Invalid`] for length 0, [`TransportError::Os`] where the system refuses.
    pub fn anonymous(len: usize) -> Result<Self, TransportError> {
        let name = format!("anonymous memory of {len} bytes");
        let os = |what: &str, e: rustix::io::Errno| TransportError::os(format!("{what} {name}"), &e.into());
        let fd = rustix::fs::memfd_create("distfuse", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|e| os("create", e))?;
        rustix::fs::ftruncate(&fd, len as u64).map_err(|e| os("size", e))?;
        // Nobody we hand it to can make it smaller and so turn our accesses into SIGBUS.
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).map_err(|e| os("seal", e))?;
        Self::map(fd, len, name)
    }

    /// Memory in a named file (created, or extended if shorter), which survives the process; on tmpfs
    /// (`/dev/shm/x`) it is memory and nothing else. With `reserve`, all of it is allocated now: a full
    /// file system is then an error here instead of a SIGBUS later.
    ///
    /// The file is its owner's alone, and one that somebody else made, or a link, is refused: in a folder that
    /// everybody may write to, others could have put it there to read what is written to it.
    ///
    /// # Errors
    /// [`TransportError::Invalid`] for length 0, [`TransportError::Os`] where the system refuses.
    pub fn open_file(path: &Path, len: usize, reserve: bool) -> Result<Self, TransportError> {
        let name = path.display().to_string();
        let os = |what: String, e: rustix::io::Errno| TransportError::os(what, &e.into());
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let private = Mode::RUSR | Mode::WUSR;
        let fd = match rustix::fs::open(path, flags, Mode::empty()) {
            Err(rustix::io::Errno::NOENT) => {
                rustix::fs::open(path, flags | OFlags::CREATE | OFlags::EXCL, private)
            }
            other => other,
        }
        .map_err(|e| os(format!("open memory file {name}"), e))?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| os(format!("examine memory file {name}"), e))?;
        let regular = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file();
        if !regular || stat.st_uid != rustix::process::geteuid().as_raw() {
            return Err(TransportError::Invalid(format!(
                "memory file {name} is not a file of the user who runs this: remove it"
            )));
        }
        if stat.st_mode & 0o777 != 0o600 {
            rustix::fs::fchmod(&fd, private).map_err(|e| os(format!("protect memory file {name}"), e))?;
        }
        if u64::try_from(stat.st_size).unwrap_or(0) < len as u64 {
            rustix::fs::ftruncate(&fd, len as u64)
                .map_err(|e| os(format!("extend memory file {name} to {len} bytes"), e))?;
        }
        if reserve && len > 0 {
            rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, len as u64)
                .map_err(|e| os(format!("reserve {len} bytes for memory file {name}"), e))?;
        }
        Self::map(fd, len, name)
    }

    /// Allocates part of the memory of a named file: what is touched there from now on cannot meet a full memory
    /// file system, which would be a SIGBUS.
    ///
    /// # Errors
    /// [`TransportError::Os`] where the memory file system is full, [`TransportError::Invalid`] outside of the memory.
    pub fn reserve(&self, off: usize, len: usize) -> Result<(), TransportError> {
        self.at(off, len)?;
        rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), off as u64, len as u64).map_err(|e| {
            TransportError::os(
                format!("reserve {len} bytes for memory file {}", self.name),
                &e.into(),
            )
        })
    }

    /// Gives part of the memory back to the system; it is zero when it is touched again. Not for memory that a device
    /// has pinned: the device would go on with the pages that were there.
    ///
    /// # Errors
    /// [`TransportError::Os`] where the system refuses, [`TransportError::Invalid`] outside of the memory.
    pub fn give_back(&self, off: usize, len: usize) -> Result<(), TransportError> {
        self.at(off, len)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.fd, flags, off as u64, len as u64).map_err(|e| {
            TransportError::os(
                format!("give {len} bytes of memory file {} back", self.name),
                &e.into(),
            )
        })
    }

    /// What the memory file system has left, bytes.
    ///
    /// # Errors
    /// [`TransportError::Os`] where the system cannot say.
    pub fn file_system_free(&self) -> Result<u64, TransportError> {
        let stat = rustix::fs::fstatvfs(&self.fd).map_err(|e| {
            TransportError::os(format!("examine the file system of {}", self.name), &e.into())
        })?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Maps what a peer has passed, after checking that it is as long as the peer says.
    pub(crate) fn from_fd(fd: OwnedFd, len: usize, name: String) -> Result<Self, TransportError> {
        let stat =
            rustix::fs::fstat(&fd).map_err(|e| TransportError::os(format!("examine {name}"), &e.into()))?;
        if u64::try_from(stat.st_size).unwrap_or(0) < len as u64 {
            return Err(TransportError::Invalid(format!(
                "{name} is shorter than the {len} bytes announced"
            )));
        }
        Self::map(fd, len, name)
    }

    fn map(fd: OwnedFd, len: usize, name: String) -> Result<Self, TransportError> {
        if len == 0 || isize::try_from(len).is_err() {
            return Err(TransportError::Invalid(format!(
                "{name}: shared memory of {len} bytes"
            )));
        }
        // SAFETY: a new mapping at an address of the kernel's choice; it aliases nothing of this process.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )
        }
        .map_err(|e| TransportError::os(format!("map {len} bytes of {name}"), &e.into()))?;
        let Some(base) = NonNull::new(base.cast::<u8>()) else {
            return Err(TransportError::Invalid(format!(
                "{name} was mapped at address zero"
            )));
        };
        Ok(Self { fd, base, len, name })
    }

    /// Length, bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true; for symmetry with `len`.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What it is, for messages to humans: the path of a named file.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file behind it.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The pointer to `len` bytes at `off`, for memory that the caller has to itself.
    pub(crate) fn pointer(&self, off: usize, len: usize) -> Result<NonNull<u8>, TransportError> {
        self.at(off, len)
    }

    /// Where it is mapped.
    #[cfg(feature = "verbs")]
    pub(crate) fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Whether `len` bytes at `off` lie inside.
    #[must_use]
    pub fn contains(&self, off: usize, len: usize) -> bool {
        off.checked_add(len).is_some_and(|end| end <= self.len)
    }

    /// The pointer to `off` once `off..off+len` is known to lie inside.
    fn at(&self, off: usize, len: usize) -> Result<NonNull<u8>, TransportError> {
        if !self.contains(off, len) {
            return Err(TransportError::Invalid(format!(
                "bytes {off}..+{len} lie outside of {} ({} bytes)",
                self.name, self.len
            )));
        }
        // SAFETY: `off <= self.len`, so the result is inside the mapping or one past its end.
        Ok(unsafe { self.base.add(off) })
    }

    /// Copies from shared memory.
    ///
    /// # Errors
    /// [`TransportError::Invalid`] outside of the memory.
    #[inline]
    pub fn read_at(&self, off: usize, into: &mut [u8]) -> Result<(), TransportError> {
        let from = self.at(off, into.len())?;
        if off.is_multiple_of(8) && into.len().is_multiple_of(8) && into.len() <= WORDWISE {
            for (i, chunk) in into.chunks_exact_mut(8).enumerate() {
                // SAFETY: in bounds (checked above) and 8-aligned: the base is page-aligned, `off` and the
                // step are multiples of 8.
                let word = unsafe { from.add(i * 8).cast::<AtomicU64>().as_ref() };
                chunk.copy_from_slice(&word.load(Ordering::Acquire).to_ne_bytes());
            }
        } else {
            // SAFETY: source in bounds; the destination is private memory, which never overlaps a mapping.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), into.len()) }
        }
        Ok(())
    }

    /// Copies into shared memory.
    ///
    /// # Errors
    /// [`TransportError::Invalid`] outside of the memory.
    #[inline]
    pub fn write_at(&self, off: usize, from: &[u8]) -> Result<(), TransportError> {
        let to = self.at(off, from.len())?;
        if off.is_multiple_of(8) && from.len().is_multiple_of(8) && from.len() <= WORDWISE {
            let (words, _) = from.as_chunks::<8>();
            for (i, value) in words.iter().enumerate() {
                // SAFETY: in bounds (checked above) and 8-aligned, as in `read_at`.
                let word = unsafe { to.add(i * 8).cast::<AtomicU64>().as_ref() };
                word.store(u64::from_ne_bytes(*value), Ordering::Release);
            }
        } else {
            // SAFETY: destination in bounds; the source is private memory, which never overlaps a mapping.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), from.len()) }
        }
        Ok(())
    }

    /// Fills with zeros.
    ///
    /// # Errors
    /// [`TransportError::Invalid`] outside of the memory.
    pub fn zero(&self, off: usize, len: usize) -> Result<(), TransportError> {
        let to = self.at(off, len)?;
        // SAFETY: in bounds.
        unsafe { std::ptr::write_bytes(to.as_ptr(), 0, len) }
        Ok(())
    }

    /// Copies within the memory; the ranges may overlap.
    ///
    /// # Errors
    /// [`TransportError::Invalid`] outside of the memory.
    pub fn copy_within(&self, src: usize, dst: usize, len: usize) -> Result<(), TransportError> {
        let from = self.at(src, len)?;
        let to = self.at(dst, len)?;
        // SAFETY: both in bounds; `copy` allows overlap.
        unsafe { std::ptr::copy(from.as_ptr(), to.as_ptr(), len) }
        Ok(())
    }

    /// The word at `off`.
    ///
    /// # Errors
    /// [`TransportError::Invalid`] outside of the memory or misaligned.
    #[inline]
    pub fn word(&self, off: usize) -> Result<&AtomicU64, TransportError> {
        if !off.is_multiple_of(8) {
            return Err(TransportError::Invalid(format!(
                "word at {off} is not 8-byte aligned"
            )));
        }
        let at = self.at(off, 8)?;
        // SAFETY: in bounds, aligned, and the mapping outlives the borrow of `self`.
        Ok(unsafe { at.cast::<AtomicU64>().as_ref() })
    }

    /// Puts `new` into the word at `off` if that is `expect`; what it was.
    ///
    /// # Errors
    /// As [`SharedMem::word`].
    #[inline]
    pub(crate) fn compare_and_swap(&self, off: usize, expect: u64, new: u64) -> Result<u64, TransportError> {
        let word = self.word(off)?;
        match word.compare_exchange(expect, new, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(old) | Err(old) => Ok(old),
        }
    }

    /// A word of a layout that this crate has defined itself and whose length was checked when it was mapped:
    /// an offset outside is a bug, not an input.
    #[inline]
    pub(crate) fn own_word(&self, off: usize) -> &AtomicU64 {
        assert!(
            off.is_multiple_of(8) && self.contains(off, 8),
            "layout of {} broken at {off}",
            self.name
        );
        // SAFETY: in bounds, aligned, and the mapping outlives the borrow of `self`.
        unsafe { self.base.add(off).cast::<AtomicU64>().as_ref() }
    }

    /// Receives from a nonblocking socket straight into the memory.
    pub(crate) fn recv_from(&self, sock: BorrowedFd<'_>, off: usize, len: usize) -> io::Result<usize> {
        let to = self.at(off, len).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most `len` bytes, in bounds of the mapping.
        socket_io(sock, to.as_ptr(), len, |fd, p, n| unsafe {
            libc::recv(fd, p.cast(), n, 0)
        })
    }

    /// Sends on a nonblocking socket straight from the memory.
    pub(crate) fn send_to(&self, sock: BorrowedFd<'_>, off: usize, len: usize) -> io::Result<usize> {
        let from = self.at(off, len).map_err(io::Error::other)?;
        // SAFETY: the kernel reads at most `len` bytes, in bounds of the mapping.
        socket_io(sock, from.as_ptr(), len, |fd, p, n| unsafe {
            libc::send(fd, p.cast(), n, libc::MSG_NOSIGNAL)
        })
    }
}

impl Drop for SharedMem {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and no borrow of it is left.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        if let Err(error) = unmapped {
            tracing::error!("unmap {}: {error}", self.name);
        }
    }
}

fn socket_io(
    sock: BorrowedFd<'_>,
    at: *mut u8,
    len: usize,
    call: impl Fn(i32, *mut u8, usize) -> isize,
) -> io::Result<usize> {
    loop {
        match usize::try_from(call(sock.as_raw_fd(), at, len)) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// A caller's buffer lent to the progress thread while the caller is blocked.
///
/// This is how a blocking operation moves megabytes without a copy in between. Whoever lends must not return
/// before every `Lent` made from the buffer has been dropped or can no longer be used; `tcp::conn` keeps that
/// promise by removing them under the lock that users of them hold.
#[derive(Debug)]
pub(crate) struct Lent {
    at: *mut u8,
    len: usize,
    writable: bool,
}

// SAFETY: the buffer is borrowed exclusively (or shared, for reading) by the blocked lender; moving the
// pointer to another thread moves that right.
unsafe impl Send for Lent {}

impl Lent {
    /// # Safety
    /// The result must not be used after the borrow behind `buffer` has ended.
    pub(crate) unsafe fn writable(buffer: &mut [u8]) -> Self {
        Self {
            at: buffer.as_mut_ptr(),
            len: buffer.len(),
            writable: true,
        }
    }

    /// # Safety
    /// The result must not be used after the borrow behind `buffer` has ended.
    pub(crate) unsafe fn readable(buffer: &[u8]) -> Self {
        Self {
            at: buffer.as_ptr().cast_mut(),
            len: buffer.len(),
            writable: false,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Copies `from` to position `off`; false if it does not fit.
    pub(crate) fn fill(&mut self, off: usize, from: &[u8]) -> bool {
        let fits = self.writable && off.checked_add(from.len()).is_some_and(|end| end <= self.len);
        if fits {
            // SAFETY: in bounds, lent for writing, and valid by the contract of `writable`.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.at.add(off), from.len()) }
        }
        fits
    }

    /// Receives from a nonblocking socket to position `off`, at most up to the end.
    pub(crate) fn recv_from(&mut self, sock: BorrowedFd<'_>, off: usize) -> io::Result<usize> {
        if !self.writable || off > self.len {
            return Err(io::Error::other("receive beyond a lent buffer"));
        }
        // SAFETY: `off <= len`; the buffer is valid by the contract of `writable`.
        let at = unsafe { self.at.add(off) };
        // SAFETY: the kernel writes at most to the end of the buffer.
        socket_io(sock, at, self.len - off, |fd, p, n| unsafe {
            libc::recv(fd, p.cast(), n, 0)
        })
    }

    /// Sends on a nonblocking socket from position `off`.
    pub(crate) fn send_to(&self, sock: BorrowedFd<'_>, off: usize) -> io::Result<usize> {
        if off > self.len {
            return Err(io::Error::other("send beyond a lent buffer"));
        }
        // SAFETY: `off <= len`; the buffer is valid by the contract of `readable`/`writable`.
        let at = unsafe { self.at.add(off) };
        // SAFETY: the kernel reads at most to the end of the buffer.
        socket_io(sock, at, self.len - off, |fd, p, n| unsafe {
            libc::send(fd, p.cast(), n, libc::MSG_NOSIGNAL)
        })
    }
}

#[cfg(test)]
#[path = "mem_tests.rs"]
mod tests;
