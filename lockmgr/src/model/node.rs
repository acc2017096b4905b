//! One node of the model: the state machine, and what its user knows.

use super::options::Options;
use super::view::Place;
use crate::fsm::{Config, Fsm, Outcome};
use crate::ids::{NodeId, NodeSet};

/// Versions that its user deals with.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Versions {
    /// That under which it keeps its caches.
    pub(super) cached: u64,
    /// The last one that it stored.
    pub(super) stored: u64,
    /// One that the authority may not have, and that goes there when the lease is handed on or an epoch begins.
    pub(super) kept: Option<u64>,
    /// Those that are on their way to the authority.
    pub(super) confirm: Vec<u64>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Node {
    pub(super) fsm: Fsm,
    /// Operations of the batch that have taken effect.
    pub(super) done: u8,
    pub(super) outcome: Outcome,
    pub(super) versions: Versions,
    /// Its user's caches show what was last written.
    pub(super) fresh: bool,
    pub(super) modified: bool,
    /// The user has been asked to bring its caches down.
    pub(super) asked: bool,
    pub(super) left: bool,
    pub(super) budget: u8,
    pub(super) incarnation: u8,
    /// In the membership.
    pub(super) place: Place,
}

pub(super) fn config(options: &Options, i: usize, node: &Node) -> Config {
    let mut cfg = Config::new(NodeId(i as u16), node.incarnation);
    cfg.epoch = node.place.epoch.into();
    cfg.dead = NodeSet::from_words(&[node.place.dead.into()]);
    cfg.keep_shared = options.keep_shared;
    cfg.keep_word = options.keep_word;
    cfg.ask_first = options.ask_first;
    cfg.near_nodes = options.near.into();
    #[cfg(any(test, feature = "flaws"))]
    {
        cfg.flaws = options.flaws;
    }
    cfg
}

impl Node {
    /// It holds nothing, and asks for leases so often.
    pub(super) fn new(budget: u8) -> Self {
        Self {
            fsm: Fsm::new(),
            done: 0,
            outcome: Outcome::default(),
            versions: Versions::default(),
            fresh: true,
            modified: false,
            asked: false,
            left: false,
            budget,
            incarnation: 1,
            place: Place::default(),
        }
    }

    /// The user tells the authority about a version.
    pub(super) fn push(&mut self, version: u64) {
        self.versions.kept.take_if(|kept| *kept == version);
        if !self.versions.confirm.contains(&version) {
            self.versions.confirm.push(version);
        }
    }
}
