//! A TCP connection as the application sees it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::net::Shutdown;

use super::frame::Header;
use super::pending::{Batch, Pending};
use super::request;
use super::tx::{Out, READS, Tx};
use crate::base::{ConnBase, answered_by_base};
use crate::common::{self, disconnected};
use crate::error::TransportError;
use crate::fabric::Connection;
use crate::mem::SharedMem;
use crate::ops::{AsyncOp, BatchError, Completion, Op, Outcome};
use crate::stream::{Host, Linked};
use crate::waiter::Waiter;

/// Senders of messages wait while more than this is queued.
const QUEUE: usize = 1024 * 1024;
/// Longest time that a blocked caller looks for its results before it sleeps.
const SPIN: Duration = Duration::from_micros(50);
/// Most bytes of results a peer may leave unread; twice what ours ever asks for, and some.
const UNREAD: usize = 3 * READS;

pub(super) struct TcpConn {
    pub(super) base: ConnBase,
    pub(super) host: Arc<Host>,
    pub(super) sock: Arc<OwnedFd>,
    /// Lock order: `tx`, then `pending`.
    pub(super) tx: Mutex<Tx>,
    room: Condvar,
    pub(super) pending: Mutex<Pending>,
    pub(super) next_batch: AtomicU64,
    /// Held while an operation of the peer is executed.
    executing: Mutex<()>,
}

impl TcpConn {
    pub(super) fn new(base: ConnBase, host: &Arc<Host>, sock: Arc<OwnedFd>) -> Arc<Self> {
        Arc::new(Self {
            base,
            host: Arc::clone(host),
            sock,
            tx: Mutex::new(Tx::default()),
            room: Condvar::new(),
            pending: Mutex::new(Pending::default()),
            next_batch: AtomicU64::new(1),
            executing: Mutex::new(()),
        })
    }

    pub(super) fn alive(&self) -> bool {
        self.base.alive()
    }

    /// Puts the connection into error; the first reason counts. When this returns, no operation of the peer is
    /// executed any more, and no lent buffer is being sent.
    pub(super) fn fail(&self, why: TransportError) {
        if !self.base.condemn(why) {
            return;
        }
        self.base.die();
        drop(self.executing.lock());
        self.tx.lock().close();
        self.room.notify_all();
        self.host.wake();
    }

    /// As `fail`, but lets what is queued (the reason, for the peer) go out; the progress thread ends the
    /// connection once the peer has taken note.
    pub(super) fn fail_politely(&self, why: TransportError) {
        if !self.base.condemn(why) {
            return;
        }
        self.base.die();
        drop(self.executing.lock());
        self.host.wake();
    }

    /// Executes something on our memory for the peer, unless the connection has ended.
    pub(super) fn executing<R>(&self, act: impl FnOnce() -> R) -> Option<R> {
        let _held = self.executing.lock();
        self.alive().then(act)
    }

    fn with_tx(&self, act: impl FnOnce(&mut Tx) -> std::io::Result<()>) -> Result<(), TransportError> {
        let mut tx = self.tx.lock();
        if tx.closed() {
            drop(tx);
            return Err(self.base.dead());
        }
        act(&mut tx).map_err(|e| {
            drop(tx);
            let why = disconnected(&self.base.addr, &e.to_string());
            self.fail(why.clone());
            why
        })
    }

    /// Sends bytes as they are (handshake, results).
    pub(super) fn send_raw(&self, bytes: &[u8]) -> Result<(), TransportError> {
        self.with_tx(|tx| tx.send(self.sock.as_fd(), bytes, &[]))?;
        self.check_unread()
    }

    /// Sends a result that is a piece of our memory.
    pub(super) fn send_mem(
        &self,
        head: &[u8],
        mem: &SharedMem,
        off: usize,
        len: usize,
    ) -> Result<(), TransportError> {
        self.with_tx(|tx| tx.send_mem(self.sock.as_fd(), head, mem, off, len))?;
        self.check_unread()
    }

    fn check_unread(&self) -> Result<(), TransportError> {
        if self.tx.lock().queued() > UNREAD {
            return Err(self.base.protocol("the peer asks for more than it takes"));
        }
        Ok(())
    }

