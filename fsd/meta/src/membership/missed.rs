//! Finding out that a mount whose connection broke has ended, so that nobody waits for it to come back.

use std::collections::HashMap;
use std::time::Duration;

use rdma_transport::Fabric;
use rt::channel::{Receiver, RecvTimeoutError};
use rt::time::Instant;

use super::members::Members;

/// How often it is looked for mounts that are newly lost. One that lives comes back much sooner.
const EVERY: Duration = Duration::from_millis(500);
/// Pause before one is looked for again that was found: each time it sees a connection that comes to nothing.
const AGAIN: Duration = Duration::from_secs(2);

/// Looks after mounts that are lost.
pub fn watch(members: &Members, stop: &Receiver<()>, fabric: &dyn Fabric) {
    let mut found: HashMap<(u16, u64), Instant> = HashMap::new();
    while let Err(RecvTimeoutError::Timeout) = stop.recv_timeout(EVERY) {
        found.retain(|_, when| when.elapsed() < AGAIN);
        let missed = members.sessions.lock().missed();
        for (node, life, listen) in missed {
            if found.contains_key(&(node, life)) {
                continue;
            }
            // Its host answers that nobody listens there. A mount that is stopped, or cut off, is waited for.
            if fabric.is_deserted(&listen) {
                members.sessions.lock().ended(node, life);
            } else {
                found.insert((node, life), Instant::now());
            }
        }
    }
}
