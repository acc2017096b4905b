//! Short-lived threads for incoming handshakes, bounded in number.
//!
//! A peer that connects and then says nothing costs one of these threads until the deadline, never the
//! progress thread. When all are taken the oldest is cut off: an honest handshake takes milliseconds, so the
//! oldest one is the likeliest to be idle on purpose.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use rustix::net::Shutdown;

const MOST: usize = 64;

#[derive(Debug, Default)]
struct Inner {
    active: VecDeque<(u64, Arc<OwnedFd>)>,
    threads: Vec<JoinHandle<()>>,
    next: u64,
    closed: bool,
}

/// The handshakes under way at one endpoint.
#[derive(Debug, Default)]
pub(crate) struct Handshakes(Mutex<Inner>);

impl Handshakes {
    /// Runs `work`, which talks over `sock`, on a thread of its own.
    pub(crate) fn start(self: &Arc<Self>, sock: Arc<OwnedFd>, work: impl FnOnce() + Send + 'static) {
        let mut inner = self.0.lock();
        if inner.closed {
            return;
        }
        inner.threads.retain(|t| !t.is_finished());
        while inner.active.len() >= MOST {
            if let Some((_, oldest)) = inner.active.pop_front() {
                cut(&oldest);
            }
        }
        let ticket = inner.next;
        inner.next += 1;
        inner.active.push_back((ticket, sock));
        let pool = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name("fabric-hello".to_owned())
            .spawn(move || {
                work();
                pool.0.lock().active.retain(|(t, _)| *t != ticket);
            });
        match spawned {
            Ok(thread) => inner.threads.push(thread),
            Err(error) => {
                tracing::warn!("no thread for an incoming connection: {error}");
                inner.active.retain(|(t, _)| *t != ticket);
            }
        }
    }

    /// Cuts all of them off and waits for their threads. No new ones start.
    pub(crate) fn stop(&self) {
        let threads = {
            let mut inner = self.0.lock();
            inner.closed = true;
            for (_, sock) in &inner.active {
                cut(sock);
            }
            std::mem::take(&mut inner.threads)
        };
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a handshake thread panicked");
            }
        }
    }
}

fn cut(sock: &OwnedFd) {
    // Not connected any more: the handshake has noticed by itself.
    let _gone = rustix::net::shutdown(sock, Shutdown::Both);
}
