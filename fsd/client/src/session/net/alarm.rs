//! When somebody is to look after something again.

use rt::sync::{Condvar, Mutex};
use rt::time::Instant;

/// A thread waits for it; others set it.
#[derive(Debug, Default)]
pub(super) struct Alarm {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    due: Option<Instant>,
    ended: bool,
}

impl Alarm {
    /// It rings at this time at the latest.
    pub(super) fn set(&self, at: Instant) {
        let mut state = self.state.lock();
        if state.due.is_none_or(|due| at < due) {
            state.due = Some(at);
            drop(state);
            self.changed.notify_one();
        }
    }

    /// Nobody is to wait any more.
    pub(super) fn end(&self) {
        self.state.lock().ended = true;
        self.changed.notify_one();
    }

    /// Waits until it rings, once for each time that it was set. False: it has been ended.
    pub(super) fn wait(&self) -> bool {
        let mut state = self.state.lock();
        loop {
            if state.ended {
                return false;
            }
            match state.due {
                Some(due) if due <= Instant::now() => {
                    state.due = None;
                    return true;
                }
                Some(due) => {
                    self.changed.wait_until(&mut state, due);
                }
                None => self.changed.wait(&mut state),
            }
        }
    }
}
