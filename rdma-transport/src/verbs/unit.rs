//! Operations on their way: what is posted together and completes together, and who waits for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::attend::Attended;
use super::cells::Cell;
use super::ffi::{Local, Verb};
use super::wire::Place;
use crate::{Completion, OpResult, RemoteAddr, TransportError};

/// What an operation does; its length and memory are in the [`Request`].
#[derive(Debug, Clone, Copy)]
pub(super) enum Action {
    Read,
    Write,
    Cas { expect: u64, new: u64 },
    Faa { add: u64 },
}

/// Where the bytes are.
pub(super) enum Data {
    Cell(Cell),
    /// Copied when it is posted.
    Inline(Vec<u8>),
}

/// One operation, or a piece of a long one.
pub(super) struct Request {
    pub(super) action: Action,
    pub(super) at: RemoteAddr,
    pub(super) len: u32,
    pub(super) data: Data,
}

impl Request {
    /// Whether later writes and messages must wait for it, as the adapter does not order them by itself.
    pub(super) fn needs_fence(&self) -> bool {
        !matches!(self.action, Action::Write)
    }

    /// The error, if the region does not have or permit it.
    pub(super) fn refusal(&self, place: &Place) -> Option<&'static str> {
        let permitted = match self.action {
            Action::Read => place.access.read,
            Action::Write => place.access.write,
            Action::Cas { .. } | Action::Faa { .. } => place.access.atomic,
        };
        if !permitted {
            return Some("the region does not permit this");
        }
        let end = self.at.offset.checked_add(u64::from(self.len));
        end.is_none_or(|end| end > place.len)
            .then_some("outside of the region")
    }

    pub(super) fn verb(&self, place: &Place) -> Verb {
        let addr = place.base.wrapping_add(self.at.offset);
        let rkey = place.rkey;
        match self.action {
            Action::Read => Verb::Read { addr, rkey },
            Action::Write => Verb::Write { addr, rkey },
            Action::Cas { expect, new } => Verb::Cas {
                addr,
                rkey,
                expect,
                new,
            },
            Action::Faa { add } => Verb::Faa { addr, rkey, add },
        }
    }

    /// Its local memory; what is inline is appended to `bytes`.
    pub(super) fn local(&self, bytes: &mut Vec<u8>) -> Local {
        match &self.data {
            Data::Cell(cell) => Local::Mem {
                addr: cell.address(),
                len: self.len,
                lkey: cell.lkey(),
            },
            Data::Inline(data) => {
                let off = bytes.len();
                bytes.extend_from_slice(data);
                Local::Inline { off, len: data.len() }
            }
        }
    }

    fn cell(&self) -> Result<&Cell, TransportError> {
        match &self.data {
            Data::Cell(cell) => Ok(cell),
            Data::Inline(_) => Err(TransportError::Invalid("a result without memory".to_owned())),
        }
    }

    /// Copies what was read.
    pub(super) fn copy_to(&self, into: &mut [u8]) -> Result<(), TransportError> {
        self.cell()?.copy_to(into)
    }

    /// The value before an atomic.
    pub(super) fn old(&self) -> Result<u64, TransportError> {
        let words = self.cell()?.words(1)?;
        words.first().copied().ok_or(TransportError::Shutdown)
    }

    fn result(&self) -> Result<OpResult, TransportError> {
        match self.action {
            Action::Cas { .. } | Action::Faa { .. } => self.old().map(OpResult::Old),
            Action::Read | Action::Write => Ok(OpResult::Words(self.cell()?.words(self.len as usize / 8)?)),
        }
    }
}

type Outcome = Result<Vec<Request>, TransportError>;

/// What a blocked caller waits on.
#[derive(Default)]
pub(super) struct Waiter {
    done: AtomicBool,
    outcome: Mutex<Option<Outcome>>,
    cond: Condvar,
}

impl Waiter {
    fn finish(&self, outcome: Outcome) {
        *self.outcome.lock() = Some(outcome);
        self.done.store(true, Ordering::Release);
        self.cond.notify_one();
    }

    /// The outcome if it is there.
    pub(super) fn take(&self) -> Option<Outcome> {
        if self.done.load(Ordering::Acquire) {
            self.outcome.lock().take()
        } else {
            None
        }
    }

    /// The outcome, or None at the deadline.
    pub(super) fn wait(&self, deadline: Instant) -> Option<Outcome> {
        let mut outcome = self.outcome.lock();
        while outcome.is_none() {
            if self.cond.wait_until(&mut outcome, deadline).timed_out() {
                break;
            }
        }
        outcome.take()
    }
}

/// Who is told.
pub(super) enum Owner {
    Blocked(Arc<Waiter>),
    Async {
        done: Completion,
        /// The places, in ascending order, of reads of nothing, which are not requests.
        empty: Vec<usize>,
        /// The caller looks for it itself.
        attended: Option<Arc<Attended>>,
    },
}

/// Requests that complete together.
pub(super) struct Unit {
    /// Its place among everything submitted.
    pub(super) order: u64,
    pub(super) requests: Vec<Request>,
    pub(super) posted: usize,
    pub(super) done: usize,
    pub(super) owner: Owner,
    /// It fails with this once what was posted of it is done.
    pub(super) poison: Option<TransportError>,
}

/// A completion that is to be called: by the caller that attends to it, else on the progress thread.
pub(super) struct Due {
    done: Completion,
    result: Result<Vec<OpResult>, TransportError>,
    attended: Option<Arc<Attended>>,
}

impl Due {
    pub(super) fn call(self) {
        (self.done)(self.result);
    }

    /// Gives it to who attends to it; returns it if nobody does.
    pub(super) fn offer(mut self) -> Option<Self> {
        match self.attended.take() {
            Some(attended) => attended.put(self),
            None => Some(self),
        }
    }
}

impl Unit {
    /// Everything posted is done, and there is no more to post.
    pub(super) fn over(&self) -> bool {
        self.done == self.requests.len() || (self.poison.is_some() && self.done == self.posted)
    }

    /// Tells the owner, or returns what is to be called.
    pub(super) fn finish(self, result: Result<(), TransportError>) -> Option<Due> {
        match self.owner {
            Owner::Blocked(waiter) => waiter.finish(result.map(|()| self.requests)),
            Owner::Async {
                done,
                empty,
                attended,
            } => {
                let result = result.and_then(|()| {
                    let mut results = self
                        .requests
                        .iter()
                        .map(Request::result)
                        .collect::<Result<Vec<_>, _>>()?;
                    for place in empty {
                        results.insert(place.min(results.len()), OpResult::Words(Vec::new()));
                    }
                    Ok(results)
                });
                return Some(Due {
                    done,
                    result,
                    attended,
                });
            }
        }
        None
    }
}
