//! Giving leases up.
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

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use lockmgr::{LeaseUser, Mode, RecordId, Relinquish};
use rt::channel::bounded;
use rt::time::Instant;

use crate::cache::Cache;
use crate::cache::inode::{Granted, Inode, Source, State};
use crate::cache::pages::PAGE;
use crate::data::reservations::Reservations;
use crate::data::writing::Writing;
use crate::kernel::caches::KernelCaches;
use crate::kernel::front::Front;
use crate::opens::pins::Pinning;
use crate::session::Session;
use crate::session::ctx::Ctx;
use crate::storing::push::Push;
use fsd_proto::ino;
use fsd_proto::layout::BLOCK;
use fsd_proto::wire::Attr;

/// How long the kernel gets to take in the attributes of an answer before it is told to drop them; only
/// for files that are open through the page cache.
const SETTLE: Duration = Duration::from_micros(500);
/// Pause between attempts to write back (each waits for lost connections itself).
const RETRY: Duration = Duration::from_millis(50);
/// How often to say that data cannot be stored.
const COMPLAIN: Duration = Duration::from_secs(30);
/// Attempts of a mount that ends before data is given up.
const LAST_ATTEMPTS: u32 = 3;

/// The lease manager's user: hands revocations to threads that never serve requests.
#[derive(Default)]
pub struct Revoker {
    revocations: OnceLock<Weak<Revocations>>,
    inodes: OnceLock<Arc<crate::cache::inode_table::InodeTable>>,
}

impl Revoker {
    /// To be called once, before the first lease.
    pub fn set(&self, revocations: &Arc<Revocations>) {
        let _ = self.revocations.set(Arc::downgrade(revocations));
        let _ = self.inodes.set(Arc::clone(&revocations.cache.inodes));
    }
}

impl LeaseUser for Revoker {
    fn revoke(&self, id: RecordId, from: Mode, to: Option<Mode>) {
        let Some(revocations) = self.revocations.get().and_then(Weak::upgrade) else {
            return;
        };
        if revocations.revoke_lent_at_once(id, from, to) {
            return;
        }
        let job = Arc::clone(&revocations);
        let revokers = &revocations.session.threads.revokers;
        revokers.run(move || job.revoke(id, from, to));
    }

    fn granted(&self, id: RecordId, mode: Mode, version: u64, payload: Option<&[u8]>) {
        let Some(inodes) = self.inodes.get() else { return };
        let attr = payload.and_then(Attr::decode);
        // Whoever asked may have given up, and the inode been forgotten: what came with the lease goes on with it all the same.
        let told = attr.filter(|a| ino::record(a.ino) == id);
        let Some(inode) = told.map_or_else(|| inodes.by_record(id), |a| Some(inodes.get(a.ino))) else {
            return;
        };
        if mode == Mode::Exclusive {
            inode.regained.store(true, Ordering::SeqCst);
            if inode.push.lock().waiting.is_some()
                && let Some(revocations) = self.revocations.get().and_then(Weak::upgrade)
            {
                revocations.cache.note_dirty(inode.ino);
            }
        }
        if let Some(attr) = told {
            // Neither a hand-over nor a shared grant waits for the metadata server to have the attributes.
            let source = match mode {
                Mode::Exclusive => Source::Handed,
                Mode::Shared => Source::Owner,
            };
            *inode.granted.lock() = Some(Box::new(Granted {
                attr: Attr { version, ..attr },
                source,
            }));
        }
    }

