//! One other mount: which way frames go to it, and when that is looked after. Nothing here waits, or calls anybody else.

use std::sync::Arc;
use std::time::Duration;

use rdma_transport::Connection;
use rt::time::Instant;

use super::stream::{Carrier, Stream};
use fsd_proto::rpc::{Errno, RpcError};
use fsd_proto::wire::{self, FrameKind};

/// For so long messages wait for a connection, or to be told of over one; then they go by way of the metadata server.
const PATIENCE: Duration = Duration::from_secs(1);
/// After so long the other mount is asked what it has heard: it need not tell by itself.
const ASKED: Duration = Duration::from_millis(500);
/// For so long an answer of the metadata server is waited for before a frame goes that way again.
const RELAY_LIMIT: Duration = Duration::from_secs(3);
/// Pause after the metadata server could not pass a frame on.
const RELAY_RETRY: Duration = Duration::from_millis(100);
/// A connection over which nothing has gone for so long is closed.
const IDLE: Duration = Duration::from_secs(60);
/// How often is looked whether anything has gone.
const LOOK: Duration = Duration::from_secs(15);

/// A frame that is to go by way of the metadata server.
pub(super) struct Relayed {
    pub(super) turn: u64,
    /// Behind the life that it is for.
    pub(super) frame: Vec<u8>,
}

/// A frame that has come by way of the metadata server: for which life of this mount, 0 for any, and what that life is to take.
pub(super) fn open(relayed: &[u8]) -> Option<(u64, &[u8])> {
    let (life, frame) = relayed.split_first_chunk()?;
    Some((u64::from_le_bytes(*life), frame))
}

/// The way by the metadata server.
#[derive(Debug, Default)]
struct Relay {
    /// Messages go this way.
    on: bool,
    /// The last frame has reached the other mount.
    works: bool,
    /// One frame at a time: its number among all that went this way, and since when it is under way.
    under_way: Option<(u64, Instant)>,
    turns: u64,
    /// Nothing goes before.
    not_before: Option<Instant>,
    /// When it was asked over the connection whether that works again.
    probed: Option<Instant>,
    /// The life that is known is not there any more.
    outlived: bool,
}

/// The connection.
struct Link {
    conn: Arc<dyn Connection>,
    /// By this mount.
    made: bool,
    /// Messages it had carried, in both directions, when somebody looked; and since when it has been so many.
    carried: u64,
    idle_since: Instant,
}

impl Link {
    fn look(&mut self, now: Instant) {
        let stats = self.conn.stats();
        let carried = stats.messages_sent + stats.messages_received;
        if self.carried != carried {
            self.carried = carried;
            self.idle_since = now;
        }
    }
}

/// What is to be done for another mount, with nothing locked.
#[derive(Default)]
pub(super) struct Todo {
    /// A frame is to go by way of the metadata server.
    pub(super) relayed: Option<Relayed>,
    /// The connection is up, and has become silent.
    pub(super) silent: bool,
    /// When to look again.
    pub(super) due: Option<Instant>,
}

/// Another mount.
#[derive(Default)]
pub(super) struct Peer {
    link: Option<Link>,
    pub(super) stream: Stream,
    /// Somebody tries to connect to it.
    pub(super) connecting: bool,
    relay: Relay,
    /// Since when it has not told that it has a message that is kept.
    waiting: Option<Instant>,
    /// When it was asked, since then.
    asked: Option<Instant>,
}

impl Peer {
    /// The connection, if it is alive.
    pub(super) fn live(&self) -> Option<&Arc<dyn Connection>> {
        self.link.as_ref().map(|link| &link.conn).filter(|c| c.is_alive())
    }

    /// The connection, if it is alive and not silent.
    pub(super) fn answering(&self) -> Option<&Arc<dyn Connection>> {
        self.live().filter(|_| !self.relay.on)
    }

    /// Is this the connection to it?
    pub(super) fn is_over(&self, conn: &Arc<dyn Connection>) -> bool {
        self.link.as_ref().is_some_and(|link| link.conn.id() == conn.id())
    }

    /// There is no connection to it any more; the one there was.
    pub(super) fn unlink(&mut self) -> Option<Arc<dyn Connection>> {
        Some(self.link.take()?.conn)
    }

    /// Since when nothing has gone over the connection, as far as anybody has looked; none if it must not be closed for that.
    pub(super) fn idle_since(&mut self, now: Instant) -> Option<Instant> {
        let keeps = self.stream.keeps();
        let link = self.link.as_mut().filter(|link| link.conn.is_alive() && !keeps)?;
        link.look(now);
        Some(link.idle_since)
    }

