//! The progress thread: receives messages, accepts peers, sees to completions nobody polls for.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use super::conn::VerbsConn;
use super::control::Heard;
use super::endpoint::Core;
use super::ffi::Event;
use super::receive::NUMBER;
use super::setup;
use super::tx::Known;
use super::wire::{self, Control, Kind};
use crate::base::Endpoint;
use crate::common::{self, LIMITS};
use crate::stats;
use crate::{Connection, TransportError};

pub(super) const WAKER: Token = Token(usize::MAX);
const LISTENER: Token = Token(usize::MAX - 1);
const COMPLETIONS: Token = Token(usize::MAX - 2);
const DEVICE: Token = Token(usize::MAX - 3);
/// After a peer has hung up: how long nothing may arrive before nothing more is expected.
const QUIET: Duration = Duration::from_millis(10);
/// How long what is under way may take to arrive when this side closes.
const LINGER: Duration = Duration::from_millis(200);
/// How long a peer has to say whether it still has a region.
const DOUBT: Duration = Duration::from_secs(2);
/// Between looks for completions that nobody is told of, while there are some to come.
const LOOK: Duration = Duration::from_millis(200);
/// Fragments of one connection that are dealt with in a turn.
const TURN: usize = 64;

struct Link {
    conn: Arc<VerbsConn>,
    dynamic: Arc<dyn Connection>,
    /// There may be something on the stream.
    ready: bool,
    /// The message that is coming in, and its length.
    message: Vec<u8>,
    wanted: Option<usize>,
    /// Since when its end, or the answer to a doubt, is awaited.
    ending: Option<Instant>,
    /// The peer has hung up: what it said before may still arrive.
    hung_up: bool,
    heard: Instant,
}

struct Progress {
    core: Arc<Core>,
    poll: Poll,
    links: HashMap<Token, Link>,
}

pub(super) fn start(core: &Arc<Core>, poll: Poll) -> Result<(), TransportError> {
    let watch = |fd: RawFd, token: Token, what: &str| {
        poll.registry()
            .register(&mut SourceFd(&fd), token, Interest::READABLE)
            .map_err(|e| TransportError::os(format!("watch {what}"), &e))
    };
    if let Some(listener) = &*core.listener.lock() {
        watch(listener.as_raw_fd(), LISTENER, "the listener")?;
    }
    watch(core.channel.as_raw_fd(), COMPLETIONS, "a completion channel")?;
    watch(core.device.pd.context.as_raw_fd(), DEVICE, "an RDMA device")?;
    let mut progress = Progress {
        core: Arc::clone(core),
        poll,
        links: HashMap::new(),
    };
    core.base.start("fabric-verbs", move || progress.run())
}

impl Progress {
    fn run(&mut self) {
        let spin = self.core.base.config.spin;
        let mut events = Events::with_capacity(256);
        let mut idle_since: Option<Instant> = None;
        let mut soon = false;
        loop {
            let spinning = idle_since.is_none_or(|since| since.elapsed() < spin);
            let timeout = if spinning {
                Some(Duration::ZERO)
            } else {
                // What comes while the queues are being armed is found now, what comes later is reported.
                if self.arm() {
                    idle_since = None;
                    continue;
                }
                self.patience(soon)
            };
            match self.poll.poll(&mut events, timeout) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    tracing::error!("wait for events: {e}");
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
            if timeout != Some(Duration::ZERO) {
                stats::count(&self.core.base.counters.wakeups, 1);
            }
            self.react(&events);
            if self.core.base.take_news() {
                if self.core.base.stopped() {
                    return self.stop();
                }
                self.replace();
                self.place(self.core.base.take_installs());
                // Events are edges: one spent on a failed attempt does not come back.
                self.accept();
            }
            let worked = self.work() || !events.is_empty();
            soon = self.end_dead();
            if worked {
                idle_since = None;
            }
            if idle_since.get_or_insert_with(Instant::now).elapsed() < spin && !worked {
                // On few cores the one we wait for may need this core.
                std::thread::yield_now();
            }
        }
    }

    fn react(&mut self, events: &Events) {
        for event in events {
            match event.token() {
                WAKER => {}
                LISTENER => self.accept(),
                DEVICE => self.device(),
                COMPLETIONS => {
                    while let Some(number) = self.core.channel.next() {
                        if number != NUMBER
                            && let Some(link) = self.links.get(&Token(number as usize))
                        {
                            link.conn.reported();
                        }
                    }
                }
                token => {
                    if let Some(link) = self.links.get_mut(&token) {
                        link.ready |= event.is_readable() || event.is_read_closed() || event.is_error();
                        if event.is_writable()
                            && let Err(e) = link.conn.stream.flush()
                        {
                            link.conn.fail(link.conn.lost(&e));
                        }
                    }
                }
            }
        }
    }

