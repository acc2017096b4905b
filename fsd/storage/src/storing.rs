//! Storing what was written: in the background, and on request.

use std::sync::Arc;
use std::time::Duration;

use rt::channel::{Receiver, RecvTimeoutError};
use rt::sync::Mutex;

use super::blocks::Blocks;
use super::error::StorageError;
use super::keeping::Wanted;

/// How often the background flusher looks for unstored data.
const FLUSH_EVERY: Duration = Duration::from_secs(2);

/// Stores, and knows whether that works.
pub struct Storing {
    pub blocks: Arc<Blocks>,
    /// Why what was to be stored last could not be.
    pub failing: Mutex<Option<String>>,
}

impl Storing {
    /// Bounds how long data that nobody fsyncs stays in memory only.
    pub fn run(&self, stop: &Receiver<()>) {
        let mut seen = self.blocks.media.dirty_sum();
        let mut pending = true;
        while let Err(RecvTimeoutError::Timeout) = stop.recv_timeout(FLUSH_EVERY) {
            let now = self.blocks.media.dirty_sum();
            let moved = now != seen;
            seen = now;
            if moved || pending || self.blocks.flusher.is_unsettled() {
                pending = false;
                if let Err(error) = self.noted(self.blocks.flusher.flush_all()) {
                    pending = true;
                    tracing::error!("background flush: {error}");
                }
            }
            self.blocks.cleaner.give_surplus_back();
            self.blocks.media.store.tidy();
        }
    }

    /// Makes what was written durable.
    pub fn flush(&self, wanted: &Wanted) -> Result<(), StorageError> {
        self.noted(self.blocks.flusher.flush(wanted))
    }

    /// Remembers why something could not be stored, until something can be again.
    fn noted(&self, result: Result<(), StorageError>) -> Result<(), StorageError> {
        *self.failing.lock() = result.as_ref().err().map(ToString::to_string);
        result
    }
}
