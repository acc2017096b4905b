//! Room for messages at a peer: as many as it has not dealt with may be under way before who sends has to wait.

use std::time::Duration;

use rt::sync::{Condvar, Mutex};
use rt::time::Instant;

/// What one end may still send.
#[derive(Debug)]
pub struct Room {
    /// None: the connection has ended, and nobody waits any more.
    left: Mutex<Option<usize>>,
    changed: Condvar,
}

/// Nothing was dealt with in time.
#[derive(Debug)]
pub struct Late;

impl Room {
    pub fn new(messages: usize) -> Self {
        Self {
            left: Mutex::new(Some(messages)),
            changed: Condvar::new(),
        }
    }

    /// Takes room for a message, if there is any; else waits for it at most for `patience`, or goes without.
    pub fn take(&self, patience: Option<Duration>) -> Result<(), Late> {
        let mut left = self.left.lock();
        let deadline = patience.map(|patience| Instant::now() + patience);
        while let (Some(0), Some(deadline)) = (*left, deadline) {
            if self.changed.wait_until(&mut left, deadline).timed_out() {
                return Err(Late);
            }
        }
        *left = left.map(|n| n.saturating_sub(1));
        Ok(())
    }

    /// The peer has dealt with a message.
    pub fn give(&self, most: usize) {
        let mut left = self.left.lock();
        *left = left.map(|n| (n + 1).min(most));
        drop(left);
        self.changed.notify_all();
    }

    /// The connection has ended.
    pub fn end(&self) {
        *self.left.lock() = None;
        self.changed.notify_all();
    }
}
