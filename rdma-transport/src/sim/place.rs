//! An endpoint as the net knows it.

use std::collections::HashMap;
use std::sync::Arc;

use rt::sync::Condvar;

use super::state::{After, End, PairId};
use crate::mem::SharedMem;
use crate::stats::Counters;
use crate::{Access, Connection, Handler, TransportError};

pub(super) struct EndpointState {
    pub(super) addr: String,
    pub(super) key: Vec<u8>,
    pub(super) identity: Vec<u8>,
    pub(super) counters: Arc<Counters>,
    pub(super) handler: Arc<dyn Handler>,
    pub(super) regions: HashMap<u64, (Arc<SharedMem>, Access)>,
    pub(super) up: bool,
    /// Where its thread finds what it is to call; none where the test calls.
    pub(super) inbox: Option<Inbox>,
}

/// What an endpoint's thread is to call, and for which end of which connection.
pub(super) type Inbox = rt::channel::Sender<((PairId, End), After)>;

/// Time that passes by itself.
pub(super) struct Clock {
    pub(super) began: rt::time::Instant,
    pub(super) changed: Condvar,
}

impl EndpointState {
    /// Nothing of it is called any more, and it is not kept for that.
    pub(super) fn go_down(&mut self) {
        self.up = false;
        self.regions.clear();
        self.inbox = None;
        self.handler = Arc::new(Nobody);
    }
}

/// In the place of the handler of an endpoint that is down.
struct Nobody;

impl Handler for Nobody {
    fn admit(&self, _: &[u8]) -> Result<(), String> {
        Err("it is down".to_owned())
    }
    fn connected(&self, _: &Arc<dyn Connection>) {}
    fn message(&self, _: &Arc<dyn Connection>, _: &[u8]) {}
    fn disconnected(&self, _: &Arc<dyn Connection>, _: &TransportError) {}
}
