//! What the server does by itself: freeing the blocks of removed files, ending the recovery window.

use std::sync::Arc;
use std::time::Duration;

use rt::channel::{Either, Receiver, recv_either};
use rt::time::Instant;

use crate::namespace::Namespace;
use crate::namespace::freeing::Told;
use crate::service::Service;
use fsd_proto::wire::MetaReply;

/// How often freed inodes are looked after while there is something to do.
const TICK: Duration = Duration::from_secs(1);
/// … and while there is nothing that nobody has told of.
const QUIET: Duration = Duration::from_secs(10);

/// Keeps house.
pub struct House {
    service: Arc<Service>,
    namespace: Namespace,
    /// Inodes whose blocks are to be freed.
    backlog: Vec<u64>,
    /// When that was last done.
    freed: Option<Instant>,
}

impl House {
    /// Of a server.
    pub fn new(service: &Arc<Service>) -> Self {
        Self {
            service: Arc::clone(service),
            namespace: service.namespace.clone(),
            backlog: Vec::new(),
            freed: None,
        }
    }

    /// Until it is stopped.
    pub fn run(mut self, told: &Receiver<Told>, stop: &Receiver<()>) {
        loop {
            let mut news: Vec<Told> = Vec::new();
            match recv_either(stop, told, self.patience()) {
                Either::First(_) => return,
                Either::Second(first) => news.extend(first),
                Either::Neither => {}
            }
            news.extend(told.try_iter());
            self.look_after(news);
        }
    }

    fn patience(&self) -> Duration {
        if self.backlog.is_empty() && !self.service.membership.recovery.is_open() {
            QUIET
        } else {
            TICK
        }
    }

    /// Deals with what was told.
    pub fn look_after(&mut self, news: Vec<Told>) {
        let mut waiting = Vec::new();
        for one in news {
            match one {
                Told::Freed(ino) => self.backlog.push(ino),
                Told::Settle(responder) => waiting.push(responder),
            }
        }
        // Not for each of many that are removed one after the other: a sync keeps everybody waiting for a while.
        let due = !waiting.is_empty() || self.freed.is_none_or(|at| at.elapsed() >= TICK);
        if !self.backlog.is_empty() && due {
            self.freed = Some(Instant::now());
            if let Err(error) = self.namespace.freeing.free(&mut self.backlog) {
                tracing::debug!("{} inodes are not freed yet: {error}", self.backlog.len());
            }
        }
        let orphans = self.namespace.transactions.orphans();
        for responder in waiting {
            responder.reply(&Ok(MetaReply::Settled { orphans }));
        }
        self.service.end_window();
    }
}
