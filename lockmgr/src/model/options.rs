//! What is explored, and what may be found.

use crate::fsm::Violation;

/// Nodes in the model.
pub(super) const NODES: usize = 3;

/// What is explored.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How many leases each node asks for.
    pub budget: [u8; NODES],
    /// Owners keep a shared lease when only readers wait.
    pub keep_shared: bool,
    /// They keep the word as well (only with `keep_shared`).
    pub keep_word: bool,
    /// Nodes ask the last owner known before they look at the record.
    pub ask_first: bool,
    /// How many nodes have their holder bit in the owner word: the first ones.
    pub near: u8,
    /// Exclusive tenures may end without a modification.
    pub unmodified: bool,
    /// Leases may be released or downgraded with nobody asking.
    pub voluntary: bool,
    /// Every modification must be confirmed before the word is freed.
    pub confirm: bool,
    /// Nodes may leave: they release everything and ask for nothing more.
    pub leave: bool,
    /// How many batches may be lost with their connection.
    pub losses: u8,
    /// How many nodes may die, at any step.
    pub crashes: u8,
    /// How many may come back, with an incarnation of their own, and ask for one lease.
    pub restarts: u8,
    /// Rules to break (see [`crate::fsm::Flaw`]); no effect unless built for tests or with feature `flaws`.
    pub flaws: u32,
    /// Nodes with equal budgets are interchangeable.
    pub symmetry: bool,
    /// Needs far less memory; traces are not the shortest.
    pub depth_first: bool,
    /// Give up after so many states.
    pub max_states: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            budget: [2, 2, 1],
            keep_shared: true,
            keep_word: true,
            ask_first: true,
            near: NODES as u8,
            unmodified: false,
            voluntary: true,
            confirm: false,
            leave: false,
            losses: 0,
            crashes: 0,
            restarts: 0,
            flaws: 0,
            symmetry: true,
            depth_first: false,
            max_states: 200_000_000,
        }
    }
}

/// What is wrong with a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Problem {
    /// Two leases that exclude each other.
    MutualExclusion,
    /// Valid caches show old data.
    Stale,
    /// The state machine holds a lease for another version than it told the user.
    WrongVersion,
    /// Attributes of another version than the one granted.
    WrongPayload,
    /// A fetch-and-add carried out of its bit.
    Carry,
    /// The version of the word went back.
    VersionBack,
    /// A free word with a version that nobody confirmed.
    Unconfirmed,
    /// The state machine found a rule broken.
    Violation(Violation),
    /// A channel grows without bound.
    ChannelFull,
    /// Nothing can happen, but somebody waits.
    Stuck,
    /// Nothing can happen, but the bits or the word do not show the leases.
    RecordWrong,
    /// An execution that never ends.
    Cycle,
    /// Too many states.
    Limit,
}
