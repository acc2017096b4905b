//! Events, actions, phases and what the machine is configured with.

use crate::ids::{Mode, NodeId, NodeSet};
use crate::msg::{Body, Payload, Waiter};
use crate::record::{NEAR_NODES, OwnerWord};

use super::batch::{Outcome, WordOps};

/// What a state machine has to know about its node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Config {
    /// This node.
    pub node: NodeId,
    /// Its incarnation.
    pub incarnation: u8,
    /// Keep a shared lease when only readers wait.
    pub keep_shared: bool,
    /// Keep the word, too, once they have been granted, until [`Event::Settle`]. Only with `keep_shared`.
    pub keep_word: bool,
    /// Ask the last owner known first, before looking at the record.
    pub ask_first: bool,
    /// Nodes below this have their holder bit in the owner word.
    pub near_nodes: u16,
    /// The membership's epoch: one more with each death.
    pub epoch: u64,
    /// The dead whose words and bits are being taken back. While there are any nothing new is acquired.
    pub dead: NodeSet,
    /// Rules to break, one bit each, for tests of the model checker.
    #[cfg(any(test, feature = "flaws"))]
    pub flaws: u32,
}

impl Config {
    /// The configuration of a node that keeps a shared lease, but not the word, when only readers wait.
    #[must_use]
    pub fn new(node: NodeId, incarnation: u8) -> Self {
        Self {
            node,
            incarnation,
            keep_shared: true,
            keep_word: false,
            ask_first: true,
            near_nodes: NEAR_NODES,
            epoch: 0,
            dead: NodeSet::new(),
            #[cfg(any(test, feature = "flaws"))]
            flaws: 0,
        }
    }

    /// Is the holder bit of this node in the owner word?
    pub(super) fn is_near(&self) -> bool {
        self.node.0 < self.near_nodes
    }

    /// Are leases of the dead being taken back?
    pub(super) fn is_recovering(&self) -> bool {
        !self.dead.is_empty()
    }

    /// Is any of these nodes one whose holder bit is in the map?
    pub(super) fn any_far(&self, nodes: &NodeSet) -> bool {
        nodes.iter().any(|node| node.0 >= self.near_nodes)
    }

    #[cfg(any(test, feature = "flaws"))]
    pub(crate) fn flaw(&self, flaw: Flaw) -> bool {
        self.flaws >> flaw as u32 & 1 == 1
    }

    #[cfg(not(any(test, feature = "flaws")))]
    #[allow(clippy::unused_self)]
    pub(crate) const fn flaw(&self, _flaw: Flaw) -> bool {
        false
    }
}

/// A rule broken on purpose, to show that the model checker finds what happens then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Flaw {
    /// DONE at once while a shared acquisition is in flight.
    DoneWhileAcquiring,
    /// DONE at once while the word is freed and a shared lease kept.
    DoneWhileFreeing,
    /// DONE when the user has been asked to invalidate, not when it has.
    DoneBeforeInvalidated,
    /// RETRY to those who ask while the own exclusive acquisition is in flight.
    RetryWhileAcquiring,
    /// RETRY to those who ask while this node waits to become the owner.
    RetryWhileWaiting,
    /// RETRY to those who ask while a hand-over or release is in flight.
    RetryWhileReleasing,
    /// The own bit stays on when the word is released.
    BitLeftOn,
    /// The version of a shared grant is taken from the word.
    VersionFromWord,
    /// Exclusive after a run of readers without revoking them.
    GrantedForgotten,
    /// The word is freed or handed over before the readers have acknowledged.
    FreeBeforeAcks,
    /// A flush does not move the version.
    VersionNotMoved,
    /// Hand-over while the user still has the shared caches it was let keep.
    HandOverWithCaches,
    /// The word is freed before the user has confirmed.
    FreeUnconfirmed,
    /// After a lost connection the whole batch is posted again.
    RepostAll,
    /// An upgrade that loses keeps its shared lease.
    LoserKeepsShared,
    /// The owner that kept the word takes the exclusive lease again without revoking the readers it granted.
    KeptWithoutRevoking,
    /// A confirmation counts whatever version it is of.
    AnyConfirmation,
    /// An exclusive acquisition does not mind the holders in the owner word.
    NearForgotten,
    /// A far reader does not say in the word that there is one.
    FarUnsaid,
    /// The word is released without saying that far readers were granted.
    FarForgotten,
    /// Who waited here in an earlier epoch still does, though it asks again.
    QueueOutlivesEpoch,
    /// A request of an earlier epoch is queued, though it is made again.
    OldRequestTaken,
    /// Leases are acquired while those of the dead are being taken back.
    AcquiredWhileRecovering,
    /// A node says it has reached the epoch while it hands over or acquires.
    BatchOutlivesEpoch,
    /// A shared lease that one of the dead granted, with attributes that nobody else has, is kept.
    GrantOfDeadKept,
    /// What comes from the dead is taken after their epoch.
    DeadHeard,
    /// Those that wait do not ask again after an epoch.
    NotAskedAgain,
}

