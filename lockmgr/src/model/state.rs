//! The state of three nodes, the memory and the channels, and its steps.

use std::collections::VecDeque;

use super::node::{Node, config};
use super::options::{NODES, Options, Problem};
use super::view::{Change, Membership};
use crate::fsm::{Action, Config, Event, Outcome, Phase, WordOp};
use crate::ids::{Mode, NodeId, NodeSet};
use crate::msg::Body;
use crate::record::OwnerWord;

/// A channel never grows beyond this in a correct protocol of three nodes.
const MAX_CHANNEL: usize = 6;

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct State {
    pub(super) word: OwnerWord,
    /// The holder bits of the far nodes.
    pub(super) bits: u8,
    /// Which nodes are far.
    pub(super) far: u8,
    /// Memory shows what was last written.
    pub(super) store_fresh: bool,
    pub(super) confirmed: u64,
    losses: u8,
    pub(super) nodes: [Node; NODES],
    /// Messages, with their senders' epochs.
    pub(super) channels: [[VecDeque<(u8, Body)>; NODES]; NODES],
    pub(super) membership: Membership,
    pub(super) problem: Option<Problem>,
}

/// One step; its number identifies it among the successors of a state.
#[derive(Debug, Clone, Copy)]
enum Step {
    Operation(usize),
    Completion(usize),
    Loss(usize),
    Reconnect(usize),
    Message(usize, usize),
    Use(usize, bool),
    Bring(usize),
    Confirm(usize),
    Settle(usize),
    Want(usize, Mode),
    Release(usize),
    Downgrade(usize),
    Leave(usize),
    Gone(usize, usize),
    Membership(Change),
}

impl State {
    pub(super) fn initial(options: &Options) -> Self {
        let node = |i: usize| Node::new(options.budget[i]);
        Self {
            word: OwnerWord::free(0),
            bits: 0,
            far: ((1 << NODES) - 1) & !((1 << options.near) - 1),
            store_fresh: true,
            confirmed: 0,
            losses: options.losses,
            nodes: [node(0), node(1), node(2)],
            channels: Default::default(),
            membership: Membership {
                crashes: options.crashes,
                restarts: options.restarts,
                ..Membership::default()
            },
            problem: None,
        }
    }

    pub(super) fn config(&self, options: &Options, i: usize) -> Config {
        config(options, i, &self.nodes[i])
    }

    pub(super) fn fail(&mut self, problem: Problem) {
        self.problem.get_or_insert(problem);
    }

    pub(super) fn event(&mut self, options: &Options, i: usize, event: Event) {
        let mut actions = Vec::new();
        let cfg = self.config(options, i);
        if let Err(v) = self.nodes[i].fsm.apply(&cfg, event, &mut actions) {
            self.fail(Problem::Violation(v));
        }
        for action in actions {
            match action {
                Action::Post(_) => {
                    self.nodes[i].done = 0;
                    self.nodes[i].outcome = Outcome::default();
                }
                Action::Send { to, .. } if !self.alive(to.0.into()) => {}
                Action::Send { to, body } => {
                    let body = (self.nodes[i].place.epoch, body);
                    let channel = &mut self.channels[i][usize::from(to.0)];
                    channel.push_back(body);
                    if channel.len() > MAX_CHANNEL {
                        self.fail(Problem::ChannelFull);
                    }
                }
                Action::Flush { .. } | Action::Invalidate => self.nodes[i].asked = true,
                Action::Confirm { version } => self.nodes[i].push(version),
                Action::Granted {
                    mode,
                    version,
                    payload,
                } => {
                    if payload.is_some_and(|p| p[..] != version.to_le_bytes()) {
                        self.fail(Problem::WrongPayload);
                    }
                    let node = &mut self.nodes[i];
                    node.versions.kept.take_if(|_| mode == Mode::Exclusive);
                    if node.versions.cached != version {
                        node.versions.cached = version;
                        node.fresh = self.store_fresh;
                    }
                }
            }
        }
    }

