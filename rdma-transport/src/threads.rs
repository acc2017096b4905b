//! The threads of an endpoint: one that makes progress, and short-lived ones for handshakes; how they hand connections over.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::base::Base;
use crate::common;
use crate::error::TransportError;
use crate::handshake::Peer;
use crate::pool::Handshakes;
use crate::stats;

/// A peer that does not finish its handshake in this time is dropped.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// A peer has proved itself: its older connections are to be ended before it gets a new one.
pub(crate) struct Replace {
    pub(crate) peer: Peer,
    pub(crate) done: SyncSender<()>,
}

/// What is on its way to the progress thread. `I` is a new connection.
pub(crate) struct Threads<I> {
    /// None: the progress thread has ended.
    installs: Mutex<Option<Vec<I>>>,
    replacing: Mutex<Option<Vec<Replace>>>,
    handshakes: Arc<Handshakes>,
    progress: Mutex<Option<JoinHandle<()>>>,
}

impl<I> Default for Threads<I> {
    fn default() -> Self {
        Self {
            installs: Mutex::new(Some(Vec::new())),
            replacing: Mutex::new(Some(Vec::new())),
            handshakes: Arc::default(),
            progress: Mutex::new(None),
        }
    }
}

impl<I> Threads<I> {
    /// The connections that are new since the last time.
    pub(crate) fn take_installs(&self) -> Vec<I> {
        let mut installs = self.installs.lock();
        installs.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// As [`Threads::take_installs`]; there will be no more.
    pub(crate) fn take_last_installs(&self) -> Vec<I> {
        self.installs.lock().take().unwrap_or_default()
    }

    /// Whose older connections are to be ended.
    pub(crate) fn take_replacing(&self) -> Vec<Replace> {
        let mut replacing = self.replacing.lock();
        replacing.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// As [`Threads::take_replacing`]; there will be no more. Dropping an entry ends its handshake.
    pub(crate) fn take_last_replacing(&self) -> Vec<Replace> {
        self.replacing.lock().take().unwrap_or_default()
    }

    /// Starts the progress thread.
    pub(crate) fn start(
        &self,
        name: &str,
        run: impl FnOnce() + Send + 'static,
    ) -> Result<(), TransportError> {
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                common::mark_progress_thread();
                run();
            })
            .map_err(|e| TransportError::os("start the progress thread", &e))?;
        *self.progress.lock() = Some(thread);
        Ok(())
    }
}

/// A provider's endpoint.
pub(crate) trait Endpoint: Send + Sync + Sized + 'static {
    /// What it hands to its progress thread when a connection is new.
    type Install: Send;

    fn base(&self) -> &Base;

    fn threads(&self) -> &Threads<Self::Install>;

    /// Makes the progress thread look around, whatever it is doing.
    fn wake(&self);

    /// Hands a connection to the progress thread.
    fn install(&self, install: Self::Install) -> Result<(), TransportError> {
        match self.threads().installs.lock().as_mut() {
            Some(installs) => {
                // Before anybody can be told of it.
                stats::count(&self.base().counters.connections, 1);
                installs.push(install);
            }
            None => return Err(TransportError::Shutdown),
        }
        self.wake();
        Ok(())
    }

    /// Has the progress thread end what the peer had before, and waits for that. `addr` is for the error.
    fn replace(&self, peer: &Peer, addr: &str, deadline: Instant) -> Result<(), TransportError> {
        let (done, ended) = mpsc::sync_channel(1);
        match self.threads().replacing.lock().as_mut() {
            Some(replacing) => replacing.push(Replace {
                peer: peer.clone(),
                done,
            }),
            None => return Err(TransportError::Shutdown),
        }
        self.wake();
        let left = deadline.saturating_duration_since(Instant::now());
        ended
            .recv_timeout(left.max(Duration::from_millis(1)))
            .map_err(|e| match e {
                mpsc::RecvTimeoutError::Timeout => common::timed_out(addr, HANDSHAKE),
                mpsc::RecvTimeoutError::Disconnected => TransportError::Shutdown,
            })
    }

    /// Welcomes an incoming socket on a thread of its own; `welcome` gets its deadline and how long that is.
    fn shake_hands(
        self: &Arc<Self>,
        sock: Arc<OwnedFd>,
        welcome: impl FnOnce(&Arc<Self>, Instant, Duration) -> Result<(), TransportError> + Send + 'static,
    ) {
        let me = Arc::clone(self);
        self.threads().handshakes.start(sock, move || {
            let base = me.base();
            let timeout = HANDSHAKE.min(base.config.timeout);
            if let Err(error) = welcome(&me, Instant::now() + timeout, timeout)
                && !base.stopped()
            {
                base.counters.handshake_failed(&error);
            }
        });
    }

    /// Ends what runs on threads; called once, after [`Base::begin_stop`]. `addr` is for the log.
    fn end_threads(&self, addr: &str) {
        // The progress thread hears of it first: it lets those handshakes go that wait for it.
        self.wake();
        self.threads().handshakes.stop();
        self.wake();
        let thread = self.threads().progress.lock().take();
        if let Some(thread) = thread
            && !common::on_progress_thread()
            && thread.join().is_err()
        {
            tracing::error!("the progress thread of {addr} panicked");
        }
    }
}
