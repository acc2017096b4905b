//! Giving leases up, and forgetting inodes.

mod duties;
pub mod revocation;
pub mod revoker;
pub mod trim;

use std::sync::Arc;

use revocation::Revocations;

use crate::cache::Base;
use crate::data::Data;
use crate::kernel::Kernel;
use crate::opens::Opens;
use crate::storing::Storing;
use trim::{Forgetting, Trim};

/// Giving up.
pub struct Revoke {
    /// Forgetting inodes.
    pub forgetting: Arc<Forgetting>,
    /// Revocations.
    pub revocations: Arc<Revocations>,
}

impl Revoke {
    /// The room, with nothing in it.
    #[must_use]
    pub fn new(
        Base { session, cache }: &Base,
        kernel: &Kernel,
        data: &Data,
        opens: &Opens,
        storing: &Storing,
        trim: Trim,
    ) -> Self {
        let forgetting = Arc::new(Forgetting {
            trim,
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            front: Arc::clone(&kernel.front),
        });
        let revocations = Arc::new(Revocations {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            kernel: Arc::clone(&kernel.caches),
            front: Arc::clone(&kernel.front),
            reservations: Arc::clone(&data.reservations),
            stored: Arc::clone(&data.stored),
            writing: Arc::clone(&data.writing),
            pinning: Arc::clone(&opens.pinning),
            push: Arc::clone(&storing.push),
        });
        Self {
            forgetting,
            revocations,
        }
    }
}