/// What happens to a state machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The user wants a lease; only if [`super::Fsm::can_want`].
    Want(Mode),
    /// At least one operation has run under the lease held.
    Used,
    /// The user does not need the lease; only if [`super::Fsm::can_release`].
    Release,
    /// A shared lease is enough; only if [`super::Fsm::can_downgrade`].
    Downgrade,
    /// Answer to [`Action::Flush`].
    Flushed {
        /// The data or attributes were changed under the lease.
        modified: bool,
        /// The word must not be freed before [`Event::Confirmed`] for the version of this flush.
        needs_confirm: bool,
        /// Attributes for the next holder.
        payload: Option<Payload>,
    },
    /// Answer to [`Action::Invalidate`].
    Invalidated,
    /// The word has been kept long enough; only if [`super::Fsm::is_keeping`].
    Settle,
    /// What the user flushed has reached its authority; in answer to [`Action::Confirm`], or earlier.
    Confirmed {
        /// Version of the data after that flush.
        version: u64,
    },
    /// The batch has taken effect.
    BatchDone(Outcome),
    /// The connection broke while the batch was in flight; which of its operations took effect is unknown.
    BatchLost,
    /// A node cannot be reached any more: what it was asked only because it was the last owner known, it will not
    /// answer.
    Gone(NodeId),
    /// A connection to the storage node exists again, and no operation of the old one can still land.
    Reconnected,
    /// A new epoch has begun: [`Config::epoch`] and [`Config::dead`] say which, and who is dead.
    Epoch,
    /// Everything of the dead has been taken back, and [`Config::dead`] is empty.
    Resume,
    /// A message has arrived.
    Message {
        /// The sender.
        from: NodeId,
        /// The sender's incarnation.
        incarnation: u8,
        /// The sender's epoch.
        epoch: u64,
        /// What it says.
        body: Body,
    },
}

/// What a state machine asks for; to be done in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Post these operations as one batch.
    Post(WordOps),
    /// Send a message.
    Send {
        /// To whom.
        to: NodeId,
        /// What.
        body: Body,
    },
    /// The user must write back what it changed, and give up its caches or keep them for reading only.
    Flush {
        /// What it keeps.
        to: Option<Mode>,
    },
    /// The user must stop using its shared lease.
    Invalidate,
    /// The word is about to be freed: the user must tell its authority what it flushed last, if that has not
    /// happened, and report [`Event::Confirmed`].
    Confirm {
        /// Version of the data.
        version: u64,
    },
    /// The user has a lease.
    Granted {
        /// Its mode.
        mode: Mode,
        /// Version of the data; caches of the same version are valid.
        version: u64,
        /// Attributes, if they came from another node (or were the user's own, when it kept the lease).
        payload: Option<Payload>,
    },
}

