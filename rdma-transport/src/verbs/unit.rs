//! Operations on their way: what is posted together and completes together, and who waits for it.

use std::sync::Arc;

use super::attend::{Attended, Due};
use super::cells::Cell;
use super::ffi::{Local, Verb};
use super::wire::Place;
use crate::buffer::Buffer;
use crate::error::TransportError;
use crate::ops::{BatchError, Completion, OpResult, Outcome, RemoteAddr};
use crate::waiter::Waiter;

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
    /// Part of a buffer that the unit's owner holds, in registered memory.
    Registered {
        addr: u64,
        lkey: u32,
    },
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
            Data::Registered { addr, lkey } => Local::Mem {
                addr: *addr,
                len: self.len,
                lkey: *lkey,
            },
        }
    }

    fn cell(&self) -> Result<&Cell, TransportError> {
        match &self.data {
            Data::Cell(cell) => Ok(cell),
            Data::Inline(_) | Data::Registered { .. } => {
                Err(TransportError::Invalid("a result without memory".to_owned()))
            }
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
}

/// What a blocked caller gets.
pub(super) type Done = Result<Vec<Request>, TransportError>;

/// What an operation of an asynchronous batch gives back.
pub(super) enum Gives {
    Read(Buffer),
    Written(Buffer),
    Words,
    Old,
}

/// An operation of an asynchronous batch, and how many of the unit's requests it has become.
pub(super) struct Asked {
    pub(super) gives: Gives,
    pub(super) requests: usize,
}

impl Asked {
    /// The result, once its requests are done. A buffer that is not registered gets what was read into cells.
    fn result(self, requests: &[Request]) -> Result<OpResult, (TransportError, Option<Buffer>)> {
        match self.gives {
            Gives::Read(mut buffer) => {
                let mut off = 0;
                for request in requests {
                    let end = off + request.len as usize;
                    if let (Data::Cell(cell), Some(into)) = (&request.data, buffer.get_mut(off..end))
                        && let Err(why) = cell.copy_to(into)
                    {
                        return Err((why, Some(buffer)));
                    }
                    off = end;
                }
                Ok(OpResult::Read(buffer))
            }
            Gives::Written(buffer) => Ok(OpResult::Written(buffer)),
            Gives::Words => requests
                .first()
                .map_or(Ok(Vec::new()), |r| r.cell()?.words(r.len as usize / 8))
                .map(OpResult::Words)
                .map_err(|why| (why, None)),
            Gives::Old => requests
                .first()
                .ok_or(TransportError::Shutdown)
                .and_then(Request::old)
                .map(OpResult::Old)
                .map_err(|why| (why, None)),
        }
    }

    pub(super) fn into_buffer(self) -> Option<Buffer> {
        match self.gives {
            Gives::Read(buffer) | Gives::Written(buffer) => Some(buffer),
            Gives::Words | Gives::Old => None,
        }
    }
}

/// What became of an asynchronous batch, with its buffers.
fn outcome(asked: Vec<Asked>, requests: &[Request], result: Result<(), TransportError>) -> Outcome {
    let mut failed = result.err();
    let mut results = Vec::with_capacity(asked.len());
    let mut buffers = Vec::new();
    let mut rest = requests;
    for asked in asked {
        let (own, behind) = rest.split_at(asked.requests.min(rest.len()));
        rest = behind;
        if failed.is_some() {
            buffers.extend(asked.into_buffer());
            continue;
        }
        match asked.result(own) {
            Ok(result) => results.push(result),
            Err((why, buffer)) => {
                buffers.extend(results.drain(..).filter_map(OpResult::into_buffer));
                buffers.extend(buffer);
                failed = Some(why);
            }
        }
    }
    match failed {
        Some(why) => Err(BatchError { why, buffers }),
        None => Ok(results),
    }
}

/// Who waits for a batch, and learns how it ended.
pub(super) enum Owner {
    Blocked(Arc<Waiter<Done>>),
    Async {
        done: Completion,
        asked: Vec<Asked>,
        /// The caller looks for it itself.
        attended: Option<Arc<Attended>>,
    },
}

impl Owner {
    /// Tells it that nothing was started.
    pub(super) fn refuse(self, why: TransportError) {
        match self {
            Self::Blocked(waiter) => waiter.put(Err(why)),
            Self::Async { done, asked, .. } => done(outcome(asked, &[], Err(why))),
        }
    }
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

impl Unit {
    /// Everything posted is done, and there is no more to post.
    pub(super) fn over(&self) -> bool {
        self.done == self.requests.len() || (self.poison.is_some() && self.done == self.posted)
    }

    /// Tells the owner, or returns what is to be called.
    pub(super) fn finish(self, result: Result<(), TransportError>) -> Option<Due> {
        match self.owner {
            Owner::Blocked(waiter) => {
                waiter.put(result.map(|()| self.requests));
                None
            }
            Owner::Async {
                done,
                asked,
                attended,
            } => Some(Due {
                done,
                outcome: outcome(asked, &self.requests, result),
                attended,
            }),
        }
    }
}