    /// Everything there is to do now; false if there was nothing.
    fn work(&mut self) -> bool {
        let mut worked = self.core.receive_all();
        for link in self.links.values_mut() {
            if link.ready {
                worked = true;
                link.listen(&self.core);
            }
            if link.conn.under_way() {
                link.conn.reap();
            }
            worked |= link.deliver(&self.core);
        }
        worked | self.complete()
    }

    /// Calls the completions that are due.
    fn complete(&self) -> bool {
        let mut worked = false;
        loop {
            // Not while the lock is held: they may submit.
            let due = self.core.due.lock().pop_front();
            let Some(due) = due else { return worked };
            due.call();
            worked = true;
        }
    }

    /// Lets queues report; true if there was something to do meanwhile.
    fn arm(&mut self) -> bool {
        if let Err(e) = self.core.receive.cq.arm() {
            tracing::error!("arm the receive queue: {e}");
        }
        for link in self.links.values() {
            if link.conn.under_way() && link.conn.awaited() {
                link.conn.arm();
            }
        }
        self.work()
    }

    /// How long to sleep.
    fn patience(&self, soon: bool) -> Option<Duration> {
        if soon {
            return Some(Duration::from_millis(2));
        }
        self.links.values().any(|l| l.conn.under_way()).then_some(LOOK)
    }

    fn device(&self) {
        let core = &self.core;
        let name = &core.device.pd.context.name;
        while let Some(event) = core.device.pd.context.event() {
            match event {
                Event::PortDown(port) if port == core.device.port => {
                    core.port_down.store(true, Ordering::SeqCst);
                    tracing::warn!("port {port} of the RDMA device {name} is down");
                }
                Event::PortUp(port) if port == core.device.port => {
                    core.port_down.store(false, Ordering::SeqCst);
                    tracing::info!("port {port} of the RDMA device {name} is up");
                }
                Event::PortDown(_) | Event::PortUp(_) => {}
                Event::DeviceGone => {
                    core.device_gone.store(true, Ordering::SeqCst);
                    tracing::error!("the RDMA device {name} has failed or was removed");
                    for link in self.links.values() {
                        link.conn.fail(TransportError::Os {
                            what: format!("use the RDMA device {name}"),
                            reason: "it has failed or was removed".to_owned(),
                        });
                    }
                }
                Event::Other(what) => tracing::debug!("{name}: {what}"),
            }
        }
    }

    fn accept(&self) {
        let listener = self.core.listener.lock();
        let Some(listener) = &*listener else { return };
        loop {
            match listener.accept() {
                Ok((stream, _)) => setup::accept(&self.core, stream),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => {
                    // Out of descriptors, most likely. The event is spent: try again by ourselves.
                    tracing::error!("accept a connection: {e}");
                    std::thread::sleep(Duration::from_millis(10));
                    self.core.wake();
                    return;
                }
            }
        }
    }

    /// Ends what peers had before that are about to get a new connection.
    fn replace(&mut self) {
        let replacing = std::mem::take(&mut *self.core.replacing.lock());
        for replace in replacing {
            let superseded: Vec<Token> = self
                .links
                .iter()
                .filter(|(_, l)| l.conn.base.superseded_by(&replace.peer))
                .map(|(t, _)| *t)
                .collect();
            for token in superseded {
                // What it has sent and was not received is not received any more.
                self.end(token, Some("replaced by a newer connection of the same peer"));
            }
            // Whoever waits may have given up.
            let _gone = replace.done.try_send(());
        }
    }

    fn place(&mut self, installs: Vec<Arc<VerbsConn>>) {
        for conn in installs {
            let token = Token(conn.id().0 as usize);
            let dynamic: Arc<dyn Connection> = Arc::clone(&conn) as _;
            let fd = conn.stream.sock.as_raw_fd();
            let interest = Interest::READABLE | Interest::WRITABLE;
            if let Err(e) = self.poll.registry().register(&mut SourceFd(&fd), token, interest) {
                conn.fail(TransportError::os("watch a connection", &e));
            }
            if conn.base.incoming {
                self.core.base.handler.connected(&dynamic);
            }
            let link = Link {
                conn,
                dynamic,
                ready: true,
                message: Vec::new(),
                wanted: None,
                ending: None,
                hung_up: false,
                heard: Instant::now(),
            };
            self.links.insert(token, link);
        }
    }

    /// Ends connections that are in error; true if some are still waited for.
    fn end_dead(&mut self) -> bool {
        let mut waiting = false;
        let mut over = Vec::new();
        for (token, link) in &mut self.links {
            let conn = &link.conn;
            if conn.alive() {
                if conn.doubtful.load(Ordering::SeqCst) {
                    waiting = true;
                    if link.ending.get_or_insert_with(Instant::now).elapsed() > DOUBT {
                        conn.fail(common::disconnected(
                            &conn.base.addr,
                            "the target has refused an operation and does not say why",
                        ));
                    }
                }
                continue;
            }
            let since = *link.ending.get_or_insert_with(Instant::now);
            let wait = if link.hung_up {
                link.heard.elapsed() < QUIET || !conn.inbox.lock().is_empty()
            } else {
                conn.lingers.load(Ordering::SeqCst) && conn.lingering(since + LINGER)
            };
            if wait {
                waiting = true;
            } else {
                over.push(*token);
            }
        }
        for token in over {
            self.end(token, None);
        }
        waiting
    }