    fn check(&mut self, options: &Options) {
        for i in 0..NODES {
            let held = self.nodes[i].fsm.held();
            if held.is_some() && self.nodes[i].versions.cached != self.nodes[i].fsm.version() {
                self.fail(Problem::WrongVersion);
            }
            if held.is_some() && !self.nodes[i].fresh {
                self.fail(Problem::Stale);
            }
            if held == Some(Mode::Exclusive)
                && (0..NODES).any(|j| j != i && self.nodes[j].fsm.held().is_some())
            {
                self.fail(Problem::MutualExclusion);
            }
        }
        if options.confirm && self.word.writer.is_none() && self.word.version > self.confirmed {
            self.fail(Problem::Unconfirmed);
        }
    }

    fn operation(&mut self, i: usize) {
        let node = &mut self.nodes[i];
        let Some(op) = node
            .fsm
            .batch()
            .and_then(|b| b.posted())
            .and_then(|p| p.iter().nth(node.done.into()))
        else {
            return;
        };
        node.done += 1;
        match op {
            WordOp::SetBit | WordOp::ClearBit => {
                if self.far >> i & 1 == 0 {
                    node.outcome.owner = Some(self.word);
                }
                self.flip(i, matches!(op, WordOp::SetBit));
            }
            WordOp::Move { from, to, bit } => {
                node.outcome.owner = Some(self.word);
                if let Some(on) = bit {
                    self.flip(i, on);
                }
                // Added to anything else it makes no sense; the state machine must find out.
                if self.word.owners_part() == from {
                    if to.version < from.version {
                        self.fail(Problem::VersionBack);
                    }
                    self.word = to.read_by(self.word.near, to.far);
                }
            }
            WordOp::Cas { expect, new } => {
                node.outcome.owner = Some(self.word);
                if self.word == expect {
                    let back = new.version < self.word.version;
                    self.word = new;
                    if back {
                        self.fail(Problem::VersionBack);
                    }
                }
            }
            WordOp::ReadOwner => node.outcome.owner = Some(self.word),
            WordOp::ReadHolders => {
                node.outcome.holders = Some(NodeSet::from_words(&[u64::from(self.bits)]));
            }
        }
    }

    /// The holder bit of a node, where it is kept.
    pub(super) fn bit(&self, i: usize) -> bool {
        if self.far >> i & 1 == 1 {
            self.bits >> i & 1 == 1
        } else {
            self.word.near >> i & 1 == 1
        }
    }

    /// A fetch-and-add on a holder bit.
    fn flip(&mut self, i: usize, on: bool) {
        let before = self.bit(i);
        self.nodes[i].outcome.bit = Some(before);
        if self.far >> i & 1 == 1 {
            self.bits ^= 1 << i;
        } else {
            self.word.near ^= 1 << i;
        }
        if before == on {
            self.fail(Problem::Carry);
        }
    }

    /// The user does what it was asked for: writes back, drops caches.
    fn bring(&mut self, options: &Options, i: usize) {
        let node = &mut self.nodes[i];
        node.asked = false;
        let event = if let &Phase::Flushing { to } = node.fsm.phase() {
            let modified = std::mem::take(&mut node.modified);
            let version = node.fsm.version() + u64::from(modified);
            node.versions.cached = version;
            if modified {
                self.store_fresh = true;
                node.versions.stored = version;
            }
            // A holder that changed nothing still passes on what the one before it has not yet confirmed.
            let needs_confirm = options.confirm && self.confirmed < version;
            match to {
                None if needs_confirm => node.push(version),
                _ => node.versions.kept = needs_confirm.then_some(version),
            }
            Event::Flushed {
                modified,
                needs_confirm,
                payload: Some(version.to_le_bytes()[..].into()),
            }
        } else {
            Event::Invalidated
        };
        self.event(options, i, event);
    }

