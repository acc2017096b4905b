//! What the tests inside of this crate share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::{Connection, FabricConfig, Handler, TransportError};

pub(crate) const KEY: &[u8] = b"the key of the unit tests";

/// Counts what happens.
#[derive(Default)]
pub(crate) struct Counting {
    pub(crate) connected: AtomicU64,
    pub(crate) conns: Mutex<Vec<Arc<dyn Connection>>>,
    pub(crate) messages: AtomicU64,
    pub(crate) ended: Mutex<Vec<TransportError>>,
}

impl Handler for Counting {
    fn admit(&self, _identity: &[u8]) -> Result<(), String> {
        Ok(())
    }
    fn connected(&self, conn: &Arc<dyn Connection>) {
        self.conns.lock().push(Arc::clone(conn));
        self.connected.fetch_add(1, Ordering::SeqCst);
    }
    fn message(&self, _conn: &Arc<dyn Connection>, _message: &[u8]) {
        self.messages.fetch_add(1, Ordering::SeqCst);
    }
    fn disconnected(&self, _conn: &Arc<dyn Connection>, why: &TransportError) {
        self.ended.lock().push(why.clone());
    }
}

pub(crate) fn config(listen: &str, identity: &str) -> FabricConfig {
    FabricConfig {
        listen: listen.to_owned(),
        key: KEY.to_vec(),
        identity: identity.as_bytes().to_vec(),
        spin: Duration::ZERO,
        timeout: Duration::from_secs(5),
    }
}

pub(crate) fn until(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "waited in vain: {what}"
        );
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A small random number generator for garbage.
pub(crate) struct Junk(pub(crate) u64);

impl Junk {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 24
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}
