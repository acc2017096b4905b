//! The progress thread: delivers messages, notices ends, sleeps when there is nothing to do.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::conn::ShmConn;
use super::core::{Core, Install};
use super::ring::Consumer;
use super::setup;
use crate::common::{self, LIMITS};
use crate::error::TransportError;
use crate::fabric::Connection;
use crate::stats;
use crate::threads::Endpoint;

const BELL: u64 = u64::MAX;
const LISTENER: u64 = u64::MAX - 1;
/// Messages of one connection before the others get a turn.
const BUDGET: usize = 64;
/// Rounds of polling memory between two looks at the sockets.
const ROUNDS: u32 = 256;
/// How long the end of a connection waits for operations still being executed.
const QUIET: Duration = Duration::from_secs(1);

struct Link {
    conn: Arc<ShmConn>,
    dynamic: Arc<dyn Connection>,
    ring: Consumer,
    /// Since when its end is awaited.
    ending: Option<Instant>,
}

struct Progress {
    core: Arc<Core>,
    epoll: OwnedFd,
    links: Vec<Link>,
    scratch: Vec<u8>,
}

pub(super) fn start(core: &Arc<Core>) -> Result<(), TransportError> {
    let os = |e: rustix::io::Errno| TransportError::os("create an epoll instance", &e.into());
    let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(os)?;
    epoll::add(&epoll, &core.host.bell, EventData::new_u64(BELL), EventFlags::IN).map_err(os)?;
    if let Some(listener) = &*core.listener.lock() {
        epoll::add(&epoll, listener, EventData::new_u64(LISTENER), EventFlags::IN).map_err(os)?;
    }
    let mut progress = Progress {
        core: Arc::clone(core),
        epoll,
        links: Vec::new(),
        scratch: vec![0; LIMITS.max_message],
    };
    core.threads().start("fabric-shm", move || progress.run())
}

impl Progress {
    fn run(&mut self) {
        let spin = self.core.host.base.config.spin;
        let mut idle_since: Option<Instant> = None;
        let mut rounds = 0u32;
        loop {
            rounds = rounds.wrapping_add(1);
            let mut worked = self.poll_memory();
            if self.core.host.base.take_news() {
                worked = true;
                if self.core.host.base.stopped() {
                    return self.stop();
                }
                self.place(self.core.threads().take_installs());
            }
            let waiting = self.end_dead();
            if rounds.is_multiple_of(ROUNDS) {
                worked |= self.poll_sockets(Some(Duration::ZERO));
            }
            if worked {
                idle_since = None;
                continue;
            }
            if idle_since.get_or_insert_with(Instant::now).elapsed() < spin {
                // On few cores the one we wait for may need this core.
                if rounds.is_multiple_of(16) {
                    std::thread::yield_now()
                } else {
                    std::hint::spin_loop()
                }
                continue;
            }
            self.sleep(waiting);
            idle_since = None;
        }
    }

    /// Sleeps until the doorbell or a socket has something, or at most a moment while an end is awaited.
    fn sleep(&mut self, waiting: bool) {
        let sleeping = Arc::clone(&self.core);
        let sleeping = sleeping.host.directory.sleeping();
        sleeping.store(1, Ordering::SeqCst);
        // Whoever acted before seeing the flag is seen by this last look.
        let missed = self.core.host.base.has_news()
            || self
                .links
                .iter()
                .any(|l| l.ring.pending(&l.conn.channel, l.conn.side.other()))
            || self.links.iter().any(|l| l.conn.flush());
        if !missed {
            self.poll_sockets(waiting.then_some(Duration::from_millis(1)));
            stats::count(&self.core.host.base.counters.wakeups, 1);
        }
        sleeping.store(0, Ordering::SeqCst);
    }

    fn poll_memory(&mut self) -> bool {
        let mut worked = false;
        for link in &mut self.links {
            worked |= link.conn.flush();
            if link.conn.alive() {
                worked |= deliver(link, &self.core, &mut self.scratch, BUDGET);
            }
        }
        worked
    }

