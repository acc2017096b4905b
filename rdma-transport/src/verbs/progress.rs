//! What the progress thread does: receives messages, sees to completions nobody looks for.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mio::{Poll, Token};

use super::adapter::Adapter;
use super::conn::{LINGER, VerbsConn};
use super::incoming::Incoming;
use super::receive::NUMBER;
use super::setup;
use crate::common;
use crate::error::TransportError;
use crate::stream::{self, Core, Drive, Fate, FramedPipe, Links};

const COMPLETIONS: Token = Token(usize::MAX - 2);
const DEVICE: Token = Token(usize::MAX - 3);
/// After a peer has hung up: how long nothing may arrive before nothing more is expected.
const QUIET: Duration = Duration::from_millis(10);
/// How long a peer has to say whether it still has a region.
const DOUBT: Duration = Duration::from_secs(2);
/// Between looks for completions that nobody is told of, while there are some to come.
const LOOK: Duration = Duration::from_millis(200);
/// Between looks at connections that wait for their end.
const SOON: Duration = Duration::from_millis(2);

type Link = stream::Link<VerbsConn, Incoming>;

pub(super) struct Verbs {
    pub(super) core: Arc<Core<VerbsConn>>,
    pub(super) adapter: Arc<Adapter>,
}

/// Watches what the adapter reports.
pub(super) fn watch(adapter: &Adapter, poll: &Poll) -> Result<(), TransportError> {
    let registry = poll.registry();
    stream::watch(
        registry,
        adapter.channel.as_raw_fd(),
        COMPLETIONS,
        "a completion channel",
    )?;
    let device = adapter.device.pd.context.as_raw_fd();
    stream::watch(registry, device, DEVICE, "an RDMA device")
}

impl Drive for Verbs {
    type Conn = VerbsConn;
    type Own = Incoming;

    fn core(&self) -> &Arc<Core<VerbsConn>> {
        &self.core
    }

    fn own(&self) -> Incoming {
        Incoming::new()
    }

    fn welcome(&self) -> impl FnOnce(FramedPipe) -> Result<(), TransportError> + Send + 'static {
        let (core, adapter) = (Arc::clone(&self.core), Arc::clone(&self.adapter));
        move |pipe| setup::welcome(&core, &adapter, pipe)
    }

    fn other(&mut self, token: Token, links: &Links<VerbsConn, Incoming>) {
        match token {
            COMPLETIONS => {
                while let Some(number) = self.adapter.channel.next() {
                    if number != NUMBER
                        && let Some(link) = links.get(&Token(number as usize))
                    {
                        link.conn.reported();
                    }
                }
            }
            DEVICE if self.adapter.heed() => {
                for link in links.values() {
                    link.conn.fail(TransportError::Os {
                        what: format!("use the RDMA device {}", self.adapter.name()),
                        reason: "it has failed or was removed".to_owned(),
                    });
                }
            }
            _ => {}
        }
    }

    fn work(&mut self, links: &mut Links<VerbsConn, Incoming>) -> bool {
        let handler = &*self.core.host.base.handler;
        let mut worked = self.adapter.receive.receive_all();
        for link in links.values_mut() {
            if link.ready {
                worked = true;
                link.ready = false;
                link.own.read_stream(&link.conn, &self.adapter);
            }
            if link.conn.under_way() {
                link.conn.reap();
            }
            worked |= link.own.deliver(&link.conn, &link.dynamic, handler);
        }
        worked | self.adapter.call_due()
    }

    fn busy(&self, _links: &Links<VerbsConn, Incoming>) -> bool {
        false
    }

    /// What comes while the queues are being armed is found now, what comes later is reported.
    fn before_sleep(&mut self, links: &mut Links<VerbsConn, Incoming>) -> bool {
        if let Err(e) = self.adapter.receive.cq.arm() {
            tracing::error!("arm the receive queue: {e}");
        }
        for link in links.values() {
            if link.conn.under_way() && link.conn.awaited() {
                link.conn.arm();
            }
        }
        self.work(links)
    }

    fn patience(&self, links: &Links<VerbsConn, Incoming>, waits: bool) -> Option<Duration> {
        if waits {
            return Some(SOON);
        }
        links.values().any(|l| l.conn.under_way()).then_some(LOOK)
    }

    fn fate(&self, link: &mut Link) -> Fate {
        let conn = &link.conn;
        if conn.alive() {
            if !conn.doubtful.load(Ordering::SeqCst) {
                return Fate::Lives;
            }
            if link.ending.get_or_insert_with(Instant::now).elapsed() > DOUBT {
                conn.fail(common::disconnected(
                    &conn.base.addr,
                    "the target has refused an operation and does not say why",
                ));
            }
            return Fate::Waits;
        }
        let since = *link.ending.get_or_insert_with(Instant::now);
        let wait = match link.own.hung_up() {
            Some(last) => last.elapsed() < QUIET || !conn.inbox.lock().is_empty(),
            None => conn.lingers.load(Ordering::SeqCst) && conn.lingering(since + LINGER),
        };
        if wait { Fate::Waits } else { Fate::Over }
    }

    fn ended(&mut self, link: &mut Link) {
        if link.own.hung_up().is_some() {
            // What came in at the last moment.
            let handler = &*self.core.host.base.handler;
            while link.own.deliver(&link.conn, &link.dynamic, handler) {}
        }
        setup::forget(&link.conn, true);
        self.adapter.call_due();
    }

    fn settle(&mut self, links: &Links<VerbsConn, Incoming>) {
        let deadline = Instant::now() + LINGER;
        while links.values().any(|l| l.conn.lingering(deadline)) {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}
