//! What the server does by itself: making things durable, freeing the blocks of removed files, looking after membership.

use std::sync::atomic::Ordering;
use std::time::Duration;

use rt::channel::{Either, Receiver, RecvTimeoutError, recv_either};
use rt::time::Instant;

use super::names::Change;
use super::opening::load;
use super::records::key;
use super::server::{Flaw, House, Inner, OnceDurable};
use super::{MetaError, Refusal};
use fsd_node::store::prefix_end;
use fsd_proto::ask;
use fsd_proto::rpc::Errno;
use fsd_proto::wire::{MetaReply, StorageReply, StorageRequest, Time};

/// How often membership and freed inodes are looked after while there is something to do.
const TICK: Duration = Duration::from_secs(1);

/// Transactions that nobody asks to be durable are so after this long, as with local file systems.
const SYNC_AFTER: Duration = Duration::from_secs(5);

/// So many inodes are freed between two syncs of the storage nodes.
const FREED_TOGETHER: usize = 4096;

/// Inodes whose blocks are to be freed.
#[derive(Default)]
pub(super) struct Backlog {
    inos: Vec<u64>,
    /// When that was last done.
    freed: Option<Instant>,
}

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
                        self.store.tidy();
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
            self.answer_once_durable(std::iter::once(first).chain(requests.try_iter()).collect());
        }
    }

    /// Makes everything so far durable, and answers who waits for that.
    pub(super) fn answer_once_durable(&self, waiting: Vec<OnceDurable>) {
        let result = self.order.sync().map_err(|e| Refusal::Store(e).errno());
        for (responder, reply) in waiting {
            responder.reply(&result.map(|()| self.ordered(0, reply)));
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
        let mut backlog = Backlog::default();
        loop {
            let mut news: Vec<House> = Vec::new();
            match recv_either(stop, told, TICK) {
                Either::First(_) => return,
                Either::Second(first) => news.extend(first),
                Either::Neither => {}
            }
            news.extend(told.try_iter());
            self.look_after(&mut backlog, news);
        }
    }

    /// Deals with what was told, and with what has become of the mounts.
    pub(super) fn look_after(&self, backlog: &mut Backlog, news: Vec<House>) {
        let mut waiting = Vec::new();
        for one in news {
            match one {
                House::Freed(ino) => backlog.inos.push(ino),
                House::Settle(responder) => waiting.push(responder),
            }
        }
        // Not for each of many that are removed one after the other: a sync keeps everybody waiting for a while.
        let due = !waiting.is_empty() || backlog.freed.is_none_or(|at| at.elapsed() >= TICK);
        if !backlog.inos.is_empty() && due {
            backlog.freed = Some(Instant::now());
            if let Err(error) = self.free_blocks(&mut backlog.inos)
                && !self.stopping.load(Ordering::Acquire)
            {
                tracing::debug!("{} inodes are not freed yet: {error}", backlog.inos.len());
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

    pub(super) fn free_later(&self, ino: u64) {
        self.freeing.fetch_add(1, Ordering::Relaxed);
        let _ = self.freed.send(House::Freed(ino));
    }

    /// Frees the blocks of removed inodes everywhere, then lets their records be used again. What is left in `inos` is to
    /// be tried again.
    fn free_blocks(&self, inos: &mut Vec<u64>) -> Result<(), MetaError> {
        // A crash that undid a removal would bring back the name of a file whose blocks are gone.
        if !self.flawed(Flaw::FreedEarly) {
            self.order.sync()?;
        }
        while !inos.is_empty() {
            let some = &inos[inos.len().saturating_sub(FREED_TOGETHER)..];
            for section in &self.config.storage {
                for &ino in some {
                    let (first, last) = (0, u64::MAX);
                    self.ask(section.id, ask::storage::Free { ino, first, last })?;
                }
                // A crash of the storage node that undid this would leave it blocks that nobody frees any more: the record
                // of what is to be freed stays until it cannot.
                if !self.flawed(Flaw::FreedForgotten) {
                    self.ask(section.id, ask::storage::Flush { inos: Vec::new() })?;
                }
            }
            let mut txn = self.txn();
            for &ino in some {
                txn.delete(key::freed(ino));
                txn.recycle(ino);
            }
            txn.commit()?;
            self.freeing.fetch_sub(some.len() as u64, Ordering::Relaxed);
            inos.truncate(inos.len() - some.len());
        }
        Ok(())
    }

    fn ask<R>(&self, node: u16, request: R) -> Result<R::Reply, MetaError>
    where
        R: ask::Request<Message = StorageRequest, Answer = StorageReply>,
    {
        self.nodes.asked(node, request).map_err(|error| MetaError::Io {
            what: format!("storage node {node} does not do what it is asked"),
            error: std::io::Error::other(error.to_string()),
        })
    }

    /// Gives what mounts left beyond the ends of files, and the blocks of inodes that are no more, back: what they wrote and
    /// had not told anybody about before they died, and what a power cut of a storage node brought back after it had been
    /// freed. Only while no mount is alive, for else a file may be longer than the store knows.
    fn cut_ends(&self) -> Result<(), MetaError> {
        let mut bytes = 0;
        for section in &self.config.storage {
            let mut after = 0;
            loop {
                let inos = self.ask(section.id, ask::storage::Inodes { after })?;
                let Some(&last) = inos.last() else { break };
                after = last;
                let mut ends = Vec::with_capacity(inos.len());
                for ino in inos {
                    match self.txn().inode(ino) {
                        Ok(inode) => ends.push((ino, Some(inode.attr.size))),
                        Err(Refusal::Errno(Errno(libc::ENOENT))) => ends.push((ino, None)),
                        // An inode that cannot be read: nothing of it is touched.
                        Err(Refusal::Errno(_)) => {}
                        Err(Refusal::Store(error)) => return Err(error.into()),
                    }
                }
                bytes += self.ask(section.id, ask::storage::Cut { ends })?;
            }
        }
        if bytes > 0 {
            tracing::info!("{bytes} bytes beyond the ends of files, or of no file at all, have been freed");
        }
        Ok(())
    }

    /// Nobody alive holds anything: clear all leases, reap all orphans, forget the dead.
    fn recover_all(&self) -> Result<(), MetaError> {
        for section in &self.config.storage {
            self.ask(section.id, ask::storage::ResetLeases {})?;
        }
        if !self.flawed(Flaw::EndsNotCut) {
            // What the store says of sizes must not be undone once blocks are gone for it.
            self.order.sync()?;
            self.cut_ends()?;
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
