//! The kernel's caches: what is invalidated, delegated to it, and recalled.

pub mod caches;
pub mod delegations;
pub mod extension;
pub mod recalls;

use std::sync::{Arc, OnceLock};

use crate::cache::Base;
use caches::KernelCaches;
use delegations::Delegations;
use fsd_node::config::CacheMode;
use recalls::Recalls;

/// The kernel's caches.
pub struct Kernel {
    /// Page and attribute caches of any kernel.
    pub caches: Arc<KernelCaches>,
    /// What is delegated to the kernel extension.
    pub delegations: Arc<Delegations>,
    /// Taking that back.
    pub recalls: Arc<Recalls>,
}

impl Kernel {
    /// The room, with no kernel yet.
    #[must_use]
    pub fn new(Base { session, cache }: &Base, mode: CacheMode) -> Self {
        let caches = Arc::new(KernelCaches {
            mode,
            notifier: OnceLock::new(),
            session: Arc::clone(session),
        });
        let delegations = Arc::new(Delegations {
            extension: OnceLock::new(),
            cache: Arc::clone(cache),
        });
        let recalls = Arc::new(Recalls {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            delegations: Arc::clone(&delegations),
        });
        Self {
            caches,
            delegations,
            recalls,
        }
    }
}
