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
use fsd_proto::wire::StorageReply;

/// A request that is handed to the worker.
pub enum Work {
    Flush(Vec<u64>, Responder),
    Reset(Responder),
    Status(Responder),
    Cut(Vec<End>, Responder),
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
