//! A shared-memory connection: operations inline, messages through the rings.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::PollFlags;
use rustix::net::Shutdown;

use super::control::{self, Notice};
use super::executor::Executor;
use super::host::Host;
use super::layout::{Channel, Directory, Side, slot_of};
use super::maps::{Mapped, Maps};
use super::send::{Outbox, Sent, Unsent};
use crate::base::{ConnBase, answered_by_base};
use crate::buffer::Buffer;
use crate::common::{self, disconnected, remote_access};
use crate::error::TransportError;
use crate::fabric::{ConnId, Connection};
use crate::handshake::Peer;
use crate::mem::SharedMem;
use crate::ops::{Access, AsyncOp, BatchError, Completion, Op, OpResult, RemoteAddr};
use crate::regions::place_in;
use crate::stats;

/// Longest time `close` waits for operations of the peer that are being executed at that moment.
const FENCE: Duration = Duration::from_secs(1);

/// Longest time that an operation of a peer takes which is expelled and not stopped in the middle of it.
const OPERATION: Duration = Duration::from_millis(100);

/// The process at the other end.
struct Process {
    /// Wakes its progress thread.
    bell: OwnedFd,
    /// If it has connected to us and has a number here.
    executor: Option<Executor>,
}

pub(super) struct ShmConn {
    pub(super) base: ConnBase,
    host: Arc<Host>,
    pub(super) side: Side,
    pub(super) channel: Channel,
    peer_dir: Directory,
    process: Process,
    pub(super) sock: Arc<OwnedFd>,
    /// Held while a packet is taken from the socket and acted upon: packets count in their order.
    receiving: Mutex<()>,
    maps: Maps,
    outbox: Outbox,
    /// The peer is gone: none of its threads executes anything any more.
    hung_up: AtomicBool,
    /// The peer has told of all its regions.
    ready: AtomicBool,
}

/// What a new connection is made of.
pub(super) struct Parts {
    pub(super) peer: Peer,
    pub(super) addr: String,
    pub(super) side: Side,
    pub(super) channel: Channel,
    pub(super) peer_dir: Directory,
    pub(super) peer_bell: OwnedFd,
    pub(super) sock: Arc<OwnedFd>,
    pub(super) executor: Option<Executor>,
}

impl ShmConn {
    pub(super) fn new(id: ConnId, host: &Arc<Host>, parts: Parts) -> Arc<Self> {
        Arc::new(Self {
            base: ConnBase::new(id, parts.peer, parts.side == Side::Listening, parts.addr),
            host: Arc::clone(host),
            side: parts.side,
            channel: parts.channel,
            peer_dir: parts.peer_dir,
            process: Process {
                bell: parts.peer_bell,
                executor: parts.executor,
            },
            sock: parts.sock,
            receiving: Mutex::new(()),
            maps: Maps::default(),
            outbox: Outbox::new(parts.side),
            hung_up: AtomicBool::new(false),
            ready: AtomicBool::new(false),
        })
    }

    #[cfg(test)]
    pub(super) fn bells_for_tests(&self) -> (&Host, &OwnedFd) {
        (&self.host, &self.process.bell)
    }

    pub(super) fn alive(&self) -> bool {
        self.base.alive()
    }

    pub(super) fn hung_up(&self) -> bool {
        self.hung_up.load(Ordering::SeqCst)
    }

    /// Puts the connection into error. The first reason counts. From now on nothing of the peer lands here,
    /// except for operations it is executing at this very moment (see [`ShmConn::quiet`]).
    pub(super) fn fail(&self, why: TransportError) {
        if !self.base.condemn(why) {
            return;
        }
        self.channel.open(self.side).store(0, Ordering::SeqCst);
        self.base.die();
        self.outbox.wake_all();
        self.host.wake();
    }

    /// Whether no operation of the peer is being executed on our memory.
    pub(super) fn quiet(&self) -> bool {
        self.hung_up() || !self.channel.busy(self.side.other())
    }

