//! Files that were looked up, and lose their last name before the operation that the look-up was for.
//!
//! A kernel looks a name up and then opens, truncates, changes … the inode it was told of, by number. On a local file system the inode is
//! alive in between, whoever removes its name. Here it is kept alive by a *pin*: the mount's use bit in the lease record, without the open
//! bit of those that have the file open. Whoever removes the last name needs the exclusive lease, for which the mount that answered the look-up gives
//! up its own: it pins then, if the look-up was a moment ago, and so pays nothing for all the others. In the mount that removes
//! the name itself, look-ups of other threads count the same way. A pin is dropped a little later; the last one
//! to go removes the inode, as the last close of an unlinked file does.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lockmgr::Mode;
use rt::sync::{Mutex, MutexGuard};
use rt::time::Instant;

use crate::cache::Cache;
use crate::cache::claims::{Purpose, Span};
use crate::cache::inode::Inode;
use crate::cache::opens::{Opens, Telling, Usage};
use crate::data::reservations::Reservations;
use crate::opens::record::OpenRecords;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res, Stop};
use fsd_proto::ask;
use fsd_proto::rpc::Errno;

/// For so long an inode is kept for it.
const KEEP: Duration = Duration::from_secs(2);

/// The inodes that this mount pins, or whose record it could not bring up to date, in the order in which they are to be looked at.
#[derive(Debug, Default)]
pub struct Pins(Mutex<VecDeque<(Instant, Arc<Inode>)>>);

impl Pins {
    /// Is there any?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }

    fn add(&self, end: Instant, inode: Arc<Inode>) {
        self.0.lock().push_back((end, inode));
    }

    /// Those that are due by then, or all.
    fn take(&self, now: Option<Instant>) -> Vec<Arc<Inode>> {
        let mut all = self.0.lock();
        let due = now.map_or(all.len(), |now| {
            all.iter().take_while(|(end, _)| *end <= now).count()
        });
        all.drain(..due).map(|(_, inode)| inode).collect()
    }
}

/// A removal of what may be an inode's last name, while it is under way.
pub struct Removal {
    pinning: Arc<Pinning>,
    inode: Arc<Inode>,
}

impl Drop for Removal {
    fn drop(&mut self) {
        self.pinning.unlinked(&self.inode);
    }
}

/// Inodes that stay for a moment.
pub struct Pinning {
    /// The pins.
    pub pins: Pins,
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) reservations: Arc<Reservations>,
    pub(crate) records: Arc<OpenRecords>,
}

impl Pinning {
    /// Notes a look-up that is about to be answered. False: the inode is just losing its last name, with nobody in need of it.
    ///
    /// # Errors
    /// Park: somebody opens or closes the file just now, which may wait for the fabric.
    pub fn note_look_up(&self, ctx: &Ctx<'_>, inode: &Inode, thread: u32) -> Res<bool> {
        let opens = inode.lock_opens(ctx)?;
        if !opens.removed {
            inode.looked_up.note(thread);
        }
        Ok(!opens.removed)
    }

    /// Pins an inode whose opens are locked, or has its pin last longer. The caller holds a lease on it, or is just giving one up.
    ///
    /// # Errors
    /// The storage node cannot be reached.
    pub fn pin_held(&self, inode: &Arc<Inode>, opens: &mut Opens) -> Res<()> {
        let end = Instant::now() + KEEP;
        if opens.pinned.replace(end).is_some() {
            return Ok(());
        }
        // While the file is open its bit is there already: nothing is to be changed.
        if !opens.is_recorded()
            && let Err(stop) = self.records.record(inode, opens)
        {
            opens.pinned = None;
            self.record_later(inode, opens);
            return Err(stop);
        }
        self.add(end, inode);
        Ok(())
    }

    fn add(&self, end: Instant, inode: &Arc<Inode>) {
        self.pins.add(end, Arc::clone(inode));
        self.cache.wake_writer();
    }