    fn poll_sockets(&mut self, timeout: Option<Duration>) -> bool {
        let timeout = timeout.map(common::timespec);
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 64];
        let Ok((events, _)) = epoll::wait(&self.epoll, &mut events[..], timeout.as_ref()) else {
            // Interrupted by a signal.
            return false;
        };
        let mut worked = false;
        for event in events.iter() {
            worked = true;
            match event.data.u64() {
                BELL => {
                    let mut count = [0u8; 8];
                    // Emptied by somebody else: fine.
                    let _empty = rustix::io::read(&self.core.host.bell, &mut count);
                }
                LISTENER => {
                    if let Some(sock) = self.core.accept_one() {
                        setup::accept(&self.core, sock);
                    }
                }
                id => {
                    if let Some(link) = self.links.iter().find(|l| l.conn.id().0 == id) {
                        link.conn.drain_control();
                        if link.ending.is_some() {
                            // A hang-up stays readable; it has been seen.
                            let _gone = epoll::delete(&self.epoll, link.conn.sock.as_fd());
                        }
                    }
                }
            }
        }
        worked
    }

    fn place(&mut self, installs: Vec<Install>) {
        for Install { conn, superseded } in installs {
            for old in superseded {
                self.end(&old);
            }
            let id = EventData::new_u64(conn.id().0);
            if let Err(e) = epoll::add(&self.epoll, &*conn.sock, id, EventFlags::IN | EventFlags::RDHUP) {
                conn.fail(TransportError::os("watch a connection", &e.into()));
            }
            let dynamic: Arc<dyn Connection> = Arc::clone(&conn) as _;
            if conn.base.incoming {
                self.core.host.base.handler.connected(&dynamic);
            }
            self.links.push(Link {
                conn,
                dynamic,
                ring: Consumer::default(),
                ending: None,
            });
        }
    }

    /// Ends connections that are in error and quiet; true if some are not quiet yet.
    fn end_dead(&mut self) -> bool {
        let mut waiting = false;
        let mut at = 0;
        while at < self.links.len() {
            let link = &mut self.links[at];
            if link.conn.alive() {
                at += 1;
                continue;
            }
            if link.conn.hung_up() {
                // What the peer said before it left still counts.
                while deliver(link, &self.core, &mut self.scratch, BUDGET) {}
            }
            let since = *link.ending.get_or_insert_with(Instant::now);
            let conn = &link.conn;
            if since.elapsed() < QUIET && (conn.channel.busy(conn.side) || !conn.quiet()) {
                conn.drain_control();
                waiting = true;
                at += 1;
                continue;
            }
            let link = self.links.swap_remove(at);
            self.finish(&link);
        }
        waiting
    }

    /// Ends one connection now.
    fn end(&mut self, conn: &Arc<ShmConn>) {
        if let Some(at) = self.links.iter().position(|l| Arc::ptr_eq(&l.conn, conn)) {
            let link = self.links.swap_remove(at);
            self.finish(&link);
        }
    }

    fn finish(&self, link: &Link) {
        // Removed before: fine.
        let _gone = epoll::delete(&self.epoll, link.conn.sock.as_fd());
        link.conn.finish();
        self.core.unlink(&link.conn);
        self.core
            .host
            .base
            .handler
            .disconnected(&link.dynamic, &link.conn.base.reason());
    }

    fn stop(&mut self) {
        let last = self.core.threads().take_last_installs();
        self.place(last);
        for link in &self.links {
            link.conn.fail(TransportError::Shutdown);
        }
        let deadline = Instant::now() + QUIET;
        while self.end_dead() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        for link in std::mem::take(&mut self.links) {
            self.finish(&link);
        }
    }
}

/// Delivers messages of one connection; true if there were any.
fn deliver(link: &mut Link, core: &Core, scratch: &mut [u8], budget: usize) -> bool {
    let conn = &link.conn;
    let from = conn.side.other();
    let mut any = false;
    for _ in 0..budget {
        match link.ring.pop(&conn.channel, from, scratch) {
            Ok(None) => break,
            Ok(Some(len)) => {
                any = true;
                // Half empty before the other side is told: it can then write many messages at once.
                let want = conn.channel.want_room(from);
                if want.load(Ordering::SeqCst) != 0
                    && link.ring.roomy(&conn.channel, from)
                    && want.swap(0, Ordering::SeqCst) != 0
                {
                    conn.ring_bell();
                }
                conn.base.counters.received(len);
                core.host.base.handler.message(&link.dynamic, &scratch[..len]);
                if !conn.alive() && !conn.hung_up() {
                    // Closed by the callback.
                    break;
                }
            }
            Err(broken) => {
                conn.fail(conn.base.protocol(broken));
                break;
            }
        }
    }
    any
}