/// Where a state machine is in the protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Holding a lease or none.
    #[default]
    Rest,
    /// The batch that takes the bit, or the word, is in flight (or a repair of the word).
    Acquiring,
    /// The word is ours; readers have been asked to let go.
    Revoking,
    /// WANT has been sent.
    Waiting {
        /// To the writer found.
        at: NodeId,
    },
    /// Something is wanted, and asked for when leases of the dead have been taken back.
    Paused,
    /// The user is writing back.
    Flushing {
        /// What it keeps.
        to: Option<Mode>,
    },
    /// The word is ours, readers have been granted, and the user keeps reading: it may well write again, or
    /// others may read, so the word is not freed at once.
    Keeping,
    /// Ready to free the word, but the user has not confirmed.
    Confirming,
    /// Readers have been granted; not all have acknowledged.
    Granting,
    /// The user kept shared caches, and must drop them before the hand-over.
    DropBeforeHand,
    /// The batch that names the next writer is in flight.
    HandingOver {
        /// The next writer.
        to: NodeId,
    },
    /// The batch that frees the word is in flight.
    Freeing,
    /// The user is dropping its shared caches.
    DropShared,
    /// As `DropShared`; the upgrade it was held for has lost.
    LostUpgrade {
        /// To whom; none: an epoch has begun since, and the record is looked at again.
        to: Option<NodeId>,
    },
    /// The batch that takes the own bit back is in flight.
    ClearingBit,
}

impl Phase {
    /// A name for humans.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Rest => "rest",
            Self::Acquiring => "acquiring",
            Self::Revoking => "revoking readers",
            Self::Waiting { .. } => "waiting for grant",
            Self::Paused => "waiting for recovery",
            Self::Flushing { .. } => "flushing",
            Self::Keeping => "sharing",
            Self::Confirming => "awaiting confirmation",
            Self::Granting => "granting readers",
            Self::DropBeforeHand => "invalidating before hand-over",
            Self::HandingOver { .. } => "handing over",
            Self::Freeing => "freeing",
            Self::DropShared => "invalidating",
            Self::LostUpgrade { .. } => "invalidating after lost upgrade",
            Self::ClearingBit => "releasing shared",
        }
    }
}

/// What a node keeps as owner of the word.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Own {
    /// The version in the word.
    pub(super) word_version: u64,
    /// What the word says of far holders.
    pub(super) word_far: bool,
    /// After the flush: the version of the data.
    pub(super) new_version: u64,
    /// After the flush: the word must not be freed before the user confirms.
    pub(super) unconfirmed: bool,
    /// Who waits, in the order of arrival.
    pub(super) queue: Vec<Waiter>,
    /// After the flush: readers that were granted.
    pub(super) granted: NodeSet,
}

/// What a node knows of the owner and of other readers while it is not the owner.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Search {
    /// Who else was reading when this node got its shared lease.
    pub(super) seen: Readers,
    /// The grant that the shared acquisition in flight follows up.
    pub(super) via: Option<Via>,
    /// Who owned the word when this node last heard of it: asked first, once.
    pub(super) last_owner: Option<NodeId>,
    /// The node waited for was asked without a look at the record.
    pub(super) asking: bool,
    /// An answer that came before the own bit was off.
    pub(super) deferred: Option<(NodeId, Answer)>,
    /// Who granted the shared lease held, if it came with attributes that the authority may not have.
    pub(super) granted_by: Option<NodeId>,
    /// That one is dead: the lease must go.
    pub(super) tainted: bool,
}

/// Who else reads, as far as a node with a shared lease knows: what it expects of the word when it upgrades.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(super) struct Readers {
    pub(super) near: u16,
    pub(super) far: bool,
}

impl Readers {
    /// Those of a set.
    pub(super) fn of(cfg: &Config, nodes: &NodeSet) -> Self {
        let near = nodes.words().next().unwrap_or(0) & ((1 << cfg.near_nodes) - 1);
        Self {
            near: near as u16,
            far: cfg.any_far(nodes),
        }
    }

    /// Those a word names.
    pub(super) fn in_word(word: OwnerWord) -> Self {
        Self {
            near: word.near,
            far: word.far,
        }
    }
}

/// The grant behind a shared acquisition.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Via {
    pub(super) granter: NodeId,
    pub(super) version: u64,
    pub(super) payload: Option<Payload>,
}

/// The answer to a WANT.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Answer {
    Shared {
        version: u64,
        payload: Option<Payload>,
    },
    Exclusive {
        version: u64,
        granted: NodeSet,
        /// The word says that there are far readers.
        far: bool,
        queue: Vec<Waiter>,
        payload: Option<Payload>,
    },
    Retry,
}
