//! Renaming of nodes, for the symmetry reduction of the model checker.

use super::Fsm;
use super::batch::{Batch, WordOp, WordOps};
use super::types::{Answer, Phase, Readers, Via};
use crate::ids::{NodeId, NodeSet};
use crate::msg::{Body, Waiter};
use crate::record::OwnerWord;

/// Gives every node another name.
pub(crate) trait Rename {
    fn rename(&self, f: &impl Fn(NodeId) -> NodeId) -> Self;
}

impl Rename for NodeSet {
    fn rename(&self, f: &impl Fn(NodeId) -> NodeId) -> Self {
        self.iter().map(f).collect()
    }
}

/// A set of near nodes, a bit each.
impl Rename for u16 {
    fn rename(&self, f: &impl Fn(NodeId) -> NodeId) -> Self {
        let nodes = (0..Self::BITS as Self).filter(|n| self >> n & 1 == 1);
        nodes.map(|n| 1 << f(NodeId(n)).0).sum()
    }
}

impl Rename for OwnerWord {
    fn rename(&self, f: &impl Fn(NodeId) -> NodeId) -> Self {
        Self {
            writer: self.writer.map(f),
            near: self.near.rename(f),
            ..*self
        }
    }
}

impl Rename for Vec<Waiter> {
    fn rename(&self, f: &impl Fn(NodeId) -> NodeId) -> Self {
        self.iter()
            .map(|w| Waiter {
                node: f(w.node),
                ..*w
            })
            .collect()
    }
}

impl Rename for Body {
    fn rename(&self, f: &impl Fn(NodeId) -> NodeId) -> Self {
        match self {
            Self::GrantX {
                version,
                granted,
                queue,
                payload,
            } => Self::GrantX {
                version: *version,
                granted: granted.rename(f),
                queue: queue.rename(f),
                payload: payload.clone(),
            },
            other => other.clone(),
        }
    }
}

impl Rename for WordOps {
    fn rename(&self, f: &impl Fn(NodeId) -> NodeId) -> Self {
        let op = |op: WordOp| match op {
            WordOp::Cas { expect, new } => WordOp::Cas {
                expect: expect.rename(f),
                new: new.rename(f),
            },
            WordOp::Move { from, to, bit } => WordOp::Move {
                from: from.rename(f),
                to: to.rename(f),
                bit,
            },
            other => other,
        };
        Self {
            first: op(self.first),
            second: self.second.map(op),
        }
    }
}

impl Rename for Fsm {
    fn rename(&self, f: &impl Fn(NodeId) -> NodeId) -> Self {
        Self {
            phase: match self.phase {
                Phase::Waiting { at } => Phase::Waiting { at: f(at) },
                Phase::HandingOver { to } => Phase::HandingOver { to: f(to) },
                Phase::LostUpgrade { to } => Phase::LostUpgrade { to: f(to) },
                other => other,
            },
            payload: self.payload.clone(),
            queue: self.queue.rename(f),
            granted: self.granted.rename(f),
            answers: self.answers.rename(f),
            revokers: self.revokers.rename(f),
            via: self.via.as_ref().map(|v| Via {
                granter: f(v.granter),
                version: v.version,
                payload: v.payload.clone(),
            }),
            deferred: self.deferred.as_ref().map(|(from, answer)| {
                let answer = match answer {
                    Answer::Exclusive {
                        version,
                        granted,
                        queue,
                        payload,
                    } => Answer::Exclusive {
                        version: *version,
                        granted: granted.rename(f),
                        queue: queue.rename(f),
                        payload: payload.clone(),
                    },
                    other => other.clone(),
                };
                (f(*from), answer)
            }),
            last_owner: self.last_owner.map(f),
            seen: Readers {
                near: self.seen.near.rename(f),
                ..self.seen
            },
            batch: self.batch.map(|b| Batch {
                ops: b.ops.rename(f),
                ..b
            }),
            ..*self
        }
    }
}
