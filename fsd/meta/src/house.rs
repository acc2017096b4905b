//! What the server does by itself: freeing the blocks of removed files, looking after membership.

use std::sync::Arc;
use std::time::Duration;

use rt::channel::{Either, Receiver, recv_either};
use rt::time::Instant;

use crate::membership::clear::Clearing;
use crate::membership::members::Members;
use crate::namespace::Namespace;
use crate::namespace::freeing::Told;
use crate::service::Service;
use fsd_proto::wire::MetaReply;

/// How often membership and freed inodes are looked after while there is something to do.
const TICK: Duration = Duration::from_secs(1);

/// Keeps house.
pub struct House {
    service: Arc<Service>,
    namespace: Namespace,
    members: Arc<Members>,
    clearing: Clearing,
    /// Inodes whose blocks are to be freed.
    backlog: Vec<u64>,
    /// When that was last done.
    freed: Option<Instant>,
}

impl House {
    /// Of a server.
    pub fn new(service: &Arc<Service>) -> Self {
        let members = &service.membership.members;
        Self {
            service: Arc::clone(service),
            namespace: service.namespace.clone(),
            members: Arc::clone(members),
            clearing: Clearing {
                journal: service.journal.clone(),
                nodes: service.nodes.clone(),
                members: Arc::clone(members),
                rules: service.rules,
            },
            backlog: Vec::new(),
            freed: None,
        }
    }

    /// Until it is stopped.
    pub fn run(mut self, told: &Receiver<Told>, stop: &Receiver<()>) {
        loop {
            let mut news: Vec<Told> = Vec::new();
            match recv_either(stop, told, TICK) {
                Either::First(_) => return,
                Either::Second(first) => news.extend(first),
                Either::Neither => {}
            }
            news.extend(told.try_iter());
            self.look_after(news);
        }
    }

    /// Deals with what was told, and with what has become of the mounts.
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
        self.members.bury();
        self.service.end_window();
        if self.members.only_dead()
            && let Err(error) = self.clearing.clear()
        {
            tracing::error!("recovery is not complete: {error}");
        }
    }
}
