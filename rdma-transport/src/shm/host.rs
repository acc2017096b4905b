//! What a connection knows of its endpoint.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use super::layout::Directory;
use crate::base::Base;

/// An endpoint without its connections.
pub(super) struct Host {
    pub(super) base: Base,
    pub(super) directory: Directory,
    pub(super) bell: OwnedFd,
}

impl Host {
    fn ring(&self) {
        let _full = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Makes the progress thread look around, whatever it is doing.
    pub(super) fn wake(&self) {
        self.base.set_news();
        self.ring();
    }

    /// Brings the progress thread out of its sleep; no system call if it is running.
    pub(super) fn wake_if_sleeping(&self) {
        if self.directory.sleeping().swap(0, Ordering::SeqCst) != 0 {
            self.ring();
        }
    }
}
