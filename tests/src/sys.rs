//! System calls that `std` lacks, and errors that name the file.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::AtomicU64;

use rustix::fs::{AtFlags, CWD, FallocateFlags, RenameFlags, Timespec, Timestamps, XattrFlags};

/// The errno of a result, 0 for success.
pub fn errno<T>(result: &io::Result<T>) -> i32 {
    result
        .as_ref()
        .err()
        .map_or(0, |e| e.raw_os_error().unwrap_or(-1))
}

/// The calling thread runs on this processor only.
///
/// # Errors
/// There is no such processor.
pub fn stay_on(cpu: usize) -> io::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

/// The calling thread gets what others leave of the processor, and little else.
///
/// # Errors
/// Those of setpriority(2).
pub fn be_last() -> io::Result<()> {
    Ok(rustix::process::nice(19).map(drop)?)
}

/// Opens with any flags, mode 0666.
///
/// # Errors
/// Those of open(2).
pub fn open(path: &Path, flags: i32) -> io::Result<File> {
    let raw = rustix::fs::OFlags::from_bits_retain(flags as u32) | rustix::fs::OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::open(
        path,
        raw,
        rustix::fs::Mode::from_raw_mode(0o666),
    )?))
}

/// Reads `len` bytes at `offset`, fewer at the end of the file.
///
/// # Errors
/// Those of pread(2).
pub fn read_at(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0; len];
    let mut done = 0;
    while done < len {
        match file.read_at(&mut data[done..], offset + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    data.truncate(done);
    Ok(data)
}

/// pwritev2(2) of one buffer, with flags such as `RWF_DSYNC` or `RWF_APPEND`.
///
/// # Errors
/// Those of the call; a short write.
pub fn write_with(file: &File, offset: u64, data: &[u8], flags: i32) -> io::Result<()> {
    let flags = rustix::io::ReadWriteFlags::from_bits_retain(flags as u32);
    let done = rustix::io::pwritev2(file, &[io::IoSlice::new(data)], offset, flags)?;
    if done == data.len() {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::WriteZero, "a short write"))
}

/// fallocate(2) with mode bits: 0, or KEEP_SIZE | PUNCH_HOLE, or ZERO_RANGE.
///
/// # Errors
/// Those of the call.
pub fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::from_bits_retain(mode as u32);
    Ok(rustix::fs::fallocate(file, flags, offset, len)?)
}

/// Punches a hole.
///
/// # Errors
/// Those of fallocate(2).
pub fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    fallocate(
        file,
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        offset,
        len,
    )
}

/// copy_file_range(2) until all is copied or the source ends.
///
/// # Errors
/// Those of the call.
pub fn copy_range(from: &File, mut at: u64, to: &File, mut target: u64, len: usize) -> io::Result<usize> {
    let mut done = 0;
    while done < len {
        match rustix::fs::copy_file_range(from, Some(&mut at), to, Some(&mut target), len - done)? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}

/// The next data at or after `offset`.
///
/// # Errors
/// Those of lseek(2), ENXIO for none.
pub fn seek_data(file: &File, offset: u64) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset))?)
}

/// The next hole at or after `offset`.
///
/// # Errors
/// Those of lseek(2).
pub fn seek_hole(file: &File, offset: u64) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(offset))?)
}

/// setxattr(2); `flags` as there.
///
/// # Errors
/// Those of the call.
pub fn setxattr(path: &Path, name: &str, value: &[u8], flags: i32) -> io::Result<()> {
    Ok(rustix::fs::lsetxattr(
        path,
        name,
        value,
        XattrFlags::from_bits_retain(flags as u32),
    )?)
}

/// getxattr(2).
///
/// # Errors
/// Those of the call.
pub fn getxattr(path: &Path, name: &str) -> io::Result<Vec<u8>> {
    let mut value = vec![0u8; 65536];
    let n = rustix::fs::lgetxattr(path, name, &mut value[..])?;
    value.truncate(n);
    Ok(value)
}

/// listxattr(2), sorted.
///
/// # Errors
/// Those of the call.
pub fn listxattr(path: &Path) -> io::Result<Vec<String>> {
    let mut list = vec![0u8; 65536];
    let n = rustix::fs::llistxattr(path, &mut list[..])?;
    let names = list[..n].split(|b| *b == 0).filter(|s| !s.is_empty());
    let mut names: Vec<String> = names.map(|s| String::from_utf8_lossy(s).into_owned()).collect();
    names.sort();
    Ok(names)
}