    /// A file has just been made under this number, whose lease is held exclusively: nobody else has it open.
    pub fn made(&self, inode: &Inode) {
        inode.opens.lock().telling = Telling::Nothing;
    }

    /// The lease is about to be given up, or to be lowered to another: has the lease record say what this mount does with the file, as far as
    /// it then has to.
    ///
    /// # Errors
    /// The storage node cannot be reached.
    pub fn publish(&self, ctx: &Ctx<'_>, inode: &Inode, to: Option<Mode>) -> Res<()> {
        if inode.lock_opens(ctx)?.telling == Telling::All {
            return Ok(());
        }
        self.records.patiently(ctx, inode, || {
            self.records.publish(inode, &mut inode.opens.lock(), to)
        })
    }

    /// As [`Pinning::publish`], on a thread that must not wait for the fabric, nor for who does. False: another one has to.
    pub fn publish_at_once(&self, inode: &Inode, to: Option<Mode>) -> bool {
        let Some(mut opens) = inode.opens.try_lock() else {
            return false;
        };
        if opens.telling == Telling::All || (to.is_some() && opens.lower()) {
            return true;
        }
        let at_once = opens.is_published() || self.session.local_memory();
        at_once && self.records.publish(inode, &mut opens, to).is_ok()
    }

    /// The record could not be changed: that is tried again after a while, if need be. A bit left behind would keep the inode for good after
    /// its last name, and be set twice when this mount, having forgotten the inode, opens it again.
    pub(crate) fn record_later(&self, inode: &Arc<Inode>, opens: &Opens) {
        if !opens.is_recorded() {
            self.add(Instant::now() + KEEP, inode);
        }
    }

    /// The lease is about to be given up altogether: pins an inode that was looked up a moment ago. Not one that has been removed: its
    /// record may serve another by the time the pin is dropped. Not while the mount leaves: nothing comes from its kernel any more, and
    /// nobody would drop the pin.
    pub fn pin_looked_up(&self, inode: &Arc<Inode>) {
        if !self.is_needed(inode) {
            return;
        }
        let mut opens = inode.opens.lock();
        if !opens.removed
            && let Err(stop) = self.pin_held(inode, &mut opens)
        {
            tracing::debug!(
                "inode {:#x} is not kept for who looked it up: {stop:?}",
                inode.ino
            );
        }
    }

    fn is_needed(&self, inode: &Inode) -> bool {
        inode.looked_up.is_fresh(None) && !self.session.fate.leaving.load(Ordering::SeqCst)
    }

    /// As [`Pinning::pin_looked_up`], on a thread that must not wait for the fabric, nor for who does. False: another one has to.
    pub fn pin_at_once(&self, inode: &Arc<Inode>) -> bool {
        if !self.is_needed(inode) {
            return true;
        }
        let Some(mut opens) = inode.opens.try_lock() else {
            return false;
        };
        if opens.removed {
            return true;
        }
        if opens.pinned.is_some() {
            opens.pinned = Some(Instant::now() + KEEP);
            return true;
        }
        if !self.session.local_memory() {
            return false;
        }
        drop(opens);
        self.pin_looked_up(inode);
        true
    }

    /// Drops the pins whose time is over; with `all`, every one.
    pub fn drop_pins(self: &Arc<Self>, all: bool) {
        let now = (!all).then(Instant::now);
        for inode in self.pins.take(now) {
            self.drop_pin(&inode, all);
        }
    }

    fn drop_pin(self: &Arc<Self>, inode: &Arc<Inode>, now: bool) {
        let mut opens = inode.opens.lock();
        if let Some(end) = opens.pinned.filter(|end| !now && *end > Instant::now()) {
            // It was looked up again meanwhile.
            return self.pins.add(end, Arc::clone(inode));
        }
        opens.pinned = None;
        // A record that serves a later inode says what this mount does with that one.
        let serves_another = opens.in_doubt && inode.hints.superseded.load(Ordering::SeqCst);
        if opens.is_recorded() || serves_another {
            return;
        }
        match self.records.record(inode, &mut opens) {
            Ok(seen) if seen.is_orphan() => self.left(inode, opens),
            Ok(_) => {}
            Err(stop) => {
                tracing::debug!("the pin of inode {:#x} stays for now: {stop:?}", inode.ino);
                self.record_later(inode, &opens);
            }
        }
    }

