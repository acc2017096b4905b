//! The system calls, and the mapped area: all of the crate's unsafe code.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::time::Duration;

use crate::error::Error;
use crate::layout::{self, Attach, Entry, Shared};
use crate::ring::Slots;
use crate::sync::{AtomicU64, Ordering};

fn ioctl(device: &File, request: u64, argument: *mut libc::c_void) -> io::Result<()> {
    // SAFETY: the callers pass what the request reads and writes.
    match unsafe { libc::ioctl(device.as_raw_fd(), request as libc::Ioctl, argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

pub(crate) fn version(device: &File) -> io::Result<u32> {
    let mut version = 0u32;
    ioctl(device, layout::IOC_VERSION, (&raw mut version).cast()).map(|()| version)
}

pub(crate) fn attach(device: &File, attach: &mut Attach) -> io::Result<()> {
    ioctl(device, layout::IOC_ATTACH, (&raw mut *attach).cast())
}

pub(crate) fn kick(device: &File) -> io::Result<()> {
    ioctl(device, layout::IOC_KICK, std::ptr::null_mut())
}

/// Waits until the device has something to be read. Whether it has; also true where a signal came.
pub(crate) fn poll(device: &File, timeout: Option<Duration>) -> io::Result<bool> {
    let mut fd = libc::pollfd {
        fd: device.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // Rounded up, so that a short time is no busy loop.
    let timeout = timeout.map_or(-1, |time| {
        i32::try_from(time.as_millis().saturating_add(1)).unwrap_or(i32::MAX)
    });
    // SAFETY: one descriptor, as said.
    match unsafe { libc::poll(&raw mut fd, 1, timeout) } {
        0 => Ok(false),
        1 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            error => Err(error),
        },
    }
}

/// The mapped area. The kernel changes it at any time, so all access is by atomics.
#[derive(Debug)]
pub(crate) struct Map {
    base: NonNull<u8>,
    layout: Attach,
}

// SAFETY: it is shared with another party already; everything is reached by atomics.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    pub(crate) fn new(device: &File, layout: Attach) -> Result<Map, Error> {
        let size = usize::try_from(layout.map_size).unwrap_or(usize::MAX);
        let fits = |offset: u64, each: usize, count: u64| {
            offset.is_multiple_of(64)
                && offset
                    .checked_add(each as u64 * count)
                    .is_some_and(|end| end <= layout.map_size)
        };
        let sane = fits(0, size_of::<Shared>(), 1)
            && fits(
                layout.counters_offset,
                8 * layout::COUNTERS_STRIDE,
                layout.cpus.into(),
            )
            && fits(
                layout.events_offset,
                size_of::<layout::Event>(),
                layout.events.into(),
            )
            && fits(
                layout.commands_offset,
                size_of::<layout::Command>(),
                layout.commands.into(),
            )
            && fits(layout.table_offset, size_of::<Entry>(), layout.entries.into())
            && fits(layout.buffers_offset, layout::BUFFER_SIZE, layout.buffers.into())
            && layout.events.is_power_of_two()
            && layout.commands.is_power_of_two()
            && layout.entries.is_power_of_two()
            && layout.entries >= layout::MIN_ENTRIES;
        if !sane {
            return Err(Error::System {
                what: "attach",
                source: io::ErrorKind::InvalidData.into(),
            });
        }
        // SAFETY: a new mapping, where the kernel likes.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                device.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(base.cast::<u8>()) {
            Some(start) if base != libc::MAP_FAILED => Ok(Map { base: start, layout }),
            _ => Err(Error::System {
                what: "map the lease table",
                source: io::Error::last_os_error(),
            }),
        }
    }

    /// A map over ordinary memory, for tests.
    #[cfg(test)]
    pub(crate) fn anonymous(entries: u32) -> Map {
        let table = 4096 * 4;
        let layout = Attach {
            entries,
            events: 16,
            commands: 16,
            cpus: 1,
            counters_offset: 4096,
            events_offset: 8192,
            commands_offset: 4096 * 3,
            table_offset: table,
            map_size: table + 128 * u64::from(entries),
            ..Attach::default()
        };
        // SAFETY: a new mapping of its own.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                layout.map_size as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        Map {
            base: NonNull::new(base.cast()).unwrap(),
            layout,
        }
    }

    fn at<T>(&self, offset: u64, count: usize) -> &[T] {
        // SAFETY: new() has checked that it is inside, and aligned; T is made of atomics, for which all
        // bits are right; the mapping lives as long as self.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(offset as usize).cast(), count) }
    }

    pub(crate) fn layout(&self) -> &Attach {
        &self.layout
    }

    pub(crate) fn shared(&self) -> &Shared {
        // SAFETY: as in at(). The fields without atomics are not read after attaching, but for abi, which
        // the kernel does not change.
        unsafe { self.base.cast::<Shared>().as_ref() }
    }

    pub(crate) fn counters(&self) -> &[AtomicU64] {
        self.at(
            self.layout.counters_offset,
            layout::COUNTERS_STRIDE * self.layout.cpus as usize,
        )
    }

    pub(crate) fn table(&self) -> &[Entry] {
        self.at(self.layout.table_offset, self.layout.entries as usize)
    }

    /// A call's buffer; none of that number: empty.
    pub(crate) fn buffer(&self, number: u32) -> &[AtomicU64] {
        let words = layout::BUFFER_SIZE / 8;
        let all = self.at(self.layout.buffers_offset, words * self.layout.buffers as usize);
        all.chunks(words).nth(number as usize).unwrap_or(&[])
    }

    pub(crate) fn events(&self) -> Words<'_, 8> {
        Words(self.at(self.layout.events_offset, self.layout.events as usize))
    }

    pub(crate) fn commands(&self) -> Words<'_, 4> {
        Words(self.at(self.layout.commands_offset, self.layout.commands as usize))
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped by new(), and nothing borrows from it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.layout.map_size as usize) };
    }
}

/// Slots of `N` words each: what the kernel breaks its own rules with is a wrong value and no undefined one.
pub(crate) struct Words<'a, const N: usize>(&'a [[AtomicU64; N]]);

/// What is as large as `N` words, and made of integers.
///
/// # Safety
/// All bits must be right for it, and its size `N * 8`.
pub(crate) unsafe trait Plain<const N: usize>: Copy {}
// SAFETY: integers, without holes.
unsafe impl Plain<8> for layout::Event {}
// SAFETY: integers, without holes.
unsafe impl Plain<4> for layout::Command {}

impl<const N: usize, T: Plain<N>> Slots<T> for Words<'_, N> {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn put(&self, index: u64, value: T) {
        // SAFETY: Plain says that the sizes are the same, and that there are no holes.
        let words: [u64; N] = unsafe { std::mem::transmute_copy(&value) };
        let slot = self.0.get((index & (self.0.len() as u64 - 1)) as usize);
        for (cell, word) in slot.into_iter().flatten().zip(words) {
            cell.store(word, Ordering::Relaxed);
        }
    }

    fn take(&self, index: u64) -> T {
        let slot = self.0.get((index & (self.0.len() as u64 - 1)) as usize);
        let mut words = [0u64; N];
        for (word, cell) in words.iter_mut().zip(slot.into_iter().flatten()) {
            *word = cell.load(Ordering::Relaxed);
        }
        // SAFETY: Plain says that the sizes are the same, and that all bits are right.
        unsafe { std::mem::transmute_copy(&words) }
    }
}
