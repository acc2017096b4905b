//! What a mount is to the cluster: its number, its connections and leases, and who may wait for them.

pub mod busy;
pub mod caller;
pub mod ctx;
pub mod heartbeat;
pub mod net;
pub mod term;
pub mod waiting;
pub mod workers;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lockmgr::{Guard, LeaseError, LeaseManager, NodeId};
use rt::channel::Sender;
use rt::time::Instant;

use crate::session::busy::Busy;
use crate::session::ctx::Permits;
use crate::session::net::Net;
use crate::session::term::Term;
use crate::session::waiting::Waiting;
use crate::session::workers::Workers;
use fsd_proto::ino;
use fsd_proto::rpc::Errno;

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
    /// How long it may act.
    pub term: Arc<Term>,
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
    /// Processes that requests wait for.
    pub waiting: Arc<Waiting>,
    /// Requests of the kernel that are under way.
    pub busy: Busy,
    /// Ends the one that tells the metadata server that this mount lives.
    pub heartbeat: OnceLock<Sender<()>>,
}

impl Threads {
    /// The metadata server is not told any more that this mount lives.
    pub fn stop_heartbeat(&self) {
        if let Some(stop) = self.heartbeat.get() {
            let _ = stop.try_send(());
        }
    }
}

/// How a mount ends.
#[derive(Default)]
pub struct Fate {
    /// The mount is leaving.
    pub stopping: AtomicBool,
    /// The mount is about to stop: what cannot be stored by now never will be.
    pub leaving: AtomicBool,
    /// The metadata server is told that the mount leaves: that it does not know it afterwards is no news.
    pub left: AtomicBool,
    /// The leases are lost; nothing is served any more.
    pub doomed: AtomicBool,
    /// Who waits for the end of the mount.
    once_ending: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Fate {
    /// The leases are lost; false if that was known.
    pub fn doom(&self) -> bool {
        let first = !self.doomed.swap(true, Ordering::SeqCst);
        self.may_end();
        first
    }

    /// Something has happened that may be the end of the mount: whoever waits for that looks.
    pub fn may_end(&self) {
        self.once_ending.get().inspect(|tell| tell());
    }

    /// Calls this when something has happened that may be the end of the mount.
    pub fn once_ending(&self, tell: Box<dyn Fn() + Send + Sync>) {
        let first = self.once_ending.set(tell).is_ok();
        debug_assert!(first);
    }
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
    /// Nanoseconds since the mount began.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    /// Does something while the mount may act; for a thread that must not wait. One that is frozen does it when it is thawed, or has
    /// been declared dead: then with the error that is to be answered.
    pub fn in_term(self: &Arc<Self>, act: impl FnOnce(Result<(), Errno>) + Send + 'static) {
        if self.term.is_valid() {
            return act(Ok(()));
        }
        let me = Arc::clone(self);
        self.threads.workers.run(move || act(me.term.hold()));
    }

    /// Is something waited for on, after a round of waiting in vain, that is needed since `began`? It is where a server is away or has
    /// just come back: others may wait for it, too, and who waits for them fails no sooner.
    #[must_use]
    pub fn waits_on(&self, began: Instant, round: Instant) -> bool {
        self.net.was_away_since(round)
            && !self.net.ways.patience.is_over(began)
            && !self.fate.doomed.load(Ordering::Relaxed)
    }

    /// Longest wait for another mount: as for a lease, or, while a server is away, as for that; none: for ever.
    #[must_use]
    pub fn longest_wait(&self) -> Option<Duration> {
        let now = Instant::now();
        let round = now.checked_sub(self.lease_wait).unwrap_or(now);
        if !self.net.was_away_since(round) {
            return Some(self.lease_wait);
        }
        let limit = self.net.ways.patience.for_return();
        limit.map(|limit| limit.max(self.lease_wait))
    }

    /// The storage node of a block.
    #[must_use]
    pub fn storage_of(&self, number: u64, block: u64) -> u16 {
        let n = u64::from(self.net.storage.count());
        ((u64::from(ino::shard(number)) + block) % n) as u16
    }

    /// One-sided operations do not wait for anybody (shared memory).
    #[must_use]
    pub fn local_memory(&self) -> bool {
        !self.cache_reads
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
pub struct Guards(pub(crate) Vec<(u64, Guard)>);

impl Versions for Guards {
    fn version_of(&self, number: u64) -> u64 {
        let record = ino::record(number);
        self.0
            .iter()
            .find(|(i, _)| ino::record(*i) == record)
            .map_or(0, |(_, g)| g.version())
    }
}