    /// An inode whose unlinked flag is set has lost its last user. While a removal of its last name is under way here, the name may still be
    /// there, and stay: then nobody may look yet whether it is, for one that found it there would take the flag back, and nobody would
    /// ever look again once the name has gone.
    pub(crate) fn left(self: &Arc<Self>, inode: &Arc<Inode>, mut opens: MutexGuard<'_, Opens>) {
        if opens.unlinking.is_under_way() {
            opens.left = true;
            return;
        }
        opens.removed = true;
        drop(opens);
        self.reap(inode);
    }

    /// A removal of what may be the last name of an inode begins; it ends when that is dropped, with no lease held.
    pub fn unlinking(self: &Arc<Self>, inode: &Arc<Inode>) -> Removal {
        let mut opens = inode.opens.lock();
        opens.unlinking.begun = opens.unlinking.begun.wrapping_add(1);
        drop(opens);
        Removal {
            pinning: Arc::clone(self),
            inode: Arc::clone(inode),
        }
    }

    /// Such a removal has ended, whatever came of it.
    fn unlinked(self: &Arc<Self>, inode: &Arc<Inode>) {
        let mut opens = inode.opens.lock();
        opens.unlinking.ended = opens.unlinking.ended.wrapping_add(1);
        if opens.unlinking.is_under_way() || !std::mem::take(&mut opens.left) {
            return;
        }
        // It was removed with its name, or somebody uses it again, who will see the flag.
        if !opens.removed && opens.usage() == Usage::Unused {
            self.left(inode, opens);
        }
    }

    /// Sets the unlinked flag of an inode about to lose its last name to a request of `thread`, and tells whether it is in use: open
    /// anywhere, or looked up a moment ago. The flag comes first: a last closer either sees it or is seen. If it is not in use,
    /// nobody can open it any more. To be called between the begin and the end of a [`Removal`].
    ///
    /// # Errors
    /// The storage node cannot be reached.
    pub fn mark_unlinked(&self, ctx: &Ctx<'_>, inode: &Arc<Inode>, thread: u32) -> Res<bool> {
        if self.is_unused_here(ctx, inode, thread)? {
            return Ok(false);
        }
        ctx.may_wait()?;
        // Others look at the record once the inode has no name.
        self.publish(ctx, inode, None)?;
        self.records.patiently(ctx, inode, || {
            self.records.set_unlinked(inode, true)?;
            let used = self.is_used(inode, thread);
            if used.is_err() {
                // The name stays; with the flag the next last close would take the file for one without.
                self.clear_unlinked(inode)?;
            }
            used
        })
    }

    /// Is the file this mount's alone, and not in use? Then nobody can open it any more, and its record need not say so: it is what it is while
    /// no file is in use.
    fn is_unused_here(&self, ctx: &Ctx<'_>, inode: &Inode, thread: u32) -> Res<bool> {
        let mut opens = inode.lock_opens(ctx)?;
        let used = opens.usage() != Usage::Unused || inode.looked_up.is_fresh(Some(thread));
        let unused = opens.telling == Telling::Nothing && opens.is_published() && !used;
        opens.removed |= unused;
        Ok(unused)
    }

    fn is_used(&self, inode: &Arc<Inode>, thread: u32) -> Res<bool> {
        let mut opens = inode.opens.lock();
        if inode.looked_up.is_fresh(Some(thread)) {
            self.pin_held(inode, &mut opens)?;
            return Ok(true);
        }
        let used = opens.count > 0 || self.records.look(inode, &opens)?.in_use();
        opens.removed = !used;
        Ok(used)
    }

