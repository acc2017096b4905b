//! A connection as the application sees it, and how it is driven.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};

use super::attend::{self, Attendance};
use super::control::Stream;
use super::endpoint::Core;
use super::ffi::{Cq, Qp, Route};
use super::submit::Prepared;
use super::tx::{Broken, Known, Reaped, Suspect, Tx};
use super::unit::{Due, Owner, Request};
use super::wire::{self, Control, Kind};
use crate::base::{ConnBase, Endpoint};
use crate::common::{self, disconnected};
use crate::{AsyncOp, BatchError, Completion, ConnId, Connection, FabricStats, Op, TransportError};

/// How long what is under way may take to arrive when this side closes.
const LINGER: Duration = Duration::from_millis(200);

pub(super) struct VerbsConn {
    pub(super) base: ConnBase,
    pub(super) core: Arc<Core>,
    /// None: destroyed, nothing of the peer lands any more.
    qp: RwLock<Option<Qp>>,
    pub(super) qpn: u32,
    pub(super) inline: usize,
    cq: Arc<Cq>,
    /// The completion queue reports to the progress thread.
    armed: AtomicBool,
    tx: Mutex<Tx>,
    room: Condvar,
    /// Work requests that the adapter is at, for a look without the lock.
    under_way: AtomicUsize,
    /// How long blocking operations have taken lately, ns.
    pub(super) lately: AtomicU64,
    /// Fragments that have arrived.
    pub(super) inbox: Mutex<VecDeque<Vec<u8>>>,
    pub(super) stream: Stream,
    /// The end is ours: what is under way may arrive.
    pub(super) lingers: AtomicBool,
    /// The peer has been asked whether a region, or everything, has gone.
    pub(super) doubtful: AtomicBool,
}

impl VerbsConn {
    pub(super) fn new(
        base: ConnBase,
        core: &Arc<Core>,
        sock: Arc<OwnedFd>,
        qp: Qp,
        cq: Arc<Cq>,
        credits: u32,
    ) -> Arc<Self> {
        let (qpn, caps) = (qp.number(), qp.caps);
        let mut tx = Tx::new(caps.depth as usize, caps.inline as usize);
        tx.add_credits(credits);
        Arc::new(Self {
            base,
            core: Arc::clone(core),
            qp: RwLock::new(Some(qp)),
            qpn,
            inline: caps.inline as usize,
            cq,
            armed: AtomicBool::new(false),
            tx: Mutex::new(tx),
            room: Condvar::new(),
            under_way: AtomicUsize::new(0),
            lately: AtomicU64::new(0),
            inbox: Mutex::default(),
            stream: Stream::new(sock),
            lingers: AtomicBool::new(false),
            doubtful: AtomicBool::new(false),
        })
    }

    pub(super) fn join(&self, route: &Route) -> std::io::Result<()> {
        match &*self.qp.read() {
            Some(qp) => qp.connect(route),
            None => Ok(()),
        }
    }

    pub(super) fn alive(&self) -> bool {
        self.base.alive()
    }

    pub(super) fn under_way(&self) -> bool {
        self.under_way.load(Ordering::SeqCst) > 0
    }

    /// Puts the connection into error; the first reason counts.
    pub(super) fn fail(&self, why: TransportError) {
        if !self.base.condemn(why) {
            return;
        }
        self.base.die();
        self.tx.lock().closed = true;
        self.room.notify_all();
        self.core.wake();
    }

    /// Posts what can be posted. The lock is given back before anybody is told of a failure.
    pub(super) fn pump(&self, mut tx: MutexGuard<'_, Tx>) {
        let mut reaped = Reaped::default();
        let result = self.post(&mut tx, &mut reaped);
        self.tell(tx, reaped);
        if let Err(why) = result {
            self.fail(why);
        }
    }

    fn post(&self, tx: &mut Tx, reaped: &mut Reaped) -> Result<(), TransportError> {
        let gathered = tx.gather(&self.core.cells)?;
        for key in gathered.ask {
            self.stream
                .send(&Control::Where(key))
                .map_err(|e| self.lost(&e))?;
        }
        if !gathered.posts.is_empty() {
            let qp = self.qp.read();
            let Some(qp) = &*qp else { return Ok(()) };
            qp.post(&gathered.posts, &gathered.bytes)
                .map_err(|e| TransportError::os("post work requests", &e))?;
        }
        self.under_way.store(tx.under_way(), Ordering::SeqCst);
        // Some may be refused right here, or be empty.
        tx.advance(reaped);
        Ok(())
    }

    /// Takes completions, continues with what waits for room.
    pub(super) fn reap(&self) {
        let mut completions = Vec::new();
        let mut tx = self.tx.lock();
        let mut more = true;
        let mut failed = None;
        while more {
            more = match self.cq.poll(&mut completions) {
                Ok(more) => more,
                Err(e) => {
                    failed = Some(TransportError::os("poll a completion queue", &e));
                    false
                }
            };
        }
        if !completions.is_empty() {
            let mut reaped = tx.reap(&completions);
            if reaped.broken.is_none()
                && let Err(why) = self.post(&mut tx, &mut reaped)
            {
                failed = Some(why);
            }
            self.under_way.store(tx.under_way(), Ordering::SeqCst);
            self.tell(tx, reaped);
        } else {
            drop(tx);
        }
        if let Some(why) = failed {
            self.fail(why);
        }
    }

