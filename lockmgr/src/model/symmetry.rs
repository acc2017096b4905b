//! States that differ only in the names of the nodes are one.

use std::hash::{Hash, Hasher};

use super::node::Node;
use super::options::{NODES, Options};
use super::state::State;
use super::view::Place;
use crate::fsm::Outcome;
use crate::fsm::symmetry::Symmetry;
use crate::ids::NodeId;

impl State {
    fn permuted(&self, p: [usize; NODES]) -> Self {
        let f = |n: NodeId| NodeId(p[usize::from(n.0)] as u16);
        let mut s = self.clone();
        s.word = self.word.exchanged(&f);
        let moved = |set: u8| (0..NODES).map(|i| (set >> i & 1) << p[i]).sum();
        s.bits = moved(self.bits);
        s.far = moved(self.far);
        s.membership.fenced = moved(self.membership.fenced);
        s.membership.recovered = moved(self.membership.recovered);
        for i in 0..NODES {
            let node = &self.nodes[i];
            s.nodes[p[i]] = Node {
                fsm: node.fsm.exchanged(&f),
                outcome: Outcome {
                    owner: node.outcome.owner.map(|w| w.exchanged(&f)),
                    holders: node.outcome.holders.as_ref().map(|h| h.exchanged(&f)),
                    bit: node.outcome.bit,
                },
                place: Place {
                    dead: moved(node.place.dead),
                    unheard: std::array::from_fn(|to| {
                        let from = p.iter().position(|&t| t == to).unwrap_or(to);
                        node.place.unheard[from]
                    }),
                    ..node.place.clone()
                },
                ..node.clone()
            };
            for j in 0..NODES {
                s.channels[p[i]][p[j]] = self.channels[i][j]
                    .iter()
                    .map(|(epoch, body)| (*epoch, body.exchanged(&f)))
                    .collect();
            }
        }
        s
    }

    fn digest(&self) -> u64 {
        let mut h = Folded(0x243f_6a88_85a3_08d3);
        self.hash(&mut h);
        h.finish()
    }

    /// Tells nodes apart cheaply, so that few permutations need the full digest.
    fn key(&self, i: usize) -> u64 {
        let n = &self.nodes[i];
        let mut h = Folded(0x1319_8a2e_0370_7344);
        (
            n.budget,
            n.fresh,
            &n.versions,
            n.asked,
            n.done,
            n.left,
            n.modified,
        )
            .hash(&mut h);
        (self.alive(i), n.incarnation, n.place.epoch, n.place.settled).hash(&mut h);
        (n.fsm.held(), n.fsm.wanted(), n.fsm.version(), n.fsm.queued()).hash(&mut h);
        std::mem::discriminant(n.fsm.phase()).hash(&mut h);
        n.fsm.batch().map(|b| (b.kind, b.state)).hash(&mut h);
        let named = self.word.writer == Some(NodeId(i as u16));
        (
            self.bits >> i & 1,
            self.word.near >> i & 1,
            self.far >> i & 1,
            named,
        )
            .hash(&mut h);
        for j in 0..NODES {
            // Sums do not depend on the names of the others.
            h.0 =
                h.0.wrapping_add((self.channels[i][j].len() as u64) << 8 | self.channels[j][i].len() as u64);
        }
        h.finish()
    }

    /// A number that equivalent states share.
    pub(super) fn fingerprint(&self, options: &Options) -> u64 {
        if !options.symmetry {
            return self.digest();
        }
        let k = [self.key(0), self.key(1), self.key(2)];
        const ALL: [[usize; NODES]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
        let mut best = u64::MAX;
        for p in ALL {
            let mut sorted = [0; NODES];
            for i in 0..NODES {
                sorted[p[i]] = k[i];
            }
            if sorted.is_sorted() {
                let d = if p == [0, 1, 2] {
                    self.digest()
                } else {
                    self.permuted(p).digest()
                };
                best = best.min(d);
            }
        }
        best
    }
}

/// A hash of 64 well mixed bits; the default one is too slow for this many states.
struct Folded(u64);

impl Folded {
    fn mix(&mut self, x: u64) {
        let wide = u128::from(self.0 ^ x) * u128::from(0x9e37_79b9_7f4a_7c15_u64 | 1);
        self.0 = (wide as u64 ^ (wide >> 64) as u64)
            .wrapping_add(0xa076_1d64_78bd_642f)
            .rotate_left(23);
    }
}

impl Hasher for Folded {
    fn finish(&self) -> u64 {
        let mut last = Self(self.0);
        last.mix(0xe703_7ed1_a0b4_28db);
        last.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.mix(u64::from_le_bytes(word));
        }
    }
    fn write_u8(&mut self, i: u8) {
        self.mix(i.into());
    }
    fn write_u16(&mut self, i: u16) {
        self.mix(i.into());
    }
    fn write_u64(&mut self, i: u64) {
        self.mix(i);
    }
    fn write_usize(&mut self, i: usize) {
        self.mix(i as u64);
    }
}
