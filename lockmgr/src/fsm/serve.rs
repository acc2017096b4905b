//! How a lease is given up: flushing, granting, handing over, freeing, invalidating.

use super::Fsm;
use super::batch::{BatchKind, WordOp, WordOps};
use super::types::{Action, Config, Flaw, Phase, Readers};
use super::violation::Violation;
use crate::ids::{Mode, NodeSet};
use crate::msg::{Body, Payload, Waiter};
use crate::record::OwnerWord;

impl Fsm {
    /// Another node wants the lease; `queues`: it may wait here.
    pub(super) fn join_queue(
        &mut self,
        cfg: &Config,
        waiter: Waiter,
        queues: bool,
        out: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        if !queues {
            // Never forwarded: a chain of forwards can close a cycle of waiters on a free word.
            out.push(Action::Send {
                to: waiter.node,
                body: Body::Retry,
            });
            return Ok(());
        }
        if self.own.queue.iter().any(|w| w.node == waiter.node) {
            return Err(Violation::QueuedTwice);
        }
        self.own.queue.push(waiter);
        if matches!(self.phase, Phase::Keeping | Phase::Confirming) {
            self.next_step(cfg, out);
        }
        Ok(())
    }

    pub(super) fn begin_flush(&mut self, to: Option<Mode>, out: &mut Vec<Action>) {
        self.phase = Phase::Flushing { to };
        out.push(Action::Flush { to });
    }

    pub(super) fn begin_drop(&mut self, phase: Phase, out: &mut Vec<Action>) {
        self.phase = phase;
        out.push(Action::Invalidate);
    }

    /// The user has written back and given the exclusive lease down.
    pub(super) fn flushed(
        &mut self,
        cfg: &Config,
        modified: bool,
        needs_confirm: bool,
        payload: Option<Payload>,
        out: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        let Phase::Flushing { to } = self.phase else {
            return Err(Violation::NotNow);
        };
        let moved = modified && !cfg.flaw(Flaw::VersionNotMoved);
        // Not the version in the word: that stays behind while the word is kept.
        self.own.new_version = (self.last_version + u64::from(moved)) & OwnerWord::MAX_VERSION;
        self.last_version = self.own.new_version;
        // What was taken back unconfirmed still is.
        self.own.unconfirmed = (self.own.unconfirmed || needs_confirm) && !cfg.flaw(Flaw::FreeUnconfirmed);
        self.payload = payload;
        self.own.granted = NodeSet::new();
        self.held = to;
        self.used = to.is_some();
        self.next_step(cfg, out);
        Ok(())
    }

    /// Owning the word, with nothing held but perhaps shared caches: whose turn is it?
    pub(super) fn next_step(&mut self, cfg: &Config, out: &mut Vec<Action>) {
        match self.own.queue.first().copied() {
            Some(head) if head.mode == Mode::Exclusive => {
                if self.held.is_some() && !cfg.flaw(Flaw::HandOverWithCaches) {
                    self.begin_drop(Phase::DropBeforeHand, out);
                    return;
                }
                self.own.queue.remove(0);
                let next = OwnerWord::owned(head.node, head.incarnation, self.own.new_version);
                let ops = self.release_ops(cfg, next, false);
                self.phase = Phase::HandingOver { to: head.node };
                self.post(BatchKind::HandOver, ops, out);
            }
            Some(_) => {
                let run = self
                    .own
                    .queue
                    .iter()
                    .take_while(|w| w.mode == Mode::Shared)
                    .count();
                let readers: NodeSet = self.own.queue.drain(..run).map(|w| w.node).collect();
                for to in readers.iter() {
                    let body = Body::GrantS {
                        version: self.own.new_version,
                        payload: self.payload.clone(),
                    };
                    out.push(Action::Send { to, body });
                }
                self.own.granted.union(&readers);
                self.answers = readers;
                self.phase = Phase::Granting;
                if cfg.flaw(Flaw::FreeBeforeAcks) {
                    self.answers = NodeSet::new();
                    self.next_step(cfg, out);
                }
            }
            None if cfg.keep_word && self.held.is_some() && self.may_keep() => self.phase = Phase::Keeping,
            None => self.settle_word(cfg, out),
        }
    }

    /// Recovery frees the word of a dead owner with a version that no cache can have: it must know how far
    /// the owner may have come.
    fn may_keep(&self) -> bool {
        let ahead = self.own.new_version.wrapping_sub(self.own.word_version) & OwnerWord::MAX_VERSION;
        // The next tenure adds one.
        ahead + 1 < OwnerWord::MOST_AHEAD
    }