/// removexattr(2).
///
/// # Errors
/// Those of the call.
pub fn removexattr(path: &Path, name: &str) -> io::Result<()> {
    Ok(rustix::fs::lremovexattr(path, name)?)
}

/// utimensat(2): access and modification times as (seconds, nanoseconds).
///
/// # Errors
/// Those of the call.
pub fn utimens(path: &Path, atime: (i64, i64), mtime: (i64, i64)) -> io::Result<()> {
    let spec = |(tv_sec, tv_nsec): (i64, i64)| Timespec { tv_sec, tv_nsec };
    let times = Timestamps {
        last_access: spec(atime),
        last_modification: spec(mtime),
    };
    Ok(rustix::fs::utimensat(
        CWD,
        path,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

/// renameat2(2).
///
/// # Errors
/// Those of the call.
pub fn rename2(from: &Path, to: &Path, flags: RenameFlags) -> io::Result<()> {
    Ok(rustix::fs::renameat_with(CWD, from, CWD, to, flags)?)
}

/// mknod(2).
///
/// # Errors
/// Those of the call.
pub fn mknod(path: &Path, mode: u32, device: u64) -> io::Result<()> {
    let kind = rustix::fs::FileType::from_raw_mode(mode);
    Ok(rustix::fs::mknodat(
        CWD,
        path,
        kind,
        rustix::fs::Mode::from_raw_mode(mode & 0o7777),
        device,
    )?)
}

/// A byte-range lock of this process: `kind` is F_RDLCK, F_WRLCK or F_UNLCK; waits if `wait`.
///
/// # Errors
/// Those of fcntl(2), EAGAIN if somebody else has it.
pub fn lock(file: &File, kind: i32, start: i64, len: i64, wait: bool) -> io::Result<()> {
    let spec = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    let command = if wait { libc::F_SETLKW } else { libc::F_SETLK };
    // SAFETY: the descriptor is open and `spec` outlives the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &spec) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether somebody else has a lock that conflicts with a write lock there (F_GETLK).
///
/// # Errors
/// Those of fcntl(2).
pub fn locked(file: &File, start: i64, len: i64) -> io::Result<bool> {
    let mut spec = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open and `spec` outlives the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &mut spec) } {
        0 => Ok(i32::from(spec.l_type) != libc::F_UNLCK),
        _ => Err(io::Error::last_os_error()),
    }
}

fn write_lock(start: i64, len: i64) -> libc::flock {
    // SAFETY: plain numbers, for which zero is a value.
    let mut spec: libc::flock = unsafe { std::mem::zeroed() };
    spec.l_type = libc::F_WRLCK as libc::c_short;
    spec.l_whence = libc::SEEK_SET as libc::c_short;
    (spec.l_start, spec.l_len) = (start, len);
    spec
}

/// F_OFD_SETLK: a lock of the open file description.
///
/// # Errors
/// Those of fcntl(2), EAGAIN if somebody else has it.
pub fn ofd_lock(file: &File, kind: i32, start: i64, len: i64) -> io::Result<()> {
    let mut spec = write_lock(start, len);
    spec.l_type = kind as libc::c_short;
    // SAFETY: the descriptor is open and the structure is initialised.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &spec) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// F_GETLK: the process that is in the way of a write lock.
///
/// # Errors
/// Those of fcntl(2).
pub fn lock_holder(file: &File, start: i64, len: i64) -> io::Result<Option<i32>> {
    let mut spec = write_lock(start, len);
    // SAFETY: the descriptor is open and the structure is initialised.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &mut spec) } {
        0 => Ok((i32::from(spec.l_type) != libc::F_UNLCK).then_some(spec.l_pid)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// flock(2) with the operation as there.
///
/// # Errors
/// Those of the call, EAGAIN if somebody else has it.
pub fn flock(file: &File, operation: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open.
    match unsafe { libc::flock(file.as_raw_fd(), operation) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Writes at the end of a file, wherever that is, as pwritev2(2) does with `RWF_APPEND`.
///
/// # Errors
/// Those of the call.
pub fn append(file: &File, data: &[u8]) -> io::Result<usize> {
    let part = libc::iovec {
        iov_base: data.as_ptr().cast_mut().cast(),
        iov_len: data.len(),
    };
    // SAFETY: one part, which is only read and as long as it says.
    let n = unsafe { libc::pwritev2(file.as_raw_fd(), &raw const part, 1, 0, libc::RWF_APPEND) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// A shared mapping of a file.
#[derive(Debug)]
pub struct Map {
    address: *mut u8,
    len: usize,
    writable: bool,
}

impl Map {
    /// Maps the first `len` bytes for reading.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn new(file: &File, len: usize) -> io::Result<Self> {
        Self::with(file, len, false)
    }

    /// Maps the first `len` bytes for reading and writing.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn writable(file: &File, len: usize) -> io::Result<Self> {
        Self::with(file, len, true)
    }

    fn with(file: &File, len: usize, writable: bool) -> io::Result<Self> {
        let write = if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | write,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            address: address.cast(),
            len,
            writable,
        })
    }

    /// Copies bytes out; the range must lie within the file, or the kernel ends the program by SIGBUS.
    #[must_use]
    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= self.len, "outside of the mapping");
        // SAFETY: within the mapping; volatile, as other processes change the memory.
        (offset..offset + len)
            .map(|i| unsafe { self.address.add(i).read_volatile() })
            .collect()
    }

    /// Copies bytes in; as [`Map::read`].
    pub fn write(&self, offset: usize, data: &[u8]) {
        assert!(
            self.writable && offset + data.len() <= self.len,
            "outside of the mapping"
        );
        for (i, byte) in data.iter().enumerate() {
            // SAFETY: within the mapping, which is writable; volatile, as other processes look at the memory.
            unsafe { self.address.add(offset + i).write_volatile(*byte) };
        }
    }

    /// msync(2) of all of it, with the flags as there.
    ///
    /// # Errors
    /// Those of the call.
    pub fn sync(&self, flags: i32) -> io::Result<()> {
        // SAFETY: the range is that of the mapping.
        match unsafe { libc::msync(self.address.cast(), self.len, flags) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// How many of its pages the kernel has in memory.
    ///
    /// # Errors
    /// Those of mincore(2).
    pub fn resident(&self) -> io::Result<usize> {
        let mut pages = vec![0u8; self.len.div_ceil(4096)];
        // SAFETY: there is a byte for each page of the mapping.
        match unsafe { libc::mincore(self.address.cast(), self.len, pages.as_mut_ptr()) } {
            0 => Ok(pages.iter().filter(|page| **page & 1 != 0).count()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The word at an offset that is a multiple of 8.
    #[must_use]
    pub fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(
            self.writable && offset.is_multiple_of(8) && offset + 8 <= self.len,
            "no word of the mapping"
        );
        // SAFETY: within the writable mapping, which outlives the reference, and aligned, as pages are; all threads of
        // this program use it as an atomic.
        unsafe { AtomicU64::from_ptr(self.address.add(offset).cast()) }
    }
}

// SAFETY: the memory belongs to no thread, and is only used by volatile and atomic accesses.
unsafe impl Sync for Map {}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing points into it any more.
        unsafe { libc::munmap(self.address.cast(), self.len) };
    }
}

/// Runs `job` on a thread with another user's rights (and none of root's).
///
/// # Errors
/// The system refuses the change of user.
pub fn as_user<T: Send>(uid: u32, gid: u32, job: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            // The raw calls change this thread only; those of the C library change the whole process.
            let check = |result: i64| {
                if result == 0 {
                    Ok(())
                } else {
                    Err(io::Error::last_os_error())
                }
            };
            // SAFETY: no memory is involved (an empty list of groups).
            check(unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) })?;
            // SAFETY: no memory is involved.
            check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
            // SAFETY: no memory is involved.
            check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
            Ok(job())
        });
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the job panicked")))
    })
}

/// truncate(2) by path.
///
/// # Errors
/// Those of the call.
pub fn truncate(path: &Path, len: i64) -> io::Result<()> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the name is a string that ends with a zero byte.
    match unsafe { libc::truncate(name.as_ptr(), len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
