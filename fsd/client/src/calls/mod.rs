//! Calls of the kernel extension, and what else it asks of the mount.

pub mod forward;
pub mod grants;
pub mod here;
pub mod space;

use std::sync::Arc;

use rt::sync::Mutex;

use crate::cache::Base;
use crate::data::Data;
use crate::kernel::extended::Extended;
use crate::namespace::Namespace;
use forward::{Away, Forward};
use grants::Grants;
use here::Here;
use space::SpaceCalls;

/// What the kernel extension asks for.
pub struct Calls {
    /// Space.
    pub space_calls: Arc<SpaceCalls>,
    /// Leases.
    pub grants: Arc<Grants>,
    /// Reads and writes that are carried out here.
    pub here: Arc<Here>,
    /// Reads and writes that are forwarded to the owner of a lease, or from it.
    pub forward: Arc<Forward>,
}

impl Calls {
    /// The room.
    #[must_use]
    pub fn new(
        Base { session, cache }: &Base,
        kernel: &Extended,
        data: &Data,
        namespace: &Namespace,
    ) -> Self {
        let space_calls = Arc::new(SpaceCalls {
            recalling: Mutex::default(),
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            delegations: Arc::clone(&kernel.delegations),
            recalls: Arc::clone(&kernel.recalls),
            space: Arc::clone(&data.space),
            stored: Arc::clone(&data.stored),
            reservations: Arc::clone(&data.reservations),
        });
        let grants = Arc::new(Grants {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            delegations: Arc::clone(&kernel.delegations),
            recalls: Arc::clone(&kernel.recalls),
            space: Arc::clone(&data.space),
            reservations: Arc::clone(&data.reservations),
            space_calls: Arc::clone(&space_calls),
        });
        let here = Arc::new(Here {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            delegations: Arc::clone(&kernel.delegations),
            space: Arc::clone(&data.space),
            reads: Arc::clone(&data.reads),
            writing: Arc::clone(&data.writing),
            xattrs: Arc::clone(&namespace.xattrs),
        });
        let forward = Arc::new(Forward {
            away: Away::default(),
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            delegations: Arc::clone(&kernel.delegations),
            stored: Arc::clone(&data.stored),
            reads: Arc::clone(&data.reads),
            writing: Arc::clone(&data.writing),
            xattrs: Arc::clone(&namespace.xattrs),
            space_calls: Arc::clone(&space_calls),
            here: Arc::clone(&here),
        });
        Self {
            space_calls,
            grants,
            here,
            forward,
        }
    }
}
