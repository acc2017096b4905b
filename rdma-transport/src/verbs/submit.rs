//! Asynchronous batches: what their operations become.

use super::adapter::Adapter;
use super::cells::{Cell, LARGE};
use super::unit::{Action, Asked, Data, Gives, Request};
use crate::buffer::Buffer;
use crate::error::TransportError;
use crate::ops::{AsyncOp, BatchError, RemoteAddr};

/// Longest piece of a transfer from or to registered memory.
const PIECE: usize = 1 << 20;

/// A batch on its way to the queue.
pub(super) struct Prepared {
    pub(super) requests: Vec<Request>,
    pub(super) asked: Vec<Asked>,
}

/// What is to be posted for a batch. Buffers in memory that is registered with this adapter are used in place,
/// others through cells.
pub(super) fn prepare(adapter: &Adapter, inline: usize, batch: Vec<AsyncOp>) -> Result<Prepared, BatchError> {
    let local = Local { adapter, inline };
    let mut prepared = Prepared {
        requests: Vec::with_capacity(batch.len()),
        asked: Vec::with_capacity(batch.len()),
    };
    let mut ops = batch.into_iter();
    while let Some(op) = ops.next() {
        let before = prepared.requests.len();
        let (gives, added) = local.add(&mut prepared.requests, op);
        prepared.asked.push(Asked {
            gives,
            requests: prepared.requests.len() - before,
        });
        if let Err(why) = added {
            let taken = prepared.asked.into_iter().filter_map(Asked::into_buffer);
            let buffers = taken.chain(ops.filter_map(AsyncOp::into_buffer)).collect();
            return Err(BatchError { why, buffers });
        }
    }
    Ok(prepared)
}

/// Where local memory comes from.
struct Local<'a> {
    adapter: &'a Adapter,
    inline: usize,
}

impl Local<'_> {
    fn add(&self, requests: &mut Vec<Request>, op: AsyncOp) -> (Gives, Result<(), TransportError>) {
        match op {
            AsyncOp::Read { at, into } => {
                let added = self.add_transfer(requests, Action::Read, at, &into);
                (Gives::Read(into), added)
            }
            AsyncOp::Write { at, from } => {
                let added = self.add_transfer(requests, Action::Write, at, &from);
                (Gives::Written(from), added)
            }
            AsyncOp::ReadWords { words: 0, .. } => (Gives::Words, Ok(())),
            AsyncOp::ReadWords { at, words } => {
                (Gives::Words, self.add_words(requests, Action::Read, at, words))
            }
            AsyncOp::Cas { at, expect, new } => {
                let action = Action::Cas { expect, new };
                (Gives::Old, self.add_words(requests, action, at, 1))
            }
            AsyncOp::Faa { at, add } => {
                let action = Action::Faa { add };
                (Gives::Old, self.add_words(requests, action, at, 1))
            }
        }
    }

    fn add_words(
        &self,
        requests: &mut Vec<Request>,
        action: Action,
        at: RemoteAddr,
        words: u32,
    ) -> Result<(), TransportError> {
        let data = Data::Cell(self.cell(words as usize * 8)?);
        requests.push(Request {
            action,
            at,
            len: words * 8,
            data,
        });
        Ok(())
    }

    fn add_transfer(
        &self,
        requests: &mut Vec<Request>,
        action: Action,
        at: RemoteAddr,
        buffer: &Buffer,
    ) -> Result<(), TransportError> {
        let registered = buffer.registered(self.adapter.domain());
        let longest = if registered.is_some() { PIECE } else { LARGE };
        for (n, piece) in buffer.chunks(longest).enumerate() {
            let off = (n * longest) as u64;
            let write = matches!(action, Action::Write);
            let data = match registered {
                _ if write && piece.len() <= self.inline => Data::Inline(piece.to_vec()),
                Some((addr, lkey)) => Data::Registered {
                    addr: addr + off,
                    lkey,
                },
                None => {
                    let cell = self.cell(piece.len())?;
                    if write {
                        cell.fill(0, piece)?;
                    }
                    Data::Cell(cell)
                }
            };
            requests.push(Request {
                action,
                at: at.plus(off),
                len: piece.len() as u32,
                data,
            });
        }
        Ok(())
    }

    fn cell(&self, len: usize) -> Result<Cell, TransportError> {
        self.adapter.cells.take(len)
    }
}
