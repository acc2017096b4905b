//! Rules of the product left out, to see that the simulation finds what they are for.

use std::str::FromStr;

use fsd_meta::rules::Flaw as MetaFlaw;
use fsd_storage::blocks::Flaw as StorageFlaw;
use lockmgr::fsm::Flaw as LeaseFlaw;

/// Which rules are left out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flaws {
    /// One of the metadata server's.
    pub meta: Option<MetaFlaw>,
    /// One of the storage nodes'.
    pub storage: Option<StorageFlaw>,
    /// One of the lease manager's.
    pub leases: Option<LeaseFlaw>,
    /// One that the cluster is run by.
    pub cluster: Option<ClusterFlaw>,
}

/// A rule left out that is none of one program's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterFlaw {
    /// Terms have margins: here the least that a configuration may have.
    NoMargin,
    /// The rates of clocks differ by no more than that.
    ClocksApart,
    /// A mount answers nothing when its term has passed.
    AnsweredLate,
}

const CLUSTER: &[ClusterFlaw] = &[
    ClusterFlaw::NoMargin,
    ClusterFlaw::ClocksApart,
    ClusterFlaw::AnsweredLate,
];

const META: &[MetaFlaw] = &[
    MetaFlaw::NumbersEarly,
    MetaFlaw::FreedEarly,
    MetaFlaw::FreedForgotten,
    MetaFlaw::ReplayedAnyhow,
    MetaFlaw::LeftEarly,
    MetaFlaw::WindowForgotten,
    MetaFlaw::PlacesAgain,
    MetaFlaw::EndsNotCut,
    MetaFlaw::PauseBlamed,
    MetaFlaw::DeclaredEarly,
    MetaFlaw::NotFenced,
    MetaFlaw::SharedEarly,
    MetaFlaw::ReadEarly,
    MetaFlaw::ChangesUntold,
    MetaFlaw::TablesMixed,
    MetaFlaw::EraNotCleared,
];

const STORAGE: &[StorageFlaw] = &[
    StorageFlaw::MoveForgets,
    StorageFlaw::InPlace,
    StorageFlaw::EarlyReuse,
    StorageFlaw::IndexFirst,
    StorageFlaw::CleanBySlab,
    StorageFlaw::MarkedEarly,
];

const LEASES: &[LeaseFlaw] = &[
    LeaseFlaw::DoneWhileAcquiring,
    LeaseFlaw::DoneWhileFreeing,
    LeaseFlaw::DoneBeforeInvalidated,
    LeaseFlaw::RetryWhileAcquiring,
    LeaseFlaw::RetryWhileWaiting,
    LeaseFlaw::RetryWhileReleasing,
    LeaseFlaw::BitLeftOn,
    LeaseFlaw::VersionFromWord,
    LeaseFlaw::GrantedForgotten,
    LeaseFlaw::FreeBeforeAcks,
    LeaseFlaw::VersionNotMoved,
    LeaseFlaw::HandOverWithCaches,
    LeaseFlaw::FreeUnconfirmed,
    LeaseFlaw::RepostAll,
    LeaseFlaw::LoserKeepsShared,
    LeaseFlaw::KeptWithoutRevoking,
    LeaseFlaw::AnyConfirmation,
    LeaseFlaw::NearForgotten,
    LeaseFlaw::FarUnsaid,
    LeaseFlaw::FarForgotten,
    LeaseFlaw::QueueOutlivesEpoch,
    LeaseFlaw::OldRequestTaken,
    LeaseFlaw::AcquiredWhileRecovering,
    LeaseFlaw::BatchOutlivesEpoch,
    LeaseFlaw::GrantOfDeadKept,
    LeaseFlaw::DeadHeard,
    LeaseFlaw::NotAskedAgain,
];

impl Flaws {
    /// Each of them, with its name.
    #[must_use]
    pub fn all() -> Vec<(String, Self)> {
        let none = Self::default();
        let meta = META.iter().map(|f| {
            let meta = Some(*f);
            (format!("meta {f:?}"), Self { meta, ..none })
        });
        let storage = STORAGE.iter().map(|f| {
            let storage = Some(*f);
            (format!("storage {f:?}"), Self { storage, ..none })
        });
        let leases = LEASES.iter().map(|f| {
            let leases = Some(*f);
            (format!("leases {f:?}"), Self { leases, ..none })
        });
        let cluster = CLUSTER.iter().map(|f| {
            let cluster = Some(*f);
            (format!("cluster {f:?}"), Self { cluster, ..none })
        });
        storage.chain(meta).chain(leases).chain(cluster).collect()
    }
}

impl FromStr for Flaws {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let all = Self::all();
        let found = all
            .iter()
            .find(|(name, _)| name.split(' ').any(|word| word == text));
        found.map(|(_, flaws)| *flaws).ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
            format!("not one of {names:?}")
        })
    }
}
