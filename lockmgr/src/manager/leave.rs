//! The end of a manager: every lease is given back, then somebody is told.

use std::sync::atomic::{AtomicBool, Ordering};

use rt::sync::Mutex;

type Told = Box<dyn FnOnce() + Send>;

#[derive(Default)]
pub(super) struct Leave {
    begun: AtomicBool,
    told: Mutex<Option<Told>>,
}

impl Leave {
    pub(super) fn begin(&self, told: Told) {
        *self.told.lock() = Some(told);
        self.begun.store(true, Ordering::SeqCst);
    }

    pub(super) fn begun(&self) -> bool {
        self.begun.load(Ordering::SeqCst)
    }

    /// Whom to tell; once.
    pub(super) fn then(&self) -> Option<Told> {
        self.told.lock().take()
    }
}
