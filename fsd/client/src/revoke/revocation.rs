//! A revocation: what is done before a lease is given down, or up.
//!
//! A revocation first empties the kernel's caches while requests are still served under the lease, for
//! the kernel may hold pages locked until such requests are answered; then it closes the gate, and starts
//! again if a read has filled a page meanwhile (the paper's optimistic scheme). Only then it writes back and
//! tells the lease manager.
//!
//! Three things keep the kernel's invalidation from waiting for a request that itself waits for a lease:
//! * a write that waits for the exclusive lease keeps at most one folio locked, and only if that is not up to
//!   date; its pages are invalidated aside (see `edges`);
//! * a write of mapped pages is answered at once (see `mapped`);
//! * reads wait only while no lease is held, and then nothing is invalidated.
//!
//! It begins on the thread that brought it, which must not wait. Where it would have to, it goes on from there on a thread of its own.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lockmgr::{Mode, RecordId, Relinquish};
use rt::channel::bounded;
use rt::time::Instant;

use crate::cache::Cache;
use crate::cache::inode::{Inode, Locked};
use crate::cache::pages::PAGE;
use crate::cache::state::State;
use crate::data::reservations::Reservations;
use crate::data::stored::Stored;
use crate::data::writing::Writing;
use crate::kernel::caches::KernelCaches;
use crate::kernel::front::Front;
use crate::opens::pins::Pinning;
use crate::session::Session;
use crate::session::ctx::Ctx;
use crate::storing::push::Push;
use fsd_node::config::CacheMode;
use fsd_proto::layout::BLOCK;

/// How long the kernel gets to take in the attributes of an answer before it is told to drop them; only
/// for files that are open through the page cache.
const SETTLE: Duration = Duration::from_micros(500);
/// Pause between attempts to write back (each waits for lost connections itself).
pub(super) const RETRY: Duration = Duration::from_millis(50);
/// How often to say that data cannot be stored.
const COMPLAIN: Duration = Duration::from_secs(30);
/// Attempts of a mount that ends before data is given up.
const LAST_ATTEMPTS: u32 = 3;
/// How often is looked whether pages that are being invalidated are gone.
const INVALIDATED: Duration = Duration::from_micros(50);

/// What is left to be done.
#[derive(Debug)]
pub(super) struct Revocation {
    id: RecordId,
    from: Mode,
    to: Option<Mode>,
    inode: Option<Arc<Inode>>,
    /// What was delegated to the kernel has been recalled.
    recalled: bool,
    /// The kernel gets nothing new any more.
    begun: bool,
    /// Writes of mapped pages are answered at once.
    mapped: bool,
}

impl Revocation {
    /// A revocation that has just been asked for.
    pub(super) fn asked(id: RecordId, from: Mode, to: Option<Mode>) -> Self {
        Self {
            id,
            from,
            to,
            inode: None,
            recalled: false,
            begun: false,
            mapped: false,
        }
    }

    /// The kernel may be given something to keep again.
    fn cached_again(&self, inode: &Inode) {
        if self.mapped {
            inode.waiting.mapped.revoking(false);
        }
        if self.begun {
            inode.kernel.revoking.store(false, Ordering::SeqCst);
        }
    }
}

/// Giving leases up.
pub struct Revocations {
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) kernel: Arc<KernelCaches>,
    pub(crate) front: Arc<Front>,
    pub(crate) reservations: Arc<Reservations>,
    pub(crate) stored: Arc<Stored>,
    pub(crate) writing: Arc<Writing>,
    pub(crate) pinning: Arc<Pinning>,
    pub(crate) push: Arc<Push>,
}

impl Revocations {
    /// Carries a revocation on, to its end or, unless `may_wait`, until it would have to wait. True: that was the end.
    pub(super) fn carry_on(&self, job: &mut Revocation, may_wait: bool) -> bool {
        loop {
            self.look_again(job);
            let inode = job.inode.clone();
            let closed = match &inode {
                Some(inode) => self.shut(job, inode, may_wait),
                None => self.close_gate(job.id, may_wait),
            };
            if !closed {
                return false;
            }
            if self.is_same(job) {
                return self.give_up(job, inode.as_ref(), may_wait);
            }
            // A file was made of the record before the gate was closed: its caches are what is to be given up.
            self.session.leases.open_gate(job.id);
            if !may_wait {
                return false;
            }
        }
    }

