//! Locks of files, and who waits for one. The table itself is in `fsd_proto::locks`.
//!
//! A server that has been started again knows of no lock: the mounts tell it theirs when they come back. Until all have, or are
//! dead and shut out, nobody gets one.

use std::collections::{BTreeSet, HashMap};

use rt::sync::Mutex;

use fsd_proto::locks::{LockTable, Outcome, Ticket};
use fsd_proto::rpc::{Errno, Responder};
use fsd_proto::wire::{LockOwner, LockSpec, MetaReply};

/// A request that waits until all locks are known.
enum Parked {
    Set(bool),
    Test,
}

#[derive(Default)]
struct State {
    table: LockTable,
    waiters: HashMap<Ticket, Responder>,
    next_ticket: Ticket,
    /// The mounts of the last life that have not told their locks.
    awaited: BTreeSet<u16>,
    parked: Vec<(LockSpec, Parked, Responder)>,
}

/// Locks of files.
pub struct FileLocks(Mutex<State>);

impl FileLocks {
    /// Those that these mounts have are not known yet.
    pub fn new(mounts: impl Iterator<Item = u16>) -> Self {
        Self(Mutex::new(State {
            awaited: mounts.collect(),
            ..State::default()
        }))
    }

    /// Sets a lock, or has its request wait.
    pub fn set(&self, lock: &LockSpec, wait: bool, responder: Responder) {
        if lock.range.start > lock.range.end {
            return responder.reply::<MetaReply>(&Err(Errno(libc::EINVAL)));
        }
        let mut state = self.0.lock();
        // What is given up cannot be in anybody's way.
        if !state.awaited.is_empty() && lock.kind.is_some() {
            return state.parked.push((*lock, Parked::Set(wait), responder));
        }
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        let (outcome, served) = state.table.set(lock, wait.then_some(ticket));
        let answer = match outcome {
            Outcome::Done => Ok(MetaReply::Done),
            Outcome::Conflict => Err(Errno(libc::EAGAIN)),
            Outcome::Deadlock => Err(Errno(libc::EDEADLK)),
            Outcome::Waiting => {
                state.waiters.insert(ticket, responder);
                return;
            }
        };
        drop(state);
        responder.reply(&answer);
        self.answer(&served, &Ok(MetaReply::Done));
    }

    /// Has a request wait no longer.
    pub fn cancel(&self, lock: &LockSpec) {
        let (cancelled, served, parked) = {
            let mut state = self.0.lock();
            let theirs = |(l, p, _): &(LockSpec, Parked, Responder)| l == lock && matches!(p, Parked::Set(_));
            let at = state.parked.iter().position(theirs);
            let parked = at.map(|at| state.parked.remove(at));
            let (cancelled, served) = state.table.cancel(lock);
            (cancelled, served, parked)
        };
        if let Some((_, _, responder)) = parked {
            responder.reply::<MetaReply>(&Err(Errno(libc::EINTR)));
        }
        self.answer(cancelled.as_slice(), &Err(Errno(libc::EINTR)));
        self.answer(&served, &Ok(MetaReply::Done));
    }

    /// An owner gives up all locks of a file.
    pub fn release(&self, ino: u64, owner: LockOwner) {
        let served = self.0.lock().table.release(ino, owner);
        self.answer(&served, &Ok(MetaReply::Done));
    }

    /// Answers who is in the way of a lock.
    pub fn test(&self, lock: &LockSpec, responder: Responder) {
        let mut state = self.0.lock();
        if !state.awaited.is_empty() {
            return state.parked.push((*lock, Parked::Test, responder));
        }
        let found = state.table.test(lock);
        drop(state);
        responder.reply(&Ok(MetaReply::Lock(found)));
    }

    /// A mount that joins has these, and waits for none.
    pub fn restore(&self, node: u16, locks: &[LockSpec]) {
        let mut state = self.0.lock();
        let served = state.table.forget_waiters(node);
        // It asks again, on the connection that it has now.
        state.parked.retain(|(lock, ..)| lock.owner.node != node);
        for lock in locks {
            state.table.set(lock, None);
        }
        state.awaited.remove(&node);
        drop(state);
        self.answer(&served, &Ok(MetaReply::Done));
        self.unpark();
    }

    /// A mount is no more, and can do nothing any more for which it had a lock.
    pub fn release_node(&self, node: u16) {
        let mut state = self.0.lock();
        let served = state.table.release_node(node);
        state.awaited.remove(&node);
        drop(state);
        self.answer(&served, &Ok(MetaReply::Done));
        self.unpark();
    }

    /// What a mount holds is another one's from now on.
    pub fn give(&self, from: u16, to: u16) {
        self.0.lock().table.give(from, to);
    }

    /// Serves what has waited until all locks are known, if they are.
    fn unpark(&self) {
        let mut state = self.0.lock();
        if !state.awaited.is_empty() {
            return;
        }
        let parked = std::mem::take(&mut state.parked);
        drop(state);
        for (lock, what, responder) in parked {
            match what {
                Parked::Set(wait) => self.set(&lock, wait, responder),
                Parked::Test => self.test(&lock, responder),
            }
        }
    }

    /// How many a mount has.
    pub fn count(&self, node: u16) -> u64 {
        self.0.lock().table.count(node)
    }

    fn answer(&self, tickets: &[Ticket], answer: &Result<MetaReply, Errno>) {
        for ticket in tickets {
            let waiter = self.0.lock().waiters.remove(ticket);
            if let Some(responder) = waiter {
                responder.reply(answer);
            }
        }
    }
}
