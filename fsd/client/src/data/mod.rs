//! Reading and writing file data under leases that are held: frames, space, the buffer cache.

pub mod allocation;
pub mod buffers;
pub mod discard;
pub mod reading;
pub mod reservations;
pub mod space;
pub mod stored;
pub mod together;
pub mod transfer;
pub mod writing;

use std::sync::Arc;

use allocation::Allocator;
use buffers::Buffers;
use discard::Discards;
use reading::Reads;
use reservations::Reservations;
use stored::Stored;
use transfer::Transfer;
use writing::Writing;

use crate::cache::Base;
use crate::kernel::Kernel;
use space::Space;

/// Data: from the most basic to what uses it.
pub struct Data {
    /// Space set aside.
    pub space: Arc<Space>,
    /// What storage nodes have.
    pub stored: Arc<Stored>,
    /// Space set aside for blocks.
    pub reservations: Arc<Reservations>,
    /// Reads.
    pub reads: Arc<Reads>,
    /// Writes.
    pub writing: Arc<Writing>,
    /// Truncation and holes.
    pub discards: Arc<Discards>,
    /// Frames before there is data.
    pub allocator: Arc<Allocator>,
}

impl Data {
    /// The room, with nothing in it.
    #[must_use]
    pub fn new(Base { session, cache }: &Base, kernel: &Kernel) -> Self {
        let space = Arc::new(Space {
            accounts: Default::default(),
            closes_awaited: Default::default(),
            session: Arc::clone(session),
        });
        let transfer = Arc::new(Transfer {
            session: Arc::clone(session),
        });
        let stored = Arc::new(Stored {
            transfer,
            session: Arc::clone(session),
            space: Arc::clone(&space),
        });
        let reservations = Arc::new(Reservations {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            front: Arc::clone(&kernel.front),
            space: Arc::clone(&space),
            stored: Arc::clone(&stored),
        });
        let reads = Arc::new(Reads {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            stored: Arc::clone(&stored),
            buffers: Buffers::default(),
        });
        let writing = Arc::new(Writing {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            kernel: Arc::clone(&kernel.caches),
            space: Arc::clone(&space),
            stored: Arc::clone(&stored),
        });
        let discards = Arc::new(Discards {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            front: Arc::clone(&kernel.front),
            stored: Arc::clone(&stored),
            reservations: Arc::clone(&reservations),
            writing: Arc::clone(&writing),
        });
        let allocator = Arc::new(Allocator {
            session: Arc::clone(session),
            space: Arc::clone(&space),
            stored: Arc::clone(&stored),
            discards: Arc::clone(&discards),
        });
        Self {
            space,
            stored,
            reservations,
            reads,
            writing,
            discards,
            allocator,
        }
    }
}