    /// Tells owners what became of their batches; completions are left to the progress thread.
    fn tell(&self, mut tx: MutexGuard<'_, Tx>, reaped: Reaped) {
        let why = reaped.broken.and_then(|broken| match broken {
            Broken::Failed(why) => Some(why),
            Broken::Lost(reason) => Some(self.unreachable(&reason)),
            Broken::Suspect(suspect) => {
                // Is it the region that has gone, or everything? The peer's answer decides.
                tx.closed = true;
                tx.suspect = Some(suspect);
                self.doubtful.store(true, Ordering::SeqCst);
                let asked = self.stream.send(&Control::Where(suspect.at.key.0));
                self.core.wake();
                asked.err().map(|e| self.lost(&e))
            }
        });
        if let Some(why) = why {
            tx.closed = true;
            if self.base.condemn(why) {
                // Before anybody is told what it ended with.
                self.base.die();
                self.core.wake();
            }
        }
        let mut due = false;
        for (unit, failed) in reaped.over {
            // Under the lock: completions keep their order.
            let completion = unit.finish(failed.map_or(Ok(()), Err));
            if let Some(completion) = completion.and_then(Due::offer) {
                self.core.due.lock().push_back(completion);
                due = true;
            }
        }
        drop(tx);
        self.room.notify_all();
        if due && !common::on_progress_thread() {
            self.core.wake();
        }
    }

    fn unreachable(&self, reason: &str) -> TransportError {
        match self.core.trouble() {
            Some(trouble) => disconnected(&self.base.addr, &format!("{reason}; {trouble}")),
            None => disconnected(&self.base.addr, reason),
        }
    }

    pub(super) fn lost(&self, e: &std::io::Error) -> TransportError {
        disconnected(&self.base.addr, &e.to_string())
    }

    /// Lets the completion queue report to the progress thread, then looks once more: what came before is not
    /// reported.
    pub(super) fn arm(&self) {
        if !self.armed.swap(true, Ordering::SeqCst)
            && let Err(e) = self.cq.arm()
        {
            self.fail(TransportError::os("arm a completion queue", &e));
        }
        self.reap();
    }

    /// The completion queue has reported, or it is time to look.
    pub(super) fn reported(&self) {
        self.armed.store(false, Ordering::SeqCst);
        self.reap();
    }

    /// Whether somebody waits for what the adapter is at.
    pub(super) fn awaited(&self) -> bool {
        self.tx.lock().awaited()
    }

    /// A fragment has arrived.
    pub(super) fn arrived(&self, fragment: Vec<u8>) {
        let Some((kind, credits, _)) = wire::parse(&fragment) else {
            return self.fail(self.base.protocol("a malformed fragment"));
        };
        let waiting = if kind == Kind::Credit {
            0
        } else {
            let mut inbox = self.inbox.lock();
            inbox.push_back(fragment);
            inbox.len()
        };
        let mut tx = self.tx.lock();
        if !tx.add_credits(credits) || !tx.within_credits(waiting) {
            drop(tx);
            return self.fail(self.base.protocol("more fragments than it has credits for"));
        }
        if credits > 0 {
            self.pump(tx);
        }
    }

    /// A fragment has been dealt with: its credit goes back, with others.
    pub(super) fn dealt(&self) {
        let mut tx = self.tx.lock();
        tx.owe();
        self.pump(tx);
    }

    /// The peer has told what a region key stands for.
    pub(super) fn told(&self, key: u64, known: Known) {
        let mut tx = self.tx.lock();
        if let Some(Suspect { at, len }) = tx.suspect.filter(|s| s.at.key.0 == key) {
            let reason = match known {
                Known::Nowhere => "no such region",
                _ => "the target's adapter does not permit it",
            };
            let why = common::remote_access(at, len, reason);
            tx.guilty = Some(why.clone());
            drop(tx);
            return self.fail(why);
        }
        // Regions that nobody has used are not remembered.
        if let Some(entry) = tx.regions.get_mut(&key) {
            *entry = known;
            self.pump(tx);
        }
    }

    /// Destroys the queue pair: nothing of the peer lands after this.
    pub(super) fn cut(&self) {
        // Completions of this queue pair's number must not be left for another that gets it again.
        self.core.receive_all();
        let qp = self.qp.write().take();
        drop(qp);
    }

    /// Ends it for good; called by the progress thread.
    pub(super) fn finish(&self) {
        self.cut();
        let (units, mut guilty) = {
            let mut tx = self.tx.lock();
            (tx.take_all(), tx.guilty.take())
        };
        self.under_way.store(0, Ordering::SeqCst);
        self.stream.close();
        for unit in units {
            let why = guilty.take().unwrap_or_else(|| self.base.dead());
            if let Some(due) = unit.finish(Err(why)).and_then(Due::offer) {
                self.core.due.lock().push_back(due);
            }
        }
        self.room.notify_all();
    }

