//! Batches on several connections, under way at the same time.

use std::sync::Arc;
use std::time::Duration;

use rt::sync::{Condvar, Mutex};
use rt::time::Instant;

use crate::error::TransportError;
use crate::fabric::Connection;
use crate::ops::{AsyncOp, BatchError, Outcome};

/// Most connections whose completions are looked for on the caller's thread; those of more come as always.
const ATTENDED: usize = 16;

struct Come {
    /// What came of each batch.
    outcomes: Vec<Option<Outcome>>,
    /// How many have not come.
    left: usize,
}

struct Gathering {
    come: Mutex<Come>,
    all: Condvar,
}

impl Gathering {
    fn put(&self, n: usize, outcome: Outcome) {
        let mut come = self.come.lock();
        if let Some(place @ None) = come.outcomes.get_mut(n) {
            *place = Some(outcome);
            come.left -= 1;
        }
        if come.left == 0 {
            self.all.notify_one();
        }
    }

    /// Waits for all of them; false at the deadline.
    fn wait(&self, deadline: Instant) -> bool {
        let mut come = self.come.lock();
        while come.left > 0 {
            if self.all.wait_until(&mut come, deadline).timed_out() {
                return come.left == 0;
            }
        }
        true
    }
}

/// Starts batches, each on its connection, and waits for all of them; what came of each, in the order given. The time
/// is that of the slowest, not the sum. A connection may have several batches, which are carried out in the order given.
///
/// Connections that have not answered when `timeout` has passed are closed, and their batches fail with
/// [`TransportError::Timeout`]. Over the simulator somebody must step it meanwhile. Must not be called from a [`Handler`](crate::Handler) callback or a
/// [`Completion`](crate::Completion).
pub fn gather(batches: Vec<(Arc<dyn Connection>, Vec<AsyncOp>)>, timeout: Duration) -> Vec<Outcome> {
    gather_then(batches, &mut || (), timeout)
}

/// As [`gather`]; `then` runs when all batches are on their way, before they are waited for. It must not wait for anything:
/// messages are to be queued ([`Connection::queue`]).
pub fn gather_then(
    batches: Vec<(Arc<dyn Connection>, Vec<AsyncOp>)>,
    then: &mut dyn FnMut(),
    timeout: Duration,
) -> Vec<Outcome> {
    let gathering = Arc::new(Gathering {
        come: Mutex::new(Come {
            outcomes: batches.iter().map(|_| None).collect(),
            left: batches.len(),
        }),
        all: Condvar::new(),
    });
    let of: Vec<Arc<dyn Connection>> = batches.iter().map(|(conn, _)| Arc::clone(conn)).collect();
    let mut conns: Vec<&Arc<dyn Connection>> = Vec::new();
    for conn in &of {
        if !conns.iter().any(|c| Arc::ptr_eq(c, conn)) {
            conns.push(conn);
        }
    }
    let mut batches = batches.into_iter().enumerate();
    let mut start = || {
        for (n, (conn, batch)) in batches.by_ref() {
            let gathering = Arc::clone(&gathering);
            conn.submit(batch, Box::new(move |outcome| gathering.put(n, outcome)));
        }
        then();
    };
    let come = |conn: &Arc<dyn Connection>| {
        let come = gathering.come.lock();
        let mut pairs = of.iter().zip(&come.outcomes);
        pairs.all(|(c, outcome)| outcome.is_some() || !Arc::ptr_eq(c, conn))
    };
    attend_all(&conns[..conns.len().min(ATTENDED)], &mut start, &come);
    if !gathering.wait(Instant::now() + timeout) {
        give_up(&gathering, &of, timeout);
    }
    let mut come = gathering.come.lock();
    let outcomes = std::mem::take(&mut come.outcomes);
    let missing = || Err(TransportError::Shutdown.into());
    outcomes
        .into_iter()
        .map(|outcome| outcome.unwrap_or_else(missing))
        .collect()
}

/// Attends to all of the connections at once: one within the other, so that everything is under way before the first
/// is waited for.
fn attend_all(
    conns: &[&Arc<dyn Connection>],
    start: &mut dyn FnMut(),
    come: &dyn Fn(&Arc<dyn Connection>) -> bool,
) {
    match conns.split_first() {
        Some((conn, rest)) => conn.attend(&mut || attend_all(rest, start, come), &|| come(conn)),
        None => start(),
    }
}

/// Closes the connections that have not answered: that ends their batches, whose buffers come back.
fn give_up(gathering: &Gathering, of: &[Arc<dyn Connection>], timeout: Duration) {
    let late: Vec<usize> = {
        let come = gathering.come.lock();
        let outcomes = come.outcomes.iter().enumerate();
        outcomes.filter(|(_, o)| o.is_none()).map(|(n, _)| n).collect()
    };
    for &n in &late {
        of[n].close();
    }
    gathering.wait(Instant::now() + timeout);
    let mut come = gathering.come.lock();
    for n in late {
        let why = TransportError::Timeout {
            addr: of[n].peer_addr(),
            millis: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        };
        let buffers = match come.outcomes[n].take() {
            // It came at the last moment.
            Some(Ok(results)) => {
                come.outcomes[n] = Some(Ok(results));
                continue;
            }
            Some(Err(error)) => error.buffers,
            None => Vec::new(),
        };
        come.outcomes[n] = Some(Err(BatchError { why, buffers }));
    }
}
