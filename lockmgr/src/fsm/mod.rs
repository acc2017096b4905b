//! The protocol: a pure state machine for one record on one node.
//!
//! [`Fsm::apply`] takes an [`Event`] and appends [`Action`]s; it does no I/O, knows no time and takes no
//! locks. Whoever drives it executes the actions in order and reports back:
//!
//! * at most one batch is in flight, and its outcome comes as [`Event::BatchDone`] or [`Event::BatchLost`];
//! * [`Action::Flush`] is answered by [`Event::Flushed`], [`Action::Invalidate`] by [`Event::Invalidated`];
//! * after [`Action::Granted`] the driver reports [`Event::Used`] once at least one operation has run
//!   under the lease; before that the lease is not asked back.
//!
//! `docs/lease-protocol.md` has the table this code follows and the reason for every rule in it.
//!
//! When a node dies the others are told twice: [`Event::Epoch`] before its words and bits are taken back, [`Event::Resume`] after.

mod acquire;
mod batch;
mod epoch;
mod reconcile;
mod serve;
pub(crate) mod symmetry;
mod types;
mod violation;

pub use batch::{Batch, BatchKind, BatchState, Outcome, WordOp, WordOps};
pub use types::{Action, Config, Event, Flaw, Phase};
pub use violation::Violation;

use crate::ids::{Mode, NodeId, NodeSet};
use crate::msg::{Body, Payload, Waiter};
use types::{Answer, Own, Search};

/// The state of one record on one node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Fsm {
    /// What the local user may rely on.
    held: Option<Mode>,
    /// An operation has run since the grant.
    used: bool,
    /// What was asked for and not yet granted.
    want: Option<Mode>,
    phase: Phase,
    /// The holder bit of this node is set, or will be when the batch in flight is complete.
    bit: bool,
    /// Version of the user's cached data, and the one an exclusive acquisition expects.
    last_version: u64,
    own: Own,
    search: Search,
    /// As owner: attributes for the next grant; as grantee: those of the grant.
    payload: Option<Payload>,
    /// Nodes whose `Done` or `Ack` is awaited.
    answers: NodeSet,
    /// Nodes that wait for our `Done`.
    revokers: NodeSet,
    batch: Option<Batch>,
}

impl Fsm {
    /// Nothing held, nothing known.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Nothing held; the data were last seen with this version, and the word may belong to this node.
    #[must_use]
    pub fn remembering(version: u64, last_owner: Option<NodeId>) -> Self {
        Self {
            last_version: version,
            search: Search {
                last_owner,
                ..Search::default()
            },
            ..Self::default()
        }
    }

    /// Who is asked first when the next lease is wanted.
    #[must_use]
    pub fn last_owner(&self) -> Option<NodeId> {
        self.search.last_owner
    }

    /// The lease held.
    #[must_use]
    pub fn held(&self) -> Option<Mode> {
        self.held
    }

