//! The lease cache: drives one state machine per record over the fabric, and lets local operations in.
//!
//! # Threads and locks
//! Every method may be called from any thread. Lock order: table shard, record, then gate or timers; none is
//! held while the fabric, the directory, the user or a parked operation is called. Events of a record are
//! queued under its lock, and applied by one thread at a time, which also executes the actions, in order;
//! whoever comes meanwhile, be it a callback further down the same stack, only queues. So there is no
//! recursion, and messages about a record leave in the order in which its state machine sent them.

mod driver;
mod enter;
mod epochs;
mod interface;
mod leave;
mod outgoing;
mod posting;
mod stats;
mod storage;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rt::time::Instant;

use crate::LeaseError;
use crate::fsm::{Event, Phase};
use crate::ids::{Mode, NodeId, NodeSet, RecordId};
use crate::lease::{LeaseHandle, Parked, Wish, rank};
use crate::msg::{Body, LeaseMsg, MAX_PAYLOAD};
use crate::timers::Timer;

use driver::Driver;
pub use interface::{Directory, LeaseUser, ManagerConfig, Relinquish};
use outgoing::Posting;
pub use stats::{LeaseInfo, Stats};

/// See the module.
pub struct LeaseManager(Arc<Driver>);

impl LeaseManager {
    /// A manager that holds nothing.
    ///
    /// # Errors
    /// [`LeaseError::NodeTooLarge`] if records of this layout have no bit for the node.
    pub fn new(
        cfg: ManagerConfig,
        dir: Arc<dyn Directory>,
        user: Arc<dyn LeaseUser>,
    ) -> Result<Arc<Self>, LeaseError> {
        let max_nodes = cfg.layout.max_nodes();
        if cfg.node.0 >= max_nodes {
            return Err(LeaseError::NodeTooLarge {
                node: cfg.node,
                max_nodes,
            });
        }
        Ok(Arc::new(Self(Driver::new(cfg, dir, user))))
    }

    /// The handle of a record that is in the table.
    #[must_use]
    pub fn handle(&self, id: RecordId) -> Option<Arc<LeaseHandle>> {
        self.0.table.get(id)
    }

    /// Calls [`Self::expire`] when minimum hold times and the like are over (operations that block watch
    /// their own deadlines); sleeps meanwhile. Returns after [`Self::stop_timers`].
    pub fn run_timers(&self) {
        while self.0.alarms.tenures.wait() {
            self.expire(Instant::now());
        }
    }

    /// Ends [`Self::run_timers`].
    pub fn stop_timers(&self) {
        self.0.alarms.tenures.stop();
    }

    /// Gives up operations whose deadline has passed, ends minimum hold times that are over, frees records
    /// that were kept long enough.
    pub fn expire(&self, now: Instant) {
        while let Some((ticket, lease, timer)) = self.0.alarms.due(now) {
            let mut record = lease.record.lock();
            match timer {
                Timer::Deadline => {
                    let Some(at) = record.parked.iter().position(|p| p.ticket == ticket) else {
                        continue;
                    };
                    let Some(parked) = record.parked.remove(at) else {
                        continue;
                    };
                    let error = self.0.why(lease.id(), &record, &parked);
                    drop(record);
                    (parked.f)(Err(error));
                    self.0.drive(&lease, None);
                }
                Timer::Held(tenure, began) => {
                    let current = record.counts.tenure == tenure && !record.evicted;
                    let held = record.fsm.held().filter(|_| current && !record.fsm.is_used());
                    drop(record);
                    let Some(mode) = held else { continue };
                    self.0.kept_so_far(&lease, mode, (tenure, began));
                }
                Timer::Kept => {
                    let until = record.kept_since.map(|since| since + self.0.cfg.keep_word);
                    if let Some(until) = until.filter(|&u| u > now && record.fsm.is_keeping()) {
                        self.0
                            .alarms
                            .tenures
                            .insert(until, ticket, Arc::clone(&lease), timer);
                        continue;
                    }
                    record.kept.timer = false;
                    record.kept.over = true;
                    drop(record);
                    self.0.drive(&lease, None);
                }
            }
        }
    }

