//! What of an inode's lease is delegated to the kernel, and who used it meanwhile.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rt::sync::{Condvar, Mutex};
use rt::time::Instant;

/// Forwarded operations in a row, with nobody else in between, after which a forwarder takes the lease.
const STAY: u32 = 4;
/// Reads in a row, of whomever, after which readers take a lease they can share.
const READS: u32 = 8;
/// So many calls under one hold of the lease cost as much as the flush of what would have been written instead.
const RENT: u32 = 3;

/// Who came for what, under one hold of the exclusive lease.
#[derive(Debug, Default)]
pub(crate) struct Forwarders {
    last: Option<u16>,
    in_a_row: u32,
    reads: u32,
}

impl Forwarders {
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

impl DelegationState {
    /// A forwarder was served, so the kernel would not have had the lease to itself.
    pub(crate) fn forwarded(&mut self, from: u16, writes: bool) {
        self.rent = 0;
        self.forwarders.came(from, writes);
    }
}

/// What of an inode's lease is delegated to the kernel.
#[derive(Debug, Default)]
pub struct Delegation {
    pub(crate) state: Mutex<DelegationState>,
    pub(crate) changed: Condvar,
    /// How often the size was set here.
    pub(crate) resized: AtomicU64,
}

#[derive(Debug, Default)]
pub(crate) struct DelegationState {
    /// It is being recalled: nothing is delegated meanwhile.
    pub(crate) recalling: bool,
    /// The kernel's pages are those of this version of the record, and the kernel knows them by that stamp.
    pub(crate) caches: Option<(u64, u64)>,
    /// Calls being carried out: nothing is delegated meanwhile.
    pub(crate) calling: usize,
    /// Tasks that space is being arranged for, under the mount's lease: it is not recalled before it has been delegated to them.
    pub(crate) arranging: usize,
    /// Calls since the mount got its lease.
    rent: u32,
    /// Who else came meanwhile.
    pub(crate) forwarders: Forwarders,
    /// When it was delegated to tasks that wait, which must come to use it.
    pub(crate) asked: Option<Instant>,
    /// When nobody was let in any more, while it is being recalled.
    pub(crate) closed: Option<Instant>,
    /// How long recalling it, and giving the mount's lease up, took the last time.
    pub(crate) took: Duration,
}

impl Delegation {
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

    /// What is held may be delegated again.
    pub fn again(&self) {
        let mut state = self.state.lock();
        state.recalling = false;
        if let Some(closed) = state.closed.take() {
            state.took = closed.elapsed();
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Is somebody recalling it?
    pub fn is_recalling(&self) -> bool {
        self.state.lock().recalling
    }

    /// Space is about to be arranged for a task, and the lease delegated with it, unless somebody is recalling it: whoever begins to
    /// do so meanwhile waits for this. That costs nothing, for the mount's lease is entered besides; without it two mounts
    /// could take a file from each other for ever, each while it asks for space.
    pub(crate) fn arrange(&self) -> Option<Arranging<'_>> {
        let mut state = self.state.lock();
        if state.recalling {
            return None;
        }
        state.arranging += 1;
        Some(Arranging(self))
    }

    /// Waits until nobody is recalling it, and no call is being carried out.
    pub(crate) fn settled(&self) {
        let mut state = self.state.lock();
        while state.recalling || state.calling > 0 {
            self.changed.wait(&mut state);
        }
    }
}

/// Space is being arranged for a task.
pub(crate) struct Arranging<'a>(&'a Delegation);

impl Drop for Arranging<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.arranging -= 1;
        if state.arranging == 0 {
            self.0.changed.notify_all();
        }
    }
}

impl DelegationState {
    /// The lease goes to another mount.
    pub(crate) fn lost(&mut self) {
        self.rent = 0;
        self.forwarders = Forwarders::default();
    }

    /// One more call of this mount's own. Whether so many have come that the lease is better delegated.
    pub(crate) fn pay_rent(&mut self, writes: bool) -> bool {
        self.forwarders.at_home(writes);
        self.rent += 1;
        self.rent >= RENT
    }
}

/// A call that is being carried out: nothing is delegated meanwhile.
pub(crate) struct Calling<'a>(pub(crate) &'a Delegation);

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
        let lent = Delegation::default();
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
        let mut forwarders = Forwarders::default();
        for _ in 0..STAY {
            assert!(!forwarders.are_enough(3, true));
            forwarders.came(3, true);
        }
        assert!(forwarders.are_enough(3, true) && !forwarders.are_enough(4, true));
        forwarders.at_home(false);
        assert!(!forwarders.are_enough(3, true));
    }

    #[test]
    fn readers_that_nobody_writes_between_take_a_lease_to_share() {
        let mut forwarders = Forwarders::default();
        for from in 0..READS {
            assert!(!forwarders.are_enough(99, false));
            forwarders.came(from as u16, false);
        }
        assert!(forwarders.are_enough(99, false) && !forwarders.are_enough(99, true));
        forwarders.at_home(true);
        assert!(!forwarders.are_enough(99, false));
    }

    #[test]
    fn a_visitor_keeps_the_lease_from_being_lent() {
        let mut lent = DelegationState::default();
        let paid = |lent: &mut DelegationState| (0..2).all(|_| !lent.pay_rent(true));
        assert!(paid(&mut lent));
        lent.forwarded(1, true);
        assert!(paid(&mut lent) && lent.pay_rent(true));
    }
}
