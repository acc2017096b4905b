//! The progress thread and passive agent.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rustix::net::Shutdown;

use super::conn::TcpConn;
use super::endpoint::{Core, Install};
use super::rx::{Rx, Turn};
use crate::base::{ConnBase, Endpoint};
use crate::common;
use crate::stats;
use crate::{Connection, TransportError};

pub(super) const WAKER: Token = Token(usize::MAX);
const LISTENER: Token = Token(usize::MAX - 1);
/// How long a peer whose operation was refused gets to read so.
const FAREWELL: Duration = Duration::from_secs(1);

struct Link {
    conn: Arc<TcpConn>,
    dynamic: Arc<dyn Connection>,
    rx: Rx,
    /// There may be something to read.
    ready: bool,
    ended: bool,
    /// Since when its end is awaited.
    ending: Option<Instant>,
}

struct Progress {
    core: Arc<Core>,
    poll: Poll,
    links: HashMap<Token, Link>,
}

pub(super) fn start(core: &Arc<Core>, poll: Poll) -> Result<(), TransportError> {
    if let Some(listener) = &*core.listener.lock() {
        poll.registry()
            .register(&mut SourceFd(&listener.as_raw_fd()), LISTENER, Interest::READABLE)
            .map_err(|e| TransportError::os("watch the listener", &e))?;
    }
    let mut progress = Progress {
        core: Arc::clone(core),
        poll,
        links: HashMap::new(),
    };
    core.base.start("fabric-tcp", move || progress.run())
}

impl Progress {
    fn run(&mut self) {
        let spin = self.core.base.config.spin;
        let mut events = Events::with_capacity(256);
        let mut idle_since: Option<Instant> = None;
        let mut waiting = false;
        loop {
            let busy = self.links.values().any(|l| l.ready);
            let spinning = idle_since.is_none_or(|since| since.elapsed() < spin);
            let timeout = match (busy || spinning, waiting) {
                (true, _) => Some(Duration::ZERO),
                (false, true) => Some(Duration::from_millis(10)),
                (false, false) => None,
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
            for event in &events {
                match event.token() {
                    WAKER => {}
                    LISTENER => self.accept(),
                    token => {
                        if let Some(link) = self.links.get_mut(&token) {
                            link.ready |= event.is_readable() || event.is_read_closed() || event.is_error();
                            if event.is_writable() {
                                link.conn.writable();
                            }
                        }
                    }
                }
            }
            if self.core.base.take_news() {
                if self.core.base.stopped() {
                    return self.stop();
                }
                self.place(self.core.base.take_installs());
                // Events are edges: one spent on a failed attempt does not come back.
                self.accept();
            }
            let worked = self.pump() || !events.is_empty();
            waiting = self.end_dead();
            if worked {
                idle_since = None;
            }
            if idle_since.get_or_insert_with(Instant::now).elapsed() < spin && !worked {
                // On few cores the one we wait for may need this core.
                std::thread::yield_now();
            }
        }
    }

    fn accept(&self) {
        let listener = self.core.listener.lock();
        let Some(listener) = &*listener else { return };
        loop {
            match listener.accept() {
                Ok((stream, _)) => self.core.accept(stream),
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

    fn pump(&mut self) -> bool {
        let mut worked = false;
        for link in self.links.values_mut().filter(|l| l.ready) {
            worked = true;
            match link.rx.pump(&link.conn, &link.dynamic, &self.core) {
                Ok(Turn::More) => {}
                Ok(Turn::Empty) => link.ready = false,
                Ok(Turn::Ended) => {
                    link.ready = false;
                    link.ended = true;
                    link.conn
                        .fail(common::disconnected(&link.conn.peer_addr(), "the peer has gone"));
                }
                Err(why) => {
                    link.ready = false;
                    link.conn.fail(why);
                }
            }
        }
        worked
    }

    fn place(&mut self, installs: Vec<Install>) {
        for install in installs {
            let (conn, welcome) = match install {
                Install::Ours(conn) => (conn, None),
                Install::Theirs {
                    sock,
                    addr,
                    peer,
                    welcome,
                } => {
                    let superseded: Vec<Token> = self
                        .links
                        .iter()
                        .filter(|(_, l)| l.conn.base.superseded_by(&peer))
                        .map(|(t, _)| *t)
                        .collect();
                    for token in superseded {
                        // What it has sent and we have not read is not executed any more.
                        self.end(token, Some("replaced by a newer connection of the same peer"));
                    }
                    let conn = TcpConn::new(
                        ConnBase::new(self.core.base.next_id(), peer, true, addr),
                        &self.core,
                        sock,
                    );
                    self.core.conns.lock().push(Arc::clone(&conn));
                    (conn, Some(welcome))
                }
            };
            let token = Token(conn.id().0 as usize);
            let dynamic: Arc<dyn Connection> = Arc::clone(&conn) as _;
            let fd = conn.sock.as_raw_fd();
            let interest = Interest::READABLE | Interest::WRITABLE;
            if let Err(e) = self.poll.registry().register(&mut SourceFd(&fd), token, interest) {
                conn.fail(TransportError::os("watch a connection", &e));
            }
            if let Some(welcome) = welcome {
                // First of all on this connection, then the application may use it.
                let _failed = conn.send_raw(&welcome);
                self.core.base.handler.connected(&dynamic);
            }
            let link = Link {
                conn,
                dynamic,
                rx: Rx::new(),
                ready: true,
                ended: false,
                ending: None,
            };
            self.links.insert(token, link);
        }
    }

    /// Ends connections that are in error; true if some still wait for their peer to take note.
    fn end_dead(&mut self) -> bool {
        let mut waiting = false;
        let mut over = Vec::new();
        for (token, link) in &mut self.links {
            if link.conn.alive() {
                continue;
            }
            let polite = link.rx.discarding() && !link.ended;
            let since = *link.ending.get_or_insert_with(Instant::now);
            if polite && since.elapsed() < FAREWELL {
                if link.conn.sent_all() {
                    // Already gone: fine.
                    let _gone = rustix::net::shutdown(&*link.conn.sock, Shutdown::Write);
                }
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
        let Some(link) = self.links.remove(&token) else {
            return;
        };
        let conn = &link.conn;
        if let Some(why) = why {
            conn.fail(common::disconnected(&conn.peer_addr(), why));
        }
        let fd = conn.sock.as_raw_fd();
        if let Err(e) = self.poll.registry().deregister(&mut SourceFd(&fd)) {
            tracing::debug!("stop watching a connection: {e}");
        }
        conn.finish();
        self.core.conns.lock().retain(|c| !Arc::ptr_eq(c, conn));
        self.core.base.counters.fold(&conn.stats());
        self.core
            .base
            .handler
            .disconnected(&link.dynamic, &conn.base.reason());
    }

    fn stop(&mut self) {
        self.place(self.core.base.take_last_installs());
        for link in self.links.values() {
            link.conn.fail(TransportError::Shutdown);
        }
        let tokens: Vec<Token> = self.links.keys().copied().collect();
        for token in tokens {
            self.end(token, None);
        }
    }
}
