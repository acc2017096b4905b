//! Finding out that a mount whose connection broke has ended, so that nobody waits for it to come back.

use std::collections::HashMap;
use std::time::Duration;

use rdma_transport::Fabric;
use rt::channel::{Either, Receiver, recv_either};
use rt::time::Instant;

use super::members::Members;

/// How soon it is looked again for a mount that was found: its connection may be closed before its address is given up.
const SOON: Duration = Duration::from_millis(20);
/// Longest pause between two looks: each time the mount sees a connection that comes to nothing.
const AGAIN: Duration = Duration::from_secs(2);
/// How often it is looked for mounts that are newly lost while others are, if nobody has said so …
const EVERY: Duration = Duration::from_millis(500);
/// … and while none is.
const QUIET: Duration = Duration::from_secs(10);

/// When it is looked next for one that was found, and how long to wait then.
struct Look {
    next: Instant,
    pause: Duration,
}

/// Looks after mounts that are lost, as it is told; calls `judge` when one has ended.
pub fn watch(
    members: &Members,
    (lost, stop): (&Receiver<()>, &Receiver<()>),
    fabric: &dyn Fabric,
    judge: &dyn Fn(),
) {
    let mut looks: HashMap<(u16, u64), Look> = HashMap::new();
    let mut patience = EVERY;
    loop {
        if let Either::First(_) = recv_either(stop, lost, patience) {
            return;
        }
        while lost.try_recv().is_ok() {}
        let missed = members.sessions.lock().missed();
        looks.retain(|(node, life), _| missed.iter().any(|(n, l, _)| (n, l) == (node, life)));
        for (node, life, listen) in missed {
            let now = Instant::now();
            let look = looks.entry((node, life)).or_insert(Look {
                next: now,
                pause: SOON,
            });
            if now < look.next {
                continue;
            }
            *look = Look {
                next: now + look.pause,
                pause: (look.pause * 2).min(AGAIN),
            };
            // Its host answers that nobody listens there. A mount that is stopped, or cut off, is waited for.
            if fabric.is_deserted(&listen) {
                members.sessions.lock().ended(node, life);
                judge();
            }
        }
        let now = Instant::now();
        let next = looks
            .values()
            .map(|l| l.next.saturating_duration_since(now))
            .min();
        patience = next.map_or(QUIET, |next| next.clamp(Duration::from_millis(1), EVERY));
    }
}
