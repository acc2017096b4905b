//! Locks of files, and who waits for one. The table itself is in `fsd_proto::locks`.

use std::collections::HashMap;

use rt::sync::Mutex;

use fsd_proto::locks::{LockTable, Outcome, Ticket};
use fsd_proto::rpc::{Errno, Responder};
use fsd_proto::wire::{LockOwner, LockSpec, MetaReply};

#[derive(Default)]
struct State {
    table: LockTable,
    waiters: HashMap<Ticket, Responder>,
    next_ticket: Ticket,
}

/// Locks of files.
#[derive(Default)]
pub struct FileLocks(Mutex<State>);

impl FileLocks {
    /// Sets a lock, or has its request wait.
    pub fn set(&self, lock: &LockSpec, wait: bool, responder: Responder) {
        if lock.range.start > lock.range.end {
            return responder.reply::<MetaReply>(&Err(Errno(libc::EINVAL)));
        }
        let mut state = self.0.lock();
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
        let (cancelled, served) = self.0.lock().table.cancel(lock);
        self.answer(cancelled.as_slice(), &Err(Errno(libc::EINTR)));
        self.answer(&served, &Ok(MetaReply::Done));
    }

    /// An owner gives up all locks of a file.
    pub fn release(&self, ino: u64, owner: LockOwner) {
        let served = self.0.lock().table.release(ino, owner);
        self.answer(&served, &Ok(MetaReply::Done));
    }

    /// Who is in the way of a lock.
    pub fn test(&self, lock: &LockSpec) -> Option<LockSpec> {
        self.0.lock().table.test(lock)
    }

    /// A mount that joins has these, and waits for none.
    pub fn restore(&self, node: u16, locks: &[LockSpec]) {
        let mut state = self.0.lock();
        let served = state.table.forget_waiters(node);
        for lock in locks {
            state.table.set(lock, None);
        }
        drop(state);
        self.answer(&served, &Ok(MetaReply::Done));
    }

    /// A mount is no more.
    pub fn release_node(&self, node: u16) {
        let served = self.0.lock().table.release_node(node);
        self.answer(&served, &Ok(MetaReply::Done));
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
