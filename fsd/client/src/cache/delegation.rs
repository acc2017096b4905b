//! What of an inode's lease is delegated to the kernel, and who used it meanwhile.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rt::sync::{Condvar, Mutex};
use rt::time::Instant;

/// Visits in a row, with nobody else in between, after which a visitor takes the lease.
const STAY: u32 = 4;
/// Reads in a row, of whomever, after which readers take a lease they can share.
const READS: u32 = 8;
/// So many calls under one hold of the lease cost as much as the flush of what would have been written instead.
const RENT: u32 = 3;

/// Who came for what, under one hold of the exclusive lease.
#[derive(Debug, Default)]
pub(crate) struct Visitors {
    last: Option<u16>,
    in_a_row: u32,
    reads: u32,
}

impl Visitors {
    /// Whether another one had better take the lease.
    pub(crate) fn are_enough(&self, from: u16, writes: bool) -> bool {
        (self.last == Some(from) && self.in_a_row >= STAY) || (!writes && self.reads >= READS)
    }

    fn came(&mut self, from: u16, writes: bool) {
        self.in_a_row = if self.last == Some(from) {
            self.in_a_row + 1
        } else {
            1
        };
        self.last = Some(from);
        self.reads = if writes { 0 } else { self.reads + 1 };
    }

    /// A call of this mount's own.
    pub(crate) fn at_home(&mut self, writes: bool) {
        self.last = None;
        if writes {
            self.reads = 0;
        }
    }
}

impl LentState {
    /// A visitor was served, so the kernel would not have had the lease to itself.
    pub(crate) fn visited(&mut self, from: u16, writes: bool) {
        self.rent = 0;
        self.visitors.came(from, writes);
    }
}

/// What of an inode's lease is lent to the kernel.
#[derive(Debug, Default)]
pub struct Lent {
    pub(crate) state: Mutex<LentState>,
    pub(crate) changed: Condvar,
    /// How often the size was set here.
    pub(crate) resized: AtomicU64,
}

#[derive(Debug, Default)]
pub(crate) struct LentState {
    /// It is being taken back: nothing is lent meanwhile.
    pub(crate) taking: bool,
    /// The kernel's pages are those of this version of the record, and the kernel knows them by that stamp.
    pub(crate) caches: Option<(u64, u64)>,
    /// Calls being carried out: nothing is lent meanwhile.
    pub(crate) calling: usize,
    /// Tasks that space is being arranged for, under the mount's lease: it is not taken back before they have been lent it.
    pub(crate) arranging: usize,
    /// Calls since the mount got its lease.
    rent: u32,
    /// Who else came meanwhile.
    pub(crate) visitors: Visitors,
    /// When it was lent to tasks that wait, which must come to use it.
    pub(crate) asked: Option<Instant>,
    /// When nobody was let in any more, while it is being taken back.
    pub(crate) closed: Option<Instant>,
    /// How long taking it back, and giving the mount's lease up, took the last time.
    pub(crate) took: Duration,
}

impl Lent {
    /// This mount has made version `to` out of version `from`, through the kernel's pages.
    pub fn carry(&self, from: u64, to: u64) {
        let mut state = self.state.lock();
        if let Some(caches) = state.caches.as_mut().filter(|c| c.0 == from) {
            caches.0 = to;
        }
    }

    /// The size was set here: what the kernel says of it may be older.
    pub fn resize(&self) {
        self.resized.fetch_add(1, Ordering::SeqCst);
    }

    /// What is held may be lent again.
    pub fn again(&self) {
        let mut state = self.state.lock();
        state.taking = false;
        if let Some(closed) = state.closed.take() {
            state.took = closed.elapsed();
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Is somebody taking it back?
    pub fn is_taken_back(&self) -> bool {
        self.state.lock().taking
    }

    /// Space is about to be arranged for a task, and the lease lent with it, unless somebody is taking that back: whoever begins to
    /// do so meanwhile waits for this. That costs nothing, for the mount's lease is entered besides; without it two mounts
    /// could take a file from each other for ever, each while it asks for space.
    pub(crate) fn arrange(&self) -> Option<Arranging<'_>> {
        let mut state = self.state.lock();
        if state.taking {
            return None;
        }
        state.arranging += 1;
        Some(Arranging(self))
    }

    /// Waits until nobody is taking it back, and no call is being carried out.
    pub(crate) fn settled(&self) {
        let mut state = self.state.lock();
        while state.taking || state.calling > 0 {
            self.changed.wait(&mut state);
        }
    }
}

/// Space is being arranged for a task.
pub(crate) struct Arranging<'a>(&'a Lent);

impl Drop for Arranging<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.arranging -= 1;
        if state.arranging == 0 {
            self.0.changed.notify_all();
        }
    }
}

impl LentState {
    /// The lease goes to another mount.
    pub(crate) fn lost(&mut self) {
        self.rent = 0;
        self.visitors = Visitors::default();
    }

    /// One more call of this mount's own. Whether so many have come that the lease is better lent.
    pub(crate) fn pay_rent(&mut self, writes: bool) -> bool {
        self.visitors.at_home(writes);
        self.rent += 1;
        self.rent >= RENT
    }
}

/// A call that is being carried out: nothing is lent meanwhile.
pub(crate) struct Calling<'a>(pub(crate) &'a Lent);

impl Drop for Calling<'_> {
    fn drop(&mut self) {
        let mut lent = self.0.state.lock();
        lent.calling -= 1;
        if lent.calling == 0 {
            self.0.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_right_for_the_versions_made_through_them() {
        let lent = Lent::default();
        lent.carry(3, 4);
        assert_eq!(lent.state.lock().caches, None);
        lent.state.lock().caches = Some((3, 1));
        lent.carry(3, 4);
        lent.carry(4, 5);
        lent.carry(7, 8);
        assert_eq!(lent.state.lock().caches, Some((5, 1)));
    }

    #[test]
    fn who_comes_alone_takes_the_lease() {
        let mut visitors = Visitors::default();
        for _ in 0..STAY {
            assert!(!visitors.are_enough(3, true));
            visitors.came(3, true);
        }
        assert!(visitors.are_enough(3, true) && !visitors.are_enough(4, true));
        visitors.at_home(false);
        assert!(!visitors.are_enough(3, true));
    }

    #[test]
    fn readers_that_nobody_writes_between_take_a_lease_to_share() {
        let mut visitors = Visitors::default();
        for from in 0..READS {
            assert!(!visitors.are_enough(99, false));
            visitors.came(from as u16, false);
        }
        assert!(visitors.are_enough(99, false) && !visitors.are_enough(99, true));
        visitors.at_home(true);
        assert!(!visitors.are_enough(99, false));
    }

    #[test]
    fn a_visitor_keeps_the_lease_from_being_lent() {
        let mut lent = LentState::default();
        let paid = |lent: &mut LentState| (0..2).all(|_| !lent.pay_rent(true));
        assert!(paid(&mut lent));
        lent.visited(1, true);
        assert!(paid(&mut lent) && lent.pay_rent(true));
    }
}
