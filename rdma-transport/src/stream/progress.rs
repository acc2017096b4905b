//! The progress thread: watches the sockets, takes connections in, ends them; everything else is the provider's.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
#[cfg(feature = "verbs")]
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[cfg(feature = "verbs")]
use mio::Registry;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use super::core::{Core, Linked};
use super::host::WAKER;
use super::socket::FramedPipe;
use crate::base::ConnBase;
use crate::common;
use crate::error::TransportError;
use crate::fabric::Connection;
use crate::stats;
use crate::threads::Endpoint;

const LISTENER: Token = Token(usize::MAX - 1);

/// A connection as the progress thread keeps it, with what the provider keeps of it.
pub(crate) struct Link<C, S> {
    pub(crate) conn: Arc<C>,
    pub(crate) dynamic: Arc<dyn Connection>,
    /// There may be something to read.
    pub(crate) ready: bool,
    /// Since when its end is awaited.
    pub(crate) ending: Option<Instant>,
    pub(crate) own: S,
}

/// All of them, by the numbers of the connections.
pub(crate) type Links<C, S> = HashMap<Token, Link<C, S>>;

/// What is to become of a connection.
pub(crate) enum Fate {
    Lives,
    /// It is not over yet, but will be soon.
    Waits,
    Over,
}

/// What a provider does in its progress thread.
pub(crate) trait Drive: Send + Sized + 'static {
    type Conn: Linked;
    /// What it keeps of each connection.
    type Own: Send;

    fn core(&self) -> &Arc<Core<Self::Conn>>;
    fn own(&self) -> Self::Own;
    /// What runs on a thread of its own for an incoming socket.
    fn welcome(&self) -> impl FnOnce(FramedPipe) -> Result<(), TransportError> + Send + 'static;
    /// Something else that is watched has reported.
    fn other(&mut self, _token: Token, _links: &Links<Self::Conn, Self::Own>) {}
    /// Everything there is to do now; false if there was nothing.
    fn work(&mut self, links: &mut Links<Self::Conn, Self::Own>) -> bool;
    /// Whether there is more to do than the last call of `work` has done.
    fn busy(&self, links: &Links<Self::Conn, Self::Own>) -> bool;
    /// Called before each sleep; true if there was something to do after all.
    fn before_sleep(&mut self, _links: &mut Links<Self::Conn, Self::Own>) -> bool {
        false
    }
    /// How long to sleep; `waits`: some connection waits for its end.
    fn patience(&self, links: &Links<Self::Conn, Self::Own>, waits: bool) -> Option<Duration>;
    fn fate(&self, link: &mut Link<Self::Conn, Self::Own>) -> Fate;
    /// The connection has been finished; its handler is told next.
    fn ended(&mut self, _link: &mut Link<Self::Conn, Self::Own>) {}
    /// The endpoint shuts down: all connections are in error, and end when this returns.
    fn settle(&mut self, _links: &Links<Self::Conn, Self::Own>) {}
}

/// Watches something for reading.
#[cfg(feature = "verbs")]
pub(crate) fn watch(registry: &Registry, fd: RawFd, token: Token, what: &str) -> Result<(), TransportError> {
    registry
        .register(&mut SourceFd(&fd), token, Interest::READABLE)
        .map_err(|e| TransportError::os(format!("watch {what}"), &e))
}

/// Starts the progress thread.
pub(crate) fn start<D: Drive>(name: &str, drive: D, poll: Poll) -> Result<(), TransportError> {
    let core = Arc::clone(drive.core());
    core.door.watch(poll.registry(), LISTENER)?;
    let mut progress = Progress {
        core: Arc::clone(&core),
        poll,
        links: HashMap::new(),
        drive,
    };
    core.threads().start(name, move || progress.run())
}

struct Progress<D: Drive> {
    core: Arc<Core<D::Conn>>,
    poll: Poll,
    links: Links<D::Conn, D::Own>,
    drive: D,
}