    /// A message is to be sent. True: it is the first that is waited for.
    pub(super) fn push(&mut self, message: &[u8]) -> bool {
        self.stream.push(message);
        let first = self.waiting.is_none();
        if first {
            self.wait_anew();
        }
        first
    }

    fn wait_anew(&mut self) {
        self.waiting = self.stream.keeps().then(Instant::now);
        self.asked = None;
    }

    /// Everything there is to send goes over this connection from now on.
    pub(super) fn adopt(&mut self, life: u64, conn: &Arc<dyn Connection>, made: bool) {
        self.stream.connected(life);
        self.link = Some(Link {
            conn: Arc::clone(conn),
            made,
            carried: 0,
            idle_since: Instant::now(),
        });
        self.go_direct();
    }

    /// Messages go over the connection from now on.
    pub(super) fn go_direct(&mut self) {
        self.leave_relay();
        self.send_direct();
    }

    fn leave_relay(&mut self) {
        self.relay = Relay {
            turns: self.relay.turns,
            ..Relay::default()
        };
        self.wait_anew();
    }

    /// Messages go by way of the metadata server from now on, until the connection is known to work, or another is made.
    pub(super) fn go_round(&mut self) {
        if !std::mem::replace(&mut self.relay.on, true) {
            self.stream.restart(Carrier::Relay);
            self.probe(Instant::now());
        }
    }

    /// Whoever answers this over the connection can be reached by it in both directions.
    fn probe(&mut self, now: Instant) {
        self.stream.ask(Carrier::Direct);
        self.relay.probed = Some(now);
    }

    /// The other mount has ended, or left.
    pub(super) fn end(&mut self) {
        self.stream.end();
        self.leave_relay();
    }

    /// Sends what has not gone yet; what is to go by way of the metadata server is given back.
    pub(super) fn flush(&mut self) -> Option<Relayed> {
        self.send_direct();
        if !self.relay.on || self.relay.under_way.is_some() {
            return None;
        }
        let now = Instant::now();
        self.relay.not_before.take_if(|at| *at <= now);
        if self.relay.not_before.is_some() {
            return None;
        }
        let (life, frame) = match self.stream.life().filter(|_| !self.relay.outlived) {
            Some(life) => (life, self.stream.next(Carrier::Relay)?),
            None if !self.stream.keeps() => return None,
            None => {
                self.relay.not_before = Some(now + RELAY_RETRY);
                (0, Stream::question())
            }
        };
        self.relay.turns += 1;
        self.relay.under_way = Some((self.relay.turns, now));
        Some(Relayed {
            turn: self.relay.turns,
            frame: [&life.to_le_bytes()[..], &frame].concat(),
        })
    }

    fn send_direct(&mut self) {
        // Not `live`, which borrows the stream as well; a message that comes calls this, mostly for nothing.
        let Some(link) = self.link.as_ref().filter(|link| link.conn.is_alive()) else {
            return;
        };
        let next = if self.relay.on {
            Stream::next_without
        } else {
            Stream::next
        };
        while let Some(frame) = next(&mut self.stream, Carrier::Direct) {
            if link.conn.queue(&wire::plain(FrameKind::Lease, &frame)).is_err() {
                return;
            }
        }
    }

    /// Is the metadata server's answer to this one still waited for?
    pub(super) fn waits_for(&self, turn: u64) -> bool {
        self.relay
            .under_way
            .is_some_and(|(under_way, _)| under_way == turn)
    }

    /// The metadata server has answered. True: the other mount can be reached this way, and could not before.
    pub(super) fn relayed(&mut self, turn: u64, answer: &Result<(), RpcError>) -> bool {
        if !self.waits_for(turn) {
            return false;
        }
        self.relay.under_way = None;
        let worked = self.relay.works;
        self.relay.works = answer.is_ok();
        if let Err(error) = answer {
            self.stream.restart(Carrier::Relay);
            self.relay.outlived = matches!(error, RpcError::Errno(Errno(libc::ESTALE)));
            self.relay.not_before = Some(Instant::now() + RELAY_RETRY);
        }
        self.relay.works && !worked
    }

    /// The life of it that was met last.
    pub(super) fn life(&self) -> Option<u64> {
        self.stream.life()
    }

    /// Do messages go by way of the metadata server?
    pub(super) fn is_round(&self) -> bool {
        self.relay.on
    }