    /// Takes the unlinked flag back: the unlink failed.
    ///
    /// # Errors
    /// The storage node cannot be reached.
    pub fn clear_unlinked(&self, inode: &Inode) -> Res<()> {
        inode.opens.lock().removed = false;
        self.records.set_unlinked(inode, false)
    }

    /// As [`Pinning::clear_unlinked`], of an inode that was found to have a name when so many removals had `begun`. False: one has begun
    /// and ended since, and the name may be gone. One that is under way looks after the inode itself.
    fn has_name(&self, inode: &Inode, begun: u16) -> Res<bool> {
        let mut opens = inode.opens.lock();
        if opens.unlinking.is_under_way() {
            opens.removed = false;
            opens.left = true;
            return Ok(true);
        }
        if opens.unlinking.begun != begun {
            return Ok(false);
        }
        opens.removed = false;
        // With `opens` locked: a removal that begins now sets the flag after this.
        self.records.set_unlinked(inode, false)?;
        Ok(true)
    }

    /// The last close of a file without a name. Aside, for it waits for other mounts; but for one that leaves, whose workers end.
    pub fn reap(self: &Arc<Self>, inode: &Arc<Inode>) {
        if self.session.fate.leaving.load(Ordering::SeqCst) {
            return self.reap_alone(inode);
        }
        let (me, gone) = (Arc::clone(self), Arc::clone(inode));
        self.session.threads.workers.run(move || me.reap_alone(&gone));
    }

    /// A mount that went from a pin to an open just when this one looked may have shown neither bit. Under the exclusive lease nobody does
    /// that; whoever uses the inode reaps it later.
    fn is_used_after_all(&self, inode: &Inode) -> Res<bool> {
        let mut opens = inode.opens.lock();
        let used = self.records.look(inode, &opens)?.in_use();
        opens.removed &= !used;
        Ok(used)
    }

    /// Removes an orphan under its exclusive lease. A mount that closed the file before may still have data of it to store: that must
    /// not come into frames that have been freed, and are perhaps another file's by then. So it is waited for the lease as long as it takes:
    /// whoever has it is reached some way, or declared dead. Not by a mount that leaves: then the metadata server removes it when all
    /// mounts have left.
    ///
    /// It may have a name after all: a removal sets the unlinked flag first, and may then fail while the storage node, which would have
    /// to take that back, is away. Then that is done here.
    fn reap_alone(&self, inode: &Arc<Inode>) {
        let ctx = Ctx::on_worker();
        let guard = loop {
            if let Ok(guard) = self.cache.lease(&ctx, inode, Mode::Exclusive) {
                break guard;
            }
            if self.session.fate.leaving.load(Ordering::SeqCst) || self.session.term.is_over() {
                return tracing::warn!("orphan {:#x} stays until all mounts have left", inode.ino);
            }
            rt::thread::sleep(KEEP);
        };
        let reap = || -> Res<()> {
            let meta = &self.session.net.meta;
            // This mount itself may be storing what it has of it.
            let mut state = inode.claim(&ctx, guard.version(), Span::ALL, Purpose::Change)?;
            loop {
                let begun = state.unlocked(|| inode.opens.lock().unlinking.begun);
                if self.cache.load_attr(&ctx, inode, &mut state)?.nlink == 0 {
                    break;
                }
                if state.unlocked(|| self.has_name(inode, begun))? {
                    return Ok(());
                }
            }
            if state.unlocked(|| self.is_used_after_all(inode))? {
                return Ok(());
            }
            state.unlocked(|| meta.ask(ask::meta::Reap { ino: inode.ino }))?;
            self.reservations.forget_data(inode, state);
            Ok(())
        };
        match reap() {
            // Somebody else has removed it.
            Ok(()) | Err(Stop::Errno(Errno(libc::ESTALE | libc::ENOENT))) => {}
            Err(stop) => tracing::warn!("orphan {:#x} not removed: {stop:?}", inode.ino),
        }
    }
}
