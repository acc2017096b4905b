//! What the progress thread does: it is the passive agent that executes what peers ask for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::Shutdown;

use super::conn::TcpConn;
use super::rx::{Memory, Rx, Turn};
use crate::common;
use crate::error::TransportError;
use crate::stream::{Core, Drive, Fate, FramedPipe, Link, Links};

/// How long a peer whose operation was refused gets to read so.
const FAREWELL: Duration = Duration::from_secs(1);
/// Between looks at those.
const LOOK: Duration = Duration::from_millis(10);

pub(super) struct Tcp {
    pub(super) core: Arc<Core<TcpConn>>,
    pub(super) regions: Arc<Memory>,
}

/// What is kept of a connection.
pub(super) struct Own {
    rx: Rx,
    /// The peer has hung up.
    ended: bool,
}

impl Drive for Tcp {
    type Conn = TcpConn;
    type Own = Own;

    fn core(&self) -> &Arc<Core<TcpConn>> {
        &self.core
    }

    fn own(&self) -> Own {
        Own {
            rx: Rx::new(),
            ended: false,
        }
    }

    fn welcome(&self) -> impl FnOnce(FramedPipe) -> Result<(), TransportError> + Send + 'static {
        let core = Arc::clone(&self.core);
        move |pipe| {
            let (base, sock) = core.welcome(pipe)?.base(true);
            core.add(&TcpConn::new(base, &core.host, sock))
        }
    }

    fn work(&mut self, links: &mut Links<TcpConn, Own>) -> bool {
        let handler = &*self.core.host.base.handler;
        let mut worked = false;
        for link in links.values_mut().filter(|l| l.ready) {
            worked = true;
            match link
                .own
                .rx
                .receive_all(&link.conn, &link.dynamic, handler, &self.regions)
            {
                Ok(Turn::More) => {}
                Ok(Turn::Empty) => link.ready = false,
                Ok(Turn::Ended) => {
                    link.ready = false;
                    link.own.ended = true;
                    link.conn
                        .fail(common::disconnected(&link.conn.base.addr, "the peer has gone"));
                }
                Err(why) => {
                    link.ready = false;
                    link.conn.fail(why);
                }
            }
        }
        worked
    }

    fn busy(&self, links: &Links<TcpConn, Own>) -> bool {
        links.values().any(|l| l.ready)
    }

    fn patience(&self, _links: &Links<TcpConn, Own>, waits: bool) -> Option<Duration> {
        waits.then_some(LOOK)
    }

    fn fate(&self, link: &mut Link<TcpConn, Own>) -> Fate {
        if link.conn.alive() {
            return Fate::Lives;
        }
        let polite = link.own.rx.discarding() && !link.own.ended;
        let since = *link.ending.get_or_insert_with(Instant::now);
        if !polite || since.elapsed() >= FAREWELL {
            return Fate::Over;
        }
        if link.conn.sent_all() {
            // Already gone: fine.
            let _gone = rustix::net::shutdown(&*link.conn.sock, Shutdown::Write);
        }
        Fate::Waits
    }
}