    fn apply(&mut self, options: &Options, step: Step) {
        match step {
            Step::Operation(i) => self.operation(i),
            Step::Completion(i) => {
                let node = &mut self.nodes[i];
                node.done = 0;
                let outcome = std::mem::take(&mut node.outcome);
                self.event(options, i, Event::BatchDone(outcome));
            }
            Step::Loss(i) => {
                self.losses -= 1;
                self.nodes[i].done = 0;
                self.nodes[i].outcome = Outcome::default();
                self.event(options, i, Event::BatchLost);
            }
            Step::Reconnect(i) => self.event(options, i, Event::Reconnected),
            Step::Message(from, to) => {
                if let Some((epoch, body)) = self.channels[from][to].pop_front() {
                    let sender = &mut self.nodes[from];
                    sender.place.unheard[to] = sender.place.unheard[to].saturating_sub(1);
                    let message = Event::Message {
                        from: NodeId(from as u16),
                        incarnation: sender.incarnation,
                        epoch: epoch.into(),
                        body,
                    };
                    self.event(options, to, message);
                }
            }
            Step::Use(i, modify) => {
                if modify {
                    self.nodes[i].modified = true;
                    self.store_fresh = false;
                    for j in 0..NODES {
                        self.nodes[j].fresh &= j == i;
                    }
                }
                self.event(options, i, Event::Used);
            }
            Step::Bring(i) => self.bring(options, i),
            Step::Confirm(i) => {
                let version = self.nodes[i].versions.confirm.remove(0);
                self.confirmed = self.confirmed.max(version);
                self.event(options, i, Event::Confirmed { version });
            }
            Step::Settle(i) => self.event(options, i, Event::Settle),
            Step::Want(i, mode) => {
                self.nodes[i].budget -= 1;
                self.event(options, i, Event::Want(mode));
            }
            Step::Release(i) => self.event(options, i, Event::Release),
            Step::Downgrade(i) => self.event(options, i, Event::Downgrade),
            Step::Leave(i) => {
                self.nodes[i].left = true;
                self.nodes[i].budget = 0;
            }
            Step::Gone(i, gone) => {
                self.channels[i][gone].clear();
                self.event(options, i, Event::Gone(NodeId(gone as u16)));
            }
            Step::Membership(change) => self.change(options, change),
        }
        self.note_settled(options);
        self.check(options);
    }

    /// A node that has left may close its connections with a question of this one unread, that was asked on a guess.
    fn unanswered(&self, i: usize) -> Option<usize> {
        let at = usize::from(self.nodes[i].fsm.asked()?.0);
        let mut unread = self.channels[i][at].iter();
        let last = matches!((unread.next(), unread.next()), (Some((_, Body::Ask(_))), None));
        let over = self.nodes[at].left && self.nodes[at].fsm.is_idle() && self.channels[at][i].is_empty();
        (last && over).then_some(at)
    }

    /// What can become of the batch in flight.
    fn batch_steps(&self, i: usize, out: &mut Vec<Step>) {
        let node = &self.nodes[i];
        if let Some(batch) = node.fsm.batch() {
            match batch.posted() {
                None => out.push(Step::Reconnect(i)),
                Some(ops) => {
                    let complete = usize::from(node.done) == ops.iter().count();
                    out.push(if complete {
                        Step::Completion(i)
                    } else {
                        Step::Operation(i)
                    });
                    if self.losses > 0 {
                        out.push(Step::Loss(i));
                    }
                }
            }
        }
    }

