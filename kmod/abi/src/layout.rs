//! The layout of what is shared, as `distfuse.h` has it.

use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64};

/// The version of the interface that this crate speaks.
pub const ABI_VERSION: u32 = 4;
/// The device.
pub const DEVICE: &str = "/dev/distfuse";

/// [`Entry::valid`]: size, mtime, ctime are to be installed.
pub const ATTR_DATA: u32 = 1;
/// [`Entry::valid`]: all attributes are right.
pub const ATTR_ALL: u32 = 2;
/// [`Entry::valid`]: there are extended attributes.
pub const ATTR_XATTRS: u32 = 4;

/// [`Entry::hints`]: short reads and writes that find the lease not held are calls.
pub const HINT_CALL: u32 = 1;

/// Entries in a set.
pub const WAYS: usize = 8;
/// The smallest table.
pub const MIN_ENTRIES: u32 = 64;
/// The largest table.
pub const MAX_ENTRIES: u32 = 1 << 22;
/// What node ids are multiplied by.
pub const HASH_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// Tasks wait for a lease.
pub const EVENT_NEED: u32 = 1;
/// All have left.
pub const EVENT_DRAINED: u32 = 2;
/// A flush is done.
pub const EVENT_FLUSHED: u32 = 3;
/// Something is to be read or written.
pub const EVENT_CALL: u32 = 4;

/// [`Event::flags`]: the kernel has the inode.
pub const FLUSHED_INODE: u32 = 1;
/// [`Event::flags`]: it has no open file of it.
pub const FLUSHED_NOFILE: u32 = 2;
/// [`Event::flags`]: pages are still cached.
pub const FLUSHED_KEPT: u32 = 4;

/// [`Event::flags`]: it is to be written.
pub const CALL_WRITE: u32 = 1;
/// [`Event::flags`]: set-user-id bits go.
pub const CALL_KILL_PRIV: u32 = 2;
/// [`Event::flags`]: there shall be space to write it.
pub const CALL_SPACE: u32 = 4;

/// Bytes of a call's buffer.
pub const BUFFER_SIZE: usize = 16384;
/// Most buffers.
pub const MAX_BUFFERS: u32 = 256;
/// Longest time to look for an answer, microseconds.
pub const MAX_SPIN_US: u32 = 1000;
/// Calls for space that may be under way; their numbers come after those of the buffers.
pub const SPACE_CALLS: u32 = 16;

/// Waiters look again.
pub const COMMAND_WAKE: u32 = 1;
/// Dirty pages are written.
pub const COMMAND_FLUSH: u32 = 2;
/// A call is done.
pub const COMMAND_ANSWER: u32 = 3;

/// [`Command::flags`]: unmap pages.
pub const FLUSH_UNMAP: u32 = 1;
/// [`Command::flags`]: drop them.
pub const FLUSH_DROP: u32 = 2;

/// [`Command::flags`]: nothing was done.
pub const ANSWER_AGAIN: u32 = 1;

/// [`Shared::state`]: the mount is there.
pub const STATE_ATTACHED: u32 = 1;
/// [`Shared::state`]: it has ended.
pub const STATE_GONE: u32 = 2;

/// [`Attach::flags`]: answer stat.
pub const ATTACH_STAT: u32 = 1;
/// [`Attach::flags`]: keep names valid.
pub const ATTACH_NAMES: u32 = 2;
/// [`Attach::flags`]: check permissions.
pub const ATTACH_ACCESS: u32 = 4;

/// Counters of a processor are so many apart.
pub const COUNTERS_STRIDE: usize = 32;

/// The set of a node id in a table of `1 << set_bits` sets; at least two.
pub fn set_of(ino: u64, set_bits: u32) -> usize {
    (ino.wrapping_mul(HASH_FACTOR) >> (64 - set_bits)) as usize
}

