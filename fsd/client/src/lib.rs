//! The FUSE client: a mount.
//!
//! | module | subject |
//! | --- | --- |
//! | `mount`, `mountpoint` | start, stop |
//! | `fuse` | the kernel's requests, and how a request finds a thread |
//! | `caller` | what the requests do not say of the process behind them |
//! | `ctx`, `workers` | who may wait where |
//! | `net` | connections to the servers and the other mounts |
//! | `inode`, `pages`, `mapped` | what is cached |
//! | `pins` | what was looked up stays alive for a moment |
//! | `attrs`, `data`, `write`, `space`, `opens`, `files`, `fallocate`, `dirs`, `names`, `xattrs`, `locks` | the operations |
//! | `extension` | what of the leases is lent to the kernel extension |
//! | `revoke`, `push` | giving leases up, telling the metadata server |
//! | `trim` | forgetting inodes nobody uses |
//! | `writeback` | bringing dirty data to the servers |
//!
//! Order of locks: lease → inode state → space bank → connections. Nothing waits for a lease while it
//! holds an inode's state.

pub mod atime;
pub mod attrs;
mod buffers;
pub mod caller;
pub mod ctx;
pub mod data;
pub mod dirs;
mod edges;
pub mod extension;
pub mod fallocate;
pub mod files;
pub mod fuse;
mod handover;
mod heap;
pub mod inode;
pub mod inode_table;
pub mod kernel_mount;
pub mod lazy;
pub mod listen;
pub mod locks;
pub mod mapped;
pub mod mount;
pub mod mountpoint;
pub mod names;
pub mod net;
pub mod opens;
pub mod pages;
pub mod pins;
pub mod push;
pub mod revoke;
pub mod space;
pub mod trim;
pub mod workers;
pub mod write;
pub mod writeback;
pub mod xattrs;

pub use mount::{Detached, Mount, MountError, MountOptions};

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use lockmgr::{Guard, LeaseError, LeaseManager, Mode, NodeId};
use rt::sync::Mutex;
use rt::time::Instant;

use ctx::{Ctx, Permits, Res, Stop};
use fsd_node::config::CacheMode;
use fsd_proto::ino;
use fsd_proto::rpc::Errno;
use fsd_proto::wire::MountStatus;
use inode::Inode;
use inode_table::InodeTable;
use net::Net;
use workers::Workers;

/// Time to live of attributes that a lease protects: until told otherwise.
pub const LEASED_TTL: Duration = Duration::from_secs(24 * 3600);
/// Longest file, bytes.
pub const MAX_FILE_SIZE: u64 = 1 << 60;

