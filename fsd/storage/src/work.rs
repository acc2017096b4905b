//! What waits for the disk or goes through the whole table: not on the progress thread.

use std::sync::Arc;
use std::time::Duration;

use rt::channel::{Either, Receiver, recv_either};

use super::cut::{End, cut};
use super::error::errno;
use super::keeping::Wanted;
use super::status::Status;
use super::storing::Storing;
use super::words::Words;
use fsd_proto::rpc::Responder;
use fsd_proto::wire::{DeadMount, StorageReply};

/// How long is waited at a time for something to do; what stops a thread is heard at once.
const WAIT: Duration = Duration::from_secs(60);

/// A request that is handed to the worker.
pub enum Work {
    Flush(Wanted, Responder),
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
pub fn bury(words: &Words, told: &Receiver<Funeral>, stop: &Receiver<()>) {
    loop {
        let funeral = match recv_either(stop, told, WAIT) {
            Either::Second(Ok(funeral)) => funeral,
            Either::Neither => continue,
            Either::First(_) | Either::Second(Err(_)) => return,
        };
        let (done, responder) = match funeral {
            Funeral::Fence(dead, r) => (words.fence(dead).map(|()| StorageReply::Done), r),
            Funeral::Owned(dead, from, r) => (words.owned(&dead, from).map(StorageReply::Records), r),
            Funeral::Recover(dead, r) => (words.take_back(&dead).map(|()| StorageReply::Done), r),
            Funeral::Unused(inos, r) => (words.unused(&inos).map(StorageReply::Inodes), r),
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
    pub fn run(&self, work: &Receiver<Work>, stop: &Receiver<()>) {
        loop {
            let first = match recv_either(stop, work, WAIT) {
                Either::Second(Ok(first)) => first,
                Either::Neither => continue,
                Either::First(_) | Either::Second(Err(_)) => return,
            };
            // One pass and one sync for all flushes that have come meanwhile (group commit).
            let (mut wanted, mut flushes) = (Wanted::default(), Vec::new());
            for work in std::iter::once(first).chain(work.try_iter()) {
                match work {
                    Work::Flush(more, responder) => {
                        wanted.inos.extend(more.inos);
                        wanted.parts.extend(more.parts);
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
                    .flush(&wanted)
                    .map(|()| StorageReply::Done)
                    .map_err(|e| errno(&e));
                for responder in flushes {
                    responder.reply(&result);
                }
            }
        }
    }
}
