//! What stands in the place of other things: time that passes by itself, and the handler of an endpoint that is down.

use std::sync::Arc;
use std::time::Duration;

use rt::sync::Condvar;

use crate::{Connection, Handler, TransportError};

/// Time that passes by itself.
pub(super) struct Clock {
    pub(super) began: rt::time::Instant,
    /// The same moment, for those whose clocks go at rates of their own.
    pub(super) origin: Duration,
    pub(super) changed: Condvar,
}

/// In the place of the handler of an endpoint that is down.
pub(super) struct Nobody;

impl Handler for Nobody {
    fn admit(&self, _: &[u8]) -> Result<(), String> {
        Err("it is down".to_owned())
    }
    fn connected(&self, _: &Arc<dyn Connection>) {}
    fn message(&self, _: &Arc<dyn Connection>, _: &[u8]) {}
    fn disconnected(&self, _: &Arc<dyn Connection>, _: &TransportError) {}
}