/// Everything a mount consists of.
pub struct Client {
    /// This mount's node number.
    pub node: NodeId,
    /// How the kernel caches ([`CacheMode::Auto`] has been decided).
    pub mode: CacheMode,
    /// Mode [`CacheMode::Writethrough`] with shared files in the page cache, as the paper's baseline has them.
    pub cache_shared: bool,
    /// Shared mappings also of files that other mounts have open ([`fsd_node::config::MountConfig::shared_mappings`]).
    pub shared_mappings: bool,
    /// The leases.
    pub leases: Arc<LeaseManager>,
    /// The connections.
    pub net: Arc<Net>,
    /// The inodes.
    pub inodes: Arc<InodeTable>,
    /// Threads for requests that wait.
    pub workers: Workers,
    /// Threads for revocations.
    pub revokers: Workers,
    /// Threads for invalidations that may meet a page which stays locked.
    pub invalidators: Workers,
    /// Event loops that may still wait.
    pub permits: Permits,
    /// Longest wait for a lease.
    pub lease_wait: Duration,
    /// Clean data read from the storage nodes is worth keeping here (not where they are local memory).
    pub cache_reads: bool,
    /// Layout of lease records.
    pub layout: lockmgr::RecordLayout,
    /// Tells the kernel to drop what it has cached.
    pub notifier: std::sync::OnceLock<fuser::Notifier>,
    /// The kernel extension, in mode [`CacheMode::Writeback`].
    pub extension: std::sync::OnceLock<Arc<extension::Extension>>,
    /// Inodes with something to write back, and since when.
    pub dirty: Mutex<HashMap<u64, Instant>>,
    /// Held from looking at attributes until the metadata server has them, so that later ones come later.
    pub attr_push: Mutex<()>,
    /// Pages in the buffer caches.
    pub cached_pages: AtomicUsize,
    /// Most pages in the buffer caches.
    pub max_pages: usize,
    /// Numbers for new inodes, whose leases this mount holds exclusively already.
    pub new_inos: Arc<names::Numbers>,
    /// Open files and directories.
    pub handles: opens::Handles,
    /// File locks held by processes of this mount.
    pub file_locks: locks::LocalLocks,
    /// Inodes kept for who looked them up.
    pub pins: pins::Pins,
    /// Space set aside on the storage nodes.
    pub space: space::SpaceBank,
    /// Of what access times are kept.
    pub access_times: atime::AccessTimes,
    /// When files without names were last waited for in vain, in a full pool.
    pub closes_awaited: space::ClosesAwaited,
    /// Numbers of transactions.
    pub seqs: names::Sequence,
    /// Longest time data stays only here.
    pub writeback_after: Duration,
    /// Counters for `fsd status`.
    pub counters: Counters,
    /// When inodes are forgotten.
    pub trim: trim::Trim,
    /// Wakes the writeback thread.
    pub wake_writeback: rt::channel::Sender<()>,
    /// The writeback thread sleeps until it is woken; else it looks by itself, every now and then.
    pub writeback_sleeps: AtomicBool,
    /// The mount is leaving.
    pub stopping: AtomicBool,
    /// The mount is about to stop: what cannot be stored by now never will be.
    pub leaving: AtomicBool,
    /// The leases are lost; nothing is served any more.
    pub doomed: AtomicBool,
    /// When the mount began.
    pub began: Instant,
}

/// What a mount has done.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests of the kernel.
    pub requests: AtomicU64,
    /// Of those, how many had to be handed to a worker.
    pub parked: AtomicU64,
    /// Revocations carried out.
    pub revocations: AtomicU64,
    /// Invalidations repeated because a read slipped in.
    pub repeats: AtomicU64,
    /// Reads and writes done by another mount, which had the lease.
    pub sent: AtomicU64,
    /// Reads and writes done for other mounts.
    pub visits: AtomicU64,
}

/// The error number of a lease that could not be had.
fn lease_errno(error: &LeaseError) -> Errno {
    match error {
        LeaseError::Leaving => Errno(libc::ESHUTDOWN),
        LeaseError::Unreachable { .. } | LeaseError::StorageLost { .. } => {
            tracing::error!("{error}");
            Errno(libc::EIO)
        }
        LeaseError::Timeout { .. } => {
            tracing::error!("{error}");
            Errno(libc::ETIMEDOUT)
        }
        _ => {
            tracing::error!("{error}");
            Errno(libc::EIO)
        }
    }
}

impl Client {
    /// The inode of a number.
    pub fn inode(&self, number: u64) -> Arc<Inode> {
        self.inodes.get(number)
    }

    /// Enters under an inode's lease, getting it if need be.
    ///
    /// # Errors
    /// Park; or the lease could not be had.
    pub fn lease(&self, ctx: &Ctx<'_>, inode: &Inode, mode: Mode) -> Res<Guard> {
        let record = inode.record();
        if self.doomed.load(Ordering::Relaxed) {
            return ctx::fail(libc::EIO);
        }
        if let Some(guard) = self.leases.try_enter(record, mode) {
            return Ok(guard);
        }
        ctx.may_wait()?;
        if !self.net.knows_record(record) {
            self.net.find_record(record)?;
        }
        let failed = &inode.lease_failed;
        let entered = self.leases.enter(record, mode, self.patience(failed));
        match &entered {
            Ok(_) => failed.store(0, Ordering::Relaxed),
            Err(LeaseError::Timeout { .. } | LeaseError::Unreachable { .. }) => {
                failed.store(self.now().max(1), Ordering::Relaxed);
            }
            Err(_) => {}
        }
        entered.map_err(|e| Stop::Errno(lease_errno(&e)))
    }

