//! A connection to a former process of this endpoint, by which its peer may still be executing something.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::executor::Executor;
use super::seat::{Seat, left_behind};
use crate::base::Base;
use crate::common::disconnected;
use crate::error::TransportError;
use crate::fabric::{ConnId, Connection};
use crate::ops::{AsyncOp, BatchError, Completion, Op};

/// Longest time that an operation takes which is not stopped in the middle of it.
const OPERATION: Duration = Duration::from_millis(100);
/// Longest time that memory of a process stays mapped which has ended.
const LETTING_GO: Duration = Duration::from_secs(5);

/// Such a connection: it is dead, and not settled.
pub(super) struct Former {
    id: ConnId,
    identity: Vec<u8>,
    seat: Seat,
}

impl Former {
    /// All of them, if there are any. From now on nothing more can be executed by them than what is being executed now.
    pub(super) fn all(base: &Base) -> Result<Vec<Arc<Self>>, TransportError> {
        let Some(keep) = &base.config.keep else {
            return Ok(Vec::new());
        };
        let mut all = Vec::new();
        for seat in left_behind(keep)? {
            let former = Self {
                id: base.next_id(),
                identity: seat.identity()?,
                seat,
            };
            if !former.settled() {
                all.push(Arc::new(former));
            }
        }
        Ok(all)
    }

    /// Is it of a peer that says it is this?
    pub(super) fn is_of(&self, identity: &[u8]) -> bool {
        !identity.is_empty() && self.identity == identity
    }

    fn dead(&self) -> TransportError {
        disconnected(&self.peer_addr(), "it was made by a former process")
    }

    /// Waits until nothing is being executed by it any more; as [`Connection::close`] does.
    pub(super) fn wait_settled(&self, longest: Duration) -> bool {
        let deadline = Instant::now() + longest;
        while !self.settled() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl Connection for Former {
    fn id(&self) -> ConnId {
        self.id
    }

    fn peer_identity(&self) -> &[u8] {
        &self.identity
    }

    fn peer_addr(&self) -> String {
        format!("process {}", self.seat.trace().pid)
    }

    fn is_alive(&self) -> bool {
        false
    }

    fn execute(&self, _ops: &mut [Op<'_>]) -> Result<(), TransportError> {
        Err(self.dead())
    }

    fn submit(&self, batch: Vec<AsyncOp>, done: Completion) {
        done(Err(BatchError::unstarted(self.dead(), batch)));
    }

    fn send(&self, _message: &[u8]) -> Result<(), TransportError> {
        Err(self.dead())
    }

    fn queue(&self, _message: &[u8]) -> Result<(), TransportError> {
        Err(self.dead())
    }

    fn close(&self) {}

    fn expel(&self) -> Result<(), TransportError> {
        if self.wait_settled(OPERATION) {
            return Ok(());
        }
        // Its number may be another's by now, or mean nothing here.
        let ended = match Executor::again(self.seat.trace()) {
            Ok(Some(executor)) if executor.is_this() => Err("it is this process".to_owned()),
            Ok(Some(executor)) => executor.end().map_err(|e| e.to_string()),
            Ok(None) => Ok(()),
            Err(error) => Err(error.to_string()),
        };
        if self.wait_settled(LETTING_GO) {
            return Ok(());
        }
        let name = self.seat.mem().name();
        Err(TransportError::Os {
            what: format!("shut out {}", self.peer_addr()),
            reason: format!(
                "it was stopped while it changed memory here, and cannot be ended by this process ({}): end the process that has \
                 {name} mapped",
                ended.err().unwrap_or_else(|| "it has ended".to_owned())
            ),
        })
    }

    fn settled(&self) -> bool {
        !self.seat.busy() || self.seat.is_deserted()
    }
}