impl<D: Drive> Progress<D> {
    fn run(&mut self) {
        let spin = self.core.base().config.spin;
        let mut events = Events::with_capacity(256);
        let mut idle_since: Option<Instant> = None;
        let mut waits = false;
        loop {
            let spinning = idle_since.is_none_or(|since| since.elapsed() < spin);
            let timeout = if spinning || self.drive.busy(&self.links) {
                Some(Duration::ZERO)
            } else if self.drive.before_sleep(&mut self.links) {
                idle_since = None;
                continue;
            } else {
                self.drive.patience(&self.links, waits)
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
                stats::count(&self.core.base().counters.wakeups, 1);
            }
            self.react(&events);
            if self.core.base().take_news() {
                if self.core.base().stopped() {
                    return self.stop();
                }
                self.replace();
                self.place(self.core.threads().take_installs());
                // Events are edges: one spent on a failed attempt does not come back.
                self.accept();
            }
            let worked = self.drive.work(&mut self.links) || !events.is_empty();
            waits = self.end_dead();
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
                token => match self.links.get_mut(&token) {
                    Some(link) => {
                        link.ready |= event.is_readable() || event.is_read_closed() || event.is_error();
                        if event.is_writable() {
                            link.conn.writable();
                        }
                    }
                    None => self.drive.other(token, &self.links),
                },
            }
        }
    }

    fn accept(&self) {
        let all = self
            .core
            .door
            .accept(|stream| self.core.accept(stream, self.drive.welcome()));
        if !all {
            self.core.wake();
        }
    }

    /// Ends what peers had before that are about to get a new connection.
    fn replace(&mut self) {
        for replace in self.core.threads().take_replacing() {
            let over = |base: &ConnBase| base.superseded_by(&replace.peer);
            self.end_if(over, "replaced by a newer connection of the same peer");
            // Whoever waits may have given up.
            let _gone = replace.done.try_send(());
        }
    }

    fn end_if(&mut self, over: impl Fn(&ConnBase) -> bool, why: &str) {
        let links = self.links.iter();
        let tokens: Vec<Token> = links
            .filter(|(_, l)| over(l.conn.base()))
            .map(|(t, _)| *t)
            .collect();
        for token in tokens {
            // What it has sent and was not looked at yet is not executed any more.
            self.end(token, Some(why));
        }
    }

    fn place(&mut self, installs: Vec<Arc<D::Conn>>) {
        for conn in installs {
            let base = conn.base();
            let token = Token(base.id.0 as usize);
            // Two handshakes of one peer may have been under way at once: the later connection stays.
            self.end_if(
                |older| older.id < base.id && base.incoming && older.superseded_by(&base.peer),
                "replaced by a newer connection of the same peer",
            );
            let newer = |l: &Link<D::Conn, D::Own>| {
                let newer = l.conn.base();
                newer.incoming && newer.id > base.id && base.superseded_by(&newer.peer)
            };
            if self.links.values().any(newer) {
                conn.fail(common::disconnected(
                    &base.addr,
                    "a newer connection of the same peer is there already",
                ));
            }
            let dynamic: Arc<dyn Connection> = Arc::clone(&conn) as _;
            let fd = conn.sock().as_raw_fd();
            let interest = Interest::READABLE | Interest::WRITABLE;
            if let Err(e) = self.poll.registry().register(&mut SourceFd(&fd), token, interest) {
                conn.fail(TransportError::os("watch a connection", &e));
            }
            if base.incoming {
                self.core.base().handler.connected(&dynamic);
            }
            let link = Link {
                conn,
                dynamic,
                ready: true,
                ending: None,
                own: self.drive.own(),
            };
            self.links.insert(token, link);
        }
    }

    /// Ends connections that are over; true if some still wait for that.
    fn end_dead(&mut self) -> bool {
        let mut waits = false;
        let mut over = Vec::new();
        for (token, link) in &mut self.links {
            match self.drive.fate(link) {
                Fate::Lives => {}
                Fate::Waits => waits = true,
                Fate::Over => over.push(*token),
            }
        }
        for token in over {
            self.end(token, None);
        }
        waits
    }

    fn end(&mut self, token: Token, why: Option<&str>) {
        let Some(mut link) = self.links.remove(&token) else {
            return;
        };
        let conn = Arc::clone(&link.conn);
        if let Some(why) = why {
            conn.fail(common::disconnected(&conn.base().addr, why));
        }
        let fd = conn.sock().as_raw_fd();
        if let Err(e) = self.poll.registry().deregister(&mut SourceFd(&fd)) {
            tracing::debug!("stop watching a connection: {e}");
        }
        conn.finish();
        self.drive.ended(&mut link);
        self.core.forget(&conn);
        self.core.base().counters.fold(&conn.stats());
        let reason = conn.base().reason();
        self.core.base().handler.disconnected(&link.dynamic, &reason);
    }

    fn stop(&mut self) {
        drop(self.core.threads().take_last_replacing());
        self.place(self.core.threads().take_last_installs());
        for link in self.links.values() {
            link.conn.fail(TransportError::Shutdown);
        }
        self.drive.settle(&self.links);
        let tokens: Vec<Token> = self.links.keys().copied().collect();
        for token in tokens {
            self.end(token, None);
        }
    }
}
