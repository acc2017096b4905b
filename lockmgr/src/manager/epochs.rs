//! The epoch as the manager knows it, and which records keep it from saying that it has got there.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rt::sync::{Mutex, RwLock};

use crate::fsm::Config;
use crate::ids::{NodeId, NodeSet, RecordId};

type Told = Box<dyn FnOnce() + Send>;

/// See the module.
pub(super) struct Epochs {
    /// What the state machines are told. Read for each event, under the lock of its record: an event that is applied after one of
    /// an epoch is applied with what that epoch says.
    config: RwLock<Arc<Config>>,
    awaiting: AtomicBool,
    waiting: Mutex<Option<Waiting>>,
}

struct Waiting {
    records: HashSet<RecordId>,
    told: Told,
}

impl Epochs {
    pub(super) fn new(config: Config) -> Self {
        Self {
            config: RwLock::new(Arc::new(config)),
            awaiting: AtomicBool::new(false),
            waiting: Mutex::new(None),
        }
    }

    pub(super) fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.read())
    }

    /// There is a new epoch, or an end of one.
    pub(super) fn set(&self, epoch: u64, dead: NodeSet) {
        let mut config = self.config.write();
        *config = Arc::new(Config {
            epoch,
            dead,
            ..Config::clone(&config)
        });
    }

    /// Waits for these records. What was waited for before is of an earlier epoch, and nobody asks for it any more.
    pub(super) fn wait_for(&self, records: impl Iterator<Item = RecordId>, told: Told) {
        let records = records.collect();
        *self.waiting.lock() = Some(Waiting { records, told });
        self.awaiting.store(true, Ordering::SeqCst);
    }

    /// Nobody waits any more.
    pub(super) fn stop_waiting(&self) {
        self.awaiting.store(false, Ordering::SeqCst);
        self.waiting.lock().take();
    }

    /// Is anything waited for?
    pub(super) fn is_awaiting(&self) -> bool {
        self.awaiting.load(Ordering::SeqCst)
    }

    /// A record holds nothing up; whom to tell, if it was the last.
    pub(super) fn settled(&self, id: RecordId) -> Option<Told> {
        let mut waiting = self.waiting.lock();
        waiting.as_mut()?.records.remove(&id);
        self.over(&mut waiting)
    }

    /// Whom to tell, if nothing is waited for.
    pub(super) fn end(&self) -> Option<Told> {
        self.over(&mut self.waiting.lock())
    }

    fn over(&self, waiting: &mut Option<Waiting>) -> Option<Told> {
        let last = waiting.take_if(|w| w.records.is_empty())?;
        self.awaiting.store(false, Ordering::SeqCst);
        Some(last.told)
    }

    /// Is this one of the dead of now?
    pub(super) fn is_dead(&self, node: NodeId) -> bool {
        self.config.read().dead.contains(node)
    }
}
