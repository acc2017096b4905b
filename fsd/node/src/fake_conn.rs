//! A connection that only tests have: answers are kept, everything else fails.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rdma_transport::{AsyncOp, Completion, ConnId, Connection, Op, TransportError};
use rt::sync::Mutex;
use serde::de::DeserializeOwned;

use fsd_proto::rpc::Errno;
use fsd_proto::wire::{self, FrameView};

/// Keeps what is answered.
pub struct FakeConn {
    id: u64,
    closed: AtomicBool,
    answers: Mutex<BTreeMap<u64, Vec<u8>>>,
}

impl FakeConn {
    /// One of this number.
    #[must_use]
    pub fn new(id: u64) -> Arc<Self> {
        Arc::new(Self {
            id,
            closed: AtomicBool::new(false),
            answers: Mutex::default(),
        })
    }

    /// What the request of this number has been answered, if it has.
    pub fn taken<R: DeserializeOwned>(&self, number: u64) -> Option<Result<R, Errno>> {
        let bytes = self.answers.lock().remove(&number)?;
        wire::decode(&bytes).ok()
    }
}

impl Connection for FakeConn {
    fn id(&self) -> ConnId {
        ConnId(self.id)
    }
    fn peer_identity(&self) -> &[u8] {
        &[]
    }
    fn peer_addr(&self) -> String {
        String::new()
    }
    fn is_alive(&self) -> bool {
        !self.closed.load(Ordering::Relaxed)
    }
    fn execute(&self, _: &mut [Op<'_>]) -> Result<(), TransportError> {
        Err(TransportError::Shutdown)
    }
    fn submit(&self, _: Vec<AsyncOp>, _: Completion) {}
    fn send(&self, message: &[u8]) -> Result<(), TransportError> {
        if let Ok(FrameView::Response(number, body)) = wire::parse(message) {
            self.answers.lock().insert(number, body.to_vec());
        }
        Ok(())
    }
    fn queue(&self, message: &[u8]) -> Result<(), TransportError> {
        self.send(message)
    }
    fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }
}
