//! Entering under a lease, and getting it for that.

use std::sync::Arc;
use std::time::Duration;

use rt::sync::{Condvar, Mutex};
use rt::time::Instant;

use super::LeaseManager;
use super::outgoing::Posting;
use crate::LeaseError;
use crate::ids::{Mode, RecordId};
use crate::lease::{EnterFn, Guard, Parked};
use crate::timers::Timer;

impl LeaseManager {
    /// Enters if the lease is held in this mode (or exclusively) and its gate is open: no message, no
    /// system call.
    #[must_use]
    pub fn try_enter(&self, id: RecordId, mode: Mode) -> Option<Guard> {
        self.0.table.with(id, |lease| lease.try_enter(mode))
    }

    /// Enters, getting the lease if need be. Blocks: not for threads that the lease may depend on.
    ///
    /// # Errors
    /// As [`Self::enter_async`].
    pub fn enter(&self, id: RecordId, mode: Mode, timeout: Duration) -> Result<Guard, LeaseError> {
        if let Some(guard) = self.try_enter(id, mode) {
            return Ok(guard);
        }
        let cell = Arc::new((Mutex::new(None), Condvar::new()));
        let theirs = Arc::clone(&cell);
        let now = Instant::now();
        let deadline = now
            .checked_add(timeout)
            .unwrap_or(now + Duration::from_secs(1 << 30));
        let f = Box::new(move |result| {
            *theirs.0.lock() = Some(result);
            theirs.1.notify_one();
        });
        let mut f: Option<EnterFn> = Some(f);
        let mut ask = || {
            if let Some(f) = f.take() {
                self.enter_async(id, mode, deadline, f);
            }
        };
        match self.0.dir.record(id) {
            Ok((storage, _)) => storage.attend(&mut ask, &|| cell.0.lock().is_some()),
            // It says why.
            Err(_) => ask(),
        }
        let mut result = cell.0.lock();
        loop {
            if let Some(result) = result.take() {
                return result;
            }
            if cell.1.wait_until(&mut result, deadline).timed_out() && result.is_none() {
                // Either this finds the operation parked, or another thread is about to let it in.
                drop(result);
                self.expire(deadline);
                result = cell.0.lock();
                if result.is_none() {
                    cell.1.wait(&mut result);
                }
            }
        }
    }

    /// Enters, getting the lease if need be. `f` runs at once if the lease is held; else when it has been
    /// granted, from whatever thread brought the grant, or from [`Self::expire`] after the deadline.
    ///
    /// `f` gets one of these errors: [`LeaseError::Leaving`], [`LeaseError::NoSuchRecord`],
    /// [`LeaseError::Violation`], and at the deadline [`LeaseError::Timeout`], [`LeaseError::Unreachable`]
    /// or [`LeaseError::StorageLost`].
    pub fn enter_async(&self, id: RecordId, mode: Mode, deadline: Instant, f: EnterFn) {
        self.enter_posting((id, mode), deadline, f, &mut Posting::AtOnce);
    }

    /// Gets leases that will be needed, and waits for none: what is posted to one storage node for many of them goes there together.
    /// Which of them come, and when, [`Self::held`] tells; what keeps one from coming is told who enters.
    pub fn acquire_ahead(&self, ids: impl Iterator<Item = RecordId>, mode: Mode, deadline: Instant) {
        let mut batches = Vec::new();
        for id in ids {
            let posting = &mut Posting::Together(&mut batches);
            self.enter_posting((id, mode), deadline, Box::new(drop), posting);
        }
        self.0.post_together(batches);
    }

    fn enter_posting(
        &self,
        (id, mode): (RecordId, Mode),
        deadline: Instant,
        f: EnterFn,
        posting: &mut Posting<'_>,
    ) {
        if self.0.leave.begun() {
            return f(Err(LeaseError::Leaving));
        }
        if let Some(guard) = self.try_enter(id, mode) {
            return f(Ok(guard));
        }
        if let Err(error @ LeaseError::NoSuchRecord { .. }) = self.0.dir.record(id) {
            return f(Err(error));
        }
        let ticket = self.0.alarms.ticket();
        let parked = Parked {
            mode,
            since: Instant::now(),
            deadline,
            ticket,
            f,
        };
        loop {
            let lease = self.0.table.get_or_insert(id);
            let mut record = lease.record.lock();
            if record.evicted {
                let hint = record.hint();
                drop(record);
                let is_dead = |node| self.0.epochs.is_dead(node);
                self.0.table.remove(&lease, hint, is_dead);
                continue;
            }
            let refused = match record.broken {
                _ if self.0.leave.begun() => Some(LeaseError::Leaving),
                Some(violation) => Some(LeaseError::Violation {
                    record: id,
                    violation,
                }),
                None => None,
            };
            if let Some(error) = refused {
                drop(record);
                (parked.f)(Err(error));
            } else if let Some(guard) = lease.enter_quietly(mode) {
                // Granted since we looked; whoever grants looks for parked operations afterwards.
                drop(record);
                (parked.f)(Ok(guard));
            } else {
                self.0
                    .alarms
                    .deadlines
                    .insert(deadline, ticket, Arc::clone(&lease), Timer::Deadline);
                record.parked.push_back(parked);
                drop(record);
            }
            // Even if nothing was parked: the record may have been made for this call only.
            self.0.drive_posting(&lease, posting);
            return;
        }
    }
}
