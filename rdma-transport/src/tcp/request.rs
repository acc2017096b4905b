//! Batches on their way out, and callers who wait for them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::conn::TcpConn;
use super::frame::{Desc, Header};
use super::pending::{Batch, Expected, Slot};
use super::tx::Out;
use crate::common;
use crate::error::TransportError;
use crate::mem::Lent;
use crate::ops::{AsyncOp, Completion, Op, OpResult, Outcome};
use crate::waiter::Waiter;

/// Writes up to this length are copied into the frame; longer ones go out of the caller's buffer. Reads up to this
/// length together do not count against [`READS`](super::tx::READS).
const COPY: usize = 16 * 1024;
/// Longest time that a blocked caller looks for its results before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

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

impl TcpConn {
    fn next_batch(&self) -> u64 {
        self.next_batch.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends a batch that owns its buffers.
    pub(super) fn start(
        &self,
        batch: Vec<AsyncOp>,
        done: Completion,
    ) -> Result<(), Box<(Batch, TransportError)>> {
        let mut frame = Frame::new(self.next_batch(), batch.iter().map(Desc::of_async));
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
        let (batch, outs) = frame.finish(done);
        self.post(batch, outs)
    }

    /// Sends a batch that borrows its buffers, and waits for its results.
    pub(super) fn round_trip(&self, ops: &mut [Op<'_>]) -> Result<(), TransportError> {
        let id = self.next_batch();
        let mut frame = Frame::new(id, ops.iter().map(Desc::of));
        for op in ops.iter_mut() {
            let desc = Desc::of(op);
            let slot = match op {
                Op::Read { into, .. } => {
                    // SAFETY: this function does not return before the batch is out of `pending`: its result
                    // has come, or `abandon` has taken it out under the lock its users hold.
                    Slot::Read(unsafe { Lent::writable(into) }, None)
                }
                Op::Write { from, .. } => {
                    // SAFETY: as above.
                    unsafe { frame.write(from) };
                    Slot::Write(None)
                }
                Op::Cas { .. } | Op::Faa { .. } => Slot::Word,
            };
            frame.expect(desc, slot);
        }
        let waiter = Arc::new(Waiter::<Outcome>::default());
        let told = Arc::clone(&waiter);
        let (batch, outs) = frame.finish(Box::new(move |outcome| told.put(outcome)));
        self.post(batch, outs).map_err(|back| back.1)?;
        let timeout = self.core.base.config.timeout;
        let spin = self.core.base.config.spin.min(SPIN);
        let results = match waiter.wait(spin, Instant::now() + timeout) {
            Some(outcome) => outcome.map_err(|error| error.why)?,
            None => {
                let why = common::timed_out(&self.base.addr, timeout);
                self.fail(why.clone());
                self.abandon(id);
                return Err(why);
            }
        };
        let mut results = results.into_iter();
        for op in ops.iter_mut() {
            if let Op::Cas { old, .. } | Op::Faa { old, .. } = op {
                let Some(OpResult::Old(found)) = results.next() else {
                    return Err(self.base.protocol("a result is missing"));
                };
                *old = found;
            }
        }
        Ok(())
    }

    /// Makes sure that nobody uses the buffers of a batch any more.
    fn abandon(&self, id: u64) {
        self.tx.lock().close();
        self.pending.lock().0.retain(|b| b.id != id);
    }
}