    /// Sends a message behind everything else; `waits`: not before there is room.
    fn send_message(&self, message: &[u8], waits: bool) -> Result<(), TransportError> {
        common::check_message(message)?;
        let head = Header::message(message.len()).encode();
        let mut tx = self.tx.lock();
        let mut deadline = None;
        while waits && tx.backlog() > QUEUE && self.alive() {
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + self.host.base.config.timeout);
            if self.room.wait_until(&mut tx, deadline).timed_out() {
                drop(tx);
                let why = common::timed_out(&self.base.addr, self.host.base.config.timeout);
                self.fail(why.clone());
                return Err(why);
            }
        }
        if tx.closed() || !self.alive() {
            drop(tx);
            return Err(self.base.dead());
        }
        if let Err(e) = tx.send_behind(self.sock.as_fd(), &head, message) {
            drop(tx);
            let why = disconnected(&self.base.addr, &e.to_string());
            self.fail(why.clone());
            return Err(why);
        }
        drop(tx);
        self.base.counters.sent(message.len());
        Ok(())
    }

    /// Whether everything queued is out.
    pub(super) fn sent_all(&self) -> bool {
        self.tx.lock().queued() == 0
    }

    /// Takes a result that is complete, telling its owner if it was the last of its batch.
    pub(super) fn complete(&self, bytes: &[u8]) -> Result<(), TransportError> {
        let mut tx = self.tx.lock();
        let done = self
            .pending
            .lock()
            .complete(bytes)
            .map_err(|bad| self.base.protocol(bad))?;
        let Some(batch) = done else { return Ok(()) };
        let early = tx.lends(batch.id);
        let sent = tx.answered(self.sock.as_fd(), batch.reads);
        drop(tx);
        if early {
            let why = self.base.protocol("a result before its operation was sent");
            self.fail(why.clone());
            // Takes the lent bytes out of the queue before their owner goes on; `fail` has not done so if
            // another thread is at it.
            self.tx.lock().close();
            batch.finish(Err(why.clone()));
            return Err(why);
        }
        batch.finish(Ok(()));
        sent.map_err(|e| disconnected(&self.base.addr, &e.to_string()))
    }

    /// The target has refused the current operation.
    pub(super) fn refused(&self, reason: &str) -> TransportError {
        let batch = self.pending.lock().0.pop_front();
        let Some(batch) = batch else {
            return self.base.protocol("a result nobody waits for");
        };
        let why = match batch.current() {
            Some(e) => common::remote_access(e.at, e.len, reason),
            None => self.base.protocol("a result too many"),
        };
        self.fail(why.clone());
        // Before the owner goes on: as in `complete`.
        self.tx.lock().close();
        batch.finish(Err(why.clone()));
        why
    }

    pub(super) fn post(&self, batch: Batch, outs: Vec<Out>) -> Result<(), Box<(Batch, TransportError)>> {
        let mut tx = self.tx.lock();
        if tx.closed() || !self.alive() {
            drop(tx);
            return Err(Box::new((batch, self.base.dead())));
        }
        let reads = batch.reads;
        self.pending.lock().0.push_back(batch);
        if let Err(e) = tx.ask(self.sock.as_fd(), reads, outs) {
            drop(tx);
            // The progress thread tells the owner.
            self.fail(disconnected(&self.base.addr, &e.to_string()));
        }
        Ok(())
    }
}

impl TcpConn {
    fn next_batch(&self) -> u64 {
        self.next_batch.fetch_add(1, Ordering::Relaxed)
    }

    /// Sends a batch and waits for its results.
    fn round_trip(&self, ops: &mut [Op<'_>]) -> Result<(), TransportError> {
        let id = self.next_batch();
        let waiter = Arc::new(Waiter::<Outcome>::default());
        let told = Arc::clone(&waiter);
        let done: Completion = Box::new(move |outcome| told.put(outcome));
        // SAFETY: this function does not return before the batch is finished, or is out of `pending` and of the queue,
        // each under the lock that its users hold.
        let (batch, outs) = unsafe { request::borrowed(id, ops, done) };
        self.post(batch, outs).map_err(|back| back.1)?;
        let timeout = self.host.base.config.timeout;
        let spin = self.host.base.config.spin.min(SPIN);
        let Some(outcome) = waiter.wait(spin, Instant::now() + timeout) else {
            let why = common::timed_out(&self.base.addr, timeout);
            self.fail(why.clone());
            self.tx.lock().close();
            self.pending.lock().0.retain(|b| b.id != id);
            return Err(why);
        };
        if request::put_results(outcome?, ops) {
            Ok(())
        } else {
            Err(self.base.protocol("a result is missing"))
        }
    }
}

impl Linked for TcpConn {
    fn base(&self) -> &ConnBase {
        &self.base
    }

    fn sock(&self) -> &OwnedFd {
        &self.sock
    }

    fn fail(&self, why: TransportError) {
        TcpConn::fail(self, why);
    }

    fn writable(&self) {
        // An error has put the connection into error.
        let _failed = self.with_tx(|tx| tx.flush(self.sock.as_fd()));
        self.room.notify_all();
    }

    fn finish(&self) {
        self.tx.lock().close();
        self.room.notify_all();
        // Already gone: fine.
        let _gone = rustix::net::shutdown(&*self.sock, Shutdown::Both);
        let batches = std::mem::take(&mut self.pending.lock().0);
        for batch in batches {
            batch.finish(Err(self.base.dead()));
        }
    }
}

impl Connection for TcpConn {
    answered_by_base!();

    fn execute(&self, ops: &mut [Op<'_>]) -> Result<(), TransportError> {
        let bytes = common::check_ops(ops)?;
        if !self.alive() {
            return Err(self.base.dead());
        }
        if !ops.is_empty() {
            self.round_trip(ops)?;
        }
        self.base.counters.did_ops(ops.len(), bytes);
        Ok(())
    }

    fn submit(&self, batch: Vec<AsyncOp>, done: Completion) {
        let moved = match common::check_batch(&batch) {
            Ok(bytes) => bytes,
            Err(invalid) => return done(Err(BatchError::unstarted(invalid, batch))),
        };
        if batch.is_empty() {
            return done(if self.alive() {
                Ok(Vec::new())
            } else {
                Err(BatchError::unstarted(self.base.dead(), batch))
            });
        }
        let count = batch.len();
        let (batch, outs) = request::owned(self.next_batch(), batch, done);
        match self.post(batch, outs) {
            Ok(()) => self.base.counters.did_ops(count, moved),
            Err(back) => {
                let (batch, error) = *back;
                batch.finish(Err(error));
            }
        }
    }

    fn send(&self, message: &[u8]) -> Result<(), TransportError> {
        self.send_message(message, !common::on_progress_thread())
    }

    fn queue(&self, message: &[u8]) -> Result<(), TransportError> {
        self.send_message(message, false)
    }

    fn close(&self) {
        self.fail(disconnected(&self.base.addr, "closed on this side"));
    }

    fn expel(&self) -> Result<(), TransportError> {
        self.close();
        // Another thread may have begun to end it, and not have waited yet for what is being executed.
        self.base.die();
        drop(self.executing.lock());
        Ok(())
    }
}
