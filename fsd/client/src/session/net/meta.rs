//! The connection to the metadata server.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use rdma_transport::Connection;
use rt::sync::{Mutex, RwLock};
use rt::time::Instant;

use super::clock::Clock;
use super::log::Log;
use super::outbox::{Outbox, concern};
use super::ways::{RETRY, Ways};
use fsd_proto::ask;
use fsd_proto::clock::{Skew, Verdict};
use fsd_proto::rpc::{Errno, Pending, RpcError};
use fsd_proto::wire::{BEHIND_ALL, JoinReply, Logged, MetaReply, MetaRequest, Time};

/// Most exchanges of a newcomer to find out about the clocks, where the first ones took too long to tell.
pub(super) const EXCHANGES: usize = 5;
/// No further one after this: on a link that is slow for good it would tell no more.
const EXCHANGES_FOR: Duration = Duration::from_secs(8);

/// Attributes told in one message.
const ATTRS: usize = 256;

/// A request to the metadata server.
pub trait AskMeta: ask::Request<Message = MetaRequest, Answer = MetaReply> {}

impl<R: ask::Request<Message = MetaRequest, Answer = MetaReply>> AskMeta for R {}

/// Requests to the metadata server that are on their way.
pub struct InOrder<'a> {
    link: &'a MetaLink,
    /// None: it was not sent, or has to be sent again.
    begun: VecDeque<(MetaRequest, Option<Pending<'a>>)>,
}

impl InOrder<'_> {
    /// Waits for the answer to the next one; repeats it, and with it all that come after, where the connection broke.
    ///
    /// # Errors
    /// As [`MetaLink::ask`]; `EPROTO`: there is none, or it is another one.
    pub fn next<R: AskMeta>(&mut self) -> Result<R::Reply, RpcError> {
        let Some((request, pending)) = self.begun.pop_front() else {
            return Err(RpcError::Errno(Errno(libc::EPROTO)));
        };
        let patience = self.link.ways.patience.for_meta();
        let reply = match pending.map(|pending| pending.wait(patience)) {
            None | Some(Err(RpcError::Transport(_))) => {
                for (_, pending) in &mut self.begun {
                    *pending = None;
                }
                self.link.ask_message(&request)?
            }
            Some(reply) => self.link.taken(&request, reply?),
        };
        ask::answer_to::<R>(reply)
    }
}

/// The way to the metadata server.
pub struct MetaLink {
    me: Weak<Self>,
    pub(super) ways: Arc<Ways>,
    pub(super) addr: String,
    pub(super) conn: RwLock<Option<Arc<dyn Connection>>>,
    connecting: Mutex<()>,
    /// Another connection is being made although there is one.
    dialling: AtomicBool,
    pub(super) log: Log,
    pub(super) outbox: Outbox,
    pub(super) clock: Clock,
    pub(super) joined: OnceLock<JoinReply>,
}