    /// Takes back what the kernel has, and closes the gate; false: that would have to wait.
    fn shut(&self, job: &mut Revocation, inode: &Arc<Inode>, may_wait: bool) -> bool {
        if !job.recalled {
            if may_wait {
                self.front.recall(inode, job.to);
            } else if !self.front.recall_at_once(inode, job.to) {
                return false;
            }
            job.recalled = true;
        }
        if job.to.is_none() && !self.begin(job, inode, may_wait) {
            return false;
        }
        self.empty(job, inode, may_wait)
    }

    /// Stores what the lease protected, and gives it up. The gate is closed.
    fn give_up(&self, job: &Revocation, inode: Option<&Arc<Inode>>, may_wait: bool) -> bool {
        let Some(inode) = inode else {
            self.relinquish(job.id, Relinquish::default());
            return true;
        };
        let Some(how) = self.store(job, inode, may_wait) else {
            self.session.leases.open_gate(job.id);
            return false;
        };
        self.session.counters.revocations.fetch_add(1, Ordering::Relaxed);
        job.cached_again(inode);
        if let (None, Some(turns)) = (job.to, inode.hints.turns.get()) {
            turns.lock().lose(Instant::now());
        }
        self.relinquish(job.id, how);
        if job.to.is_none() {
            // Another mount may take the record over; else the metadata server is told of attributes when the record becomes free, for
            // they may change again before that. Only now: a confirmation counts for what has been relinquished before it.
            self.push.push_attrs(inode);
        }
        self.front.resume(inode);
        true
    }

    /// Does the record serve the inode that it served when the revocation began, or none as it did then?
    fn is_same(&self, job: &Revocation) -> bool {
        let now = self.cache.inodes.by_record(job.id);
        now.as_ref().map(Arc::as_ptr) == job.inode.as_ref().map(Arc::as_ptr)
    }

    /// The record may serve a later inode by now: then the revocation is that one's, and begins anew.
    fn look_again(&self, job: &mut Revocation) {
        if self.is_same(job) {
            return;
        }
        let now = self.cache.inodes.by_record(job.id);
        if let Some(former) = std::mem::replace(&mut job.inode, now) {
            self.let_go(job, &former);
        }
        (job.recalled, job.begun, job.mapped) = (false, false, false);
    }

    /// An inode may be cached and delegated again.
    fn let_go(&self, job: &Revocation, inode: &Inode) {
        job.cached_again(inode);
        self.front.resume(inode);
    }

    /// Lets the kernel take in what it was answered, and gives it nothing more to keep.
    fn begin(&self, job: &mut Revocation, inode: &Inode, may_wait: bool) -> bool {
        let wait = self.unsettled(inode);
        if !may_wait && (!wait.is_zero() || inode.waiting.mapped.get().is_some_and(|m| !m.is_empty())) {
            return false;
        }
        rt::thread::sleep(wait);
        inode.kernel.revoking.store(true, Ordering::SeqCst);
        job.begun = true;
        if may_wait && !job.mapped {
            // With the exclusive lease, mapped pages that are still dirty are taken in as they come.
            inode.waiting.mapped.revoking(true);
            job.mapped = true;
        }
        true
    }

    /// Empties the kernel's caches, as far as the lease goes, and closes the gate behind everybody.
    fn empty(&self, job: &Revocation, inode: &Arc<Inode>, may_wait: bool) -> bool {
        loop {
            let fills = inode.kernel.fills.load(Ordering::SeqCst);
            if job.to.is_none() && !self.drop_caches(job, inode, may_wait) {
                return false;
            }
            if !self.close_gate(job.id, may_wait) {
                return false;
            }
            let slipped = match job.to {
                None => {
                    inode.kernel.fills.load(Ordering::SeqCst) != fills
                        || inode.kernel.pages.load(Ordering::SeqCst)
                        || inode.kernel.attrs.load(Ordering::SeqCst)
                }
                // The kernel's pages stay: those being invalidated must be gone first. That may wait for reads,
                // so not behind the closed gate.
                Some(_) => inode.kernel.invals.load(Ordering::SeqCst) > 0,
            };
            if !slipped {
                return true;
            }
            self.session.leases.open_gate(job.id);
            if !may_wait {
                return false;
            }
            match job.to {
                None => _ = self.session.counters.repeats.fetch_add(1, Ordering::Relaxed),
                Some(_) => rt::thread::sleep(INVALIDATED),
            }
        }
    }

