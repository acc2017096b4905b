//! Open files, and what the record of a lease says of who has a file open.

pub mod handles;
pub mod passed;
pub mod pins;
pub mod record;

use std::sync::Arc;

use handles::OpenFiles;
use pins::Pinning;
use record::{OpenRecords, Twin};

use crate::cache::Base;
use crate::data::Data;
use crate::kernel::Kernel;

/// Open files.
pub struct Opens {
    /// What lease records say of opens.
    pub records: Arc<OpenRecords>,
    /// Inodes that stay for a moment.
    pub pinning: Arc<Pinning>,
    /// Open files.
    pub open_files: Arc<OpenFiles>,
}

impl Opens {
    /// The room, with nothing in it.
    #[must_use]
    pub fn new(
        Base { session, cache }: &Base,
        kernel: &Kernel,
        data: &Data,
        cache_shared: bool,
        shared_mappings: bool,
    ) -> Self {
        let records = Arc::new(OpenRecords {
            twin: Twin::default(),
            session: Arc::clone(session),
        });
        let pinning = Arc::new(Pinning {
            pins: Default::default(),
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            reservations: Arc::clone(&data.reservations),
            records: Arc::clone(&records),
        });
        let open_files = Arc::new(OpenFiles {
            handles: Default::default(),
            cache_shared,
            shared_mappings,
            session: Arc::clone(session),
            kernel: Arc::clone(&kernel.caches),
            reservations: Arc::clone(&data.reservations),
            records: Arc::clone(&records),
            pinning: Arc::clone(&pinning),
        });
        Self {
            records,
            pinning,
            open_files,
        }
    }
}
