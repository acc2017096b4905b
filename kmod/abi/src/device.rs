//! The device of the kernel extension: opening it, its version, and attaching it to a mount.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::layout::{self, ABI_VERSION, Attach};
use crate::sys;

/// So long the kernel may take to clean up what an earlier daemon has left.
const PATIENCE: Duration = Duration::from_secs(10);

/// How to attach.
#[derive(Debug, Clone)]
pub struct Options {
    /// The device.
    pub device: PathBuf,
    /// Entries of the lease table, 128 bytes each; made a power of two.
    pub entries: u32,
    /// Of the event ring.
    pub events: u32,
    /// Of the command ring.
    pub commands: u32,
    /// For calls, 16 KiB each: so many may be under way. 0: there are none.
    pub buffers: u32,
    /// The kernel answers stat from the entry.
    pub stat: bool,
    /// The kernel holds names valid under the lease of their directory. Names must have no time to live.
    pub names: bool,
    /// The kernel checks permissions of inodes with a lease: only for mounts with `default_permissions` and
    /// `allow_other`.
    pub access: bool,
    /// So long a side looks for what the other is about to say, before it sleeps: in that time neither makes a system
    /// call for the other. Tried less where it does not pay.
    pub spin: Duration,
    /// Per cent of the memory for dirty pages that the mount may take; 0 leaves the stock 1.
    pub max_ratio: u32,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            device: PathBuf::from(layout::DEVICE),
            entries: 1 << 15,
            events: 4096,
            commands: 4096,
            buffers: 0,
            stat: true,
            names: false,
            access: false,
            spin: Duration::ZERO,
            max_ratio: 40,
        }
    }
}

/// The version of the interface that the loaded module speaks.
///
/// # Errors
/// It is not loaded, or may not be used.
pub fn kernel_version(device: &Path) -> Result<u32, Error> {
    version_of(&open(device)?)
}

fn open(device: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(device)
        .map_err(|source| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => Error::NotLoaded(device.to_owned()),
            Some(libc::EACCES | libc::EPERM) => Error::NotAllowed(device.to_owned()),
            _ => Error::System {
                what: "open the kernel extension's device",
                source,
            },
        })
}

fn version_of(device: &File) -> Result<u32, Error> {
    sys::version(device).map_err(|source| Error::System {
        what: "ask the kernel extension for its version",
        source,
    })
}

/// Attaches to the mount that `root` is the root of. Returns the device and where things are in its memory.
pub(crate) fn attach(root: BorrowedFd<'_>, options: &Options) -> Result<(File, Attach), Error> {
    let device = open(&options.device)?;
    let kernel = version_of(&device)?;
    if kernel != ABI_VERSION {
        return Err(Error::Version { kernel });
    }
    let flag = |on: bool, bit: u32| if on { bit } else { 0 };
    let mut layout = Attach {
        abi: ABI_VERSION,
        root_fd: root.as_raw_fd(),
        flags: flag(options.stat, layout::ATTACH_STAT)
            | flag(options.names, layout::ATTACH_NAMES)
            | flag(options.access, layout::ATTACH_ACCESS),
        max_ratio: options.max_ratio,
        entries: options.entries,
        events: options.events,
        commands: options.commands,
        buffers: options.buffers,
        spin_us: u32::try_from(options.spin.as_micros()).unwrap_or(layout::MAX_SPIN_US),
        ..Attach::default()
    };
    let end = Instant::now() + PATIENCE;
    while let Err(source) = sys::attach(&device, &mut layout) {
        match source.raw_os_error() {
            Some(libc::EPROTONOSUPPORT) => return Err(Error::Version { kernel: layout.abi }),
            Some(libc::EBUSY) => return Err(Error::Busy),
            Some(libc::EINVAL | libc::EBADF) => return Err(Error::NotAMount),
            // What a daemon before us has left is still being cleaned up.
            Some(libc::EAGAIN) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(20));
            }
            _ => {
                return Err(Error::System {
                    what: "attach to the mount",
                    source,
                });
            }
        }
    }
    Ok((device, layout))
}
