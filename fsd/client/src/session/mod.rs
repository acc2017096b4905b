//! What a mount is to the cluster: its number, its connections and leases, and who may wait for them.

pub mod caller;
pub mod ctx;
pub mod listen;
pub mod net;
pub mod workers;

use crate::cache::inode::Inode;
use crate::session::ctx::Ctx;
use crate::session::ctx::Permits;
use crate::session::ctx::Res;
use crate::session::ctx::Stop;
use crate::session::net::Net;
use crate::session::workers::Workers;
use fsd_proto::rpc::Errno;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use rt::time::Instant;
use lockmgr::Mode;
use lockmgr::Guard;
use lockmgr::LeaseError;
use lockmgr::LeaseManager;
use lockmgr::NodeId;
use fsd_proto::ino;
/// What a mount is to the cluster: its number, connections and leases, and the threads that may wait for them.
pub struct Session {
    /// This mount's node number.
    pub node: NodeId,
    /// Layout of lease records.
    pub layout: lockmgr::RecordLayout,
    /// The connections.
    pub net: Arc<Net>,
    /// The leases.
    pub leases: Arc<LeaseManager>,
    /// Longest wait for a lease.
    pub lease_wait: Duration,
    /// When the mount began.
    pub began: Instant,
    /// Clean data read from the storage nodes is worth keeping here (not where they are local memory).
    pub cache_reads: bool,
    /// Threads that may wait.
    pub threads: Threads,
    /// How it ends.
    pub fate: Fate,
    /// Counters for `fsd status`.
    pub counters: Counters,
}

/// Threads that may wait.
pub struct Threads {
    /// For requests that wait.
    pub workers: Workers,
    /// For revocations.
    pub revokers: Workers,
    /// For invalidations that may meet a page which stays locked.
    pub invalidators: Workers,
    /// Event loops that may still wait.
    pub permits: Permits,
}

/// How a mount ends.
#[derive(Debug, Default)]
pub struct Fate {
    /// The mount is leaving.
    pub stopping: AtomicBool,
    /// The mount is about to stop: what cannot be stored by now never will be.
    pub leaving: AtomicBool,
    /// The leases are lost; nothing is served any more.
    pub doomed: AtomicBool,
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
#[must_use]
pub fn lease_errno(error: &LeaseError) -> Errno {
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

impl Session {
    /// Enters under an inode's lease, getting it if need be.
    ///
    /// # Errors
    /// Park; or the lease could not be had.
    pub fn lease(&self, ctx: &Ctx<'_>, inode: &Inode, mode: Mode) -> Res<Guard> {
        let record = inode.record();
        if self.fate.doomed.load(Ordering::Relaxed) {
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

    /// Nanoseconds since the mount began.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    /// The storage node of a block.
    #[must_use]
    pub fn storage_of(&self, number: u64, block: u64) -> u16 {
        let n = u64::from(self.net.storage_count());
        ((u64::from(ino::shard(number)) + block) % n) as u16
    }

    /// Whether the exclusive lease is here, so that a write need not wait.
    #[must_use]
    pub fn may_write_at_once(&self, inode: &Inode) -> bool {
        let held = self.leases.held(inode.record());
        held.is_some_and(|(mode, _)| mode == Mode::Exclusive)
    }

    /// One-sided operations do not wait for anybody (shared memory).
    #[must_use]
    pub fn local_memory(&self) -> bool {
        !self.cache_reads
    }

    pub(crate) fn holds(&self, inode: &Inode) -> bool {
        self.leases.held(inode.record()).is_some()
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