    /// The steps possible, and whether any of them is one that happens by itself.
    fn steps(&self, options: &Options, out: &mut Vec<Step>) -> bool {
        out.extend(self.due().into_iter().map(Step::Membership));
        let mut inevitable = !out.is_empty();
        out.extend(self.possible().into_iter().map(Step::Membership));
        for i in (0..NODES).filter(|&i| self.alive(i)) {
            let node = &self.nodes[i];
            let fsm = &node.fsm;
            let before = out.len();
            self.batch_steps(i, out);
            for from in 0..NODES {
                if !self.channels[from][i].is_empty() {
                    out.push(Step::Message(from, i));
                }
            }
            if let Some(gone) = self.unanswered(i) {
                out.push(Step::Gone(i, gone));
            }
            if node.asked {
                out.push(Step::Bring(i));
            }
            if !node.versions.confirm.is_empty() {
                out.push(Step::Confirm(i));
            }
            if fsm.held().is_some() && fsm.is_at_rest() && !fsm.can_release() {
                let exclusive = fsm.held() == Some(Mode::Exclusive);
                if exclusive {
                    out.push(Step::Use(i, true));
                }
                if !exclusive || options.unmodified {
                    out.push(Step::Use(i, false));
                }
            }
            if node.left && fsm.can_release() {
                out.push(Step::Release(i));
            }
            inevitable |= out.len() > before;
            if node.left {
                continue;
            }
            if node.budget > 0 {
                for mode in [Mode::Shared, Mode::Exclusive] {
                    if fsm.can_want(mode) {
                        out.push(Step::Want(i, mode));
                    }
                }
            }
            if fsm.is_keeping() {
                out.push(Step::Settle(i));
            }
            if options.voluntary && fsm.can_release() {
                out.push(Step::Release(i));
                if fsm.can_downgrade() {
                    out.push(Step::Downgrade(i));
                }
            }
            if options.leave {
                out.push(Step::Leave(i));
            }
            // An operation that writes only after the first ones have read, revocation under way or not.
            if options.unmodified
                && !node.modified
                && fsm.held() == Some(Mode::Exclusive)
                && matches!(fsm.phase(), Phase::Flushing { .. })
            {
                out.push(Step::Use(i, true));
            }
        }
        inevitable
    }

    /// All successors, with a description if asked for, and whether the state may last for ever.
    pub(super) fn successors(&self, options: &Options, out: &mut Vec<Self>) -> bool {
        let mut steps = Vec::with_capacity(16);
        let inevitable = self.steps(options, &mut steps);
        for step in steps {
            let mut next = self.clone();
            next.apply(options, step);
            out.push(next);
        }
        !inevitable
    }

    /// Describes the `n`th step, for the trace of a problem.
    pub(super) fn describe(&self, options: &Options, n: usize) -> String {
        let mut steps = Vec::new();
        self.steps(options, &mut steps);
        match steps.get(n) {
            Some(&step @ Step::Operation(i)) => {
                let op = self.nodes[i].fsm.batch().and_then(|b| b.posted());
                let op = op.and_then(|p| p.iter().nth(self.nodes[i].done.into()));
                format!("{step:?} {op:?}")
            }
            Some(&step @ Step::Message(from, to)) => {
                format!("{step:?} {:?}", self.channels[from][to].front())
            }
            Some(step) => format!("{step:?}"),
            None => String::new(),
        }
    }

    pub(super) fn summary(&self) -> String {
        let nodes: Vec<String> = (0..NODES)
            .map(|i| {
                format!(
                    "{i}:{:?} {:?}",
                    self.nodes[i].fsm.held(),
                    self.nodes[i].fsm.phase()
                )
            })
            .collect();
        format!(
            "{:?} v{} near {:03b} far {:03b}{} | {}",
            self.word.writer,
            self.word.version,
            self.word.near,
            self.bits,
            if self.word.far { "!" } else { "" },
            nodes.join(" | ")
        )
    }

    /// What is wrong with a state in which nothing happens by itself.
    pub(super) fn quiescent_problem(&self) -> Option<Problem> {
        let channels_empty = self.channels.iter().flatten().all(VecDeque::is_empty);
        for (i, node) in self.nodes.iter().enumerate() {
            if !self.alive(i) {
                if !self.is_forgotten(i) {
                    return Some(Problem::RecordWrong);
                }
                continue;
            }
            if !node.fsm.is_settled() || !node.fsm.waits_for().is_empty() || !channels_empty {
                return Some(Problem::Stuck);
            }
            let held = node.fsm.held();
            let bit = self.bit(i);
            let named = self.word.writer == Some(NodeId(i as u16));
            let bit_right = match held {
                None => !bit,
                Some(Mode::Shared) => bit || node.fsm.is_keeping(),
                Some(Mode::Exclusive) => true,
            };
            let names = held == Some(Mode::Exclusive) || node.fsm.is_keeping();
            if !bit_right || named != names || (node.left && held.is_some()) {
                return Some(Problem::RecordWrong);
            }
        }
        None
    }
}
