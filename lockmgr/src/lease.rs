//! A lease as callers see it: handles and guards; and its state in the manager.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rt::sync::Mutex;
use rt::time::Instant;

use crate::LeaseError;
use crate::fsm::{Event, Fsm, Violation};
use crate::gate::Gate;
use crate::hint::Hint;
use crate::ids::{Mode, RecordId};

/// Gets the result of an asynchronous enter.
pub type EnterFn = Box<dyn FnOnce(Result<Guard, LeaseError>) + Send>;

pub(crate) fn rank(mode: Option<Mode>) -> u64 {
    match mode {
        None => 0,
        Some(Mode::Shared) => 1,
        Some(Mode::Exclusive) => 2,
    }
}

/// The lease on one record, found without a look-up in the table.
///
/// A handle outlives the lease: once the lease is gone [`LeaseHandle::try_enter`] returns `None`, for ever
/// if the record has left the table meanwhile. Callers then use [`crate::LeaseManager::enter`] and get the
/// handle again.
// In this order, so that all an enter touches lies in one or two cache lines, beside the reference count.
#[repr(C)]
pub struct LeaseHandle {
    id: RecordId,
    pub(crate) gate: Gate,
    pub(crate) version: AtomicU64,
    pub(crate) hits: AtomicU64,
    pub(crate) record: Mutex<Record>,
}

impl LeaseHandle {
    pub(crate) fn new(id: RecordId, hint: Hint) -> Self {
        Self {
            id,
            gate: Gate::new(),
            version: AtomicU64::new(hint.version),
            hits: AtomicU64::new(0),
            record: Mutex::new(Record::new(hint)),
        }
    }

    /// The record.
    #[must_use]
    pub fn id(&self) -> RecordId {
        self.id
    }

    /// Enters if the lease is held in this mode (or exclusively) and the gate is open.
    #[must_use]
    pub fn try_enter(self: &Arc<Self>, mode: Mode) -> Option<Guard> {
        let guard = self.enter_quietly(mode)?;
        self.hits.fetch_add(1, Ordering::Relaxed);
        Some(guard)
    }

    /// As `try_enter`, for those who have waited: not a hit.
    pub(crate) fn enter_quietly(self: &Arc<Self>, mode: Mode) -> Option<Guard> {
        if !self.gate.enter(rank(Some(mode))) {
            return None;
        }
        // The version changes only while the gate is closed and empty.
        let version = self.version.load(Ordering::Relaxed);
        Some(Guard {
            lease: Arc::clone(self),
            mode,
            version,
        })
    }
}

impl fmt::Debug for LeaseHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseHandle")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// An operation under a lease. The lease is not given up while a guard exists.
pub struct Guard {
    lease: Arc<LeaseHandle>,
    mode: Mode,
    version: u64,
}

impl Guard {
    /// The record.
    #[must_use]
    pub fn id(&self) -> RecordId {
        self.lease.id
    }

    /// The mode asked for; the lease may be a stronger one.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Version of the data when the lease was granted.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The handle of the lease, for the next enter.
    #[must_use]
    pub fn handle(&self) -> &Arc<LeaseHandle> {
        &self.lease
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(drained) = self.lease.gate.leave() {
            drained();
        }
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lease, mode, version } = self;
        f.debug_struct("Guard")
            .field("id", &lease.id)
            .field("mode", mode)
            .field("version", version)
            .finish()
    }
}

/// A local operation that waits for the lease.
pub(crate) struct Parked {
    pub(crate) mode: Mode,
    pub(crate) since: Instant,
    pub(crate) deadline: Instant,
    pub(crate) ticket: u64,
    pub(crate) f: EnterFn,
}

/// What the user asked the lease to come down to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    Release,
    Downgrade,
}

/// A word that its owner keeps for a while. Without room between its fields and those of [`Record`]: there are many.
#[derive(Default)]
pub(crate) struct Kept {
    /// A timer looks after it.
    pub(crate) timer: bool,
    /// It was kept long enough, unless somebody needs it now.
    pub(crate) over: bool,
}

/// Where a record is in the course of things.
#[derive(Default)]
pub(crate) struct Counts {
    /// Grants, so that a timer knows whether it is about this one.
    pub(crate) tenure: u64,
    /// The last epoch that the state machine was told of.
    pub(crate) epoch: u64,
}

/// State of a record, under the lock of its handle.
pub(crate) struct Record {
    pub(crate) fsm: Fsm,
    /// Events not yet applied.
    pub(crate) inbox: VecDeque<Event>,
    /// A thread is applying events; it will see those that come.
    pub(crate) busy: bool,
    /// No longer in the table; look it up again.
    pub(crate) evicted: bool,
    pub(crate) parked: VecDeque<Parked>,
    /// What the user has been asked to come down to, and has not.
    pub(crate) asked: Option<Option<Mode>>,
    pub(crate) wish: Option<Wish>,
    /// When the word was last kept.
    pub(crate) kept_since: Option<Instant>,
    pub(crate) kept: Kept,
    pub(crate) counts: Counts,
    pub(crate) broken: Option<Violation>,
    /// Why the last batch could not be posted or did not come back.
    pub(crate) trouble: Option<LeaseError>,
}

impl Record {
    fn new(hint: Hint) -> Self {
        Self {
            fsm: Fsm::remembering(hint.version, hint.owner),
            inbox: VecDeque::new(),
            busy: false,
            evicted: false,
            parked: VecDeque::new(),
            asked: None,
            wish: None,
            kept_since: None,
            kept: Kept::default(),
            counts: Counts::default(),
            broken: None,
            trouble: None,
        }
    }

    /// What is lost if the table forgets the record.
    pub(crate) fn hint(&self) -> Hint {
        Hint {
            version: self.fsm.version(),
            owner: self.fsm.last_owner(),
        }
    }

    /// The strongest mode somebody waits for.
    pub(crate) fn needed(&self) -> Option<Mode> {
        self.parked.iter().map(|p| p.mode).max()
    }

    /// Nothing is lost if the table forgets the record (but what makes a [`Hint`]).
    pub(crate) fn is_forgettable(&self) -> bool {
        self.fsm.is_idle()
            && self.inbox.is_empty()
            && self.parked.is_empty()
            && self.asked.is_none()
            && self.broken.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_small() {
        let (lease, fsm) = (size_of::<LeaseHandle>(), size_of::<Fsm>());
        assert!(lease <= 640, "{lease} bytes, {fsm} of them state machine");
        println!("{lease} bytes, {fsm} of them state machine");
    }
}
