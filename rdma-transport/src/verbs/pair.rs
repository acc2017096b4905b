//! The queue pair of a connection, and the queue of its completions.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;

use super::ffi::{Cq, Post, Qp, Route, Wc};
use super::tx::Gathered;

pub(super) struct Pair {
    /// None: destroyed, nothing of the peer lands any more.
    qp: RwLock<Option<Qp>>,
    pub(super) number: u32,
    /// Bytes of a work request itself that carry data.
    pub(super) inline: usize,
    pub(super) depth: usize,
    cq: Arc<Cq>,
    /// The completion queue reports to the progress thread.
    armed: AtomicBool,
}

impl Pair {
    pub(super) fn new(qp: Qp, cq: Arc<Cq>) -> Self {
        Self {
            number: qp.number(),
            inline: qp.caps.inline as usize,
            depth: qp.caps.depth as usize,
            qp: RwLock::new(Some(qp)),
            cq,
            armed: AtomicBool::new(false),
        }
    }

    pub(super) fn connect(&self, route: &Route) -> std::io::Result<()> {
        match &*self.qp.read() {
            Some(qp) => qp.connect(route),
            None => Ok(()),
        }
    }

    /// Posts work requests; false if the pair has been destroyed.
    pub(super) fn post(&self, gathered: &Gathered) -> std::io::Result<bool> {
        let posts: &[Post] = &gathered.posts;
        match &*self.qp.read() {
            Some(qp) => qp.post(posts, &gathered.bytes).map(|()| true),
            None => Ok(false),
        }
    }

    /// Takes completions; true if there may be more.
    pub(super) fn poll(&self, into: &mut Vec<Wc>) -> std::io::Result<bool> {
        self.cq.poll(into)
    }

    /// Lets the queue of completions report to the progress thread, unless it is to do so already.
    pub(super) fn arm(&self) -> std::io::Result<()> {
        if self.armed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        self.cq.arm()
    }

    /// It has reported.
    pub(super) fn reported(&self) {
        self.armed.store(false, Ordering::SeqCst);
    }

    pub(super) fn destroyed(&self) -> bool {
        self.qp.read().is_none()
    }

    /// Nothing of the peer lands after this.
    pub(super) fn destroy(&self) {
        let qp = self.qp.write().take();
        drop(qp);
    }
}
