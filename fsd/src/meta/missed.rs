//! Finding out that a mount whose connection broke has ended, so that nobody waits for it to come back.

use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError};

use super::server::Inner;

/// How often those that are lost are looked for. One that lives comes back much sooner.
const EVERY: Duration = Duration::from_millis(500);

impl Inner {
    pub(super) fn members_loop(&self, stop: &Receiver<()>) {
        while let Err(RecvTimeoutError::Timeout) = stop.recv_timeout(EVERY) {
            let missed = self.state.lock().sessions.missed();
            for (node, life, listen) in missed {
                // Its host answers that nobody listens there. A mount that is stopped, or cut off, is waited for.
                if rdma_transport::is_deserted(self.config.fabric.into(), &listen) {
                    self.state.lock().sessions.ended(node, life);
                }
            }
        }
    }
}