    /// Drops what the kernel has cached.
    fn drop_caches(&self, job: &Revocation, inode: &Arc<Inode>, may_wait: bool) -> bool {
        if !may_wait && self.kernel.passing.is_undecided() {
            return false;
        }
        if !inode.kernel.pages.load(Ordering::SeqCst) {
            // Takes no lock in the kernel.
            return self.kernel.take_attrs(inode, may_wait);
        }
        if !may_wait && !self.pages_are_free(inode, job.from) {
            return false;
        }
        // After that there are none, but for those that are taken in meanwhile.
        self.drop_pages(inode, may_wait) && self.kernel.take_attrs(inode, may_wait)
    }

    /// Drops the pages and attributes that the kernel has cached, under a lease that is held; waits for reads that are under way.
    pub fn empty_kernel(&self, inode: &Arc<Inode>) {
        self.drop_pages(inode, true);
    }

    /// False: that would have to wait, and nothing was done.
    fn drop_pages(&self, inode: &Arc<Inode>, may_wait: bool) -> bool {
        let through = self.kernel.mode == CacheMode::Writethrough;
        let before = through.then(|| inode.kernel.refills.emptying(self.session.now()));
        inode.kernel.drops.fetch_add(1, Ordering::SeqCst);
        inode.kernel.pages.store(false, Ordering::SeqCst);
        inode.kernel.attrs.store(false, Ordering::SeqCst);
        let done = if may_wait {
            self.kernel.invalidate_pages(inode);
            true
        } else {
            self.kernel.notify_at_once(inode, 0, 0)
        };
        if !done {
            inode.kernel.pages.store(true, Ordering::SeqCst);
            inode.kernel.attrs.store(true, Ordering::SeqCst);
        }
        inode.kernel.drops.fetch_sub(1, Ordering::SeqCst);
        if !done {
            return false;
        }
        // Pages that a write may keep locked are dropped aside, and perhaps later: what a read has brought of them may still be there.
        let all = inode.waiting.edges.get().is_none_or(|edges| edges.is_empty());
        if let (Some(number), true) = (before, all) {
            inode.kernel.refills.dropped(number, 0, u64::MAX);
        }
        true
    }

    /// How long the kernel is still to be left alone. An invalidation that overtakes an answer makes it
    /// drop the file size in it, and a read through the page cache then ends where the file ended before.
    fn unsettled(&self, inode: &Inode) -> Duration {
        if self.front.has_leases() || inode.kernel.cached.load(Ordering::SeqCst) == 0 {
            return Duration::ZERO;
        }
        let since = self
            .session
            .now()
            .saturating_sub(inode.kernel.answered.load(Ordering::SeqCst));
        SETTLE.saturating_sub(Duration::from_nanos(since))
    }

    /// Closes the gate, and waits until nobody is inside; unless `may_wait`, only if nobody is.
    fn close_gate(&self, id: RecordId, may_wait: bool) -> bool {
        let (tx, rx) = bounded(1);
        self.session.leases.close_gate(
            id,
            Box::new(move || {
                let _ = tx.send(());
            }),
        );
        if may_wait {
            let _ = rx.recv();
            return true;
        }
        if rx.try_recv().is_ok() {
            return true;
        }
        // A thread that may wait closes it again.
        self.session.leases.open_gate(id);
        false
    }

    /// May the kernel's pages be dropped on the thread that brings answers from the fabric? Where that cannot wait
    /// for such an answer: reads under way find all they need here and in local memory.
    fn pages_are_free(&self, inode: &Inode, from: Mode) -> bool {
        if from != Mode::Shared
            || !self.session.local_memory()
            || inode.waiting.edges.get().is_some_and(|e| !e.is_empty())
        {
            return false;
        }
        let all_here = inode
            .try_lock_raw()
            .is_some_and(|s| s.is_mapped(self.session.net.storage.count()));
        let connected =
            (0..self.session.net.storage.count()).all(|n| self.session.net.storage.session_now(n).is_some());
        // Whoever opens or closes the file just now holds `opens`, perhaps waiting for the fabric. Who has it open for writing may have it
        // mapped, through the page cache or not: dropping a page that is dirty there waits for its WRITE, which waits for a lease.
        let writers = inode.opens.try_lock().is_none_or(|o| o.page_writers > 0);
        all_here && connected && !writers
    }

