//! Requests for file locks, which may wait. The table itself is in `locks`.

use super::server::Inner;
use fsd_proto::locks::{Outcome, Ticket};
use fsd_proto::rpc::{Errno, Responder};
use fsd_proto::wire::{LockSpec, MetaReply};

impl Inner {
    pub(super) fn set_lock(&self, lock: &LockSpec, wait: bool, responder: Responder) {
        if lock.range.start > lock.range.end {
            return responder.reply::<MetaReply>(&Err(Errno(libc::EINVAL)));
        }
        let mut state = self.state.lock();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        let (outcome, served) = state.locks.set(lock, wait.then_some(ticket));
        let answer = match outcome {
            Outcome::Done => Ok(MetaReply::Done),
            Outcome::Conflict => Err(Errno(libc::EAGAIN)),
            Outcome::Deadlock => Err(Errno(libc::EDEADLK)),
            Outcome::Waiting => {
                state.lock_waiters.insert(ticket, responder);
                return;
            }
        };
        drop(state);
        responder.reply(&answer);
        self.answer_locks(&served, &Ok(MetaReply::Done));
    }

    pub(super) fn answer_locks(&self, tickets: &[Ticket], answer: &Result<MetaReply, Errno>) {
        for ticket in tickets {
            let waiter = self.state.lock().lock_waiters.remove(ticket);
            if let Some(responder) = waiter {
                responder.reply(answer);
            }
        }
    }
}
