//! What `fsd status` is told by the metadata server.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::server::Inner;
use fsd_node::probe::{self, Probe};
use fsd_proto::ask;
use fsd_proto::rpc::Responder;
use fsd_proto::wire::{MetaReply, MetaStatus, NodeInfo};

impl Inner {
    /// Answers when the storage nodes have been asked whether they are there: not on the thread that brings their answers.
    pub(super) fn status_later(self: &Arc<Self>, responder: Responder) {
        let me = Arc::clone(self);
        let asking = rt::thread::Builder::new()
            .name("meta-status".into())
            .spawn(move || responder.reply(&Ok(MetaReply::Status(me.status()))));
        if let Err(error) = asking {
            // The responder is gone with the thread, and the tool says that nobody answers.
            tracing::warn!("no thread can be started for the status: {error}");
        }
    }

    fn status(self: &Arc<Self>) -> MetaStatus {
        let troubles = self.troubles();
        let state = self.state.lock();
        let nodes = state
            .sessions
            .nodes
            .iter()
            .map(|(&node, s)| NodeInfo {
                node,
                incarnation: s.member.incarnation,
                name: s.member.name.clone(),
                listen: s.member.listen.clone(),
                state: s.state(),
                locks: state.locks.count(node),
            })
            .collect();
        MetaStatus {
            nodes,
            inodes: state.inodes,
            orphans: state.orphans,
            freeing: self.freeing.load(Ordering::Relaxed),
            requests: self.requests.load(Ordering::Relaxed),
            epoch: 0,
            durable: self.order.durable(),
            generations: self.copies.known(),
            troubles,
        }
    }

    /// What is wrong as seen from here.
    fn troubles(self: &Arc<Self>) -> Vec<String> {
        let probes = self.config.storage.iter().map(|section| {
            let (me, id) = (Arc::clone(self), section.id);
            let ask = move || match me.nodes.asked(id, ask::storage::Space {}) {
                Ok(_) => Ok(()),
                Err(error) => Err(error.to_string()),
            };
            Probe {
                who: format!("storage node {id} ({})", section.listen),
                ask: Box::new(ask),
            }
        });
        let mut troubles = probe::unreachable(probes.collect(), probe::PATIENCE);
        troubles.extend(self.store.room().err().map(|error| error.to_string()));
        troubles
    }
}