/// An entry of the lease table.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct Entry {
    /// See [`crate::word`].
    pub word: AtomicU64,
    /// The FUSE node id, or 0.
    pub ino: AtomicU64,
    /// Of the contents.
    pub version: AtomicU64,
    /// Caches from this version on are as good.
    pub since: AtomicU64,
    /// Odd while what follows, or the versions, are changed.
    pub seq: AtomicU32,
    /// What is right.
    pub valid: AtomicU32,
    /// Permissions.
    pub mode: AtomicU32,
    /// Names.
    pub nlink: AtomicU32,
    /// Owner.
    pub uid: AtomicU32,
    /// Group.
    pub gid: AtomicU32,
    /// Nanoseconds of atime.
    pub atime_nsec: AtomicU32,
    /// `HINT_…`
    pub hints: AtomicU32,
    /// Bytes.
    pub size: AtomicU64,
    /// Blocks of 512 bytes.
    pub blocks: AtomicU64,
    /// Seconds.
    pub mtime: AtomicI64,
    /// Seconds.
    pub ctime: AtomicI64,
    /// Seconds.
    pub atime: AtomicI64,
    /// Nanoseconds of mtime.
    pub mtime_nsec: AtomicU32,
    /// Nanoseconds of ctime.
    pub ctime_nsec: AtomicU32,
    /// From here on everything can be stored,
    pub space_from: AtomicU64,
    /// up to here.
    pub space_to: AtomicU64,
}

/// An event.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Event {
    /// `EVENT_…`
    pub r#type: u32,
    /// `FLUSHED_…`, `CALL_…`
    pub flags: u32,
    /// The inode.
    pub ino: u64,
    /// What is needed; of a call: length.
    pub mode: u32,
    /// That of the command; of a call: its buffer.
    pub cookie: u32,
    /// Negative errno or 0.
    pub error: i32,
    /// Nanoseconds of mtime.
    pub mtime_nsec: u32,
    /// Bytes; of a call: offset in the file.
    pub size: u64,
    /// Seconds.
    pub mtime: i64,
    /// Seconds.
    pub ctime: i64,
    /// Nanoseconds of ctime.
    pub ctime_nsec: u32,
    /// 0.
    pub reserved: u32,
}

/// A command.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Command {
    /// `COMMAND_…`
    pub r#type: u32,
    /// `FLUSH_…`, `ANSWER_…`
    pub flags: u32,
    /// The inode.
    pub ino: u64,
    /// Comes back with the event.
    pub cookie: u32,
    /// Negative errno or 0.
    pub error: i32,
    /// Of a call: bytes.
    pub result: u64,
}

/// What is at offset 0.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct Shared {
    /// The module's version.
    pub abi: u32,
    /// `STATE_…`
    pub state: AtomicU32,
    /// Until when the daemon may act, nanoseconds of `CLOCK_BOOTTIME`; `u64::MAX` until it says.
    pub term_end: AtomicU64,
    reserved0: [u32; 12],
    /// Next event to be written.
    pub event_head: AtomicU64,
    /// More wait for room.
    pub event_overflow: AtomicU32,
    reserved1: [u32; 13],
    /// Next event to be read.
    pub event_tail: AtomicU64,
    /// The daemon is about to sleep.
    pub event_need_wakeup: AtomicU32,
    reserved2: [u32; 13],
    /// Next command to be written.
    pub command_head: AtomicU64,
    reserved3: [u64; 7],
    /// Next command to be read.
    pub command_tail: AtomicU64,
    /// The kernel has to be told.
    pub command_need_kick: AtomicU32,
    reserved4: [u32; 13],
}

/// The argument of attaching.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Attach {
    /// Version.
    pub abi: u32,
    /// The mount's root.
    pub root_fd: i32,
    /// `ATTACH_…`
    pub flags: u32,
    /// Per cent of the dirty memory.
    pub max_ratio: u32,
    /// Of the table.
    pub entries: u32,
    /// Of the ring.
    pub events: u32,
    /// Of the ring.
    pub commands: u32,
    /// That may count.
    pub cpus: u32,
    /// Bytes to map.
    pub map_size: u64,
    /// Where.
    pub counters_offset: u64,
    /// Where.
    pub events_offset: u64,
    /// Where.
    pub commands_offset: u64,
    /// Where.
    pub table_offset: u64,
    /// Where.
    pub buffers_offset: u64,
    /// For calls.
    pub buffers: u32,
    /// Microseconds that a task looks for an answer before it sleeps.
    pub spin_us: u32,
    /// 0.
    pub reserved: [u64; 2],
}

const fn ioc(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | (b'~' as u64) << 8 | number
}

/// Asks for the version.
pub const IOC_VERSION: u64 = ioc(2, 0x40, size_of::<u32>());
/// Attaches.
pub const IOC_ATTACH: u64 = ioc(3, 0x41, size_of::<Attach>());
/// Rings.
pub const IOC_KICK: u64 = ioc(0, 0x42, 0);