    /// Has an operation run since the grant?
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.used
    }

    /// The lease asked for and not yet granted.
    #[must_use]
    pub fn wanted(&self) -> Option<Mode> {
        self.want
    }

    /// Version of the data last seen; while a lease is held, of the data under it.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.last_version
    }

    /// Where in the protocol.
    #[must_use]
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// The batch in flight.
    #[must_use]
    pub fn batch(&self) -> Option<&Batch> {
        self.batch.as_ref()
    }

    /// How many nodes wait in the queue here.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.own.queue.len()
    }

    /// Nodes whose answer is awaited.
    #[must_use]
    pub fn waits_for(&self) -> NodeSet {
        let mut set = self.answers.clone();
        if let Phase::Waiting { at } = self.phase {
            set.insert(at);
        }
        set
    }

    /// The node that was asked without a look at the record, and has not answered.
    #[must_use]
    pub fn asked(&self) -> Option<NodeId> {
        match self.phase {
            Phase::Waiting { at } if self.search.asking => Some(at),
            _ => None,
        }
    }

    /// Nothing is held, wanted or owed: forgetting this state loses only the version last seen.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.held.is_none() && self.is_settled()
    }

    /// Nothing is going on: a lease may be held, but nobody waits for anything.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        matches!(self.phase, Phase::Rest | Phase::Keeping)
            && self.want.is_none()
            && self.batch.is_none()
            && self.own.queue.is_empty()
            && self.revokers.is_empty()
    }

    /// The word is kept though nothing more than a shared lease is needed; may [`Event::Settle`] be applied?
    #[must_use]
    pub fn is_keeping(&self) -> bool {
        self.phase == Phase::Keeping
    }

    /// At rest as far as the user is concerned: it may ask for more or give up what is held.
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        matches!(self.phase, Phase::Rest | Phase::Keeping) && self.batch.is_none()
    }

    /// May [`Event::Want`] be applied now? If not, it may after some later event.
    #[must_use]
    pub fn can_want(&self, mode: Mode) -> bool {
        // While it waits for a confirmation the owner may write again, too.
        let owner = self.phase == Phase::Confirming && self.held.is_some();
        (self.is_at_rest() || owner)
            && self.want.is_none()
            && self.revokers.is_empty()
            && match self.held {
                None => true,
                Some(Mode::Shared) => mode == Mode::Exclusive && self.used,
                Some(Mode::Exclusive) => false,
            }
    }

    /// May [`Event::Release`] be applied now?
    #[must_use]
    pub fn can_release(&self) -> bool {
        self.is_at_rest() && self.held.is_some() && self.used
    }

    /// May [`Event::Downgrade`] be applied now?
    #[must_use]
    pub fn can_downgrade(&self) -> bool {
        self.can_release() && self.held == Some(Mode::Exclusive)
    }

    /// Applies an event.
    ///
    /// # Errors
    /// A [`Violation`] if the event cannot happen in this state: a peer or the memory broke the protocol,
    /// or the caller its side of the contract. The state is unchanged unless the violation was found in the
    /// outcome of a batch.
    pub fn apply(&mut self, cfg: &Config, event: Event, out: &mut Vec<Action>) -> Result<(), Violation> {
        match event {
            Event::Want(mode) => {
                if !self.can_want(mode) {
                    return Err(Violation::NotNow);
                }
                self.want = Some(mode);
                if self.owns() {
                    self.take_back(cfg, out);
                } else if let Some(owner) = self.search.last_owner.take()
                    && cfg.ask_first
                    && self.held.is_none()
                    && !cfg.is_recovering()
                {
                    self.ask(mode, owner, out);
                } else {
                    self.start(cfg, out);
                }
            }
            Event::Used => self.used |= self.held.is_some(),
            Event::Release => {
                if !self.can_release() {
                    return Err(Violation::NotNow);
                }
                if self.held == Some(Mode::Exclusive) {
                    self.begin_flush(None, out);
                } else if self.phase == Phase::Keeping {
                    self.begin_drop(Phase::DropBeforeHand, out);
                } else {
                    self.begin_drop(Phase::DropShared, out);
                }
            }
            Event::Downgrade => {
                if !self.can_downgrade() {
                    return Err(Violation::NotNow);
                }
                self.begin_flush(Some(Mode::Shared), out);
            }
            Event::Flushed {
                modified,
                needs_confirm,
                payload,
            } => {
                self.flushed(cfg, modified, needs_confirm, payload, out)?;
            }
            Event::Invalidated => self.invalidated(cfg, out)?,
            Event::Settle => {
                if self.phase != Phase::Keeping {
                    return Err(Violation::NotNow);
                }
                self.settle_word(cfg, out);
            }
            Event::Confirmed { version } => self.confirmed(cfg, version, out),
            Event::BatchDone(outcome) => self.batch_done(cfg, outcome, out)?,
            Event::BatchLost => self.batch_lost()?,
            Event::Gone(node) => self.gone(cfg, node, out),
            Event::Reconnected => self.reconnected(out),
            Event::Epoch => self.epoch(cfg, out),
            Event::Resume => self.resume(cfg),
            Event::Message {
                from,
                incarnation,
                epoch,
                body,
            } => {
                self.message(cfg, from, incarnation, epoch, body, out)?;
            }
        }
        self.settle(cfg, out)
    }

    fn message(
        &mut self,
        cfg: &Config,
        from: NodeId,
        incarnation: u8,
        epoch: u64,
        body: Body,
        out: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        if cfg.dead.contains(from) && !cfg.flaw(Flaw::DeadHeard) {
            return Ok(());
        }
        match body {
            // Who asked in an earlier epoch asks again.
            Body::Want(_) | Body::Ask(_) if epoch < cfg.epoch && !cfg.flaw(Flaw::OldRequestTaken) => {}
            Body::Want(mode) | Body::Ask(mode) => {
                let waiter = Waiter {
                    node: from,
                    incarnation,
                    mode,
                    epoch,
                };
                // Who asks without having looked waits for nobody but an owner: if two ever took each other for it,
                // they would wait for ever.
                let queues = match body {
                    Body::Want(_) => self.queues(cfg),
                    _ => self.owns(),
                };
                self.join_queue(cfg, waiter, queues, out)?;
            }
            Body::Revoke => {
                self.revokers.insert(from);
                self.search.last_owner = Some(from);
            }
            Body::Done => {
                if self.phase != Phase::Revoking || !self.answers.remove(from) {
                    return Err(Violation::Unexpected("DONE"));
                }
                if self.answers.is_empty() {
                    self.become_exclusive(out);
                }
            }
            Body::Ack => {
                if cfg.flaw(Flaw::FreeBeforeAcks) && self.phase != Phase::Granting {
                    return Ok(());
                }
                if self.phase != Phase::Granting || !self.answers.remove(from) {
                    return Err(Violation::Unexpected("ACK"));
                }
                if self.answers.is_empty() {
                    self.next_step(cfg, out);
                }
            }
            Body::GrantS { version, payload } => {
                self.answer(Some(Mode::Shared), from, Answer::Shared { version, payload })?;
            }
            Body::GrantX {
                version,
                granted,
                queue,
                payload,
            } => {
                let mut answer = Answer::Exclusive {
                    version,
                    far: cfg.any_far(&granted),
                    granted,
                    queue,
                    payload,
                };
                answer.leave_out(cfg);
                self.answer(Some(Mode::Exclusive), from, answer)?;
            }
            Body::Retry => self.answer(None, from, Answer::Retry)?,
        }
        Ok(())
    }

    /// Notes the answer to a WANT. It is acted upon once the own bit is off (see `settle`).
    fn answer(&mut self, mode: Option<Mode>, from: NodeId, answer: Answer) -> Result<(), Violation> {
        let expected = matches!(self.phase, Phase::Waiting { .. })
            && (mode.is_none() || mode == self.want)
            && self.search.deferred.is_none();
        if !expected {
            return Err(Violation::Unexpected(match answer {
                Answer::Shared { .. } => "GRANT(S)",
                Answer::Exclusive { .. } => "GRANT(X)",
                Answer::Retry => "RETRY",
            }));
        }
        self.search.asking = false;
        self.search.deferred = Some((from, answer));
        Ok(())
    }

    /// Does a WANT join the queue here? Everywhere this node owns the word or may come to own it: answering
    /// RETRY instead makes two nodes ask each other for ever.
    fn queues(&self, cfg: &Config) -> bool {
        let acquiring = self.want == Some(Mode::Exclusive);
        match self.phase {
            Phase::Rest => self.held == Some(Mode::Exclusive),
            Phase::Revoking
            | Phase::Flushing { .. }
            | Phase::DropBeforeHand
            | Phase::Keeping
            | Phase::Confirming
            | Phase::Granting => true,
            Phase::HandingOver { .. } | Phase::Freeing => !cfg.flaw(Flaw::RetryWhileReleasing),
            Phase::Acquiring | Phase::LostUpgrade { .. } => acquiring && !cfg.flaw(Flaw::RetryWhileAcquiring),
            Phase::Waiting { .. } | Phase::Paused => acquiring && !cfg.flaw(Flaw::RetryWhileWaiting),
            Phase::DropShared | Phase::ClearingBit => false,
        }
    }

    /// Does this node own the word, as far as it knows?
    fn owns(&self) -> bool {
        match self.phase {
            Phase::Rest => self.held == Some(Mode::Exclusive),
            Phase::Revoking
            | Phase::Flushing { .. }
            | Phase::DropBeforeHand
            | Phase::Keeping
            | Phase::Confirming
            | Phase::Granting
            | Phase::HandingOver { .. }
            | Phase::Freeing => true,
            _ => false,
        }
    }

    /// Must DONE wait? While a shared lease is held, of course, but also while a batch is in flight that
    /// may turn out to have made one.
    fn defers_done(&self, cfg: &Config) -> bool {
        match self.batch.as_ref().map(|b| b.kind) {
            Some(BatchKind::SharedAcquire) if !cfg.flaw(Flaw::DoneWhileAcquiring) => return true,
            Some(BatchKind::FreeKeep) if !cfg.flaw(Flaw::DoneWhileFreeing) => return true,
            _ => {}
        }
        if cfg.flaw(Flaw::DoneBeforeInvalidated) && self.phase == Phase::DropShared {
            return false;
        }
        self.held == Some(Mode::Shared) && !self.owns()
    }

    /// Does what the state allows without a further event.
    fn settle(&mut self, cfg: &Config, out: &mut Vec<Action>) -> Result<(), Violation> {
        loop {
            if !self.revokers.is_empty() {
                if !self.defers_done(cfg) {
                    for to in std::mem::take(&mut self.revokers).iter() {
                        out.push(Action::Send { to, body: Body::Done });
                    }
                    continue;
                }
                if self.phase == Phase::Rest && self.held == Some(Mode::Shared) && self.used {
                    self.begin_drop(Phase::DropShared, out);
                    continue;
                }
            }
            if self.search.tainted
                && self.phase == Phase::Rest
                && self.held == Some(Mode::Shared)
                && self.used
                && self.batch.is_none()
            {
                self.begin_drop(Phase::DropShared, out);
                continue;
            }
            if self.phase == Phase::Rest
                && self.held == Some(Mode::Exclusive)
                && self.used
                && !self.own.queue.is_empty()
            {
                let readers_only = self.own.queue.iter().all(|w| w.mode == Mode::Shared);
                let to = (readers_only && cfg.keep_shared).then_some(Mode::Shared);
                self.begin_flush(to, out);
                continue;
            }
            if matches!(self.phase, Phase::Waiting { .. } | Phase::Paused)
                && self.batch.is_none()
                && let Some((from, answer)) = self.search.deferred.take()
            {
                self.take_answer(cfg, from, answer, out)?;
                continue;
            }
            return Ok(());
        }
    }

    /// Back to rest with nothing left of a tenure.
    fn rest(&mut self) {
        self.phase = Phase::Rest;
        self.own.word_version = 0;
        self.own.word_far = false;
        self.own.new_version = 0;
        self.own.unconfirmed = false;
        self.payload = None;
        self.own.granted = NodeSet::new();
    }
}
