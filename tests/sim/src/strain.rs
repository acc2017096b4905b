//! Nodes that are stopped for a while, and links that are silent, in one direction or in both.

use std::time::Duration;

use crate::chance::{below, once_in, one_of, wait};
use crate::world::{Node, World};

/// The term that mounts have, as the cluster is configured.
pub const TERM: Duration = Duration::from_secs(10);

/// What a phase has to bear besides processes that die.
#[derive(Debug, Clone)]
pub enum Strain {
    /// A node is stopped. If it is deaf meanwhile, nothing that others do on its memory happens before it goes on.
    Stop {
        /// Which.
        node: Node,
        /// For how long.
        time: Duration,
        /// See above.
        deaf: bool,
    },
    /// Nothing comes from the first to the second.
    Silence {
        /// From which node to which.
        ways: Vec<[Node; 2]>,
        /// For how long.
        time: Duration,
        /// Then what was sent meanwhile is lost, with the connections.
        lost: bool,
    },
}

/// A time between a fraction of the term and three terms.
fn time() -> Duration {
    let least = one_of(&[TERM / 50, TERM / 2, TERM, TERM * 2]);
    let more = one_of(&[TERM / 50, TERM / 2, TERM]);
    least + Duration::from_nanos(below(more.as_nanos() as u64))
}

impl Strain {
    /// As the seed says. A mount is the one that is given, for others have to go on.
    #[must_use]
    pub fn drawn(world: &World, victim: usize, mounts: usize) -> Self {
        let storage = Node::Storage(below(world.nodes() as u64) as usize);
        let victim = Node::Mount(victim);
        if once_in(2) {
            return Self::Stop {
                node: one_of(&[victim, victim, storage, Node::Meta]),
                time: time(),
                deaf: once_in(2),
            };
        }
        let other = Node::Mount(below(mounts as u64) as usize);
        let mut pairs = vec![one_of(&[
            [victim, Node::Meta],
            [victim, Node::Meta],
            [victim, storage],
            [victim, other],
            [Node::Meta, storage],
        ])];
        // Cut off from others as well, so that nobody but time tells them anything.
        if pairs[0] == [victim, Node::Meta] && once_in(2) {
            pairs.extend((0..mounts).map(|n| [victim, Node::Mount(n)]));
        }
        pairs.retain(|[a, b]| a != b);
        let which = below(3);
        let ways = pairs.into_iter().flat_map(|[a, b]| match which {
            0 => vec![[a, b]],
            1 => vec![[b, a]],
            _ => vec![[a, b], [b, a]],
        });
        Self::Silence {
            ways: ways.collect(),
            time: time(),
            lost: once_in(2),
        }
    }

    /// May the metadata server declare this node dead for it?
    #[must_use]
    pub fn may_kill(&self, node: Node) -> bool {
        match self {
            Self::Stop { node: stopped, .. } => *stopped == node,
            Self::Silence { ways, .. } => ways
                .iter()
                .any(|way| way.contains(&node) && way.contains(&Node::Meta)),
        }
    }

    /// May a server be away for so long that who waits for a lease gives up?
    #[must_use]
    pub fn is_long(&self) -> bool {
        let is = |node: &Node| matches!(node, Node::Storage(_) | Node::Meta);
        match self {
            Self::Stop { node, .. } => is(node),
            Self::Silence { ways, .. } => ways.iter().any(|way| way.iter().all(is)) || self.is_storage(),
        }
    }

    /// May calls fail because a storage node does not answer?
    #[must_use]
    pub fn is_storage(&self) -> bool {
        let is = |node: &Node| matches!(node, Node::Storage(_));
        match self {
            Self::Stop { node, .. } => is(node),
            Self::Silence { ways, .. } => ways.iter().flatten().any(is),
        }
    }

    /// Has it happen: begins within `soon`.
    pub fn make(&self, world: &World, mounts: &[(String, u32)], soon: Duration) {
        wait(soon);
        rt::sim::note(&format!("{self:?}"));
        match self {
            Self::Stop { node, time, deaf } => {
                let stopped = world.stop_node(*node, mounts, *deaf);
                rt::thread::sleep(*time);
                if let Some(stopped) = stopped {
                    world.go_on(stopped);
                }
            }
            Self::Silence { ways, time, lost } => {
                let addr = |node: &Node| world.whereabouts(*node, mounts).map(|(addr, _)| addr);
                let named = ways.iter().filter_map(|[a, b]| Some([addr(a)?, addr(b)?]));
                let named: Vec<[String; 2]> = named.collect();
                for [from, to] in &named {
                    world.silence([from, to]);
                }
                rt::thread::sleep(*time);
                for [from, to] in &named {
                    if *lost {
                        world.cut([from, to]);
                    }
                    world.hear([from, to]);
                }
            }
        }
        rt::sim::note(&"it is over");
    }
}