    /// Waits until no operation of the peer on `slot` (or on anything) is being executed.
    pub(super) fn wait_quiet(&self, slot: Option<usize>, deadline: Instant) -> bool {
        let mut rounds = 0u32;
        loop {
            let peer = self.side.other();
            let busy = match slot {
                Some(slot) => self.channel.in_flight(peer, slot).load(Ordering::SeqCst) != 0,
                None => self.channel.busy(peer),
            };
            if !busy || self.hung_up() {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            rounds += 1;
            if rounds.is_multiple_of(64) {
                // The peer may have died while it was at it.
                self.drain_control();
                std::thread::sleep(Duration::from_micros(50));
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// Lets go of the peer's memory and tells it; the last act of a connection.
    pub(super) fn finish(&self) {
        self.maps.clear();
        self.outbox.clear();
        // Already gone: fine.
        let _gone = rustix::net::shutdown(&*self.sock, Shutdown::Both);
    }

    /// Tells the peer about a region or its end.
    pub(super) fn notify(&self, notice: Notice, mem: Option<&SharedMem>) {
        if !self.alive() {
            return;
        }
        let fds: Vec<_> = mem.iter().map(|m| m.fd()).collect();
        let deadline = Instant::now() + self.host.base.config.timeout;
        if let Err(e) = control::send(self.sock.as_fd(), &notice.encode(), &fds, deadline) {
            self.fail(disconnected(&self.base.addr, &format!("control socket: {e}")));
        }
    }

    /// Waits for the peer's [`Notice::Ready`], acting on what comes before it.
    pub(super) fn await_ready(&self, deadline: Instant) -> Result<(), TransportError> {
        loop {
            self.drain_control();
            if self.ready.load(Ordering::SeqCst) {
                return Ok(());
            }
            if !self.alive() {
                return Err(self.base.reason());
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(common::timed_out(&self.base.addr, self.host.base.config.timeout));
            }
            // Not up to the deadline at once: another thread may take the packet from the socket.
            let soon = deadline.min(now + Duration::from_millis(10));
            common::wait(self.sock.as_fd(), PollFlags::IN, soon)
                .map_err(|e| TransportError::os("wait for the peer", &e.into()))?;
        }
    }

    /// Acts on everything waiting at the control socket. Called by the progress thread, and by any thread
    /// that meets a region key it does not know: the news about it was sent before the key could be learnt.
    pub(super) fn drain_control(&self) {
        let _in_order = self.receiving.lock();
        while !self.hung_up() {
            let lost = match control::try_recv(self.sock.as_fd()) {
                Ok(None) => return,
                Ok(Some(packet)) if packet.bytes.is_empty() => {
                    disconnected(&self.base.addr, "the peer has gone")
                }
                Ok(Some(packet)) => match self.act_on(packet) {
                    Ok(()) => continue,
                    Err(detail) => {
                        self.fail(self.base.protocol(detail));
                        return;
                    }
                },
                Err(e) => disconnected(&self.base.addr, &e.to_string()),
            };
            self.hung_up.store(true, Ordering::SeqCst);
            self.fail(lost);
        }
    }

    fn act_on(&self, packet: control::Packet) -> Result<(), String> {
        let notice = Notice::decode(&packet.bytes).ok_or("malformed packet on the control socket")?;
        match notice {
            Notice::Region { key, len, access } => {
                let fd = packet
                    .fds
                    .into_iter()
                    .next()
                    .ok_or("a region without its memory")?;
                let len = usize::try_from(len).map_err(|e| e.to_string())?;
                let name = format!("region {key:#x} of {}", self.base.addr);
                let mem = SharedMem::from_fd(fd, len, name).map_err(|e| e.to_string())?;
                self.maps.add(Mapped { key, access, mem }, || self.alive());
            }
            Notice::Ready => self.ready.store(true, Ordering::SeqCst),
            Notice::Gone { key } => self.maps.remove(key),
        }
        Ok(())
    }

    fn mapped(&self, key: u64) -> Option<Arc<Mapped>> {
        self.maps.find(key).or_else(|| {
            self.drain_control();
            self.maps.find(key)
        })
    }

    /// Executes one operation on the peer's memory while it is counted in flight.
    #[inline]
    fn on_region<R>(
        &self,
        at: RemoteAddr,
        len: usize,
        permits: impl Fn(Access) -> bool,
        act: impl FnOnce(&SharedMem, usize) -> Result<R, TransportError>,
    ) -> Result<R, TransportError> {
        let refused = |why: &str| Err(remote_access(at, len as u64, why));
        if !self.alive() {
            return Err(self.base.dead());
        }
        let Some(mapped) = self.mapped(at.key.0) else {
            return if self.alive() {
                refused("no such region")
            } else {
                Err(self.base.dead())
            };
        };
        let offset = place_in((&mapped.mem, mapped.access), at, len, permits)?;
        let slot = slot_of(at.key.0);
        let in_flight = self.channel.in_flight(self.side, slot);
        // First counted, then checked: who withdraws the permission and then sees no count is safe.
        in_flight.fetch_add(1, Ordering::SeqCst);
        let result = if self.channel.open(self.side.other()).load(Ordering::SeqCst) != 1 {
            Err(disconnected(
                &self.base.addr,
                "the peer has closed the connection",
            ))
        } else if self.peer_dir.key(slot).load(Ordering::SeqCst) != at.key.0 {
            refused("no such region any more")
        } else {
            act(&mapped.mem, offset)
        };
        in_flight.fetch_sub(1, Ordering::SeqCst);
        result
    }

    fn cas(&self, at: RemoteAddr, expect: u64, new: u64) -> Result<u64, TransportError> {
        self.on_region(
            at,
            8,
            |a| a.atomic,
            |mem, off| mem.compare_and_swap(off, expect, new),
        )
    }

    fn faa(&self, at: RemoteAddr, add: u64) -> Result<u64, TransportError> {
        self.on_region(
            at,
            8,
            |a| a.atomic,
            |mem, off| Ok(mem.word(off)?.fetch_add(add, Ordering::SeqCst)),
        )
    }

    fn words(&self, at: RemoteAddr, words: u32) -> Result<Vec<u64>, TransportError> {
        let words = words as usize;
        self.on_region(
            at,
            words * 8,
            |a| a.read,
            |mem, off| {
                (0..words)
                    .map(|i| Ok(mem.word(off + i * 8)?.load(Ordering::SeqCst)))
                    .collect()
            },
        )
    }

    // Inlined, as it is the whole way of a blocking operation.
    #[inline(always)]
    fn read(&self, at: RemoteAddr, into: &mut [u8]) -> Result<(), TransportError> {
        self.on_region(at, into.len(), |a| a.read, |mem, off| mem.read_at(off, into))
    }

    #[inline(always)]
    fn write(&self, at: RemoteAddr, from: &[u8]) -> Result<(), TransportError> {
        self.on_region(at, from.len(), |a| a.write, |mem, off| mem.write_at(off, from))
    }

    #[inline(always)]
    fn run(&self, op: &mut Op<'_>) -> Result<(), TransportError> {
        match op {
            Op::Read { at, into } => self.read(*at, into),
            Op::Write { at, from } => self.write(*at, from),
            Op::Cas { at, expect, new, old } => self.cas(*at, *expect, *new).map(|v| *old = v),
            Op::Faa { at, add, old } => self.faa(*at, *add).map(|v| *old = v),
        }
    }

    /// Executes an operation; if it fails its buffer comes back with the error.
    fn run_async(&self, op: AsyncOp) -> Result<OpResult, (TransportError, Option<Buffer>)> {
        match op {
            AsyncOp::Read { at, mut into } => match self.read(at, &mut into) {
                Ok(()) => Ok(OpResult::Read(into)),
                Err(why) => Err((why, Some(into))),
            },
            AsyncOp::Write { at, from } => match self.write(at, &from) {
                Ok(()) => Ok(OpResult::Written(from)),
                Err(why) => Err((why, Some(from))),
            },
            AsyncOp::ReadWords { at, words } => self
                .words(at, words)
                .map(OpResult::Words)
                .map_err(|why| (why, None)),
            AsyncOp::Cas { at, expect, new } => self
                .cas(at, expect, new)
                .map(OpResult::Old)
                .map_err(|why| (why, None)),
            AsyncOp::Faa { at, add } => self.faa(at, add).map(OpResult::Old).map_err(|why| (why, None)),
        }
    }

    /// Wakes the peer's progress thread if it sleeps.
    pub(super) fn ring_bell(&self) {
        let sleeping = self.peer_dir.sleeping();
        if sleeping.load(Ordering::SeqCst) != 0 && sleeping.swap(0, Ordering::SeqCst) != 0 {
            stats::count(&self.base.counters.doorbells, 1);
            // A full counter means that it will wake up anyway.
            let _full = rustix::io::write(&self.process.bell, &1u64.to_ne_bytes());
        }
    }

    /// Moves queued messages into the ring; true if anything moved. Called by the progress thread in every round.
    pub(super) fn flush(&self) -> bool {
        match self.outbox.flush(&self.channel) {
            Ok(moved) => {
                if moved {
                    self.ring_bell();
                }
                moved
            }
            Err(unsent) => {
                // It is in error now, which is all that there is to do.
                let _failed = self.unsent::<()>(&unsent);
                false
            }
        }
    }

    /// A message could not be sent.
    fn unsent<T>(&self, unsent: &Unsent) -> Result<T, TransportError> {
        match unsent {
            Unsent::Dead => Err(self.base.dead()),
            Unsent::Broken(broken) => self.failed(self.base.protocol(*broken)),
            Unsent::Late => self.failed(common::timed_out(&self.base.addr, self.host.base.config.timeout)),
        }
    }

    /// An operation has failed: the connection is in error.
    fn failed<T>(&self, error: TransportError) -> Result<T, TransportError> {
        self.fail(error.clone());
        Err(error)
    }

    /// Sends a message, waiting for room at most for `patience`; without that it is queued instead.
    fn send_message(&self, message: &[u8], patience: Option<Duration>) -> Result<(), TransportError> {
        common::check_message(message)?;
        if !self.alive() {
            return Err(self.base.dead());
        }
        let sent = self
            .outbox
            .send(&self.channel, message, || self.alive(), patience);
        if let Sent::Queued = sent.or_else(|unsent| self.unsent(&unsent))? {
            self.host.wake_if_sleeping();
        }
        self.base.counters.sent(message.len());
        self.ring_bell();
        Ok(())
    }
}

impl Connection for ShmConn {
    answered_by_base!();

    fn execute(&self, ops: &mut [Op<'_>]) -> Result<(), TransportError> {
        let bytes = common::check_ops(ops)?;
        if !self.alive() {
            return Err(self.base.dead());
        }
        for op in ops.iter_mut() {
            if let Err(error) = self.run(op) {
                return self.failed(error);
            }
        }
        self.base.counters.did_ops(ops.len(), bytes);
        Ok(())
    }

    fn submit(&self, batch: Vec<AsyncOp>, done: Completion) {
        let bytes = match common::check_batch(&batch) {
            Ok(bytes) => bytes,
            Err(invalid) => return done(Err(BatchError::unstarted(invalid, batch))),
        };
        if !self.alive() {
            return done(Err(BatchError::unstarted(self.base.dead(), batch)));
        }
        let count = batch.len();
        let mut results = Vec::with_capacity(count);
        let mut ops = batch.into_iter();
        while let Some(op) = ops.next() {
            match self.run_async(op) {
                Ok(result) => results.push(result),
                Err((why, buffer)) => {
                    self.fail(why.clone());
                    let before = results.into_iter().filter_map(OpResult::into_buffer);
                    let behind = ops.filter_map(AsyncOp::into_buffer);
                    let buffers = before.chain(buffer).chain(behind).collect();
                    return done(Err(BatchError { why, buffers }));
                }
            }
        }
        self.base.counters.did_ops(count, bytes);
        done(Ok(results));
    }

    fn send(&self, message: &[u8]) -> Result<(), TransportError> {
        let waits = !common::on_progress_thread();
        self.send_message(message, waits.then_some(self.host.base.config.timeout))
    }

    fn queue(&self, message: &[u8]) -> Result<(), TransportError> {
        self.send_message(message, None)
    }

    fn close(&self) {
        self.fail(disconnected(&self.base.addr, "closed on this side"));
        if !common::on_progress_thread() && !self.wait_quiet(None, Instant::now() + FENCE) {
            tracing::error!(
                "{}: an operation of the peer is stuck on our memory",
                self.base.addr
            );
        }
    }

    fn expel(&self) -> Result<(), TransportError> {
        self.fail(disconnected(&self.base.addr, "expelled"));
        if self.wait_quiet(None, Instant::now() + OPERATION) {
            return Ok(());
        }
        // One that is stopped in the middle of a copy goes on with it whenever it wakes up.
        match self.process.executor.as_ref().filter(|e| !e.is_this()) {
            Some(executor) => executor.end(),
            None => Err(common::timed_out(&self.base.addr, OPERATION)),
        }
    }

    fn settled(&self) -> bool {
        // A hang-up counts: the kernel closes the socket of a process that dies, or executes a program, only after its threads are
        // gone, and one that lives closes it when its operations are done. Its process may be another life by now.
        !self.alive() && self.quiet()
    }
}
