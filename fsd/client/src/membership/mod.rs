//! What this mount does when another one is dead.
//!
//! The metadata server tells it twice: before what the dead had is taken back, and after (see `docs/lease-protocol.md`). The first is
//! answered when nothing of this mount's dealings with earlier epochs is under way: no lease operation, no attributes that only it
//! has and that the dead may have been handed, no message that its receiver has not heard.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lockmgr::{Mode, NodeId, NodeSet};
use rt::sync::Mutex;

use crate::cache::Cache;
use crate::opens::pins::Pinning;
use crate::session::Session;
use crate::session::workers::Workers;
use crate::storing::push::Push;
use fsd_proto::rpc::{Errno, Responder};
use fsd_proto::wire::View;

/// Epochs whose settling may still wait for a server, when the next one begins.
const SETTLING: usize = 8;

/// See the module.
pub struct Membership {
    session: Arc<Session>,
    cache: Arc<Cache>,
    push: Arc<Push>,
    pinning: Arc<Pinning>,
    /// Threads of its own: all others may be waiting for what the dead had.
    settling: Workers,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    epoch: u64,
    /// Who waits until this mount has got there.
    asked: Option<Responder>,
}

impl Membership {
    /// Of a mount.
    pub fn new(
        session: &Arc<Session>,
        cache: &Arc<Cache>,
        push: &Arc<Push>,
        pinning: &Arc<Pinning>,
    ) -> Arc<Self> {
        Arc::new(Self {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            push: Arc::clone(push),
            pinning: Arc::clone(pinning),
            settling: Workers::new("fsd-epoch", SETTLING),
            state: Mutex::default(),
        })
    }

    /// Who takes part has changed.
    pub fn take(self: &Arc<Self>, view: View, responder: Responder) {
        let mut responder = Some(responder);
        let (late, before) = {
            let mut state = self.state.lock();
            let late = view.epoch < state.epoch;
            let before = if late {
                None
            } else {
                state.epoch = view.epoch;
                // Answered when this mount has got there.
                let waits = responder.take_if(|_| !view.dead.is_empty());
                std::mem::replace(&mut state.asked, waits)
            };
            (late, before)
        };
        for refused in before.into_iter().chain(responder.take_if(|_| late)) {
            refused.reply(&Err::<(), _>(Errno(libc::ESTALE)));
        }
        if late {
            return;
        }
        if view.dead.is_empty() {
            tracing::debug!("epoch {}: everything of the dead has been taken back", view.epoch);
            self.session.leases.resume(view.epoch);
            // Not on this thread: whoever opens or closes a file just now has its `opens` locked, and may be waiting for an answer of a storage
            // node, which this thread would bring, as it does those that say this mount lives.
            if !self.session.fate.leaving.load(Ordering::SeqCst) {
                let me = Arc::clone(self);
                self.session.threads.workers.run(move || me.reap_orphans());
            }
            if let Some(responder) = responder {
                responder.reply(&Ok(()));
            }
            return;
        }
        let dead: Vec<u16> = view.dead.iter().map(|d| d.node).collect();
        tracing::warn!(
            "epoch {}: mounts {dead:?} are dead; nothing new is leased until what they had is taken back",
            view.epoch
        );
        self.session.net.peers.bury(&view.dead);
        let me = Arc::clone(self);
        let reached = move || {
            let settling = me.settling.clone();
            settling.run(move || me.settle(view.epoch));
        };
        let dead: NodeSet = dead.into_iter().map(NodeId).collect();
        self.session
            .leases
            .begin_epoch(view.epoch, dead, Box::new(reached));
    }

    /// The mount leaves: waits for what is under way, at most so long.
    pub fn close(&self, limit: Duration) {
        self.settling.close(limit);
    }

    /// No lease operation of an earlier epoch is under way any more. On a thread that may wait.
    fn settle(self: Arc<Self>, epoch: u64) {
        tracing::debug!("epoch {epoch}: no lease operation of before is under way");
        for inode in self.cache.inodes.all() {
            while let Err(stop) = self.push.push_attrs_now(&inode) {
                // Nothing of them is given up: the server may just be starting again.
                tracing::warn!(
                    "attributes of {:#x} wait for the metadata server: {stop:?}",
                    inode.ino
                );
                if self.session.term.is_over() || self.state.lock().epoch != epoch {
                    return;
                }
                rt::thread::sleep(Duration::from_millis(100));
            }
        }
        tracing::debug!("epoch {epoch}: the metadata server knows all attributes");
        let me = Arc::clone(&self);
        self.session
            .net
            .peers
            .once_heard(Box::new(move || me.reached(epoch)));
    }

    /// Removes files without a name that this mount owns and that one of the dead had open last: nobody else would. On a thread that may
    /// wait.
    fn reap_orphans(&self) {
        for inode in self.cache.inodes.all() {
            let nameless = inode
                .try_lock_raw()
                .is_some_and(|state| state.attr.is_some_and(|attr| attr.nlink == 0) && !state.lasting.gone);
            let owned = || {
                let held = self.session.leases.held(inode.record());
                held.is_some_and(|(mode, _)| mode == Mode::Exclusive)
            };
            if nameless && inode.opens.lock().count == 0 && owned() {
                self.pinning.reap(&inode);
            }
        }
    }

    fn reached(&self, epoch: u64) {
        let asked = {
            let mut state = self.state.lock();
            if state.epoch == epoch {
                state.asked.take()
            } else {
                None
            }
        };
        if let Some(asked) = asked {
            tracing::debug!("epoch {epoch} is reached");
            asked.reply(&Ok(()));
        }
    }
}
