//! What the server does by itself: making things durable, freeing the blocks of removed files, looking after membership.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError};

use super::names::Change;
use super::opening::load;
use super::records::key;
use super::server::{House, Inner, OnceDurable};
use super::{MetaError, Refusal};
use crate::store::prefix_end;
use crate::wire::{MetaReply, StorageRequest, Time};

/// How often membership and freed inodes are looked after while there is something to do.
const TICK: Duration = Duration::from_secs(1);

/// Transactions that nobody asks to be durable are so after this long, as with local file systems.
const SYNC_AFTER: Duration = Duration::from_secs(5);

impl Inner {
    /// Group commit: one sync answers everybody who asked before it began. And one every now and then while anything
    /// happens, so that what the mounts have to keep is bounded.
    pub(super) fn sync_loop(&self, requests: &Receiver<OnceDurable>) {
        let mut pending: Option<Instant> = None;
        while !self.stopping.load(Ordering::Acquire) {
            let first = match requests.recv_timeout(TICK) {
                Ok(first) => first,
                Err(RecvTimeoutError::Timeout) => {
                    if self.order.executed() == self.order.durable() {
                        pending = None;
                    } else if pending.get_or_insert_with(Instant::now).elapsed() >= SYNC_AFTER {
                        pending = None;
                        if let Err(error) = self.order.sync() {
                            tracing::error!("{error}");
                        }
                    }
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let waiting: Vec<OnceDurable> = std::iter::once(first).chain(requests.try_iter()).collect();
            let result = self.order.sync().map_err(|e| Refusal::Store(e).errno());
            for (responder, reply) in waiting {
                responder.reply(&result.map(|()| self.ordered(0, reply)));
            }
        }
    }

    /// An answer with its place in the order of all.
    pub(super) fn ordered(&self, order: u64, reply: MetaReply) -> MetaReply {
        MetaReply::Ordered {
            order,
            durable: self.order.durable(),
            reply: Box::new(reply),
        }
    }

    pub(super) fn house_loop(&self, told: &Receiver<House>, stop: &Receiver<()>) {
        let mut backlog: Vec<u64> = Vec::new();
        let mut freed_at = Instant::now();
        loop {
            let mut news: Vec<House> = Vec::new();
            crossbeam::channel::select! {
                recv(stop) -> _ => return,
                recv(told) -> first => news.extend(first),
                default(TICK) => {}
            }
            news.extend(told.try_iter());
            let mut waiting = Vec::new();
            for one in news {
                match one {
                    House::Freed(ino) => backlog.push(ino),
                    House::Settle(responder) => waiting.push(responder),
                }
            }
            // A crash that undid the removal would bring back the names of files whose blocks are gone.
            // Not for each of many that are removed one after the other: a sync keeps everybody waiting for a while.
            let due = !waiting.is_empty() || freed_at.elapsed() >= TICK;
            if !backlog.is_empty() && due {
                freed_at = Instant::now();
                match self.order.sync() {
                    Ok(()) => backlog.retain(|&ino| !self.free_blocks(ino)),
                    Err(error) => tracing::error!("{error}"),
                }
            }
            let orphans = self.state.lock().orphans;
            for responder in waiting {
                responder.reply(&Ok(MetaReply::Settled { orphans }));
            }
            let dead = self.state.lock().sessions.bury(Instant::now());
            for node in dead {
                tracing::warn!(
                    "mount {node} is dead: it did not come back; files it had leased stay blocked until it is recovered"
                );
                let served = self.state.lock().locks.release_node(node);
                self.answer_locks(&served, &Ok(MetaReply::Done));
                if let Some(window) = &mut self.state.lock().window {
                    window.give_up(node);
                }
            }
            self.end_window();
            if self.state.lock().sessions.only_dead()
                && let Err(error) = self.recover_all()
            {
                tracing::error!("recovery is not complete: {error}");
            }
        }
    }

    pub(super) fn free_later(&self, ino: u64) {
        self.freeing.fetch_add(1, Ordering::Relaxed);
        let _ = self.freed.send(House::Freed(ino));
    }

    /// Frees an inode's blocks everywhere, then lets its record be used again. False: try again later.
    fn free_blocks(&self, ino: u64) -> bool {
        for section in &self.config.storage {
            let request = StorageRequest::Free {
                ino,
                first: 0,
                last: u64::MAX,
            };
            if let Err(error) = self.nodes.ask(section.id, &request) {
                if !self.stopping.load(Ordering::Acquire) {
                    tracing::debug!("blocks of {ino:#x} not freed yet: {error}");
                }
                return false;
            }
        }
        let mut txn = self.txn();
        txn.delete(key::freed(ino));
        txn.recycle(ino);
        match txn.commit() {
            Ok(()) => {
                self.freeing.fetch_sub(1, Ordering::Relaxed);
                true
            }
            Err(error) => {
                tracing::error!("{error}");
                false
            }
        }
    }

    /// Nobody alive holds anything: clear all leases, reap all orphans, forget the dead.
    fn recover_all(&self) -> Result<(), MetaError> {
        for section in &self.config.storage {
            self.nodes
                .ask(section.id, &StorageRequest::ResetLeases)
                .map_err(|error| MetaError::Io {
                    what: format!("resetting the leases of storage node {}", section.id),
                    error: std::io::Error::other(error.to_string()),
                })?;
        }
        let mut state = self.state.lock();
        if !state.sessions.only_dead() {
            return Ok(());
        }
        for (k, _) in self.store.scan(b"O", &prefix_end(b"O"), usize::MAX)? {
            let change = Change::new(self.txn(), 0, Time::now(), self.era(), &[]);
            if let Some((txn, effects)) = load(change.reap(key::number(&k)))? {
                txn.commit()?;
                self.settle(&mut state, &effects);
            }
        }
        let nodes: Vec<u16> = state.sessions.nodes.keys().copied().collect();
        for node in nodes {
            load(self.forget(&mut state, node, false))?;
        }
        tracing::info!("every mount was dead: all leases have been reset");
        Ok(())
    }
}