    fn end(&mut self, token: Token, why: Option<&str>) {
        let Some(mut link) = self.links.remove(&token) else {
            return;
        };
        let conn = Arc::clone(&link.conn);
        if let Some(why) = why {
            conn.fail(common::disconnected(&conn.peer_addr(), why));
        }
        let fd = conn.stream.sock.as_raw_fd();
        if let Err(e) = self.poll.registry().deregister(&mut SourceFd(&fd)) {
            tracing::debug!("stop watching a connection: {e}");
        }
        conn.finish();
        if link.hung_up {
            // What came in at the last moment.
            while link.deliver(&self.core) {}
        }
        self.core.forget(&conn, true);
        self.core.base.counters.fold(&conn.stats());
        self.complete();
        self.core
            .base
            .handler
            .disconnected(&link.dynamic, &conn.base.reason());
    }

    fn stop(&mut self) {
        self.core.replacing.lock().clear();
        self.place(self.core.base.take_last_installs());
        for link in self.links.values() {
            link.conn.fail(TransportError::Shutdown);
        }
        let deadline = Instant::now() + LINGER;
        while self.links.values().any(|l| l.conn.lingering(deadline)) {
            std::thread::sleep(Duration::from_micros(100));
        }
        let tokens: Vec<Token> = self.links.keys().copied().collect();
        for token in tokens {
            self.end(token, None);
        }
        self.complete();
    }
}

impl Link {
    /// Reads the stream until it is empty.
    fn listen(&mut self, core: &Core) {
        let conn = &self.conn;
        while self.ready {
            match conn.stream.hear() {
                Heard::Frames(frames) => {
                    for frame in frames {
                        let answered = match frame {
                            Control::Where(key) => conn.stream.send(&core.find(key)),
                            Control::There(key, place) => {
                                conn.told(key, Known::There(place));
                                Ok(())
                            }
                            Control::Nowhere(key) => {
                                conn.told(key, Known::Nowhere);
                                Ok(())
                            }
                        };
                        if let Err(e) = answered {
                            conn.fail(conn.lost(&e));
                        }
                    }
                }
                Heard::Nothing => self.ready = false,
                Heard::Ended(reason) => {
                    self.ready = false;
                    self.hung_up = conn.alive();
                    self.heard = Instant::now();
                    conn.fail(common::disconnected(&conn.base.addr, &reason));
                }
                Heard::Malformed => {
                    self.ready = false;
                    conn.fail(conn.base.protocol("a malformed control frame"));
                }
            }
        }
    }

    /// Gives the application the messages that have arrived; false if there are none.
    fn deliver(&mut self, core: &Core) -> bool {
        let mut worked = false;
        for _ in 0..TURN {
            if !self.conn.alive() && !self.hung_up {
                return worked;
            }
            let fragment = self.conn.inbox.lock().pop_front();
            let Some(fragment) = fragment else { break };
            worked = true;
            self.heard = Instant::now();
            match self.take(&fragment) {
                Ok(true) => {
                    let message = std::mem::take(&mut self.message);
                    self.wanted = None;
                    self.conn.base.counters.received(message.len());
                    core.base.handler.message(&self.dynamic, &message);
                }
                Ok(false) => {}
                Err(detail) => {
                    self.hung_up = false;
                    self.conn.fail(self.conn.base.protocol(detail));
                }
            }
            self.conn.dealt();
        }
        worked
    }

    /// Puts a fragment to the message; true if that is complete.
    fn take(&mut self, fragment: &[u8]) -> Result<bool, &'static str> {
        let (kind, _, body) = wire::parse(fragment).ok_or("a malformed fragment")?;
        match (kind, self.wanted) {
            (Kind::First(len), None) if len as usize <= LIMITS.max_message => {
                self.wanted = Some(len as usize);
                self.message = Vec::with_capacity(len as usize);
            }
            (Kind::First(_), None) => return Err("a message longer than possible"),
            (Kind::First(_), Some(_)) => return Err("a message within another"),
            (Kind::More, Some(_)) => {}
            _ => return Err("a piece of no message"),
        }
        self.message.extend_from_slice(body);
        match self.wanted {
            Some(wanted) if self.message.len() > wanted => Err("a message longer than announced"),
            Some(wanted) => Ok(self.message.len() == wanted),
            None => Ok(false),
        }
    }
}
