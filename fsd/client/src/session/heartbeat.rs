//! Telling the metadata server, again and again, that this mount lives.

use std::sync::Arc;
use std::time::Duration;

use rt::channel::{Receiver, RecvTimeoutError};

use super::net::Net;
use super::term::Term;
use fsd_proto::ask;
use fsd_proto::rpc::Errno;

/// Says so.
pub struct Heartbeat {
    /// Over which.
    pub net: Arc<Net>,
    /// What an answer renews.
    pub term: Arc<Term>,
    /// How often.
    pub every: Duration,
}

impl Heartbeat {
    /// Until it is stopped. When there is little left of the term the mount freezes, and `late` has the kernel's caches dropped.
    pub fn run(&self, stop: &Receiver<()>, mut late: impl FnMut()) {
        let (enough, mut told) = (self.every * 3 / 2, false);
        while let Err(RecvTimeoutError::Timeout) = stop.recv_timeout(self.every) {
            if self.term.is_over() {
                return;
            }
            self.beat();
            let little = self.term.left() < enough;
            if little && !told {
                tracing::warn!(
                    "the metadata server has not answered for so long that this mount freezes until it does"
                );
                self.term.freeze();
                late();
            }
            if little {
                self.dial(enough);
            }
            told = little;
        }
    }

    /// Another connection may be answered, where this one is not.
    fn dial(&self, enough: Duration) {
        let term = Arc::clone(&self.term);
        self.net
            .meta
            .replace_silent(move || term.left() < enough && !term.is_over());
    }

    /// Once. Without a connection there is nobody to tell: whoever makes the next one tells with that.
    fn beat(&self) {
        let sent = rt::time::since_boot();
        let (term, net) = (Arc::clone(&self.term), Arc::clone(&self.net));
        self.net
            .meta
            .ask_now(ask::meta::Heartbeat {}, move |answer| match answer {
                Ok(()) => term.renew(sent),
                Err(error) if error.errno() == Errno(libc::ESTALE) => net.ways.declared_dead(),
                Err(error) => tracing::debug!("heartbeat: {error}"),
            });
    }
}
