//! A mount as it can be replaced.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use rt::sync::Mutex;
use rustix::process::Pid;

use super::talk::Talk;
use crate::client::Client;
use crate::fuse::loops::Loops;
use crate::mount::kernel_mount::Mounted;

/// Where a mount stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It serves its kernel.
    Serving,
    /// A process with this number does.
    Replaced(Pid),
    /// It ends.
    Ending,
}

/// A mount that serves its kernel.
pub(crate) struct Standing {
    pub(crate) client: Arc<Client>,
    pub(crate) loops: Arc<Loops>,
    /// How many event loops there are.
    pub(crate) count: usize,
    pub(crate) mounted: Option<Mounted>,
    /// Why it cannot be replaced, if so.
    pub(crate) never: Option<&'static str>,
    /// Descriptors of predecessors, which requests for locks were read from that still wait.
    pub(crate) inherited: Arc<Vec<OwnedFd>>,
    /// Locked while it is being replaced.
    pub(crate) stage: Mutex<Stage>,
    /// The successor, which is told when this mount leaves.
    pub(crate) successor: Mutex<Option<Talk>>,
}

impl Standing {
    /// The numbers of descriptors of the device that no event loop reads from.
    pub(super) fn ours(&self) -> Vec<RawFd> {
        let notifier = self.client.kernel.caches.notifier.get();
        let ours = self.inherited.iter().map(|device| device.as_raw_fd());
        ours.chain(notifier.map(|n| n.as_fd().as_raw_fd())).collect()
    }
}
