//! What a system call on a file does, from its lease to its answer.

pub mod allocate;
pub mod atime;
pub mod attrs;
pub mod locks;
pub mod opened;
pub mod passed_locks;
pub mod writes;

use std::sync::Arc;

use allocate::Allocations;
use attrs::Attrs;
use locks::Locks;
use opened::Files;
use writes::Writes;

use crate::cache::Base;
use crate::data::Data;
use crate::kernel::Kernel;
use crate::namespace::Namespace;
use crate::opens::Opens;
use crate::storing::Storing;
use atime::{AccessTimes, Accesses};

/// Operations on files.
pub struct FileOperations {
    /// Attributes.
    pub attrs: Arc<Attrs>,
    /// Access times.
    pub accesses: Arc<Accesses>,
    /// File locks.
    pub locks: Arc<Locks>,
    /// Opening, reading, syncing.
    pub opened: Arc<Files>,
    /// `write`.
    pub writes: Arc<Writes>,
    /// `fallocate`.
    pub allocations: Arc<Allocations>,
}

impl FileOperations {
    /// The room, with nothing in it.
    #[must_use]
    pub fn new(
        Base { session, cache }: &Base,
        kernel: &Kernel,
        data: &Data,
        opens: &Opens,
        namespace: &Namespace,
        storing: &Storing,
        access_times: AccessTimes,
    ) -> Self {
        let attrs = Arc::new(Attrs {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            kernel: Arc::clone(&kernel.caches),
            front: Arc::clone(&kernel.front),
            discards: Arc::clone(&data.discards),
            xattrs: Arc::clone(&namespace.xattrs),
        });
        let accesses = Arc::new(Accesses {
            access_times,
            session: Arc::clone(session),
            attrs: Arc::clone(&attrs),
        });
        let locks = Arc::new(Locks {
            file_locks: Default::default(),
            session: Arc::clone(session),
        });
        let opened = Arc::new(Files {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            kernel: Arc::clone(&kernel.caches),
            front: Arc::clone(&kernel.front),
            stored: Arc::clone(&data.stored),
            reads: Arc::clone(&data.reads),
            writing: Arc::clone(&data.writing),
            discards: Arc::clone(&data.discards),
            open_files: Arc::clone(&opens.open_files),
            xattrs: Arc::clone(&namespace.xattrs),
            syncing: Arc::clone(&storing.syncing),
            accesses: Arc::clone(&accesses),
        });
        let writes = Arc::new(Writes {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            kernel: Arc::clone(&kernel.caches),
            space: Arc::clone(&data.space),
            stored: Arc::clone(&data.stored),
            writing: Arc::clone(&data.writing),
            xattrs: Arc::clone(&namespace.xattrs),
        });
        let allocations = Arc::new(Allocations {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            kernel: Arc::clone(&kernel.caches),
            front: Arc::clone(&kernel.front),
            space: Arc::clone(&data.space),
            stored: Arc::clone(&data.stored),
            writing: Arc::clone(&data.writing),
            discards: Arc::clone(&data.discards),
            allocator: Arc::clone(&data.allocator),
            xattrs: Arc::clone(&namespace.xattrs),
        });
        Self {
            attrs,
            accesses,
            locks,
            opened,
            writes,
            allocations,
        }
    }
}
