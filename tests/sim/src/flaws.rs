//! Rules of the product left out, to see that the simulation finds what they are for.

use fsd_meta::server::Flaw as MetaFlaw;
use fsd_storage::blocks::Flaw as StorageFlaw;

/// Which rules are left out.
#[derive(Debug, Clone, Copy, Default)]
pub struct Flaws {
    /// One of the metadata server's.
    pub meta: Option<MetaFlaw>,
    /// One of the storage nodes'.
    pub storage: Option<StorageFlaw>,
}
