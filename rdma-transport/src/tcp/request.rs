//! Batches on their way out, and callers who wait for them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::conn::TcpConn;
use super::frame::{Desc, Header};
use super::pending::{Batch, Expected, Owner, Slot, Waiter};
use super::tx::Out;
use crate::common;
use crate::mem::Lent;
use crate::{Op, TransportError};

/// Writes up to this length are copied into the frame; longer ones go out of the caller's buffer.
const COPY: usize = 16 * 1024;
/// Most bytes asked for and not yet received.
pub(super) const READS: usize = 64 * 1024 * 1024;
impl TcpConn {
    /// Sends a batch and waits for its results.
    pub(super) fn round_trip(&self, ops: &mut [Op<'_>]) -> Result<(), TransportError> {
        let id = self.next_batch.fetch_add(1, Ordering::Relaxed);
        let mut bytes = Header::ops(id, ops.len()).encode().to_vec();
        for op in ops.iter() {
            Desc::of(op).encode(&mut bytes);
        }
        let mut outs = Vec::with_capacity(2);
        let mut expected = Vec::with_capacity(ops.len());
        for op in ops.iter_mut() {
            let desc = Desc::of(op);
            let slot = match op {
                Op::Read { into, .. } => {
                    // SAFETY: this function does not return before the batch is out of `pending`: its result
                    // has come, or `abandon` has taken it out under the lock its users hold.
                    Slot::Read(unsafe { Lent::writable(into) })
                }
                Op::Write { from, .. } if from.len() <= COPY => {
                    bytes.extend_from_slice(from);
                    Slot::Write
                }
                Op::Write { from, .. } => {
                    outs.push(Out::Bytes(std::mem::take(&mut bytes)));
                    // SAFETY: as above for `tx`: results are accepted only once the queue lends nothing of
                    // this batch (`complete`), and `fail` empties the queue.
                    let lent = unsafe { Lent::readable(from) };
                    outs.push(Out::Lent { lent, batch: id });
                    Slot::Write
                }
                Op::Cas { .. } | Op::Faa { .. } => Slot::Word,
            };
            expected.push(Expected {
                slot,
                at: desc.at,
                len: desc.len as u64,
            });
        }
        outs.push(Out::Bytes(bytes));
        let waiter = Arc::new(Waiter::default());
        let batch = Batch::new(id, Owner::Blocked(Arc::clone(&waiter)), expected);
        if let Err(back) = self.post(batch, outs) {
            return Err(back.1);
        }
        let timeout = self.core.base.config.timeout;
        let spin = self.core.base.config.spin.min(Duration::from_micros(50));
        let result = match waiter.wait(spin, Instant::now() + timeout) {
            Some(result) => result,
            None => {
                let why = common::timed_out(&self.base.addr, timeout);
                self.fail(why.clone());
                self.abandon(id);
                Err(why)
            }
        };
        let mut olds = result?.into_iter();
        for op in ops.iter_mut() {
            if let Op::Cas { old, .. } | Op::Faa { old, .. } = op {
                *old = olds
                    .next()
                    .ok_or_else(|| self.base.protocol("a result is missing"))?;
            }
        }
        Ok(())
    }

    /// Makes sure that nobody uses the buffers of a batch any more.
    fn abandon(&self, id: u64) {
        self.tx.lock().close();
        self.pending.lock().0.retain(|b| b.id != id);
    }

    /// Waits until `bytes` more may be asked for.
    fn reserve(&self, bytes: usize) -> Result<(), TransportError> {
        let deadline = Instant::now() + self.core.base.config.timeout;
        let mut reading = self.reading.lock();
        while *reading > 0 && *reading + bytes > READS {
            if !self.alive() {
                return Err(self.base.dead());
            }
            if self.read_done.wait_until(&mut reading, deadline).timed_out() {
                let why = common::timed_out(&self.base.addr, self.core.base.config.timeout);
                self.fail(why.clone());
                return Err(why);
            }
        }
        *reading += bytes;
        Ok(())
    }

    pub(super) fn run(&self, ops: &mut [Op<'_>]) -> Result<(), TransportError> {
        let reads = read_bytes(ops);
        if reads <= COPY {
            return self.round_trip(ops);
        }
        self.reserve(reads)?;
        let result = self.round_trip(ops);
        *self.reading.lock() -= reads;
        self.read_done.notify_all();
        result
    }
}

pub(super) fn read_bytes(ops: &[Op<'_>]) -> usize {
    ops.iter()
        .map(|op| {
            if let Op::Read { into, .. } = op {
                into.len()
            } else {
                0
            }
        })
        .sum()
}
