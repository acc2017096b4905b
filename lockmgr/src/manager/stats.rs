//! What the manager can tell about itself.

use std::sync::atomic::{AtomicU64, Ordering};

use rt::time::Instant;

use crate::ids::{Mode, NodeSet, RecordId};
use crate::lease::LeaseHandle;
use crate::table::Table;

#[derive(Default)]
pub(super) struct Counters {
    /// Of records that have left the table; the others have their own.
    pub(super) hits: AtomicU64,
    pub(super) acquires: AtomicU64,
    pub(super) grants: AtomicU64,
    pub(super) revokes: AtomicU64,
    pub(super) hand_overs: AtomicU64,
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
    pub(super) batches: AtomicU64,
    pub(super) violations: AtomicU64,
}

/// Counters since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Operations that found their lease held.
    pub cached_hits: u64,
    /// Leases asked for.
    pub acquires: u64,
    /// Leases granted, shared leases kept by a writer included.
    pub grants: u64,
    /// Times the user was asked to bring caches down.
    pub revokes_served: u64,
    /// Exclusive leases handed directly to another node.
    pub hand_overs: u64,
    /// Messages sent.
    pub messages_sent: u64,
    /// Messages received.
    pub messages_received: u64,
    /// Batches posted to storage nodes.
    pub batches: u64,
    /// Broken rules of the protocol; anything but 0 is a bug somewhere.
    pub violations: u64,
}

/// One record in the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseInfo {
    /// The record.
    pub id: RecordId,
    /// The lease held.
    pub mode: Option<Mode>,
    /// Version of the data last seen.
    pub version: u64,
    /// Local operations that wait.
    pub waiting: usize,
    /// Remote nodes that wait in the queue here.
    pub queued: usize,
    /// Local operations under the lease.
    pub in_flight: u32,
    /// Where in the protocol.
    pub state: &'static str,
    /// Since when the first of those that wait does.
    pub since: Option<Instant>,
    /// Nodes whose answer is awaited.
    pub waits_for: NodeSet,
}

impl LeaseInfo {
    pub(super) fn of(lease: &LeaseHandle) -> Self {
        let record = lease.record.lock();
        Self {
            id: lease.id(),
            mode: record.fsm.held(),
            version: record.fsm.version(),
            waiting: record.parked.len(),
            queued: record.fsm.queued(),
            in_flight: lease.gate.count(),
            state: if record.broken.is_some() {
                "broken"
            } else {
                record.fsm.phase().name()
            },
            since: record.parked.iter().map(|parked| parked.since).min(),
            waits_for: record.fsm.waits_for(),
        }
    }
}

impl Counters {
    /// With the leases in the table, which count their hits themselves.
    pub(super) fn stats(&self, table: &Table) -> Stats {
        let get = |a: &AtomicU64| a.load(Ordering::Relaxed);
        let live: u64 = table.all().iter().map(|l| get(&l.hits)).sum();
        Stats {
            cached_hits: get(&self.hits) + live,
            acquires: get(&self.acquires),
            grants: get(&self.grants),
            revokes_served: get(&self.revokes),
            hand_overs: get(&self.hand_overs),
            messages_sent: get(&self.sent),
            messages_received: get(&self.received),
            batches: get(&self.batches),
            violations: get(&self.violations),
        }
    }
}