    /// Can messages reach it by way of the metadata server?
    pub(super) fn is_relayed(&self) -> bool {
        self.relay.works
    }

    /// A frame of this life of it has come; before that it was known to have so many messages.
    pub(super) fn heard(&mut self, acknowledged: u64, life: u64) {
        if self.stream.acknowledged() != acknowledged {
            self.wait_anew();
        }
        if self.stream.life() == Some(life) && std::mem::take(&mut self.relay.outlived) {
            self.relay.not_before = None;
        }
    }

    /// Looks after it.
    pub(super) fn tend(&mut self, now: Instant) -> Todo {
        let mut todo = Todo::default();
        if self
            .relay
            .under_way
            .is_some_and(|(_, since)| now >= since + RELAY_LIMIT)
        {
            self.relay.under_way = None;
            self.relay.works = false;
            self.stream.restart(Carrier::Relay);
        }
        let live = self.live().is_some();
        if self.relay.on {
            if self
                .waiting
                .is_some_and(|since| now >= self.asked.unwrap_or(since) + PATIENCE)
            {
                self.asked = Some(now);
                self.stream.ask(Carrier::Relay);
            }
            if live && self.relay.probed.is_none_or(|at| now >= at + PATIENCE) {
                self.probe(now);
            }
        } else {
            todo.silent = self.wait_for_link(now, live);
        }
        todo.relayed = self.flush();
        self.close_if_idle(now);
        todo.due = self.due();
        todo
    }

    /// Messages have gone over the connection, or wait for one. True: it has become silent.
    fn wait_for_link(&mut self, now: Instant, live: bool) -> bool {
        let Some(since) = self.waiting else {
            return false;
        };
        match self.asked {
            None if live && now >= since + ASKED => {
                self.asked = Some(now);
                self.stream.ask(Carrier::Direct);
                false
            }
            Some(asked) if live && now >= asked + ASKED => {
                self.go_round();
                true
            }
            _ if !live && now >= since + PATIENCE => {
                self.go_round();
                false
            }
            _ => false,
        }
    }

    /// When it is to be looked after.
    pub(super) fn due(&self) -> Option<Instant> {
        let live = self.live().is_some();
        let asking = self.waiting.map(|since| match self.asked {
            Some(asked) if self.relay.on => asked + PATIENCE,
            Some(asked) if live => asked + ASKED,
            None if live && !self.relay.on => since + ASKED,
            _ => since + PATIENCE,
        });
        let (relay, probe) = if self.relay.on {
            let limit = self.relay.under_way.map(|(_, since)| since + RELAY_LIMIT);
            let probed = self.relay.probed.filter(|_| live);
            (limit.or(self.relay.not_before), probed.map(|at| at + PATIENCE))
        } else {
            (None, None)
        };
        let look = self.link.as_ref().map(|_| Instant::now() + LOOK);
        let all = [asking, relay, probe, look];
        all.into_iter().flatten().min()
    }

    /// Who made a connection says when it is not needed any more; the other closes it, behind everything that was sent.
    fn close_if_idle(&mut self, now: Instant) {
        let made = self.link.as_ref().is_some_and(|link| link.made);
        if made && !self.relay.on && self.idle_since(now).is_some_and(|since| now >= since + IDLE) {
            self.say_goodbye();
        }
    }

    /// The connection is given up.
    pub(super) fn say_goodbye(&mut self) {
        let bye = self.stream.bye();
        if let Some(conn) = self.unlink()
            && conn.queue(&wire::plain(FrameKind::Lease, &bye)).is_err()
        {
            conn.close();
        }
    }
}

/// Does an error say that a mount has left, so that it answers nothing that it was asked? Nobody has its number then. One that has died
/// may have passed on, in a hand-over, what it was asked: that is for the epoch to undo, and not to be asked a second time before.
pub(super) fn has_left(error: &RpcError) -> bool {
    error.errno() == Errno(libc::ENOENT)
}

#[cfg(test)]
mod tests {
    use rdma_transport::TransportError;

    use super::*;

    #[test]
    fn the_dead_have_not_left() {
        let no_endpoint = TransportError::Unreachable {
            addr: "a:1".into(),
            reason: "nobody listens".into(),
        };
        assert!(has_left(&RpcError::Errno(Errno(libc::ENOENT))));
        assert!(
            !has_left(&RpcError::Errno(Errno(libc::EHOSTDOWN))),
            "it was declared dead"
        );
        assert!(
            !has_left(&no_endpoint.into()),
            "it has ended, and may be declared dead next"
        );
    }
}
