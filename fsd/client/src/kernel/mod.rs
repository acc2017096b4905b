//! The kernel's caches: what is invalidated, delegated to it, and recalled.

pub mod caches;
pub mod delegations;
pub mod extended;
pub mod extension;
pub mod front;
pub mod notifier;
pub mod recalls;

use std::sync::{Arc, OnceLock};

use extended::Extended;
use extension::Extension;
use front::Front;

use crate::cache::Base;
use caches::{KernelCaches, Passing};
use delegations::Delegations;
use fsd_node::config::CacheMode;
use recalls::Recalls;

/// The kernel's caches.
pub struct Kernel {
    /// Page and attribute caches of any kernel.
    pub caches: Arc<KernelCaches>,
    /// What is done for the extension, if there is one.
    pub front: Arc<Front>,
}

impl Kernel {
    /// The room, with a stock kernel.
    #[must_use]
    pub fn new(Base { session, .. }: &Base, mode: CacheMode) -> Self {
        let caches = Arc::new(KernelCaches {
            mode,
            notifier: OnceLock::new(),
            passing: Passing::default(),
            session: Arc::clone(session),
        });
        let front = Arc::default();
        Self { caches, front }
    }

    /// The extension is attached; before anybody uses the mount.
    pub fn attach(&self, Base { session, cache }: &Base, ext: &Arc<Extension>) -> Arc<Extended> {
        let delegations = Arc::new(Delegations { ext: Arc::clone(ext) });
        let recalls = Arc::new(Recalls {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            delegations: Arc::clone(&delegations),
        });
        let extended = Arc::new(Extended { delegations, recalls });
        self.front.attach(Arc::clone(&extended) as _);
        extended
    }
}
