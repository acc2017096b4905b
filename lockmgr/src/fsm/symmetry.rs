//! Nodes exchanged for each other: the model checker looks at one of the states that differ only in which node is which.

use super::Fsm;
use super::batch::{Batch, WordOp, WordOps};
use super::types::{Answer, Own, Phase, Readers, Search, Via};
use crate::ids::{NodeId, NodeSet};
use crate::msg::{Body, Waiter};
use crate::record::OwnerWord;

/// What names nodes, with every node exchanged for another.
pub(crate) trait Symmetry {
    fn exchanged(&self, f: &impl Fn(NodeId) -> NodeId) -> Self;
}

impl Symmetry for NodeSet {
    fn exchanged(&self, f: &impl Fn(NodeId) -> NodeId) -> Self {
        self.iter().map(f).collect()
    }
}

/// A set of near nodes, a bit each.
impl Symmetry for u16 {
    fn exchanged(&self, f: &impl Fn(NodeId) -> NodeId) -> Self {
        let nodes = (0..Self::BITS as Self).filter(|n| self >> n & 1 == 1);
        nodes.map(|n| 1 << f(NodeId(n)).0).sum()
    }
}

impl Symmetry for OwnerWord {
    fn exchanged(&self, f: &impl Fn(NodeId) -> NodeId) -> Self {
        Self {
            writer: self.writer.map(f),
            near: self.near.exchanged(f),
            ..*self
        }
    }
}

impl Symmetry for Vec<Waiter> {
    fn exchanged(&self, f: &impl Fn(NodeId) -> NodeId) -> Self {
        self.iter()
            .map(|w| Waiter {
                node: f(w.node),
                ..*w
            })
            .collect()
    }
}

impl Symmetry for Body {
    fn exchanged(&self, f: &impl Fn(NodeId) -> NodeId) -> Self {
        match self {
            Self::GrantX {
                version,
                granted,
                queue,
                payload,
            } => Self::GrantX {
                version: *version,
                granted: granted.exchanged(f),
                queue: queue.exchanged(f),
                payload: payload.clone(),
            },
            other => other.clone(),
        }
    }
}

impl Symmetry for WordOps {
    fn exchanged(&self, f: &impl Fn(NodeId) -> NodeId) -> Self {
        let op = |op: WordOp| match op {
            WordOp::Cas { expect, new } => WordOp::Cas {
                expect: expect.exchanged(f),
                new: new.exchanged(f),
            },
            WordOp::Move { from, to, bit } => WordOp::Move {
                from: from.exchanged(f),
                to: to.exchanged(f),
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

impl Symmetry for Fsm {
    fn exchanged(&self, f: &impl Fn(NodeId) -> NodeId) -> Self {
        Self {
            phase: match self.phase {
                Phase::Waiting { at } => Phase::Waiting { at: f(at) },
                Phase::HandingOver { to } => Phase::HandingOver { to: f(to) },
                Phase::LostUpgrade { to } => Phase::LostUpgrade { to: to.map(f) },
                other => other,
            },
            payload: self.payload.clone(),
            own: Own {
                queue: self.own.queue.exchanged(f),
                granted: self.own.granted.exchanged(f),
                ..self.own.clone()
            },
            search: Search {
                via: self.search.via.as_ref().map(|v| Via {
                    granter: f(v.granter),
                    version: v.version,
                    payload: v.payload.clone(),
                }),
                deferred: self.search.deferred.as_ref().map(|(from, answer)| {
                    let answer = match answer {
                        Answer::Exclusive {
                            version,
                            granted,
                            far,
                            queue,
                            payload,
                        } => Answer::Exclusive {
                            version: *version,
                            far: *far,
                            granted: granted.exchanged(f),
                            queue: queue.exchanged(f),
                            payload: payload.clone(),
                        },
                        other => other.clone(),
                    };
                    (f(*from), answer)
                }),
                last_owner: self.search.last_owner.map(f),
                granted_by: self.search.granted_by.map(f),
                seen: Readers {
                    near: self.search.seen.near.exchanged(f),
                    ..self.search.seen
                },
                ..self.search.clone()
            },
            answers: self.answers.exchanged(f),
            revokers: self.revokers.exchanged(f),
            batch: self.batch.map(|b| Batch {
                ops: b.ops.exchanged(f),
                ..b
            }),
            ..*self
        }
    }
}
