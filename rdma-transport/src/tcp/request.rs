//! Batches as they are sent.

use std::collections::VecDeque;

use super::frame::{Desc, Header};
use super::pending::{Batch, Expected, Slot};
use super::tx::Out;
use crate::mem::Lent;
use crate::ops::{AsyncOp, Completion, Op, OpResult};

/// Writes up to this length are copied into the frame; longer ones go out of the caller's buffer. Reads up to this
/// length together do not count against [`READS`](super::tx::READS).
const COPY: usize = 16 * 1024;
/// A batch as it is sent.
struct Frame {
    id: u64,
    /// Bytes of the frame that are not yet in `outs`.
    bytes: Vec<u8>,
    outs: Vec<Out>,
    expected: VecDeque<Expected>,
    /// Bytes that it asks for.
    reads: usize,
}

impl Frame {
    fn new(id: u64, descs: impl ExactSizeIterator<Item = Desc>) -> Self {
        let mut bytes = Header::ops(id, descs.len()).encode().to_vec();
        descs.for_each(|desc| desc.encode(&mut bytes));
        Self {
            id,
            bytes,
            outs: Vec::with_capacity(2),
            expected: VecDeque::new(),
            reads: 0,
        }
    }

    fn expect(&mut self, desc: Desc, slot: Slot) {
        if let Slot::Read(lent, _) = &slot {
            self.reads += lent.len();
        }
        self.expected.push_back(Expected {
            slot,
            at: desc.at,
            len: desc.len as u64,
        });
    }

    /// Appends the bytes of a write.
    ///
    /// # Safety
    /// `from` must stay as it is until the batch is finished.
    unsafe fn write(&mut self, from: &[u8]) {
        if from.len() <= COPY {
            return self.bytes.extend_from_slice(from);
        }
        self.outs.push(Out::Bytes(std::mem::take(&mut self.bytes)));
        // SAFETY: a batch is finished only when the queue lends nothing of it any more (`TcpConn::complete`), or has
        // been emptied (`Tx::close`).
        let lent = unsafe { Lent::readable(from) };
        self.outs.push(Out::Lent { lent, batch: self.id });
    }

    fn finish(mut self, done: Completion) -> (Batch, Vec<Out>) {
        self.outs.push(Out::Bytes(self.bytes));
        let reads = if self.reads > COPY { self.reads } else { 0 };
        (Batch::new(self.id, reads, self.expected, done), self.outs)
    }
}

/// A batch that owns its buffers, ready to be sent.
pub(super) fn owned(id: u64, batch: Vec<AsyncOp>, done: Completion) -> (Batch, Vec<Out>) {
    let mut frame = Frame::new(id, batch.iter().map(Desc::of_async));
    for op in batch {
        let desc = Desc::of_async(&op);
        let slot = match op {
            AsyncOp::Read { mut into, .. } => {
                // SAFETY: the slot has the buffer, too, and nobody looks at that before it is given out of the slot.
                let lent = unsafe { Lent::writable(&mut into) };
                Slot::Read(lent, Some(into))
            }
            AsyncOp::Write { from, .. } => {
                // SAFETY: the slot has the buffer until the batch is finished.
                unsafe { frame.write(&from) };
                Slot::Write(Some(from))
            }
            AsyncOp::ReadWords { words, .. } => Slot::Words(words as usize),
            AsyncOp::Cas { .. } | AsyncOp::Faa { .. } => Slot::Word,
        };
        frame.expect(desc, slot);
    }
    frame.finish(done)
}

/// A batch that borrows its buffers, ready to be sent.
///
/// # Safety
/// The buffers must stay as they are until the batch is finished, or is out of [`Pending`](super::pending::Pending) and
/// its sending queue is closed.
pub(super) unsafe fn borrowed(id: u64, ops: &mut [Op<'_>], done: Completion) -> (Batch, Vec<Out>) {
    let mut frame = Frame::new(id, ops.iter().map(Desc::of));
    for op in ops {
        let desc = Desc::of(op);
        let slot = match op {
            Op::Read { into, .. } => {
                // SAFETY: by the contract of this function.
                Slot::Read(unsafe { Lent::writable(into) }, None)
            }
            Op::Write { from, .. } => {
                // SAFETY: by the contract of this function.
                unsafe { frame.write(from) };
                Slot::Write(None)
            }
            Op::Cas { .. } | Op::Faa { .. } => Slot::Word,
        };
        frame.expect(desc, slot);
    }
    frame.finish(done)
}

/// Puts the values before each atomic, which are all the results that a borrowing batch has, to the operations; false if
/// one is missing.
pub(super) fn put_results(results: Vec<OpResult>, ops: &mut [Op<'_>]) -> bool {
    let mut results = results.into_iter();
    for op in ops {
        if let Op::Cas { old, .. } | Op::Faa { old, .. } = op {
            let Some(OpResult::Old(found)) = results.next() else {
                return false;
            };
            *old = found;
        }
    }
    true
}
