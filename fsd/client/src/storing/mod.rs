//! Bringing what is dirty to the servers.

pub mod push;
pub mod syncing;
pub mod writeback;

use std::sync::Arc;
use std::time::Duration;

use push::Push;
use syncing::Syncing;
use writeback::Writeback;

use crate::cache::Base;
use crate::data::Data;
use crate::opens::Opens;

/// What is dirty.
pub struct Storing {
    /// Attributes on their way.
    pub push: Arc<Push>,
    /// `fsync`.
    pub syncing: Arc<Syncing>,
    /// Writing back by and by.
    pub writeback: Arc<Writeback>,
}

impl Storing {
    /// The room, with nothing in it.
    #[must_use]
    pub fn new(
        Base { session, cache }: &Base,
        data: &Data,
        opens: &Opens,
        writeback_after: Duration,
    ) -> Self {
        let push = Arc::new(Push {
            answers: Default::default(),
            session: Arc::clone(session),
            cache: Arc::clone(cache),
        });
        let syncing = Arc::new(Syncing {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            stored: Arc::clone(&data.stored),
            writing: Arc::clone(&data.writing),
            push: Arc::clone(&push),
        });
        let writeback = Arc::new(Writeback {
            writeback_after,
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            space: Arc::clone(&data.space),
            stored: Arc::clone(&data.stored),
            writing: Arc::clone(&data.writing),
            pinning: Arc::clone(&opens.pinning),
            push: Arc::clone(&push),
        });
        Self {
            push,
            syncing,
            writeback,
        }
    }
}