    /// When [`Self::expire`] has something to do next.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.0.alarms.next()
    }

    /// A message from a peer.
    ///
    /// # Errors
    /// [`LeaseError::BadMessage`] if it cannot be decoded or names nodes without a bit; the state is as
    /// before. [`LeaseError::Violation`] if no correct peer sends it now. Either way the connection should
    /// be closed.
    pub fn message(&self, from: NodeId, bytes: &[u8]) -> Result<(), LeaseError> {
        let msg = LeaseMsg::decode(bytes)?;
        let known = |n: NodeId| n.0 < self.0.cfg.layout.max_nodes();
        let named = match &msg.body {
            Body::GrantX { granted, queue, .. } => {
                granted.iter().all(known) && queue.iter().all(|w| known(w.node) && w.node != self.0.cfg.node)
            }
            _ => true,
        };
        if !named || !known(from) || from == self.0.cfg.node {
            return Err(LeaseError::BadMessage {
                why: "it names a node that cannot be meant",
            });
        }
        self.0.counters.received.fetch_add(1, Ordering::Relaxed);
        let LeaseMsg {
            record,
            epoch,
            incarnation,
            body,
        } = msg;
        self.0.event(
            record,
            Event::Message {
                from,
                incarnation,
                epoch,
                body,
            },
        )
    }

    /// Keeps new operations out; `drained` runs when none is inside, maybe at once. If the gate was closed
    /// already, `drained` takes the place of what was to run then. Only in answer to [`LeaseUser::revoke`]:
    /// at other times a grant may open the gate again and drop `drained`.
    pub fn close_gate(&self, id: RecordId, drained: Box<dyn FnOnce() + Send>) {
        let run = match self.0.table.get(id) {
            Some(lease) => lease.gate.close(drained),
            None => Some(drained),
        };
        if let Some(drained) = run {
            drained();
        }
    }

    /// Lets operations in again that the lease covers. What [`Self::close_gate`] was to run, and has not
    /// run, is dropped.
    pub fn open_gate(&self, id: RecordId) {
        if let Some(lease) = self.0.table.get(id) {
            lease.gate.open();
            self.0.admit(&lease);
        }
    }

    /// The user has done what [`LeaseUser::revoke`] asked for. The gate must be closed, and nobody inside.
    /// Returns the version under which caches that were kept are valid now.
    ///
    /// # Errors
    /// [`LeaseError::Misuse`] if nothing was asked for or the gate is not closed and empty,
    /// [`LeaseError::PayloadTooLong`].
    pub fn relinquished(&self, id: RecordId, how: Relinquish) -> Result<u64, LeaseError> {
        let misuse = |what| LeaseError::Misuse { record: id, what };
        if how.payload.len() > MAX_PAYLOAD {
            return Err(LeaseError::PayloadTooLong {
                bytes: how.payload.len(),
                max: MAX_PAYLOAD,
            });
        }
        let lease = self
            .0
            .table
            .get(id)
            .ok_or(misuse("there is no lease to relinquish"))?;
        let (event, version) = {
            let mut record = lease.record.lock();
            let to = record
                .asked
                .ok_or(misuse("nobody has asked for the lease to be relinquished"))?;
            if !lease.gate.lower(rank(to)) {
                return Err(misuse(
                    "operations may still be inside; close the gate and wait until it drains",
                ));
            }
            record.asked = None;
            let version = record.fsm.version();
            if matches!(record.fsm.phase(), Phase::Flushing { .. }) {
                let Relinquish {
                    modified,
                    needs_confirm,
                    payload,
                } = how;
                let payload = (!payload.is_empty()).then(|| payload.into());
                let moved = (version + u64::from(modified)) & crate::OwnerWord::MAX_VERSION;
                if to == Some(Mode::Shared) {
                    // This node still owns the word, so nobody writes: local readers need not wait until it
                    // is free. They must not, for what they hold meanwhile may be in the way of an
                    // invalidation that is asked for next.
                    lease.version.store(moved, Ordering::Relaxed);
                    lease.gate.open();
                }
                (
                    Event::Flushed {
                        modified,
                        needs_confirm,
                        payload,
                    },
                    moved,
                )
            } else {
                (Event::Invalidated, version)
            }
        };
        if matches!(event, Event::Flushed { .. }) {
            self.0.admit(&lease);
        }
        self.0.drive(&lease, Some(event));
        Ok(version)
    }

    /// What was relinquished with `needs_confirm` has reached its authority; `version` is the one that
    /// [`Self::relinquished`] returned. For a version that has been superseded this does nothing.
    pub fn confirmed(&self, id: RecordId, version: u64) {
        if let Some(lease) = self.0.table.get(id) {
            self.0.drive(&lease, Some(Event::Confirmed { version }));
        }
    }

    /// Gives the lease up without being asked, if it is held and nothing else is going on. Goes through
    /// [`LeaseUser::revoke`].
    pub fn release(&self, id: RecordId) {
        self.wish(id, Wish::Release, &mut Posting::AtOnce);
    }

    /// As [`Self::release`], of several leases: what is posted to one storage node for many of them goes there together.
    pub fn release_together(&self, ids: impl Iterator<Item = RecordId>) {
        let mut batches = Vec::new();
        for id in ids {
            self.wish(id, Wish::Release, &mut Posting::Together(&mut batches));
        }
        self.0.post_together(batches);
    }

    /// Turns an exclusive lease into a shared one, as [`Self::release`].
    pub fn downgrade(&self, id: RecordId) {
        self.wish(id, Wish::Downgrade, &mut Posting::AtOnce);
    }

    fn wish(&self, id: RecordId, wish: Wish, posting: &mut Posting<'_>) {
        if let Some(lease) = self.0.table.get(id) {
            lease.record.lock().wish = Some(wish);
            self.0.drive_posting(&lease, posting);
        }
    }

    /// Leaves the cluster: parked and new operations fail with [`LeaseError::Leaving`], everything held is
    /// released, then `f` runs. Peers that read the owner word earlier may still ask; their messages must be
    /// handed to [`Self::message`] until they know that this node has left.
    pub fn leave(&self, f: Box<dyn FnOnce() + Send>) {
        self.0.leave.begin(f);
        for lease in self.0.table.all() {
            let parked: Vec<Parked> = lease.record.lock().parked.drain(..).collect();
            self.0.refuse(parked, &LeaseError::Leaving);
            self.0.drive(&lease, None);
        }
        self.0.check_left();
    }

    /// The connection to the storage node of the shard broke.
    pub fn storage_lost(&self, shard: u32) {
        self.0.storage.lost(shard);
    }

    /// [`Directory::record`] has a new connection for the shard, and the storage node has made sure that
    /// nothing of the old one can still take effect. Batches of unknown outcome are looked into.
    pub fn storage_reconnected(&self, shard: u32) {
        self.0.storage.reconnected(shard);
        for lease in self.0.table.all() {
            if lease.id().shard() == shard {
                self.0.drive(&lease, Some(Event::Reconnected));
            }
        }
    }

    /// The membership has declared nodes dead, and fenced them: nothing of them reaches a record any more. Until
    /// [`Self::resume`] nothing new is acquired. `reached` runs, once, when nothing of this node's dealings with earlier epochs is
    /// under way, but for messages that their receivers have not heard: no hand-over, no acquisition, no lease that came from the
    /// dead. It does not run if a later epoch begins before.
    pub fn begin_epoch(&self, epoch: u64, dead: NodeSet, reached: Box<dyn FnOnce() + Send>) {
        self.0.begin_epoch(epoch, dead, reached);
    }

    /// The words and bits of the dead have been taken back: everything that waits asks again.
    pub fn resume(&self, epoch: u64) {
        self.0.resume(epoch);
    }

    /// A mount that joins begins in this epoch.
    pub fn join_epoch(&self, epoch: u64) {
        self.0.epochs.set(epoch, NodeSet::new());
    }

    /// A peer cannot be reached just now. What waits for it may fail at its deadline, which then names it.
    pub fn peer_unreachable(&self, node: NodeId) {
        self.0.gone.lock().insert(node);
    }

    /// A peer has left or ended, and answers nothing any more. What waits for it fails at its deadline, naming it, unless the
    /// peer was only thought to be the owner. Not for a connection that broke: a question that was heard may yet be answered.
    pub fn peer_gone(&self, node: NodeId) {
        self.0.gone.lock().insert(node);
        for lease in self.0.table.all() {
            self.0.drive(&lease, Some(Event::Gone(node)));
        }
    }

    /// The peer can be reached again.
    pub fn peer_back(&self, node: NodeId) {
        self.0.gone.lock().remove(node);
    }

    /// Do operations wait here for a lease on this record?
    #[must_use]
    pub fn is_awaited(&self, id: RecordId) -> bool {
        self.0
            .table
            .with(id, |lease| (!lease.record.lock().parked.is_empty()).then_some(()))
            .is_some()
    }

    /// The lease held on a record, and the version of its data.
    #[must_use]
    pub fn held(&self, id: RecordId) -> Option<(Mode, u64)> {
        self.0.table.with(id, |lease| {
            let record = lease.record.lock();
            record.fsm.held().map(|mode| (mode, record.fsm.version()))
        })
    }

    /// The records in the table.
    #[must_use]
    pub fn snapshot(&self) -> Vec<LeaseInfo> {
        self.0
            .table
            .all()
            .iter()
            .map(|lease| LeaseInfo::of(lease))
            .collect()
    }

    /// Counters since the start.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.0.counters.stats(&self.0.table)
    }
}
