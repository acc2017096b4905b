//! The writeback thread: bounds how long, and how much, data stays in this mount's memory only.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError};

use super::Client;
use super::ctx::{Ctx, Stop};

/// How often old data is looked for while there is any.
const TICK: Duration = Duration::from_millis(250);

impl Client {
    /// Runs until the mount stops. Sleeps for good while nothing is dirty.
    pub fn writeback_loop(self: &Arc<Self>, wake: &Receiver<()>) {
        let mut idle_since = None;
        loop {
            let dirty = !self.dirty.lock().is_empty();
            let event = if dirty || idle_since.is_some() {
                wake.recv_timeout(TICK)
            } else {
                wake.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            if matches!(event, Err(RecvTimeoutError::Disconnected)) || self.stopping.load(Ordering::Acquire) {
                return;
            }
            if dirty {
                idle_since = Some(Instant::now());
                self.write_old();
            } else if idle_since.is_some_and(|t| t.elapsed() > self.writeback_after) {
                self.return_space();
                idle_since = None;
            }
            if self.cached_pages.load(Ordering::Relaxed) > self.max_pages {
                self.shrink();
            }
        }
    }

    fn write_old(&self) {
        let full = self.cached_pages.load(Ordering::Relaxed) > self.max_pages / 2;
        let old: Vec<u64> = self
            .dirty
            .lock()
            .iter()
            .filter(|(_, since)| full || since.elapsed() >= self.writeback_after)
            .map(|(&ino, _)| ino)
            .collect();
        for ino in old {
            self.write_one(ino);
        }
    }

    fn write_one(&self, ino: u64) {
        let Some(inode) = self.inodes.find(ino) else {
            self.dirty.lock().remove(&ino);
            return;
        };
        match self.write_back(&Ctx::on_worker(), &inode, false) {
            Ok(()) => {
                // Where the lease is being given up, that writes it back.
                self.dirty.lock().remove(&ino);
                if inode.try_lock_raw().is_some_and(|s| s.is_dirty()) {
                    self.note_dirty(ino);
                }
            }
            Err(Stop::Errno(error)) => {
                tracing::warn!("write-back of {ino:#x}: {error}; it is tried again");
                inode.errors.set(error);
                // Not again at once: what is wrong will not have passed.
                self.dirty.lock().insert(ino, Instant::now());
            }
            Err(Stop::Park) => {}
        }
    }

    /// Writes everything back; for leaving.
    pub fn write_all(&self) {
        let all: Vec<u64> = self.dirty.lock().keys().copied().collect();
        for ino in all {
            self.write_one(ino);
        }
    }

    /// Drops clean pages until the buffer cache has its size again.
    fn shrink(&self) {
        for inode in self.inodes.all() {
            if self.cached_pages.load(Ordering::Relaxed) <= self.max_pages * 3 / 4 {
                return;
            }
            if let Some(mut state) = inode.try_lock_raw() {
                self.drop_clean(&mut state);
            }
        }
    }
}