    /// How long to wait for a lease; `failed`: when that was last in vain. The kernel sends changes of one directory one after the other: who
    /// comes when one has just given up has waited beside it, behind the kernel's lock, and waits only a little more.
    fn patience(&self, failed: &AtomicU64) -> Duration {
        const JUST_NOW: Duration = Duration::from_secs(1);
        let at = failed.load(Ordering::Relaxed);
        if at > 0 && self.now().saturating_sub(at) < JUST_NOW.as_nanos() as u64 {
            return self.lease_wait / 30;
        }
        self.lease_wait
    }

    /// Enters under several leases, in the order that all mounts keep (so that none waits for another in
    /// a circle). An inode named twice gets the stronger mode, and one guard.
    ///
    /// # Errors
    /// As [`Client::lease`].
    pub fn lease_all(&self, ctx: &Ctx<'_>, wanted: &[(&Inode, Mode)]) -> Res<Guards> {
        let mut order: Vec<(&Inode, Mode)> = Vec::with_capacity(wanted.len());
        for &(inode, mode) in wanted {
            match order.iter_mut().find(|(i, _)| i.record() == inode.record()) {
                Some(known) if mode == Mode::Exclusive => known.1 = mode,
                Some(_) => {}
                None => order.push((inode, mode)),
            }
        }
        order.sort_by_key(|(i, _)| i.record().0);
        let mut guards = Vec::with_capacity(order.len());
        for (inode, mode) in order {
            guards.push((inode.ino, self.lease(ctx, inode, mode)?));
        }
        Ok(Guards(guards))
    }

    /// Notes that an inode has something to write back.
    pub fn note_dirty(&self, number: u64) {
        self.dirty.lock().entry(number).or_insert_with(Instant::now);
        if self.writeback_sleeps.swap(false, Ordering::SeqCst) {
            let _ = self.wake_writeback.try_send(());
        }
    }

    /// Nanoseconds since the mount began.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    /// What `fsd status` shows.
    #[must_use]
    ///
    /// Asks the servers whether they are there: not for a thread that brings their answers.
    pub fn status(&self) -> MountStatus {
        let leases = self.leases.snapshot();
        let count = |mode| leases.iter().filter(|l| l.mode == Some(mode)).count() as u64;
        let mut cache = format!("{:?}", self.mode).to_lowercase();
        if self.cache_shared {
            cache += " with shared files";
        }
        MountStatus {
            node: self.node.0,
            cache,
            shared: count(Mode::Shared),
            exclusive: count(Mode::Exclusive),
            waiting: leases.iter().map(|l| l.waiting as u64).sum(),
            inodes: self.inodes.len() as u64,
            cached_bytes: self.cached_pages.load(Ordering::Relaxed) as u64 * pages::PAGE,
            dirty_files: self.dirty.lock().len() as u64,
            requests: self.counters.requests.load(Ordering::Relaxed),
            parked: self.counters.parked.load(Ordering::Relaxed),
            messages: self.net.messages(),
            revocations: self.counters.revocations.load(Ordering::Relaxed),
            repeats: self.counters.repeats.load(Ordering::Relaxed),
            sent: self.counters.sent.load(Ordering::Relaxed),
            visits: self.counters.visits.load(Ordering::Relaxed),
            kernel: self.extension.get().map_or_else(Vec::new, |ext| {
                let counters = ext.counters();
                counters.iter().map(|(name, n)| (name.to_owned(), n)).collect()
            }),
            troubles: self.net.unreachable(),
        }
    }

    /// The storage node of a block.
    #[must_use]
    pub fn storage_of(&self, number: u64, block: u64) -> u16 {
        let n = u64::from(self.net.storage_count());
        ((u64::from(ino::shard(number)) + block) % n) as u16
    }
}

/// The versions of the leases that are held for something.
pub trait Versions {
    /// That of an inode's lease.
    fn version_of(&self, number: u64) -> u64;
}

/// The one lease there is.
impl Versions for Guard {
    fn version_of(&self, _number: u64) -> u64 {
        self.version()
    }
}

/// Guards of several leases.
pub struct Guards(Vec<(u64, Guard)>);

impl Versions for Guards {
    fn version_of(&self, number: u64) -> u64 {
        let record = ino::record(number);
        self.0
            .iter()
            .find(|(i, _)| ino::record(*i) == record)
            .map_or(0, |(_, g)| g.version())
    }
}
