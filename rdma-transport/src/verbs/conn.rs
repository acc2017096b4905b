//! A connection as the application sees it, and how it is driven.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::adapter::Adapter;
use super::control::Stream;
use super::pace::Pace;
use super::pair::Pair;
use super::receive::Receiver;
use super::tx::{Broken, Known, Reaped, Suspect, Tx};
use super::unit::{Owner, Request, Unit};
use super::wire::{self, Control, Kind};
use crate::base::ConnBase;
use crate::common::{self, disconnected};
use crate::error::TransportError;
use crate::stream::Host;

/// How long what is under way may take to arrive when this side closes.
pub(super) const LINGER: Duration = Duration::from_millis(200);

pub(super) struct VerbsConn {
    pub(super) base: ConnBase,
    pub(super) host: Arc<Host>,
    pub(super) adapter: Arc<Adapter>,
    pub(super) pair: Pair,
    tx: Mutex<Tx>,
    room: Condvar,
    /// Work requests that the adapter is at, for a look without the lock.
    under_way: AtomicUsize,
    pub(super) pace: Pace,
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
        host: &Arc<Host>,
        adapter: &Arc<Adapter>,
        sock: Arc<OwnedFd>,
        pair: Pair,
        credits: u32,
    ) -> Arc<Self> {
        let mut tx = Tx::new(pair.depth, pair.inline);
        tx.add_credits(credits);
        Arc::new(Self {
            base,
            host: Arc::clone(host),
            adapter: Arc::clone(adapter),
            pair,
            tx: Mutex::new(tx),
            room: Condvar::new(),
            under_way: AtomicUsize::new(0),
            pace: Pace::default(),
            inbox: Mutex::default(),
            stream: Stream::new(sock),
            lingers: AtomicBool::new(false),
            doubtful: AtomicBool::new(false),
        })
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
        self.tx.lock().end.closed = true;
        self.room.notify_all();
        self.host.wake();
    }

    /// Posts what can be posted. The lock is given back before anybody is told of a failure.
    fn post_all(&self, mut tx: MutexGuard<'_, Tx>) {
        let mut reaped = Reaped::default();
        let result = self.post(&mut tx, &mut reaped);
        self.tell(tx, reaped);
        if let Err(why) = result {
            self.fail(why);
        }
    }

    fn post(&self, tx: &mut Tx, reaped: &mut Reaped) -> Result<(), TransportError> {
        let gathered = tx.gather(&self.adapter.cells)?;
        for &key in &gathered.ask {
            self.stream
                .send(&Control::Where(key))
                .map_err(|e| self.lost(&e))?;
        }
        if !gathered.posts.is_empty() {
            let posted = self.pair.post(&gathered);
            if !posted.map_err(|e| TransportError::os("post work requests", &e))? {
                return Ok(());
            }
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
            more = match self.pair.poll(&mut completions) {
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
                tx.end.closed = true;
                tx.end.suspect = Some(suspect);
                self.doubtful.store(true, Ordering::SeqCst);
                let asked = self.stream.send(&Control::Where(suspect.at.key.0));
                self.host.wake();
                asked.err().map(|e| self.lost(&e))
            }
        });
        if let Some(why) = why {
            tx.end.closed = true;
            if self.base.condemn(why) {
                // Before anybody is told what it ended with.
                self.base.die();
                self.host.wake();
            }
        }
        let mut due = false;
        for (unit, failed) in reaped.over {
            // Under the lock: completions keep their order.
            let completion = unit.finish(failed.map_or(Ok(()), Err));
            due |= completion.is_some_and(|c| self.adapter.owe(c));
        }
        drop(tx);
        self.room.notify_all();
        if due && !common::on_progress_thread() {
            self.host.wake();
        }
    }

    fn unreachable(&self, reason: &str) -> TransportError {
        match self.adapter.trouble() {
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
        if let Err(e) = self.pair.arm() {
            self.fail(TransportError::os("arm a completion queue", &e));
        }
        self.reap();
    }

    /// The completion queue has reported, or it is time to look.
    pub(super) fn reported(&self) {
        self.pair.reported();
        self.reap();
    }

    /// Whether somebody waits for what the adapter is at.
    pub(super) fn awaited(&self) -> bool {
        self.tx.lock().awaited()
    }

    /// A fragment has been dealt with: its credit goes back, with others.
    pub(super) fn dealt(&self) {
        let mut tx = self.tx.lock();
        tx.owe();
        self.post_all(tx);
    }

    /// The peer has told what a region key stands for.
    pub(super) fn on_place(&self, key: u64, known: Known) {
        let mut tx = self.tx.lock();
        if let Some(Suspect { at, len }) = tx.end.suspect.filter(|s| s.at.key.0 == key) {
            let reason = match known {
                Known::Nowhere => "no such region",
                _ => "the target's adapter does not permit it",
            };
            let why = common::remote_access(at, len, reason);
            tx.end.guilty = Some(why.clone());
            drop(tx);
            return self.fail(why);
        }
        // Regions that nobody has used are not remembered.
        if let Some(entry) = tx.regions.get_mut(&key) {
            *entry = known;
            self.post_all(tx);
        }
    }

    /// Destroys the queue pair: nothing of the peer lands after this.
    pub(super) fn cut(&self) {
        // Completions of this queue pair's number must not be left for another that gets it again.
        self.adapter.receive.receive_all();
        self.pair.destroy();
    }

    /// What is left when the queue pair is gone, and what the first of it fails with if that is known.
    pub(super) fn take_all(&self) -> (Vec<Unit>, Option<TransportError>) {
        let mut tx = self.tx.lock();
        self.under_way.store(0, Ordering::SeqCst);
        (tx.take_all(), tx.end.guilty.take())
    }

    /// Queues requests and posts what can be posted.
    pub(super) fn enqueue(
        &self,
        requests: Vec<Request>,
        owner: Owner,
    ) -> Result<(), (Owner, TransportError)> {
        let mut tx = self.tx.lock();
        if tx.end.closed || !self.alive() {
            drop(tx);
            return Err((owner, self.base.dead()));
        }
        tx.add_unit(requests, owner);
        self.post_all(tx);
        Ok(())
    }

    /// Whether to wait for what is still under way.
    pub(super) fn lingering(&self, deadline: Instant) -> bool {
        self.reap();
        self.under_way() && Instant::now() < deadline && !self.pair.destroyed()
    }

    /// Sends a message; `waits`: returns when the adapter has it.
    pub(super) fn send_message(&self, message: &[u8], waits: bool) -> Result<(), TransportError> {
        common::check_message(message)?;
        if self.under_way() {
            self.reap();
        }
        let mut tx = self.tx.lock();
        if tx.end.closed || !self.alive() {
            drop(tx);
            return Err(self.base.dead());
        }
        let number = tx.add_message(message);
        self.post_all(tx);
        self.base.counters.sent(message.len());
        if common::on_progress_thread() {
            return Ok(());
        }
        let mut tx = self.tx.lock();
        if tx.is_sent(number) {
            return Ok(());
        }
        drop(tx);
        // Room in the send queue is reported; credits, which it may wait for as well, come as messages do.
        self.arm();
        if !waits {
            return Ok(());
        }
        // What the adapter does not have dies with this process.
        let deadline = Instant::now() + self.host.base.config.timeout;
        tx = self.tx.lock();
        while !tx.is_sent(number) {
            if tx.end.closed {
                drop(tx);
                return Err(self.base.dead());
            }
            if self.room.wait_until(&mut tx, deadline).timed_out() {
                drop(tx);
                let why = common::timed_out(&self.base.addr, self.host.base.config.timeout);
                self.fail(why.clone());
                return Err(why);
            }
        }
        Ok(())
    }

    /// Waits until the adapter has all messages, or `deadline`. Not on the progress thread, which brings the credits for that.
    pub(super) fn drain(&self, deadline: Instant) {
        let mut tx = self.tx.lock();
        while !tx.all_sent() && !tx.end.closed {
            if self.room.wait_until(&mut tx, deadline).timed_out() {
                return;
            }
        }
    }

    pub(super) fn notify_senders(&self) {
        self.room.notify_all();
    }
}

impl Receiver for VerbsConn {
    /// A fragment has arrived.
    fn arrived(&self, fragment: Vec<u8>) {
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
            self.post_all(tx);
        }
    }

    fn broken(&self, why: TransportError) {
        self.fail(why);
    }
}