    /// The word is freed, once it may be.
    pub(super) fn settle_word(&mut self, cfg: &Config, out: &mut Vec<Action>) {
        match self.held {
            // From a free word readers take the version without asking this node for anything else.
            _ if self.own.unconfirmed => {
                self.phase = Phase::Confirming;
                out.push(Action::Confirm {
                    version: self.own.new_version,
                });
            }
            Some(_) => {
                let ops = self.release_ops(cfg, OwnerWord::free(self.own.new_version), true);
                self.search.seen = Readers::of(cfg, &self.own.granted);
                self.phase = Phase::Freeing;
                self.post(BatchKind::FreeKeep, ops, out);
            }
            None => {
                let ops = self.release_ops(cfg, OwnerWord::free(self.own.new_version), false);
                self.phase = Phase::Freeing;
                self.post(BatchKind::Free, ops, out);
            }
        }
    }

    /// The user's authority has what was flushed with this version.
    pub(super) fn confirmed(&mut self, cfg: &Config, version: u64, out: &mut Vec<Action>) {
        // One of an earlier tenure says nothing about what was changed since.
        if version != self.last_version && !cfg.flaw(Flaw::AnyConfirmation) {
            return;
        }
        self.own.unconfirmed = false;
        if self.phase == Phase::Confirming {
            self.settle_word(cfg, out);
        }
    }

    /// The owner that let readers in wants to write again: the word is its own already.
    pub(super) fn take_back(&mut self, cfg: &Config, out: &mut Vec<Action>) {
        self.payload = None;
        let mut readers = std::mem::take(&mut self.own.granted);
        if cfg.flaw(Flaw::KeptWithoutRevoking) {
            readers = NodeSet::new();
        }
        self.own(cfg, readers, self.own.new_version, out);
    }

    /// Moves the word on. The own bit must be off then, unless a shared lease is kept: after an upgrade it is still on,
    /// and the next fetch-and-add would carry into the neighbour's.
    fn release_ops(&self, cfg: &Config, to: OwnerWord, keep: bool) -> WordOps {
        let change = (self.bit != keep && (keep || !cfg.flaw(Flaw::BitLeftOn))).then_some(keep);
        let from =
            OwnerWord::owned(cfg.node, cfg.incarnation, self.own.word_version).read_by(0, self.own.word_far);
        // Since the flush nobody reads but those granted, and perhaps this node.
        let far = cfg.any_far(&self.own.granted) || (keep && !cfg.is_near());
        let to = to.read_by(0, far && !cfg.flaw(Flaw::FarForgotten));
        if cfg.is_near() {
            let bit = change;
            return WordOps::one(WordOp::Move { from, to, bit });
        }
        let first = change.map(|on| if on { WordOp::SetBit } else { WordOp::ClearBit });
        WordOps::with_bit(first, WordOp::Move { from, to, bit: None })
    }

    /// The word has moved on.
    pub(super) fn released(&mut self, cfg: &Config, kind: BatchKind, out: &mut Vec<Action>) {
        match (kind, self.phase) {
            // The word names one of the dead, who is told nothing: it is freed with the others of that one.
            (BatchKind::HandOver, Phase::HandingOver { to }) if cfg.dead.contains(to) => {}
            (BatchKind::HandOver, Phase::HandingOver { to }) => {
                let body = Body::GrantX {
                    version: self.own.new_version,
                    granted: std::mem::take(&mut self.own.granted),
                    queue: std::mem::take(&mut self.own.queue),
                    payload: self.payload.take(),
                };
                out.push(Action::Send { to, body });
                self.search.last_owner = Some(to);
            }
            (BatchKind::FreeKeep, _) => out.push(Action::Granted {
                mode: Mode::Shared,
                version: self.own.new_version,
                payload: self.payload.take(),
            }),
            _ => {}
        }
        self.rest();
        self.retry_all(out);
    }

    pub(super) fn retry_all(&mut self, out: &mut Vec<Action>) {
        for waiter in std::mem::take(&mut self.own.queue) {
            out.push(Action::Send {
                to: waiter.node,
                body: Body::Retry,
            });
        }
    }

    /// The user has stopped using its shared lease.
    pub(super) fn invalidated(&mut self, cfg: &Config, out: &mut Vec<Action>) -> Result<(), Violation> {
        match self.phase {
            Phase::DropShared => {
                self.give_up_shared();
                self.phase = Phase::ClearingBit;
                self.post(BatchKind::ClearBit, WordOps::one(WordOp::ClearBit), out);
            }
            Phase::LostUpgrade { to } => {
                self.give_up_shared();
                match to {
                    Some(to) => self.wait_for(cfg, to, out),
                    None => self.look_again(cfg, out),
                }
            }
            Phase::DropBeforeHand => {
                self.give_up_shared();
                self.next_step(cfg, out);
            }
            _ => return Err(Violation::NotNow),
        }
        Ok(())
    }

    fn give_up_shared(&mut self) {
        self.held = None;
        self.used = false;
        self.search.tainted = false;
        self.search.granted_by = None;
        self.search.seen = Readers::default();
    }
}
