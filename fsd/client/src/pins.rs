//! Files that were looked up, and lose their last name before the operation that the look-up was for.
//!
//! A kernel looks a name up and then opens, truncates, changes … the inode it was told of, by number. On a local file system the inode is
//! alive in between, whoever removes its name. Here it is kept alive by a *pin*: a count of mounts in the lease record, beside the bits of those
//! that have the file open. Whoever removes the last name needs the exclusive lease, for which the mount that answered the look-up gives
//! up its own: it pins then, if the look-up was a moment ago, and so pays nothing for all the others. In the mount that removes
//! the name itself, look-ups of other threads count the same way. A pin is dropped a little later; the last one
//! to go removes the inode, as the last close of an unlinked file does.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use rt::sync::Mutex;
use rt::time::Instant;

use super::Client;
use super::ctx::{Ctx, Res};
use super::inode::{Inode, Opens};
use super::opens::{FLAG_UNLINKED, RecordChange};

/// In word 1 of a lease record: unit of the number of mounts that pin the inode.
pub const ONE_PIN: u64 = 1 << 8;
/// The bits of that number.
const PINS: u64 = 0xff_ffff << 8;

/// For so long after a look-up the operation that it was for may still come.
const FRESH: Duration = Duration::from_millis(500);
/// For so long an inode is kept for it.
const KEEP: Duration = Duration::from_secs(2);

/// Does a flags word say that somebody pins the inode?
#[must_use]
pub fn pinned(flags: u64) -> bool {
    flags & PINS != 0
}

/// The last two threads that an inode was looked up for, and when.
#[derive(Debug, Default)]
pub struct LookedUp(Mutex<[Option<(u32, Instant)>; 2]>);

impl LookedUp {
    /// A look-up is about to be answered.
    pub fn note(&self, thread: u32) {
        let mut last = self.0.lock();
        if last[0].is_some_and(|(other, _)| other != thread) {
            last[1] = last[0];
        }
        last[0] = Some((thread, Instant::now()));
    }

    /// Was it looked up a moment ago, for another thread than `but`?
    #[must_use]
    pub fn is_fresh(&self, but: Option<u32>) -> bool {
        let last = self.0.lock();
        let mut others = last.iter().flatten().filter(|(thread, _)| Some(*thread) != but);
        others.any(|(_, at)| at.elapsed() < FRESH)
    }
}

/// The inodes that this mount pins, in the order in which their pins end.
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

    fn take(&self, now: Option<Instant>) -> Option<Arc<Inode>> {
        let mut all = self.0.lock();
        let due = all
            .front()
            .is_some_and(|(end, _)| now.is_none_or(|now| *end <= now));
        due.then(|| all.pop_front()).flatten().map(|(_, inode)| inode)
    }
}

impl Client {
    /// Notes a look-up that is about to be answered. False: the inode is just losing its last name, with nobody in need of it.
    ///
    /// # Errors
    /// Park: somebody opens or closes the file just now, which may wait for the fabric.
    pub fn note_look_up(&self, ctx: &Ctx<'_>, inode: &Inode, thread: u32) -> Res<bool> {
        let opens = match inode.opens.try_lock() {
            Some(opens) => opens,
            None => {
                ctx.may_wait()?;
                inode.opens.lock()
            }
        };
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
        if opens.pinned.is_none() {
            let pin = RecordChange {
                pins: 1,
                ..RecordChange::default()
            };
            self.change_record(inode, pin)?;
            self.pins.add(end, Arc::clone(inode));
            self.wake_writer();
        }
        opens.pinned = Some(end);
        Ok(())
    }

    /// The lease is about to be given up altogether: pins an inode that was looked up a moment ago. Not one that has been removed: its
    /// record may serve another by the time the pin is dropped.
    pub fn pin_looked_up(&self, inode: &Arc<Inode>) {
        if !inode.looked_up.is_fresh(None) {
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

    /// As [`Client::pin_looked_up`], on a thread that must not wait for the fabric, nor for who does. False: another one has to.
    pub fn pin_at_once(&self, inode: &Arc<Inode>) -> bool {
        if !inode.looked_up.is_fresh(None) {
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
        if !self.local_memory() {
            return false;
        }
        drop(opens);
        self.pin_looked_up(inode);
        true
    }

    /// Drops the pins whose time is over; with `all`, every one.
    pub fn drop_pins(self: &Arc<Self>, all: bool) {
        let now = (!all).then(Instant::now);
        while let Some(inode) = self.pins.take(now) {
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
        let unpin = RecordChange {
            pins: -1,
            ..RecordChange::default()
        };
        match self.change_record(inode, unpin) {
            Ok((flags, bitmap)) => {
                let last = flags & FLAG_UNLINKED != 0 && !pinned(flags) && bitmap.iter().all(|&w| w == 0);
                if last && opens.count == 0 {
                    opens.removed = true;
                    drop(opens);
                    self.reap(inode);
                }
            }
            Err(stop) => tracing::warn!(
                "inode {:#x} may stay after its last name is gone, until all mounts have left: {stop:?}",
                inode.ino
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_thread_looked_up_is_fresh() {
        let looked_up = LookedUp::default();
        assert!(!looked_up.is_fresh(None));
        looked_up.note(7);
        looked_up.note(7);
        assert!(looked_up.is_fresh(None) && looked_up.is_fresh(Some(8)) && !looked_up.is_fresh(Some(7)));
        // The one that removes the name has looked it up, too.
        looked_up.note(8);
        looked_up.note(8);
        assert!(looked_up.is_fresh(Some(8)) && looked_up.is_fresh(Some(7)));
    }

    #[test]
    fn pins_are_counted_beside_flags_and_writers() {
        let word = FLAG_UNLINKED | (super::super::opens::ONE_WRITER * 3);
        assert!(!pinned(word) && pinned(word + ONE_PIN) && !pinned(word + ONE_PIN - ONE_PIN));
    }
}
