//! Descriptors and threads that the FUSE library keeps to itself, by their numbers.

use std::fs;
use std::io;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use rustix::io::DupFlags;

/// The device, as /proc shows what a descriptor is of.
const DEVICE: &str = "/dev/fuse";
/// Sent to a thread to end the read(2) that it is in. It has no other use here: no socket asks for it.
const WAKE: i32 = libc::SIGURG;

/// The numbers of this process's descriptors of the device, but for `ours`.
///
/// # Errors
/// /proc cannot be read.
pub(super) fn devices(ours: &[RawFd]) -> io::Result<Vec<RawFd>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        let number = entry.file_name().to_string_lossy().parse();
        let is_device = fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == DEVICE);
        if let Ok(number) = number
            && is_device
            && !ours.contains(&number)
        {
            found.push(number);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Another descriptor of the same open file.
///
/// # Errors
/// There is no such descriptor, or no number is left.
pub(super) fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the number was found a moment ago as one of the library's. Should it be another file's by now, or none, the duplicate is of
    // that, or there is an error: this call only makes a new descriptor.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    Ok(rustix::io::fcntl_dupfd_cloexec(borrowed, 3)?)
}

/// Answers a request over a descriptor of the device.
///
/// # Errors
/// Those of write(2); ENOENT: the request was not read from that one, or has been given up.
pub(super) fn answer(number: RawFd, message: &[u8]) -> rustix::io::Result<()> {
    // SAFETY: the number was found as one of the library's, which it keeps as long as its loops run, and a loop is what calls this. Should it
    // be another file's after all, that gets bytes, as it would from write(2) with any number.
    let device = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::write(device, message).map(drop)
}

/// Has a number of the library's stand for another open file. A read(2) that is under way goes on with the one of before.
///
/// # Errors
/// Those of dup3(2).
pub(super) fn put_over(file: impl AsFd, number: RawFd) -> io::Result<()> {
    // SAFETY: the library owns the number for as long as its loops run, and never takes it apart: for it, the number goes on being a
    // descriptor that it reads requests from and writes answers to. It is not closed here, for it is not dropped.
    let mut over = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
    Ok(rustix::io::dup3(file, &mut over, DupFlags::CLOEXEC)?)
}

/// The library's threads that read requests.
///
/// # Errors
/// /proc cannot be read.
pub(super) fn loops() -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/self/task")? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        // Those, and not the one that waits for their end.
        let number = name.trim_end().strip_prefix("fuser-");
        if number.is_some_and(|n| n.parse::<usize>().is_ok()) {
            found.extend(entry.file_name().to_string_lossy().parse::<i32>().ok());
        }
    }
    Ok(found)
}

/// Is a thread of this process in a read(2)? Where that cannot be told it counts as one that is.
pub(super) fn reads(thread: i32) -> bool {
    let call = fs::read_to_string(format!("/proc/self/task/{thread}/syscall"));
    call.map_or(true, |call| {
        call.split_whitespace().next() == Some(&libc::SYS_read.to_string())
    })
}

/// Does nothing: that the signal has come ends the call.
extern "C" fn woken(_: libc::c_int) {}

/// Ends the read(2) that a thread of this process is in; it reads again, from what its number stands for by then.
///
/// # Errors
/// The system refuses.
pub(super) fn wake(thread: i32) -> io::Result<()> {
    static READY: OnceLock<Result<(), i32>> = OnceLock::new();
    let ready = READY.get_or_init(|| {
        let handler: extern "C" fn(libc::c_int) = woken;
        // SAFETY: a sigaction of zeros is a valid one; what matters is set.
        let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        action.sa_sigaction = handler as libc::sighandler_t;
        // Calls of a thread that is no longer in its read go on as if nothing had come.
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the handler does nothing, so it may run at any time; the old action is not asked for.
        match unsafe { libc::sigaction(WAKE, &raw const action, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)),
        }
    });
    ready.map_err(io::Error::from_raw_os_error)?;
    let process = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: takes numbers only. A thread that has ended meanwhile is an error; one of this process that has got its number has the handler
    // above as well.
    match unsafe { libc::syscall(libc::SYS_tgkill, process, thread, WAKE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