    /// Can what is dirty be written back without asking anybody?
    fn flushes_at_once(&self, inode: &Inode, state: &State, from: Mode) -> bool {
        if from != Mode::Exclusive || state.pages.dirty() == 0 {
            return true;
        }
        self.session.local_memory()
            && state.is_mapped(self.session.net.storage.count())
            && state.pages.dirty() <= 16
            && state.pages.dirty_pages().all(|(page, _)| {
                let block = page * PAGE / BLOCK;
                let needed = state.frames.size_for(block, page * PAGE % BLOCK + PAGE);
                state.frames.known().get(&block).is_some_and(|f| f.size >= needed)
                    && self
                        .session
                        .net
                        .storage
                        .session_now(self.session.storage_of(inode.ino, block))
                        .is_some()
            })
    }

    fn relinquish(&self, id: RecordId, how: Relinquish) {
        if let Err(error) = self.session.leases.relinquished(id, how) {
            tracing::error!("giving up a lease: {error}");
        }
    }

    /// Writes back what the exclusive lease protected; nobody is inside. The attributes are left to be
    /// pushed. None: that would have to wait.
    fn store(&self, job: &Revocation, inode: &Arc<Inode>, may_wait: bool) -> Option<Relinquish> {
        let mut state = if may_wait {
            inode.claim_raw()
        } else {
            let state = inode.try_claim_raw();
            state.filter(|s| self.flushes_at_once(inode, s, job.from))?
        };
        if may_wait && job.from == Mode::Exclusive && state.pages.dirty() > 0 {
            self.cache.taken_dirty(inode.ino);
        }
        // What is gone answers ENOENT or ESTALE, and is not kept for anybody.
        let pins = job.to.is_none() && !state.lasting.gone;
        if !may_wait && pins && !self.pinning.pin_at_once(inode) {
            return None;
        }
        if !state.unlocked(|| self.publish(inode, job.to, may_wait)) {
            return None;
        }
        if job.from == Mode::Exclusive
            && !(self.flush(inode, &mut state, may_wait)
                && self.commit_freed(inode, &mut state, may_wait)
                && state.unlocked(|| self.tell_names(inode, may_wait) && self.commit_names(inode, may_wait)))
        {
            return None;
        }
        if job.to.is_none() && state.dir.get().is_some() {
            state.dir.heard = self.session.net.meta.mark();
        }
        let how = self.relinquish_flushed(inode, &mut state, job.from);
        drop(state);
        if may_wait && pins {
            self.pinning.pin_looked_up(inode);
        }
        Some(how)
    }

    /// Brings dirty pages to the storage nodes, however long that takes; false: it failed, and is not tried again here.
    fn flush(&self, inode: &Inode, state: &mut Locked<'_>, may_wait: bool) -> bool {
        let ctx = Ctx::on_worker();
        let mut said: Option<Instant> = None;
        for attempt in 1.. {
            let error = match self.writing.flush_pages(&ctx, inode, state) {
                Ok(()) => return true,
                Err(_) if !may_wait => return false,
                Err(stop) => stop.errno(),
            };
            if self.session.fate.leaving.load(Ordering::SeqCst) && attempt >= LAST_ATTEMPTS {
                // Told at fsync and close.
                tracing::error!("data of {:#x} lost: {error}", inode.ino);
                inode.errors.set(error);
                self.reservations.abandon_pages(inode, state);
                break;
            }
            // It was acknowledged, and this mount has the only copy: whoever wants the file waits, and is told by its own
            // wait for the lease.
            if said.is_none_or(|at| at.elapsed() > COMPLAIN) {
                said = Some(Instant::now());
                tracing::warn!("data of {:#x} cannot be stored, and is kept: {error}", inode.ino);
            }
            rt::thread::sleep(RETRY);
        }
        true
    }

    /// How to give up a lease whose data is stored. The attributes are left to be pushed.
    fn relinquish_flushed(&self, inode: &Inode, state: &mut State, from: Mode) -> Relinquish {
        if from != Mode::Exclusive {
            return Relinquish::default();
        }
        // What was reserved for the kernel it has used, or never will.
        self.reservations.release_reservations(inode, state, 0);
        let version = self
            .session
            .leases
            .held(inode.record())
            .map(|(_, version)| version);
        let how = inode.hand_over(state, version);
        self.cache.dirty.lock().remove(&inode.ino);
        how
    }
}
