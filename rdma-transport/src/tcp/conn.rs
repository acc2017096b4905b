//! A TCP connection as the application sees it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::net::Shutdown;

use super::endpoint::Core;
use super::frame::{Desc, DescKind, Header};
use super::pending::{Batch, Expected, Owner, Pending, Slot, Waiter};
use super::tx::{Out, Tx};
use crate::common::{self, Counters, disconnected};
use crate::handshake::Peer;
use crate::mem::{Lent, SharedMem};
use crate::{AsyncOp, Completion, ConnId, Connection, FabricStats, Op, RemoteAddr, TransportError};

/// Senders of messages wait while more than this is queued.
const QUEUE: usize = 1024 * 1024;
/// Writes up to this length are copied into the frame; longer ones go out of the caller's buffer.
const COPY: usize = 16 * 1024;
/// Most bytes asked for and not yet received.
const READS: usize = 64 * 1024 * 1024;
/// Most bytes of results a peer may leave unread; twice what ours ever asks for, and some.
const UNREAD: usize = 3 * READS;

pub(super) struct TcpConn {
    id: ConnId,
    core: Arc<Core>,
    pub(super) peer: Peer,
    /// True if the peer connected to us.
    pub(super) incoming: bool,
    addr: String,
    pub(super) sock: Arc<OwnedFd>,
    /// Lock order: `tx`, then `pending`.
    tx: Mutex<Tx>,
    room: Condvar,
    pub(super) pending: Mutex<Pending>,
    next_batch: AtomicU64,
    /// Bytes asked for by blocking reads.
    reading: Mutex<usize>,
    read_done: Condvar,
    /// Held while an operation of the peer is executed.
    executing: Mutex<()>,
    alive: AtomicBool,
    why: Mutex<Option<TransportError>>,
    pub(super) counters: Counters,
}