    fn confirm(&self, id: RecordId, version: u64) {
        if let Some(revocations) = self.revocations.get().and_then(Weak::upgrade) {
            revocations.push.confirm(id, version);
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
    pub(crate) writing: Arc<Writing>,
    pub(crate) pinning: Arc<Pinning>,
    pub(crate) push: Arc<Push>,
}

impl Revocations {
    /// As [`Client::revoke_at_once`], of an inode that may be lent to the kernel.
    fn revoke_lent_at_once(self: &Arc<Self>, id: RecordId, from: Mode, to: Option<Mode>) -> bool {
        let Some(inode) = self.cache.inodes.by_record(id) else {
            return self.revoke_at_once(id, from, to);
        };
        if !self.front.recall_at_once(&inode, to) {
            return false;
        }
        let done = self.revoke_at_once(id, from, to);
        self.front.resume(&inode);
        done
    }

    /// A revocation that has nothing to wait for is done where it arrives, which saves two changes of
    /// threads. False: it needs a thread of its own.
    fn revoke_at_once(self: &Arc<Self>, id: RecordId, from: Mode, to: Option<Mode>) -> bool {
        let Some(inode) = self.cache.inodes.by_record(id) else {
            if !self.close_if_quiet(id) {
                return false;
            }
            self.relinquish(id, Relinquish::default());
            return true;
        };
        if to.is_none() {
            if inode.mapped.get().is_some_and(|m| !m.is_empty()) || !self.unsettled(&inode).is_zero() {
                return false;
            }
            if inode.kernel.pages.load(Ordering::SeqCst) && !self.drop_pages_at_once(&inode, from) {
                return false;
            }
        }
        let fills = inode.kernel.fills.load(Ordering::SeqCst);
        if !self.close_if_quiet(id) {
            return false;
        }
        let quiet = (to.is_some() && inode.kernel.invals.load(Ordering::SeqCst) == 0)
            || (to.is_none()
                && !inode.kernel.pages.load(Ordering::SeqCst)
                && inode.kernel.fills.load(Ordering::SeqCst) == fills);
        let ready = inode.try_claim_raw().filter(|s| {
            quiet
                && self.flushes_at_once(&inode, s, from)
                && (to.is_some() || self.pinning.pin_at_once(&inode))
        });
        let Some(mut state) = ready else {
            self.session.leases.open_gate(id);
            return false;
        };
        if to.is_none() {
            // Attributes only: takes no lock in the kernel.
            self.kernel.invalidate_attrs(&inode);
        }
        if self
            .writing
            .flush_pages(&Ctx::on_worker(), &inode, &mut state)
            .is_err()
        {
            drop(state);
            self.session.leases.open_gate(id);
            return false;
        }
        let how = self.relinquish_flushed(&inode, &mut state, from);
        drop(state);
        self.session.counters.revocations.fetch_add(1, Ordering::Relaxed);
        self.relinquish_and_push(&inode, how, to);
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

    /// Closes the gate if nobody is inside.
    fn close_if_quiet(&self, id: RecordId) -> bool {
        let (tx, rx) = bounded(1);
        self.session.leases.close_gate(
            id,
            Box::new(move || {
                let _ = tx.send(());
            }),
        );
        if rx.try_recv().is_ok() {
            return true;
        }
        // A thread that may wait closes it again.
        self.session.leases.open_gate(id);
        false
    }

    /// Drops the kernel's pages on the thread that brings answers from the fabric, where that cannot wait
    /// for such an answer: reads under way find all they need here and in local memory.
    fn drop_pages_at_once(self: &Arc<Self>, inode: &Arc<Inode>, from: Mode) -> bool {
        if from != Mode::Shared
            || !self.session.local_memory()
            || inode.edges.get().is_some_and(|e| !e.is_empty())
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
        if !all_here || !connected || writers {
            return false;
        }
        inode.kernel.revoking.store(true, Ordering::SeqCst);
        inode.kernel.pages.store(false, Ordering::SeqCst);
        inode.kernel.attrs.store(false, Ordering::SeqCst);
        self.kernel.notify(inode, 0, 0);
        inode.kernel.revoking.store(false, Ordering::SeqCst);
        true
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

    /// A revocation, on a thread of its own.
    fn revoke(self: &Arc<Self>, id: RecordId, from: Mode, to: Option<Mode>) {
        self.session.counters.revocations.fetch_add(1, Ordering::Relaxed);
        let Some(inode) = self.cache.inodes.by_record(id) else {
            self.close_and_drain(id);
            return self.relinquish(id, Relinquish::default());
        };
        self.front.recall(&inode, to);
        if to.is_none() {
            rt::thread::sleep(self.unsettled(&inode));
            inode.kernel.revoking.store(true, Ordering::SeqCst);
            // With the exclusive lease, mapped pages that are still dirty are taken in as they come.
            inode.mapped.revoking(true);
            loop {
                let fills = inode.kernel.fills.load(Ordering::SeqCst);
                if inode.kernel.pages.swap(false, Ordering::SeqCst) {
                    inode.kernel.attrs.store(false, Ordering::SeqCst);
                    self.kernel.invalidate_pages(&inode);
                } else {
                    self.kernel.invalidate_attrs(&inode);
                }
                self.close_and_drain(id);
                let slipped = inode.kernel.fills.load(Ordering::SeqCst) != fills
                    || inode.kernel.pages.load(Ordering::SeqCst)
                    || inode.kernel.attrs.load(Ordering::SeqCst);
                if !slipped {
                    break;
                }
                self.session.counters.repeats.fetch_add(1, Ordering::Relaxed);
                self.session.leases.open_gate(id);
            }
        } else {
            // The kernel's pages stay: those being invalidated must be gone first. That may wait for reads,
            // so not behind the closed gate.
            loop {
                self.close_and_drain(id);
                if inode.kernel.invals.load(Ordering::SeqCst) == 0 {
                    break;
                }
                self.session.leases.open_gate(id);
                rt::thread::sleep(Duration::from_micros(50));
            }
        }
        let how = self.write_back_for_revoke(&inode, from);
        if to.is_none() {
            self.pinning.pin_looked_up(&inode);
            inode.mapped.revoking(false);
            inode.kernel.revoking.store(false, Ordering::SeqCst);
        }
        self.relinquish_and_push(&inode, how, to);
        self.front.resume(&inode);
    }

    /// Gives the lease down. The metadata server is told of attributes at once if another mount may take the
    /// record over; else when the record becomes free, for they may change again before that.
    fn relinquish_and_push(self: &Arc<Self>, inode: &Arc<Inode>, how: Relinquish, to: Option<Mode>) {
        self.relinquish(inode.record(), how);
        if to.is_none() {
            // Only now: a confirmation counts for what has been relinquished before it.
            self.push.push_attrs(inode);
        }
    }

    fn close_and_drain(&self, id: RecordId) {
        let (tx, rx) = bounded(1);
        self.session.leases.close_gate(
            id,
            Box::new(move || {
                let _ = tx.send(());
            }),
        );
        let _ = rx.recv();
    }

    /// Writes back what the exclusive lease protected; nobody is inside. The attributes are left to be
    /// pushed.
    fn write_back_for_revoke(&self, inode: &Arc<Inode>, from: Mode) -> Relinquish {
        let mut state = inode.claim_raw();
        if from != Mode::Exclusive {
            return Relinquish::default();
        }
        let ctx = Ctx::on_worker();
        let mut said: Option<Instant> = None;
        for attempt in 1.. {
            let error = match self.writing.flush_pages(&ctx, inode, &mut state) {
                Ok(()) => break,
                Err(stop) => stop.errno(),
            };
            if self.session.fate.leaving.load(Ordering::SeqCst) && attempt >= LAST_ATTEMPTS {
                // Told at fsync and close.
                tracing::error!("data of {:#x} lost: {error}", inode.ino);
                inode.errors.set(error);
                self.reservations.abandon_pages(inode, &mut state);
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
        self.relinquish_flushed(inode, &mut state, from)
    }

    /// How to give up a lease whose data is stored. The attributes are left to be pushed.
    fn relinquish_flushed(&self, inode: &Inode, state: &mut State, from: Mode) -> Relinquish {
        if from != Mode::Exclusive {
            return Relinquish::default();
        }
        // What was promised to the kernel it has used, or never will.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::inode_table::InodeTable;

    #[test]
    fn attributes_that_come_with_a_lease_nobody_waits_for_are_kept() {
        let revoker = Revoker::default();
        let inodes = Arc::new(InodeTable::default());
        let _ = revoker.inodes.set(Arc::clone(&inodes));
        let attr = Attr::of_file(5, 8, 32);
        let record = ino::record(attr.ino);
        revoker.granted(record, Mode::Exclusive, 8, Some(&attr.encode()));
        assert!(inodes.idle(9).is_empty());
        let inode = inodes.by_record(record).unwrap();
        let how = inode.hand_over(&mut inode.lock_raw(), Some(8));
        assert_eq!(Attr::decode(&how.payload), Some(attr));
        assert!(how.needs_confirm);
    }
}
