//! What the tests inside of this crate share.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
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
        keep: None,
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

thread_local! {
    /// Bytes that this thread has allocated and not freed, and the most that these were.
    static ALLOCATED: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

struct Watched;

#[global_allocator]
static WATCHED: Watched = Watched;

fn note(bytes: isize) {
    // Threads that are just ending are not watched.
    let _ended = ALLOCATED.try_with(|a| {
        let (now, most) = a.get();
        a.set((now + bytes, most.max(now + bytes)));
    });
}

// SAFETY: the system's allocator does the work; what is noted is a number in a cell.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size() as isize);
        // SAFETY: passed on as it came.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        note(-(layout.size() as isize));
        // SAFETY: passed on as it came.
        unsafe { System.dealloc(at, layout) }
    }
}

/// What `act` returns, and how much more memory this thread had at the most while it ran.
pub(crate) fn allocating<R>(act: impl FnOnce() -> R) -> (R, usize) {
    let before = ALLOCATED.with(|a| {
        let (now, _) = a.get();
        a.set((now, now));
        now
    });
    let result = act();
    let most = ALLOCATED.with(|a| a.get().1);
    (result, usize::try_from(most - before).unwrap_or(0))
}
