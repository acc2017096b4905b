//! Applies events, executes actions.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rt::sync::Mutex;
use rt::time::Instant;

use super::epochs::Epochs;
use super::interface::{Directory, LeaseUser, ManagerConfig};
use super::leave::Leave;
use super::outgoing::Posting;
use super::stats::Counters;
use super::storage::Storage;
use crate::LeaseError;
use crate::fsm::{Action, Config, Event, Violation};
use crate::hint::Hint;
use crate::ids::{Mode, NodeId, NodeSet, RecordId};
use crate::lease::{LeaseHandle, Parked, Record, Wish, rank};
use crate::msg::{Body, LeaseMsg};
use crate::table::Table;
use crate::timers::{Alarms, Timer};

/// Everything a manager knows, and what becomes of events.
pub(super) struct Driver {
    pub(super) me: Weak<Self>,
    pub(super) cfg: ManagerConfig,
    pub(super) epochs: Epochs,
    pub(super) dir: Arc<dyn Directory>,
    user: Arc<dyn LeaseUser>,
    pub(super) table: Table,
    pub(super) alarms: Alarms,
    pub(super) storage: Storage,
    /// Peers that cannot be reached.
    pub(super) gone: Mutex<NodeSet>,
    pub(super) leave: Leave,
    pub(super) counters: Counters,
}