impl MetaLink {
    pub(super) fn new(ways: &Arc<Ways>, addr: String) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            ways: Arc::clone(ways),
            addr,
            conn: RwLock::new(None),
            connecting: Mutex::new(()),
            dialling: AtomicBool::new(false),
            log: Log::default(),
            outbox: Outbox::default(),
            clock: Clock::default(),
            joined: OnceLock::new(),
        })
    }

    /// Connects to the metadata server for the first time: it may just be starting.
    pub(super) fn connect(&self) -> Result<Arc<dyn Connection>, RpcError> {
        let began = Instant::now();
        loop {
            match self.ways.fabric.connect(&self.addr) {
                Ok(conn) => return Ok(conn),
                Err(error) => self.ways.pause(began, error)?,
            }
        }
    }

    /// Finds out how far the metadata server's clock is ahead of this host's. A busy host can take longer over an exchange than the
    /// clocks may be apart, so that is repeated until it tells, at most so many times.
    pub(super) fn compare_clocks(
        &self,
        conn: &Arc<dyn Connection>,
        exchanges: usize,
    ) -> Result<Skew, RpcError> {
        let begun = Instant::now();
        let mut skew = Skew::UNKNOWN;
        for exchange in 0..exchanges {
            if exchange > 0 {
                rt::thread::sleep(RETRY);
            }
            // The one that measures first: what happens between the two makes the bounds wider, not wrong.
            let start = Instant::now();
            let sent = Time::now();
            let patience = self.ways.patience.for_answer();
            let theirs = ask::ask_on(&self.ways.calls, conn, ask::meta::Clock {}, patience)?;
            skew = skew.and(Skew::of_exchange(sent, theirs, start.elapsed()));
            if skew.verdict() != Verdict::Unsure || begun.elapsed() > EXCHANGES_FOR {
                break;
            }
        }
        tracing::debug!("the clock of this host is {skew} the metadata server's");
        self.clock.set(skew);
        Ok(skew)
    }

    pub(super) fn join_on(
        &self,
        conn: &Arc<dyn Connection>,
        again: Option<(u16, u8)>,
        skew: Skew,
    ) -> Result<JoinReply, RpcError> {
        let locks = self.ways.owner().map(|o| o.held_locks()).unwrap_or_default();
        let request = ask::meta::Join {
            again,
            life: self.ways.life,
            listen: self.ways.fabric.local_addr(),
            name: self.ways.name.clone(),
            skew,
            locks,
            durable: self.log.durable(),
        };
        ask::ask_on(&self.ways.calls, conn, request, self.ways.patience.for_answer())
    }

    /// The connection, where there is one that works.
    fn alive(&self) -> Option<Arc<dyn Connection>> {
        self.conn.read().as_ref().filter(|c| c.is_alive()).cloned()
    }

    /// The connection; makes another one where it has broken, at the first attempt or not at all.
    pub(super) fn connection(&self) -> Result<Arc<dyn Connection>, RpcError> {
        if let Some(conn) = self.alive() {
            return Ok(conn);
        }
        let _one = self.connecting.lock();
        if let Some(conn) = self.alive() {
            return Ok(conn);
        }
        let conn = self.ways.fabric.connect(&self.addr)?;
        self.rejoin(&conn)?;
        Ok(conn)
    }

    /// Nobody answers on the connection that there is. Where the server answers on another one, that takes its place: its host has lost its
    /// power and is back, of which no packet tells this one, or what was lost is sent again ever more seldom. A server that has
    /// been restarted waits for its mounts no longer than a term. To be called again and again while `is_silent`.
    pub fn replace_silent(&self, is_silent: impl Fn() -> bool + Send + 'static) {
        if !self.dialling.swap(true, Ordering::AcqRel) {
            let me = Weak::clone(&self.me);
            self.ways.workers.run(move || {
                if let Some(me) = me.upgrade() {
                    me.dial(is_silent);
                    me.dialling.store(false, Ordering::Release);
                }
            });
        }
    }

    fn dial(&self, is_silent: impl Fn() -> bool) {
        let Some(old) = self.alive() else { return };
        let Ok(conn) = self.ways.fabric.connect(&self.addr) else {
            return;
        };
        let _one = self.connecting.lock();
        let is_old = self.alive().is_some_and(|now| now.id() == old.id());
        if !is_old || !is_silent() {
            return conn.close();
        }
        tracing::warn!(
            "the metadata server is silent on the connection that there is, and answers on another one"
        );
        // First: a mount that it hears on another connection is unknown to it on this one.
        old.close();
        if let Err(error) = self.rejoin(&conn) {
            tracing::debug!("another connection to the metadata server: {error}");
        }
    }

    /// Comes back over a new connection. With `connecting` locked.
    fn rejoin(&self, conn: &Arc<dyn Connection>) -> Result<(), RpcError> {
        let joined = self.joined.get().ok_or(RpcError::Errno(Errno(libc::ENOTCONN)))?;
        // It is let in whatever that says, and had better not be late for that.
        let skew = self.compare_clocks(conn, 1)?;
        let sent = rt::time::since_boot();
        let back = self.join_on(conn, Some((joined.node, joined.incarnation)), skew);
        if let Err(RpcError::Errno(Errno(libc::ESTALE))) = back {
            self.ways.declared_dead();
        }
        let back = back?;
        if let Some(owner) = self.ways.owner() {
            owner.alive(sent);
        }
        self.tell_again(conn, &back)?;
        tracing::info!("connected to the metadata server again");
        self.ways.note_outage();
        *self.conn.write() = Some(Arc::clone(conn));
        Ok(())
    }

    /// As [`MetaLink::connection`], for a server that is needed since `began`, and may come back.
    fn reached(&self, began: Instant) -> Result<Arc<dyn Connection>, RpcError> {
        loop {
            match self.connection() {
                Err(RpcError::Transport(error)) => self.ways.pause(began, error)?,
                other => return other,
            }
        }
    }

    /// Asks the metadata server; repeats the request on a new connection where the old one broke.
    ///
    /// # Errors
    /// Its refusal; it is away for longer than programs wait.
    pub fn ask<R: AskMeta>(&self, request: R) -> Result<R::Reply, RpcError> {
        ask::answer_to::<R>(self.ask_message(&request.message())?)
    }

    /// Sends requests that the server is to carry out one after the other, without waiting for the answers.
    pub fn begin_in_order(&self, requests: Vec<MetaRequest>) -> InOrder<'_> {
        // What cannot be settled now is waited for when they are sent again.
        let settled = requests
            .iter()
            .all(|request| self.settle(|| concern(request)).is_ok());
        // All over one connection: it keeps their order.
        let mut conn = self.alive().filter(|_| settled);
        let mut begun = VecDeque::with_capacity(requests.len());
        for request in requests {
            let begin = |conn: &Arc<dyn Connection>| self.ways.calls.begin_queued(conn, &request).ok();
            let pending = conn.as_ref().and_then(begin);
            if pending.is_none() {
                conn = None;
            }
            begun.push_back((request, pending));
        }
        InOrder { link: self, begun }
    }

    /// As [`MetaLink::ask`], with what goes over the wire.
    fn ask_message(&self, request: &MetaRequest) -> Result<MetaReply, RpcError> {
        let began = Instant::now();
        self.settle(|| concern(request))?;
        loop {
            let conn = self.reached(began)?;
            match self
                .ways
                .calls
                .call(&conn, request, self.ways.patience.for_meta())
            {
                Err(RpcError::Transport(error)) => self.ways.pause(began, error)?,
                other => return other.map(|reply| self.taken(request, reply)),
            }
        }
    }

    /// As [`MetaLink::ask`], for what must not get lost: it is asked again until the server answers or the mount stops.
    ///
    /// # Errors
    /// Its refusal; the mount stops.
    fn ask_hard(&self, request: &MetaRequest) -> Result<MetaReply, RpcError> {
        self.ask_while(request, || !self.ways.stopping.load(Ordering::Acquire))
    }

    /// Asks the metadata server again and again while it cannot be reached, as long as that is of any use.
    pub(super) fn ask_while(
        &self,
        request: &MetaRequest,
        useful: impl Fn() -> bool,
    ) -> Result<MetaReply, RpcError> {
        loop {
            match self.ask_message(request) {
                Err(error) if error.is_transport() && useful() => {
                    tracing::warn!("the metadata server cannot be reached, and is asked again: {error}");
                    rt::thread::sleep(RETRY);
                }
                other => return other,
            }
        }
    }

    /// Place of the last transaction that a crash of the server's host could undo; 0: there is none.
    #[must_use]
    pub fn last_place(&self) -> u64 {
        self.log.last()
    }

    /// Can a crash of the server's host undo nothing up to the place with these low bits? It is the last one with them.
    #[must_use]
    pub fn is_durable_low(&self, low: u32) -> bool {
        let durable = self.log.durable();
        let last = self.log.last().max(durable);
        last.saturating_sub(u64::from((last as u32).wrapping_sub(low))) <= durable
    }

    /// Does the metadata server answer, now?
    pub(super) fn probe(&self) -> Result<(), RpcError> {
        let (conn, patience) = (self.connection()?, self.ways.patience.for_answer());
        ask::ask_on(&self.ways.calls, &conn, ask::meta::Clock {}, patience).map(drop)
    }

    /// Sends a request to the metadata server; `done` gets the answer on some thread. A connection that
    /// breaks meanwhile makes it a background request, which waits for the server as long as the mount lives.
    pub fn ask_async<R: AskMeta>(
        &self,
        request: R,
        done: impl FnOnce(Result<R::Reply, RpcError>) + Send + 'static,
    ) {
        let request = request.message();
        let done = move |result: Result<MetaReply, RpcError>| done(result.and_then(ask::answer_to::<R>));
        // One that has to wait for what is still to be told does so aside.
        let settled = self.outbox.is_settled(|| concern(&request));
        let conn = self.alive().filter(|_| settled);
        let (me, workers) = (Weak::clone(&self.me), self.ways.workers.clone());
        let later = move |request: MetaRequest, done: Box<dyn FnOnce(Result<MetaReply, RpcError>) + Send>| {
            workers.run(move || {
                if let Some(net) = me.upgrade() {
                    done(net.ask_hard(&request));
                }
            });
        };
        let done: Box<dyn FnOnce(Result<MetaReply, RpcError>) + Send> = Box::new(done);
        match conn {
            None => later(request, done),
            Some(conn) => {
                let again = request.clone();
                let net = Weak::clone(&self.me);
                self.ways
                    .calls
                    .call_async(&conn, &request, move |result| match (result, net.upgrade()) {
                        (Err(RpcError::Transport(_)), _) => later(again, done),
                        (Ok(reply), Some(net)) => done(Ok(net.taken(&again, reply))),
                        (Ok(MetaReply::Ordered { reply, .. }), None) => done(Ok(*reply)),
                        (other, _) => done(other),
                    });
            }
        }
    }

    /// Asks over the connection of now, if there is one; `done` gets the answer, or learns that the connection broke, on some thread.
    pub fn ask_now<R: AskMeta>(
        &self,
        request: R,
        done: impl FnOnce(Result<R::Reply, RpcError>) + Send + 'static,
    ) {
        let conn = self.alive();
        if let Some(conn) = conn {
            self.ways.calls.call_async(
                &conn,
                &request.message(),
                move |result: Result<MetaReply, RpcError>| done(result.and_then(ask::answer_to::<R>)),
            );
        }
    }

    /// Is there a connection to the metadata server, as far as is known?
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.alive().is_some()
    }

    /// A request whose answer may take for ever (waiting for a file lock).
    ///
    /// # Errors
    /// The connection failed at once.
    pub fn ask_slow<R: AskMeta>(
        &self,
        request: R,
        done: impl FnOnce(Result<R::Reply, RpcError>) + Send + 'static,
    ) -> Result<(), RpcError> {
        let request = request.message();
        self.settle(|| concern(&request))?;
        let conn = self.reached(Instant::now())?;
        self.ways
            .calls
            .call_async(&conn, &request, move |result: Result<MetaReply, RpcError>| {
                done(result.and_then(ask::answer_to::<R>));
            });
        Ok(())
    }

    /// The time to give a file.
    #[must_use]
    pub fn now(&self) -> Time {
        if self.clock.is_old() && !self.clock.asking.swap(true, Ordering::AcqRel) {
            self.compare_again();
        }
        self.clock.now()
    }

    /// Asks for the server's time; the answer comes when it comes.
    fn compare_again(&self) {
        let me = Weak::clone(&self.me);
        let (start, sent) = (Instant::now(), Time::now());
        self.ask_async(ask::meta::Clock {}, move |answer| {
            let Some(net) = me.upgrade() else { return };
            let clock = &net.clock;
            let took = start.elapsed();
            match answer {
                // One that was asked for again on another connection says little.
                Ok(theirs) if took < Duration::from_secs(1) => {
                    clock.set(Skew::of_exchange(sent, theirs, took));
                }
                _ => clock.compared.store(
                    u64::try_from(clock.began.elapsed().as_millis()).unwrap_or(u64::MAX),
                    Ordering::Relaxed,
                ),
            }
            clock.asking.store(false, Ordering::Release);
        });
    }

    /// Takes an answer out of what comes with it, and notes what has to be kept.
    pub(super) fn taken(&self, request: &MetaRequest, reply: MetaReply) -> MetaReply {
        let MetaReply::Ordered {
            order,
            durable,
            reply,
        } = reply
        else {
            return reply;
        };
        self.log.note(order, durable, request);
        *reply
    }

    /// Tells a server that has restarted what it may have lost, and waits until that has been carried out again.
    pub(super) fn tell_again(&self, conn: &Arc<dyn Connection>, joined: &JoinReply) -> Result<(), RpcError> {
        let mut parts = self.log.parts_after(joined.executed);
        if joined.awaited {
            // These are no transactions, and must not take the place of one: a server that dies before it has carried that out would not
            // ask for it again.
            let known = self.ways.owner().map(|owner| owner.shared_attrs());
            parts.extend(known.unwrap_or_default().chunks(ATTRS).map(|updates| {
                let updates = updates.to_vec();
                vec![Logged {
                    order: BEHIND_ALL,
                    request: MetaRequest::Update { updates },
                }]
            }));
        }
        if !joined.awaited && parts.iter().all(Vec::is_empty) {
            return Ok(());
        }
        let last = parts.pop().unwrap_or_default();
        for entries in parts {
            let request = MetaRequest::Replay { entries, last: false };
            self.ways
                .calls
                .call::<_, MetaReply>(conn, &request, self.ways.patience.for_answer())?;
        }
        let request = ask::meta::Replay {
            entries: last,
            last: true,
        };
        // The others have to come, too, or to be given up.
        let failed = ask::ask_on(&self.ways.calls, conn, request, self.ways.patience.for_meta())?;
        for (place, error) in failed {
            if let (Some(request), Some(owner)) = (self.log.get(place), self.ways.owner()) {
                owner.transaction_lost(&request, error);
            }
        }
        Ok(())
    }
}
