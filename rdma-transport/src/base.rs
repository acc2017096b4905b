//! What every endpoint and every connection keeps, whatever it talks over.
//!
//! A provider adds how bytes get to the peer. That a connection has one reason for its end, and that an endpoint shuts
//! down once, is the same for all.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::buffer::BufferPool;
use crate::common::{self, ended};
use crate::handshake::{Local, Peer, Provider};
use crate::stats::Counters;
use crate::{ConnId, FabricConfig, FabricStats, Handler, TransportError};

/// What every endpoint keeps.
pub(crate) struct Base {
    pub(crate) config: FabricConfig,
    pub(crate) handler: Arc<dyn Handler>,
    pub(crate) counters: Counters,
    pub(crate) buffers: Arc<BufferPool>,
    identity: Mutex<Vec<u8>>,
    instance: u64,
    /// The progress thread is to look around.
    news: AtomicBool,
    stopping: AtomicBool,
    next_conn: AtomicU64,
}

impl Base {
    pub(crate) fn new(
        config: FabricConfig,
        handler: Arc<dyn Handler>,
        buffers: Arc<BufferPool>,
    ) -> Result<Self, TransportError> {
        Ok(Self {
            buffers,
            identity: Mutex::new(config.identity.clone()),
            config,
            handler,
            counters: Counters::default(),
            instance: u64::from_le_bytes(common::random()?),
            news: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            next_conn: AtomicU64::new(1),
        })
    }

    /// What this side says of itself in a handshake.
    pub(crate) fn local(&self, provider: Provider) -> Local {
        Local {
            provider,
            key: self.config.key.clone(),
            identity: self.identity.lock().clone(),
            instance: self.instance,
        }
    }

    pub(crate) fn set_identity(&self, identity: Vec<u8>) {
        *self.identity.lock() = identity;
    }

    pub(crate) fn stopped(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Nothing new may begin any more.
    pub(crate) fn check_open(&self) -> Result<(), TransportError> {
        if self.stopped() {
            return Err(TransportError::Shutdown);
        }
        Ok(())
    }

    pub(crate) fn next_id(&self) -> ConnId {
        ConnId(self.next_conn.fetch_add(1, Ordering::SeqCst))
    }

    /// Whether the progress thread is to look around.
    #[inline]
    pub(crate) fn has_news(&self) -> bool {
        self.news.load(Ordering::SeqCst)
    }

    /// As [`Base::has_news`]; only once for each time.
    #[inline]
    pub(crate) fn take_news(&self) -> bool {
        self.has_news() && self.news.swap(false, Ordering::SeqCst)
    }

    /// The progress thread is to look around; who sets this wakes it.
    pub(crate) fn set_news(&self) {
        self.news.store(true, Ordering::SeqCst);
    }

    /// Begins the end. False if it has begun before.
    pub(crate) fn begin_stop(&self) -> bool {
        !self.stopping.swap(true, Ordering::SeqCst)
    }

    /// The sum over the endpoint and the connections it has.
    pub(crate) fn stats<'a>(&self, conns: impl Iterator<Item = &'a ConnBase>) -> FabricStats {
        conns.fold(self.counters.snapshot(), |sum, c| sum.plus(c.counters.snapshot()))
    }
}

/// What every connection keeps.
pub(crate) struct ConnBase {
    pub(crate) id: ConnId,
    pub(crate) peer: Peer,
    /// True if the peer connected to us.
    pub(crate) incoming: bool,
    pub(crate) addr: String,
    pub(crate) counters: Counters,
    alive: AtomicBool,
    why: Mutex<Option<TransportError>>,
}

impl ConnBase {
    pub(crate) fn new(id: ConnId, peer: Peer, incoming: bool, addr: String) -> Self {
        Self {
            id,
            peer,
            incoming,
            addr,
            counters: Counters::default(),
            alive: AtomicBool::new(true),
            why: Mutex::new(None),
        }
    }

    // Twice in the way of every operation, and called from units that are compiled apart.
    #[inline]
    pub(crate) fn alive(&self) -> bool {
        self.alive.load(Ordering::SeqCst)
    }

    /// Notes why the connection ends. The first reason counts: false if there is one already.
    pub(crate) fn condemn(&self, why: TransportError) -> bool {
        let mut reason = self.why.lock();
        let first = reason.is_none();
        reason.get_or_insert(why);
        first
    }

    /// It is over, from now on.
    pub(crate) fn die(&self) {
        self.alive.store(false, Ordering::SeqCst);
    }

    /// Why it ended.
    pub(crate) fn reason(&self) -> TransportError {
        let why = self.why.lock().clone();
        why.unwrap_or_else(|| common::disconnected(&self.addr, "closed"))
    }

    /// Why operations fail now that it is over.
    pub(crate) fn dead(&self) -> TransportError {
        ended(&self.addr, &self.reason())
    }

    pub(crate) fn protocol(&self, detail: impl Into<String>) -> TransportError {
        TransportError::Protocol {
            addr: self.addr.clone(),
            detail: detail.into(),
        }
    }

    /// Whether it ends now that `newer` has connected.
    pub(crate) fn superseded_by(&self, newer: &Peer) -> bool {
        self.incoming && self.peer.superseded_by(newer)
    }
}

/// The methods of [`crate::Connection`] that a `base: ConnBase` answers.
macro_rules! answered_by_base {
    () => {
        fn id(&self) -> $crate::ConnId {
            self.base.id
        }

        fn peer_identity(&self) -> &[u8] {
            &self.base.peer.identity
        }

        fn peer_addr(&self) -> String {
            self.base.addr.clone()
        }

        fn is_alive(&self) -> bool {
            self.base.alive()
        }

        fn stats(&self) -> $crate::FabricStats {
            self.base.counters.snapshot()
        }
    };
}
pub(crate) use answered_by_base;

/// The serials of the connections we have made to an endpoint instance and still believe in.
pub(crate) fn serials_to<'a>(conns: impl Iterator<Item = &'a ConnBase>, instance: u64) -> Vec<u64> {
    conns
        .filter(|c| !c.incoming && c.alive() && c.peer.instance == instance)
        .map(|c| c.peer.serial)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts() {
        let peer = Peer {
            identity: Vec::new(),
            instance: 1,
            serial: 1,
            alive: Vec::new(),
        };
        let conn = ConnBase::new(ConnId(1), peer, false, "there".to_owned());
        assert!(matches!(conn.reason(), TransportError::Disconnected { .. }));
        assert!(conn.condemn(conn.protocol("bad")));
        assert!(!conn.condemn(TransportError::Shutdown));
        assert!(matches!(conn.reason(), TransportError::Protocol { .. }));
        assert!(matches!(conn.dead(), TransportError::Disconnected { .. }));
        assert!(conn.alive());
        conn.die();
        assert!(!conn.alive());
    }
}