impl TcpConn {
    pub(super) fn new(
        id: ConnId,
        core: &Arc<Core>,
        peer: Peer,
        incoming: bool,
        addr: String,
        sock: Arc<OwnedFd>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            core: Arc::clone(core),
            peer,
            incoming,
            addr,
            sock,
            tx: Mutex::new(Tx::default()),
            room: Condvar::new(),
            pending: Mutex::new(Pending::default()),
            next_batch: AtomicU64::new(1),
            reading: Mutex::new(0),
            read_done: Condvar::new(),
            executing: Mutex::new(()),
            alive: AtomicBool::new(true),
            why: Mutex::new(None),
            counters: Counters::default(),
        })
    }

    pub(super) fn alive(&self) -> bool {
        self.alive.load(Ordering::SeqCst)
    }

    /// Why it ended.
    pub(super) fn reason(&self) -> TransportError {
        self.why
            .lock()
            .clone()
            .unwrap_or_else(|| disconnected(&self.addr, "closed"))
    }

    pub(super) fn dead(&self) -> TransportError {
        match self.reason() {
            e @ (TransportError::Disconnected { .. } | TransportError::Shutdown) => e,
            other => disconnected(&self.addr, &other.to_string()),
        }
    }

    pub(super) fn protocol(&self, detail: &str) -> TransportError {
        TransportError::Protocol {
            addr: self.addr.clone(),
            detail: detail.to_owned(),
        }
    }

    /// Puts the connection into error; the first reason counts. When this returns, no operation of the peer is
    /// executed any more, and no lent buffer is being sent.
    pub(super) fn fail(&self, why: TransportError) {
        {
            let mut reason = self.why.lock();
            if reason.is_some() {
                return;
            }
            *reason = Some(why);
        }
        self.alive.store(false, Ordering::SeqCst);
        drop(self.executing.lock());
        self.tx.lock().close();
        self.room.notify_all();
        self.core.wake();
    }

    /// As `fail`, but lets what is queued (the reason, for the peer) go out; the progress thread ends the
    /// connection once the peer has taken note.
    pub(super) fn fail_politely(&self, why: TransportError) {
        {
            let mut reason = self.why.lock();
            if reason.is_some() {
                return;
            }
            *reason = Some(why);
        }
        self.alive.store(false, Ordering::SeqCst);
        drop(self.executing.lock());
        self.core.wake();
    }

    /// Ends it for good; called by the progress thread.
    pub(super) fn finish(&self) {
        self.tx.lock().close();
        self.room.notify_all();
        // Already gone: fine.
        let _gone = rustix::net::shutdown(&*self.sock, Shutdown::Both);
        let batches = std::mem::take(&mut self.pending.lock().0);
        for batch in batches {
            batch.finish(Err(self.dead()));
        }
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
            return Err(self.dead());
        }
        act(&mut tx).map_err(|e| {
            drop(tx);
            let why = disconnected(&self.addr, &e.to_string());
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
            return Err(self.protocol("the peer asks for more than it takes"));
        }
        Ok(())
    }

    /// The socket takes bytes again.
    pub(super) fn writable(&self) {
        // An error has put the connection into error.
        let _failed = self.with_tx(|tx| tx.flush(self.sock.as_fd()));
        self.room.notify_all();
    }

    /// Whether everything queued is out.
    pub(super) fn sent_all(&self) -> bool {
        self.tx.lock().queued() == 0
    }

    /// Takes a result that is complete, telling its owner if it was the last of its batch.
    pub(super) fn complete(&self, bytes: &[u8]) -> Result<(), TransportError> {
        let tx = self.tx.lock();
        let done = self
            .pending
            .lock()
            .complete(bytes)
            .map_err(|bad| self.protocol(bad))?;
        let Some(batch) = done else { return Ok(()) };
        let early = tx.lends(batch.id);
        drop(tx);
        if early {
            let why = self.protocol("a result before its operation was sent");
            self.fail(why.clone());
            // Takes the lent bytes out of the queue before their owner goes on; `fail` has not done so if
            // another thread is at it.
            self.tx.lock().close();
            batch.finish(Err(why.clone()));
            return Err(why);
        }
        batch.finish(Ok(()));
        Ok(())
    }

    /// The target has refused the current operation.
    pub(super) fn refused(&self, reason: &str) -> TransportError {
        let batch = self.pending.lock().0.pop_front();
        let Some(batch) = batch else {
            return self.protocol("a result nobody waits for");
        };
        let why = match batch.expected.get(batch.next) {
            Some(e) => common::remote_access(e.at, e.len, reason),
            None => self.protocol("a result too many"),
        };
        self.fail(why.clone());
        // Before the owner goes on: as in `complete`.
        self.tx.lock().close();
        batch.finish(Err(why.clone()));
        why
    }

    fn post(&self, batch: Batch, outs: Vec<Out>) -> Result<(), (Batch, TransportError)> {
        let mut tx = self.tx.lock();
        if tx.closed() || !self.alive() {
            drop(tx);
            return Err((batch, self.dead()));
        }
        self.pending.lock().0.push_back(batch);
        if let Err(e) = tx.send_all(self.sock.as_fd(), outs) {
            drop(tx);
            // The progress thread tells the owner.
            self.fail(disconnected(&self.addr, &e.to_string()));
        }
        Ok(())
    }

    /// Sends a batch (and a message behind it) and waits for its results.
    fn round_trip(&self, ops: &mut [Op<'_>], message: Option<&[u8]>) -> Result<(), TransportError> {
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
                    outs.push(Out::Lent {
                        lent: unsafe { Lent::readable(from) },
                        batch: id,
                    });
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
        if let Some(message) = message {
            bytes.extend_from_slice(&Header::message(message.len()).encode());
            bytes.extend_from_slice(message);
        }
        outs.push(Out::Bytes(bytes));
        let waiter = Arc::new(Waiter::default());
        let batch = Batch::new(id, Owner::Blocked(Arc::clone(&waiter)), expected);
        if let Err((_, error)) = self.post(batch, outs) {
            return Err(error);
        }
        let timeout = self.core.config.timeout;
        let spin = self.core.config.spin.min(Duration::from_micros(50));
        let result = match waiter.wait(spin, Instant::now() + timeout) {
            Some(result) => result,
            None => {
                let why = common::timed_out(&self.addr, timeout);
                self.fail(why.clone());
                self.abandon(id);
                Err(why)
            }
        };
        let mut olds = result?.into_iter();
        for op in ops.iter_mut() {
            if let Op::Cas { old, .. } | Op::Faa { old, .. } = op {
                *old = olds.next().ok_or_else(|| self.protocol("a result is missing"))?;
            }
        }
        Ok(())
    }

    /// Makes sure that nobody uses the buffers of a batch any more.
    fn abandon(&self, id: u64) {
        self.tx.lock().close();
        self.pending.lock().0.retain(|b| b.id != id);
    }

    /// A write that nobody waits for, with a message behind it; for progress threads.
    fn write_behind(&self, at: RemoteAddr, from: &[u8], message: &[u8]) -> Result<(), TransportError> {
        let id = self.next_batch.fetch_add(1, Ordering::Relaxed);
        let mut bytes = Header::ops(id, 1).encode().to_vec();
        Desc {
            kind: DescKind::Write,
            len: from.len(),
            at,
            a: 0,
            b: 0,
        }
        .encode(&mut bytes);
        bytes.extend_from_slice(from);
        bytes.extend_from_slice(&Header::message(message.len()).encode());
        bytes.extend_from_slice(message);
        let expected = vec![Expected {
            slot: Slot::Write,
            at,
            len: from.len() as u64,
        }];
        self.post(Batch::new(id, Owner::Nobody, expected), vec![Out::Bytes(bytes)])
            .map_err(|(_, e)| e)
    }

    /// Waits until `bytes` more may be asked for.
    fn reserve(&self, bytes: usize) -> Result<(), TransportError> {
        let deadline = Instant::now() + self.core.config.timeout;
        let mut reading = self.reading.lock();
        while *reading > 0 && *reading + bytes > READS {
            if !self.alive() {
                return Err(self.dead());
            }
            if self.read_done.wait_until(&mut reading, deadline).timed_out() {
                let why = common::timed_out(&self.addr, self.core.config.timeout);
                self.fail(why.clone());
                return Err(why);
            }
        }
        *reading += bytes;
        Ok(())
    }

    fn run(&self, ops: &mut [Op<'_>]) -> Result<(), TransportError> {
        let reads = read_bytes(ops);
        if reads <= COPY {
            return self.round_trip(ops, None);
        }
        self.reserve(reads)?;
        let result = self.round_trip(ops, None);
        *self.reading.lock() -= reads;
        self.read_done.notify_all();
        result
    }
}

fn read_bytes(ops: &[Op<'_>]) -> usize {
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

impl Connection for TcpConn {
    fn id(&self) -> ConnId {
        self.id
    }

    fn peer_identity(&self) -> &[u8] {
        &self.peer.identity
    }

    fn peer_addr(&self) -> String {
        self.addr.clone()
    }

    fn is_alive(&self) -> bool {
        self.alive()
    }

    fn execute(&self, ops: &mut [Op<'_>]) -> Result<(), TransportError> {
        let bytes = common::check_ops(ops)?;
        if !self.alive() {
            return Err(self.dead());
        }
        let count = ops.len();
        let mut rest = ops;
        while !rest.is_empty() {
            // Batches that read very much are asked for in parts: the target must not have to hold it all.
            let mut reads = 0;
            let part = rest.iter().take_while(|op| {
                reads += read_bytes(std::slice::from_ref(op));
                reads <= READS
            });
            let part = part.count().max(1);
            let (now, later) = rest.split_at_mut(part);
            self.run(now)?;
            rest = later;
        }
        self.counters.did_ops(count, bytes);
        Ok(())
    }

    fn submit(&self, batch: Vec<AsyncOp>, done: Completion) {
        let moved = match common::check_batch(&batch) {
            Ok(bytes) => bytes,
            Err(invalid) => return done(Err(invalid)),
        };
        if batch.is_empty() {
            return done(if self.alive() {
                Ok(Vec::new())
            } else {
                Err(self.dead())
            });
        }
        let id = self.next_batch.fetch_add(1, Ordering::Relaxed);
        let mut bytes = Header::ops(id, batch.len()).encode().to_vec();
        let mut expected = Vec::with_capacity(batch.len());
        for op in &batch {
            let desc = Desc::of_async(op);
            desc.encode(&mut bytes);
            let slot = match op {
                AsyncOp::ReadWords { words, .. } => Slot::Words(*words as usize),
                AsyncOp::Cas { .. } | AsyncOp::Faa { .. } => Slot::Word,
            };
            expected.push(Expected {
                slot,
                at: desc.at,
                len: desc.len as u64,
            });
        }
        let owner = Owner::Async(done, Vec::with_capacity(batch.len()));
        match self.post(Batch::new(id, owner, expected), vec![Out::Bytes(bytes)]) {
            Ok(()) => self.counters.did_ops(batch.len(), moved),
            Err((batch, error)) => batch.finish(Err(error)),
        }
    }

    fn send(&self, message: &[u8]) -> Result<(), TransportError> {
        common::check_message(message)?;
        let head = Header::message(message.len()).encode();
        let mut tx = self.tx.lock();
        let mut deadline = None;
        while tx.queued() > QUEUE && !common::on_progress_thread() && self.alive() {
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + self.core.config.timeout);
            if self.room.wait_until(&mut tx, deadline).timed_out() {
                drop(tx);
                let why = common::timed_out(&self.addr, self.core.config.timeout);
                self.fail(why.clone());
                return Err(why);
            }
        }
        if tx.closed() || !self.alive() {
            drop(tx);
            return Err(self.dead());
        }
        if let Err(e) = tx.send(self.sock.as_fd(), &head, message) {
            drop(tx);
            let why = disconnected(&self.addr, &e.to_string());
            self.fail(why.clone());
            return Err(why);
        }
        drop(tx);
        self.counters.sent(message.len());
        Ok(())
    }

    fn write_notify(&self, at: RemoteAddr, from: &[u8], message: &[u8]) -> Result<(), TransportError> {
        common::check_message(message)?;
        let bytes = common::check_ops(&[Op::Write { at, from }])?;
        if common::on_progress_thread() {
            self.write_behind(at, from, message)?;
        } else {
            self.round_trip(&mut [Op::Write { at, from }], Some(message))?;
        }
        self.counters.did_ops(1, bytes);
        self.counters.sent(message.len());
        Ok(())
    }

    fn close(&self) {
        self.fail(disconnected(&self.addr, "closed on this side"));
    }

    fn stats(&self) -> FabricStats {
        self.counters.snapshot()
    }
}