impl Driver {
    pub(super) fn new(cfg: ManagerConfig, dir: Arc<dyn Directory>, user: Arc<dyn LeaseUser>) -> Arc<Self> {
        let mut fsm_cfg = Config::new(cfg.node, cfg.incarnation);
        #[cfg(any(test, feature = "flaws"))]
        {
            fsm_cfg.flaws = cfg.flaws;
        }
        fsm_cfg.keep_shared = cfg.keep_shared;
        fsm_cfg.keep_word = cfg.keep_shared && !cfg.keep_word.is_zero();
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            cfg,
            epochs: Epochs::new(fsm_cfg),
            dir,
            user,
            table: Table::new(),
            alarms: Alarms::default(),
            storage: Storage::default(),
            gone: Mutex::new(NodeSet::new()),
            leave: Leave::default(),
            counters: Counters::default(),
        })
    }

    /// An event of a record that need not be in the table.
    pub(super) fn event(&self, id: RecordId, event: Event) -> Result<(), LeaseError> {
        let mut event = Some(event);
        loop {
            let lease = self.table.get_or_insert(id);
            match self.try_drive(&lease, &mut event, &mut Posting::AtOnce) {
                Some(result) => {
                    return result.map_err(|violation| LeaseError::Violation {
                        record: id,
                        violation,
                    });
                }
                None => self.table.remove(&lease, Hint::default(), |_| false),
            }
        }
    }

    /// An event of a record that cannot have left the table, or has nothing to say if it has; or just a look
    /// at what the record needs.
    pub(super) fn drive(&self, lease: &Arc<LeaseHandle>, event: Option<Event>) {
        let mut event = event;
        // Violations have been logged.
        let _ = self.try_drive(lease, &mut event, &mut Posting::AtOnce);
    }

    /// A look at what the record needs; the caller says when that is posted.
    pub(super) fn drive_posting(&self, lease: &Arc<LeaseHandle>, posting: &mut Posting<'_>) {
        let _ = self.try_drive(lease, &mut None, posting);
    }

    /// Queues the event and, unless another thread is at it, applies all that is queued. `None`: the record
    /// has left the table, and the event was not taken. An error is about this event; if another thread
    /// applies it, only the log tells.
    fn try_drive(
        &self,
        lease: &Arc<LeaseHandle>,
        event: &mut Option<Event>,
        posting: &mut Posting<'_>,
    ) -> Option<Result<(), Violation>> {
        let mut record = lease.record.lock();
        if record.evicted {
            return None;
        }
        let mut ours = event.is_some() && record.inbox.is_empty();
        record.inbox.extend(event.take());
        if record.busy {
            return Some(Ok(()));
        }
        record.busy = true;
        let mut result = Ok(());
        let mut actions = Vec::new();
        while let Some(event) = record.inbox.pop_front().or_else(|| self.decide(&mut record)) {
            let from_memory = matches!(event, Event::BatchDone(_));
            let was_keeping = record.fsm.is_keeping();
            let config = self.epochs.config();
            if event == Event::Epoch {
                record.counts.epoch = config.epoch;
            }
            if let Err(violation) = record.fsm.apply(&config, event, &mut actions) {
                self.counters.violations.fetch_add(1, Ordering::Relaxed);
                tracing::error!(record = %lease.id(), phase = record.fsm.phase().name(), %violation, "lease protocol broken");
                if from_memory {
                    record.broken = Some(violation);
                }
                if ours {
                    result = Err(violation);
                }
            }
            ours = false;
            if record.fsm.is_keeping() && !was_keeping {
                self.keep(lease, &mut record);
            }
            let refused: Option<(Violation, Vec<Parked>)> = record
                .broken
                .map(|violation| (violation, record.parked.drain(..).collect()));
            drop(record);
            if let Some((violation, parked)) = refused {
                self.refuse(
                    parked,
                    &LeaseError::Violation {
                        record: lease.id(),
                        violation,
                    },
                );
            }
            for action in actions.drain(..) {
                self.execute(lease, action, config.epoch, posting);
            }
            record = lease.record.lock();
        }
        record.busy = false;
        // Room for a few events, in each of a hundred thousand records.
        record.inbox = VecDeque::new();
        record.evicted = record.is_forgettable();
        let (evicted, hint) = (record.evicted, record.hint());
        let settled = self.epochs.is_awaiting() && self.is_settled(&record);
        drop(record);
        if settled && let Some(told) = self.epochs.settled(lease.id()) {
            told();
        }
        if evicted {
            self.counters
                .hits
                .fetch_add(lease.hits.swap(0, Ordering::Relaxed), Ordering::Relaxed);
            self.table.remove(lease, hint, |node| self.epochs.is_dead(node));
            self.check_left();
        }
        Some(result)
    }

    /// Does a record not keep this node from saying that it has reached the epoch?
    fn is_settled(&self, record: &Record) -> bool {
        let config = self.epochs.config();
        record.evicted
            || record.broken.is_some()
            || (record.counts.epoch == config.epoch && !record.fsm.holds_up_epoch(&config))
    }

    /// Some nodes are dead, and what they had is about to be taken back. `reached` runs when no record has anything of earlier
    /// epochs under way.
    pub(super) fn begin_epoch(&self, epoch: u64, dead: NodeSet, reached: Box<dyn FnOnce() + Send>) {
        self.epochs.set(epoch, dead.clone());
        self.table.forget_owners(&dead);
        let all = self.table.all();
        self.epochs.wait_for(all.iter().map(|lease| lease.id()), reached);
        for lease in &all {
            // One that has left the table has nothing under way.
            let event = &mut Some(Event::Epoch);
            let gone = self.try_drive(lease, event, &mut Posting::AtOnce).is_none();
            if gone && let Some(reached) = self.epochs.settled(lease.id()) {
                return reached();
            }
        }
        if all.is_empty()
            && let Some(reached) = self.epochs.end()
        {
            reached();
        }
    }

    /// Everything that the dead had has been taken back.
    pub(super) fn resume(&self, epoch: u64) {
        let dead = self.epochs.config().dead.clone();
        self.epochs.stop_waiting();
        self.epochs.set(epoch, NodeSet::new());
        if dead.is_empty() {
            // Nothing was held back: who waits has asked, and must not ask twice.
            return;
        }
        {
            let mut gone = self.gone.lock();
            for node in dead.iter() {
                gone.remove(node);
            }
        }
        for lease in self.table.all() {
            self.drive(&lease, Some(Event::Resume));
        }
    }

    /// The owner of the word keeps it for a while. One timer a record is enough, however often that begins.
    fn keep(&self, lease: &Arc<LeaseHandle>, record: &mut Record) {
        let now = Instant::now();
        record.kept_since = Some(now);
        if !std::mem::replace(&mut record.kept.timer, true) {
            let ticket = self.alarms.ticket();
            self.alarms
                .tenures
                .insert(now + self.cfg.keep_word, ticket, Arc::clone(lease), Timer::Kept);
        }
    }

    /// A lease is not asked back for so long; `tenure`: its number, and when it began.
    fn keep_lease(&self, lease: &Arc<LeaseHandle>, tenure: (u64, Instant), keep: Duration) {
        let ticket = self.alarms.ticket();
        self.alarms.tenures.insert(
            Instant::now() + keep,
            ticket,
            Arc::clone(lease),
            Timer::Held(tenure.0, tenure.1),
        );
    }

    /// A lease was kept as long as it was to be: longer, or others get it.
    pub(super) fn kept_so_far(&self, lease: &Arc<LeaseHandle>, mode: Mode, tenure: (u64, Instant)) {
        let keep = self.user.keep(lease.id(), mode, tenure.1.elapsed());
        if keep.is_zero() {
            self.drive(lease, Some(Event::Used));
        } else {
            self.keep_lease(lease, tenure, keep);
        }
    }

    /// What local operations need, once everything that has happened is applied.
    fn decide(&self, record: &mut Record) -> Option<Event> {
        if record.broken.is_some() {
            return None;
        }
        let settle = std::mem::take(&mut record.kept.over);
        let fsm = &record.fsm;
        let at_rest = fsm.is_at_rest();
        let leaving = self.leave.begun().then_some(Wish::Release);
        if let (true, Some(held), Some(wish)) = (at_rest, fsm.held(), leaving.or(record.wish)) {
            if !fsm.is_used() {
                return Some(Event::Used);
            }
            record.wish = None;
            match (wish, held) {
                (Wish::Release, _) => return Some(Event::Release),
                (Wish::Downgrade, Mode::Exclusive) => return Some(Event::Downgrade),
                (Wish::Downgrade, Mode::Shared) => {}
            }
        }
        record.wish = None;
        let fsm = &record.fsm;
        let needed = match record.needed() {
            Some(needed) if fsm.held() < Some(needed) => needed,
            _ => return (settle && fsm.is_keeping()).then_some(Event::Settle),
        };
        if fsm.can_want(needed) {
            self.counters.acquires.fetch_add(1, Ordering::Relaxed);
            return Some(Event::Want(needed));
        }
        // To ask for more is a use, too, even if nobody came in under the weaker lease.
        (at_rest && fsm.held().is_some() && !fsm.is_used()).then_some(Event::Used)
    }

    /// `epoch`: the one in which the action was decided upon.
    fn execute(&self, lease: &Arc<LeaseHandle>, action: Action, epoch: u64, posting: &mut Posting<'_>) {
        match action {
            Action::Post(ops) => self.post(lease, ops, posting),
            Action::Send { to, body } => self.send(lease, to, body, epoch),
            Action::Confirm { version } => self.user.confirm(lease.id(), version),
            Action::Flush { to } => self.revoke(lease, Mode::Exclusive, to),
            Action::Invalidate => self.revoke(lease, Mode::Shared, None),
            Action::Granted {
                mode,
                version,
                payload,
            } => {
                self.counters.grants.fetch_add(1, Ordering::Relaxed);
                self.user.granted(lease.id(), mode, version, payload.as_deref());
                lease.version.store(version, Ordering::Relaxed);
                lease.gate.grant(rank(Some(mode)));
                let keep = self.user.keep(lease.id(), mode, Duration::ZERO);
                let keep = keep.max(self.cfg.min_hold);
                self.admit(lease);
                let tenure = {
                    let mut record = lease.record.lock();
                    record.counts.tenure += 1;
                    if keep.is_zero() {
                        // Those who waited are inside by now, or nobody waits any more.
                        record.inbox.push_back(Event::Used);
                        return;
                    }
                    record.counts.tenure
                };
                self.keep_lease(lease, (tenure, Instant::now()), keep);
            }
        }
    }

    fn revoke(&self, lease: &Arc<LeaseHandle>, from: Mode, to: Option<Mode>) {
        self.counters.revokes.fetch_add(1, Ordering::Relaxed);
        lease.record.lock().asked = Some(to);
        self.user.revoke(lease.id(), from, to);
    }

    /// Lets in whoever is parked and may enter.
    pub(super) fn admit(&self, lease: &Arc<LeaseHandle>) {
        let mut ready = Vec::new();
        {
            let mut record = lease.record.lock();
            for parked in std::mem::take(&mut record.parked) {
                match lease.enter_quietly(parked.mode) {
                    Some(guard) => ready.push((parked, guard)),
                    None => record.parked.push_back(parked),
                }
            }
        }
        for (parked, guard) in ready {
            self.alarms.deadlines.remove(parked.deadline, parked.ticket);
            (parked.f)(Ok(guard));
        }
    }

    pub(super) fn refuse(&self, parked: Vec<Parked>, error: &LeaseError) {
        for parked in parked {
            self.alarms.deadlines.remove(parked.deadline, parked.ticket);
            (parked.f)(Err(error.clone()));
        }
    }

    fn send(&self, lease: &Arc<LeaseHandle>, to: NodeId, body: Body, epoch: u64) {
        let record = lease.id();
        let on_a_guess = matches!(body, Body::Ask(_));
        self.counters.sent.fetch_add(1, Ordering::Relaxed);
        if matches!(body, Body::GrantX { .. }) {
            self.counters.hand_overs.fetch_add(1, Ordering::Relaxed);
        }
        if self.epochs.is_dead(to) {
            return;
        }
        let msg = LeaseMsg {
            record,
            epoch,
            incarnation: self.cfg.incarnation,
            body,
        };
        if let Err(error) = self.dir.send(to, &msg.encode()) {
            tracing::warn!(%record, %to, %error, "a lease message could not be sent");
            self.gone.lock().insert(to);
            if on_a_guess {
                lease.record.lock().inbox.push_back(Event::Gone(to));
            }
        }
    }

    /// Why the operation was not let in, as far as this node can tell.
    pub(super) fn why(&self, id: RecordId, record: &Record, parked: &Parked) -> LeaseError {
        let waits = record.fsm.waits_for();
        let gone = self.gone.lock();
        if let Some(node) = waits.iter().find(|&n| gone.contains(n)) {
            return LeaseError::Unreachable { record: id, node };
        }
        drop(gone);
        if let Some(batch) = record.fsm.batch() {
            let lost = self.storage.is_lost(id.shard()) || batch.posted().is_none();
            if lost {
                let shard = id.shard();
                let unknown = LeaseError::StorageLost {
                    shard,
                    why: "the connection is lost".to_owned(),
                };
                return record.trouble.clone().unwrap_or(unknown);
            }
        }
        LeaseError::Timeout {
            record: id,
            mode: parked.mode,
            waited: parked.since.elapsed(),
            state: record.fsm.phase().name(),
        }
    }

    pub(super) fn check_left(&self) {
        if self.leave.begun() && self.table.is_empty() {
            let left = self.leave.then();
            if let Some(f) = left {
                f();
            }
        }
    }
}
