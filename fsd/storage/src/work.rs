//! What waits for the disk or goes through the whole table: not on the progress thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rt::channel::{Receiver, RecvTimeoutError};

use super::cut::{End, cut};
use super::error::errno;
use super::status::Status;
use super::storing::Storing;
use super::words::Words;
use fsd_proto::rpc::Responder;
use fsd_proto::wire::{DeadMount, StorageReply};

/// A request that is handed to the worker.
pub enum Work {
    Flush(Vec<u64>, Responder),
    Reset(Responder),
    Status(Responder),
    Cut(Vec<End>, Responder),
}

/// What becomes of the dead: on a thread of its own, for the living wait for it, and must not wait for the disk as well.
pub enum Funeral {
    Fence(DeadMount, Responder),
    Owned(Vec<DeadMount>, u64, Responder),
    Recover(Vec<DeadMount>, Responder),
    Unused(Vec<u64>, Responder),
}

impl Funeral {
    /// Who waits for the answer.
    pub fn responder(self) -> Responder {
        match self {
            Self::Fence(_, r) | Self::Owned(_, _, r) | Self::Recover(_, r) | Self::Unused(_, r) => r,
        }
    }
}

/// Does what is to be done for the dead, until the node stops.
pub fn bury(words: &Words, told: &Receiver<Funeral>, stopping: &AtomicBool) {
    while !stopping.load(Ordering::Acquire) {
        let (done, responder) = match told.recv_timeout(Duration::from_secs(1)) {
            Ok(Funeral::Fence(dead, r)) => (words.fence(dead).map(|()| StorageReply::Done), r),
            Ok(Funeral::Owned(dead, from, r)) => (words.owned(&dead, from).map(StorageReply::Records), r),
            Ok(Funeral::Recover(dead, r)) => (words.take_back(&dead).map(|()| StorageReply::Done), r),
            Ok(Funeral::Unused(inos, r)) => (words.unused(&inos).map(StorageReply::Inodes), r),
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        responder.reply(&done.map_err(|e| errno(&e)));
    }
}

/// Does that.
pub struct Worker {
    pub storing: Arc<Storing>,
    pub words: Arc<Words>,
    pub status: Status,
}

impl Worker {
    /// Does what comes, until the node stops.
    pub fn run(&self, work: &Receiver<Work>, stopping: &AtomicBool) {
        while !stopping.load(Ordering::Acquire) {
            let first = match work.recv_timeout(Duration::from_secs(1)) {
                Ok(first) => first,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            // One pass and one sync for all flushes that have come meanwhile (group commit).
            let (mut inos, mut flushes) = (Vec::new(), Vec::new());
            for work in std::iter::once(first).chain(work.try_iter()) {
                match work {
                    Work::Flush(more, responder) => {
                        inos.extend(more);
                        flushes.push(responder);
                    }
                    Work::Reset(responder) => {
                        let reset = self.words.reset().map(|()| StorageReply::Done);
                        responder.reply(&reset.map_err(|e| errno(&e)));
                    }
                    Work::Cut(ends, responder) => {
                        let freed = cut(&self.storing.blocks, &ends).map(StorageReply::Freed);
                        responder.reply(&freed.map_err(|e| errno(&e)));
                    }
                    Work::Status(responder) => {
                        responder.reply(&self.status.now().map(StorageReply::Status).map_err(|e| errno(&e)));
                    }
                }
            }
            if !flushes.is_empty() {
                let result = self
                    .storing
                    .flush(&inos)
                    .map(|()| StorageReply::Done)
                    .map_err(|e| errno(&e));
                for responder in flushes {
                    responder.reply(&result);
                }
            }
        }
    }
}
