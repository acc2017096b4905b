//! What endpoints and connections count.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::TransportError;

/// What an endpoint or a connection has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FabricStats {
    /// One-sided operations started from here.
    pub ops: u64,
    /// Bytes those moved.
    pub op_bytes: u64,
    /// Batches they were started in, each with one doorbell.
    pub batches: u64,
    /// Messages sent.
    pub messages_sent: u64,
    /// Bytes in them.
    pub message_bytes_sent: u64,
    /// Messages received.
    pub messages_received: u64,
    /// Bytes in them.
    pub message_bytes_received: u64,
    /// System calls made to wake a sleeping peer.
    pub doorbells: u64,
    /// Times the progress thread came out of its sleep (endpoints only).
    pub wakeups: u64,
    /// Connections set up, either way (endpoints only).
    pub connections: u64,
    /// Peers turned away because of their key (endpoints only).
    pub wrong_keys: u64,
    /// Other attempts to connect that came to nothing (endpoints only).
    pub failed_handshakes: u64,
}

impl FabricStats {
    /// The sum.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            ops: self.ops + other.ops,
            op_bytes: self.op_bytes + other.op_bytes,
            batches: self.batches + other.batches,
            messages_sent: self.messages_sent + other.messages_sent,
            message_bytes_sent: self.message_bytes_sent + other.message_bytes_sent,
            messages_received: self.messages_received + other.messages_received,
            message_bytes_received: self.message_bytes_received + other.message_bytes_received,
            doorbells: self.doorbells + other.doorbells,
            wakeups: self.wakeups + other.wakeups,
            connections: self.connections + other.connections,
            wrong_keys: self.wrong_keys + other.wrong_keys,
            failed_handshakes: self.failed_handshakes + other.failed_handshakes,
        }
    }
}

/// The counters behind [`FabricStats`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) ops: AtomicU64,
    pub(crate) op_bytes: AtomicU64,
    pub(crate) batches: AtomicU64,
    pub(crate) messages_sent: AtomicU64,
    pub(crate) message_bytes_sent: AtomicU64,
    pub(crate) messages_received: AtomicU64,
    pub(crate) message_bytes_received: AtomicU64,
    pub(crate) doorbells: AtomicU64,
    pub(crate) wakeups: AtomicU64,
    pub(crate) connections: AtomicU64,
    pub(crate) wrong_keys: AtomicU64,
    pub(crate) failed_handshakes: AtomicU64,
}

#[inline]
pub(crate) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

impl Counters {
    /// A batch of so many operations.
    #[inline]
    pub(crate) fn did_ops(&self, ops: usize, bytes: u64) {
        count(&self.ops, ops as u64);
        count(&self.op_bytes, bytes);
        count(&self.batches, 1);
    }

    #[inline]
    pub(crate) fn sent(&self, bytes: usize) {
        count(&self.messages_sent, 1);
        count(&self.message_bytes_sent, bytes as u64);
    }

    #[inline]
    pub(crate) fn received(&self, bytes: usize) {
        count(&self.messages_received, 1);
        count(&self.message_bytes_received, bytes as u64);
    }

    pub(crate) fn snapshot(&self) -> FabricStats {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        FabricStats {
            ops: get(&self.ops),
            op_bytes: get(&self.op_bytes),
            batches: get(&self.batches),
            messages_sent: get(&self.messages_sent),
            message_bytes_sent: get(&self.message_bytes_sent),
            messages_received: get(&self.messages_received),
            message_bytes_received: get(&self.message_bytes_received),
            doorbells: get(&self.doorbells),
            wakeups: get(&self.wakeups),
            connections: get(&self.connections),
            wrong_keys: get(&self.wrong_keys),
            failed_handshakes: get(&self.failed_handshakes),
        }
    }

    /// Adds the counters of a connection that has ended.
    pub(crate) fn fold(&self, ended: &FabricStats) {
        count(&self.ops, ended.ops);
        count(&self.op_bytes, ended.op_bytes);
        count(&self.batches, ended.batches);
        count(&self.messages_sent, ended.messages_sent);
        count(&self.message_bytes_sent, ended.message_bytes_sent);
        count(&self.messages_received, ended.messages_received);
        count(&self.message_bytes_received, ended.message_bytes_received);
        count(&self.doorbells, ended.doorbells);
    }

    /// Counts a failed handshake and says so where an operator looks.
    pub(crate) fn handshake_failed(&self, error: &TransportError) {
        if matches!(error, TransportError::WrongKey { .. }) {
            count(&self.wrong_keys, 1);
        } else {
            count(&self.failed_handshakes, 1);
        }
        tracing::warn!("connection not accepted: {error}");
    }
}
