//! One node of the model: the state machine, and what its user knows.

use super::membership::{self, Place};
use super::options::Options;
use crate::fsm::{Config, Fsm, Outcome};
use crate::ids::NodeId;

#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Node {
    pub(super) fsm: Fsm,
    /// Operations of the batch that have taken effect.
    pub(super) done: u8,
    pub(super) outcome: Outcome,
    /// Version under which the user keeps its caches, and whether they show what was last written.
    pub(super) cached: u64,
    pub(super) fresh: bool,
    pub(super) modified: bool,
    /// The user has been asked to bring its caches down.
    pub(super) asked: bool,
    /// Versions that are on their way to the authority.
    pub(super) confirm: Vec<u64>,
    pub(super) left: bool,
    pub(super) budget: u8,
    pub(super) incarnation: u8,
    /// The last version that it stored.
    pub(super) stored: u64,
    /// A version that the authority may not have, and that goes there when the lease is handed on or an epoch begins.
    pub(super) kept: Option<u64>,
    /// In the membership.
    pub(super) place: Place,
}

pub(super) fn config(options: &Options, i: usize, node: &Node) -> Config {
    let mut cfg = Config::new(NodeId(i as u16), node.incarnation);
    cfg.epoch = node.place.epoch.into();
    cfg.dead = membership::set(node.place.dead);
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
            cached: 0,
            fresh: true,
            modified: false,
            asked: false,
            confirm: Vec::new(),
            left: false,
            budget,
            incarnation: 1,
            stored: 0,
            kept: None,
            place: Place::default(),
        }
    }

    /// The user tells the authority about a version.
    pub(super) fn push(&mut self, version: u64) {
        self.kept.take_if(|kept| *kept == version);
        if !self.confirm.contains(&version) {
            self.confirm.push(version);
        }
    }
}