    /// Queues requests and posts what can be posted.
    pub(super) fn enqueue(
        &self,
        requests: Vec<Request>,
        owner: Owner,
    ) -> Result<(), (Owner, TransportError)> {
        let mut tx = self.tx.lock();
        if tx.closed || !self.alive() {
            drop(tx);
            return Err((owner, self.base.dead()));
        }
        tx.add_unit(requests, owner);
        self.pump(tx);
        Ok(())
    }
}

impl Connection for VerbsConn {
    fn id(&self) -> ConnId {
        self.base.id
    }

    fn peer_identity(&self) -> &[u8] {
        &self.base.peer.identity
    }

    fn peer_addr(&self) -> String {
        self.base.addr.clone()
    }

    fn is_alive(&self) -> bool {
        self.alive()
    }

    fn execute(&self, ops: &mut [Op<'_>]) -> Result<(), TransportError> {
        let bytes = common::check_ops(ops)?;
        if !self.alive() {
            return Err(self.base.dead());
        }
        self.run(ops)?;
        self.base.counters.did_ops(ops.len(), bytes);
        Ok(())
    }

    fn submit(&self, batch: Vec<AsyncOp>, done: Completion) {
        let moved = match common::check_batch(&batch) {
            Ok(bytes) => bytes,
            Err(invalid) => return done(Err(BatchError::unstarted(invalid, batch))),
        };
        if !self.alive() {
            return done(Err(BatchError::unstarted(self.base.dead(), batch)));
        }
        let count = batch.len();
        if count == 0 {
            return done(Ok(Vec::new()));
        }
        let Prepared { requests, asked } = match self.prepare(batch) {
            Ok(prepared) => prepared,
            Err(failed) => return done(Err(failed)),
        };
        let attended = attend::current(self.place());
        // The progress thread sees to it by itself before it sleeps, and so does who attends to it.
        let looked_for = attended.is_some() || common::on_progress_thread();
        let owner = Owner::Async {
            done,
            asked,
            attended,
        };
        match self.enqueue(requests, owner) {
            Ok(()) => {
                self.base.counters.did_ops(count, moved);
                if !looked_for {
                    self.arm();
                }
            }
            Err((owner, why)) => owner.refuse(why),
        }
    }

    fn attend(&self, start: &mut dyn FnMut(), done: &dyn Fn() -> bool) {
        let attendance = match Attendance::begin(self.place()) {
            Some(attendance) if !common::on_progress_thread() => attendance,
            _ => return start(),
        };
        let begun = Instant::now();
        start();
        let spin = self.patience(self.core.base.config.spin);
        let mut measured = false;
        while !done() {
            self.reap();
            if attendance.call() && !std::mem::replace(&mut measured, true) {
                self.took(begun.elapsed());
            }
            if done() || begun.elapsed() >= spin {
                break;
            }
            // On few cores the one we wait for may need this core.
            std::thread::yield_now();
        }
        drop(attendance);
        if self.awaited() {
            self.arm();
        }
    }

    fn send(&self, message: &[u8]) -> Result<(), TransportError> {
        common::check_message(message)?;
        if self.under_way() {
            self.reap();
        }
        let mut tx = self.tx.lock();
        if tx.closed || !self.alive() {
            drop(tx);
            return Err(self.base.dead());
        }
        let number = tx.add_message(message);
        self.pump(tx);
        self.base.counters.sent(message.len());
        if common::on_progress_thread() {
            return Ok(());
        }
        // What the adapter does not have dies with this process: others wait until it has it.
        let mut tx = self.tx.lock();
        if tx.is_sent(number) {
            return Ok(());
        }
        drop(tx);
        self.arm();
        let deadline = Instant::now() + self.core.base.config.timeout;
        tx = self.tx.lock();
        while !tx.is_sent(number) {
            if tx.closed {
                drop(tx);
                return Err(self.base.dead());
            }
            if self.room.wait_until(&mut tx, deadline).timed_out() {
                drop(tx);
                let why = common::timed_out(&self.base.addr, self.core.base.config.timeout);
                self.fail(why.clone());
                return Err(why);
            }
        }
        Ok(())
    }

    fn close(&self) {
        self.lingers.store(true, Ordering::SeqCst);
        self.fail(disconnected(&self.base.addr, "closed on this side"));
        if common::on_progress_thread() {
            return;
        }
        let deadline = Instant::now() + LINGER;
        while self.lingering(deadline) {
            std::thread::sleep(Duration::from_micros(100));
        }
        self.cut();
    }

    fn stats(&self) -> FabricStats {
        self.base.counters.snapshot()
    }
}

impl VerbsConn {
    /// What tells it from all other connections of this process.
    fn place(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Whether to wait for what is still under way.
    pub(super) fn lingering(&self, deadline: Instant) -> bool {
        self.reap();
        self.under_way() && Instant::now() < deadline && self.qp.read().is_some()
    }
}
