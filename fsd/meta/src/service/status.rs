//! What `fsd status` is told by the metadata server.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::journal::Journal;
use crate::membership::members::Members;
use crate::membership::takeover::Takeover;
use crate::namespace::Namespace;
use crate::nodes::Nodes;
use fsd_node::probe::{self, Probe};
use fsd_proto::ask;
use fsd_proto::rpc::Responder;
use fsd_proto::wire::{MetaReply, MetaStatus};

/// Knows how the server is.
#[derive(Clone)]
pub struct Status {
    /// Requests so far.
    pub requests: Arc<AtomicU64>,
    pub journal: Journal,
    pub nodes: Nodes,
    pub namespace: Namespace,
    pub members: Arc<Members>,
    pub takeover: Arc<Takeover>,
}

impl Status {
    /// Answers when the storage nodes have been asked whether they are there: not on the thread that brings their answers.
    pub fn later(&self, responder: Responder) {
        let me = self.clone();
        let asking = rt::thread::Builder::new()
            .name("meta-status".into())
            .spawn(move || responder.reply(&Ok(MetaReply::Status(me.now()))));
        if let Err(error) = asking {
            // The responder is gone with the thread, and the tool says that nobody answers.
            tracing::warn!("no thread can be started for the status: {error}");
        }
    }

    fn now(&self) -> MetaStatus {
        MetaStatus {
            troubles: self.troubles(),
            nodes: self.members.infos(),
            inodes: self.namespace.transactions.inodes(),
            orphans: self.namespace.transactions.orphans(),
            freeing: self.namespace.freeing.inodes(),
            requests: self.requests.load(Ordering::Relaxed),
            epoch: self.members.view().0.epoch,
            durable: self.journal.order.durable(),
            generations: self.nodes.stores.generations(),
        }
    }

    /// What is wrong as seen from here.
    fn troubles(&self) -> Vec<String> {
        let probes = self.nodes.stores.sections().iter().map(|section| {
            let (asks, id) = (Arc::clone(&self.nodes.asks), section.id);
            let ask = move || match asks.asked(id, ask::storage::Space {}) {
                Ok(_) => Ok(()),
                Err(error) => Err(error.to_string()),
            };
            Probe {
                who: format!("storage node {id} ({})", section.listen),
                ask: Box::new(ask),
            }
        });
        let mut troubles = probe::unreachable(probes.collect(), probe::PATIENCE);
        troubles.extend(self.takeover.waits());
        troubles.extend(self.journal.store.room().err().map(|error| error.to_string()));
        troubles
    }
}
