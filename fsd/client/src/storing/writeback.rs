//! The writeback thread: bounds how long, and how much, data stays in this mount's memory only.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lockmgr::{Guard, Mode};
use rt::channel::{Receiver, RecvTimeoutError};
use rt::time::Instant;

use crate::cache::Cache;
use crate::cache::inode::{Claimed, Inode};
use crate::data::space::Space;
use crate::data::stored::Stored;
use crate::data::writing::Writing;
use crate::opens::pins::Pinning;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res};
use crate::storing::push::Push;
use fsd_proto::ask;
use fsd_proto::rpc::Errno;
use fsd_proto::wire::{AttrUpdate, BlockWant};

/// How often old data is looked for while there is any.
const TICK: Duration = Duration::from_millis(250);
/// Files written back together. While that lasts their leases cannot be given up.
const GROUP: usize = 64;

/// A frame to be asked for.
struct Wanted {
    /// Which of the files.
    file: usize,
    want: BlockWant,
    /// What is set aside for it.
    reserved: u32,
}

/// Writing back.
pub struct Writeback {
    /// Longest time data stays only here.
    pub writeback_after: Duration,
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) space: Arc<Space>,
    pub(crate) stored: Arc<Stored>,
    pub(crate) writing: Arc<Writing>,
    pub(crate) pinning: Arc<Pinning>,
    pub(crate) push: Arc<Push>,
}

impl Writeback {
    /// Runs until the mount stops. Sleeps for good while nothing is dirty.
    pub fn writeback_loop(self: &Arc<Self>, wake: &Receiver<()>) {
        let mut idle_since = None;
        loop {
            let mut dirty = !self.cache.dirty.lock().is_empty();
            let mut pinned = !self.pinning.pins.is_empty();
            if !dirty && !pinned && idle_since.is_none() {
                self.cache.writeback_sleeps.store(true, Ordering::SeqCst);
                // Who noted something before seeing that is seen by this second look.
                dirty = !self.cache.dirty.lock().is_empty();
                pinned = !self.pinning.pins.is_empty();
                if self.space.accounts.has_idle() {
                    idle_since = Some(Instant::now());
                }
            }
            let event = if dirty || pinned || idle_since.is_some() {
                self.cache.writeback_sleeps.store(false, Ordering::SeqCst);
                wake.recv_timeout(TICK)
            } else {
                wake.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            if matches!(event, Err(RecvTimeoutError::Disconnected))
                || self.session.fate.stopping.load(Ordering::Acquire)
            {
                return;
            }
            self.pinning.drop_pins(false);
            if dirty {
                idle_since = Some(Instant::now());
                self.write_old();
                self.space.return_surplus();
            } else if idle_since.is_some_and(|t| t.elapsed() > self.writeback_after) {
                self.space.return_space();
                idle_since = None;
            } else if idle_since.is_none() {
                // Woken for something, or for space that came back: that is not needed for a while.
                idle_since = Some(Instant::now());
            }
            if self.cache.cached_pages.load(Ordering::Relaxed) > self.cache.max_pages {
                self.shrink();
            }
        }
    }

    fn write_old(&self) {
        let full = self.cache.cached_pages.load(Ordering::Relaxed) > self.cache.max_pages / 2;
        let all = full || self.cache.hurry.take();
        let mut old: Vec<(Instant, u64)> = self
            .cache
            .dirty
            .lock()
            .iter()
            .filter(|(_, since)| all || since.elapsed() >= self.writeback_after)
            .map(|(&ino, &since)| (since, ino))
            .collect();
        // Files that were made one after the other are likely to be read so.
        old.sort_unstable();
        let old: Vec<u64> = old.into_iter().map(|(_, ino)| ino).collect();
        for part in old.chunks(GROUP) {
            self.write_group(part);
        }
    }

    /// Writes several files back: one request for space to each storage node, few batches of one-sided operations, and one request for
    /// the attributes serve them all.
    fn write_group(&self, inos: &[u64]) {
        let ctx = Ctx::on_worker();
        let mut held: Vec<(Arc<Inode>, Guard)> = Vec::with_capacity(inos.len());
        for &ino in inos {
            // Before it is looked at: what gets dirty from now on is noted anew. Where the lease is being
            // given up, that writes it back.
            self.cache.dirty.lock().remove(&ino);
            let inode = self.cache.inodes.find(ino);
            let guard = inode
                .as_ref()
                .and_then(|i| self.session.leases.try_enter(i.record(), Mode::Exclusive));
            held.extend(inode.zip(guard));
        }
        // Whoever else has several of these locks takes them in the same order.
        held.sort_unstable_by_key(|(inode, _)| inode.ino);
        if let Err(stop) = self.allocate_group(&held) {
            // Each file finds out for itself what it can have.
            tracing::debug!("allocation for {} files: {stop:?}", held.len());
        }
        let mut orders = Vec::with_capacity(held.len());
        let mut settled: Vec<(&Inode, u64)> = Vec::with_capacity(held.len());
        for (inode, guard) in &held {
            orders.push(inode.telling.lock());
            match self.push.settle(inode) {
                Ok(()) => settled.push((inode, guard.version())),
                Err(stop) => self.put_off(inode, stop.errno()),
            }
        }
        self.writing.store_together(&settled);
        let (mut updates, mut told) = (Vec::with_capacity(held.len()), Vec::with_capacity(held.len()));
        for (inode, version) in settled {
            let Ok(mut state) = self.stored.claim_to_change(&ctx, inode, version) else {
                continue;
            };
            if state.lasting.gone {
                continue;
            }
            match self.writing.flush_pages(&ctx, inode, &mut state) {
                Ok(()) => {}
                Err(stop) => {
                    self.put_off(inode, stop.errno());
                    continue;
                }
            }
            if let Some(attr) = state.attr.filter(|_| state.attr_dirty) {
                updates.push(AttrUpdate::midway(&attr, version));
                told.push((inode, attr));
            }
        }
        if updates.is_empty() {
            return;
        }
        let answer = self.session.net.meta.ask(ask::meta::Update { updates });
        for (inode, attr) in told {
            match &answer {
                Ok(()) => inode.lock_raw().told(&attr),
                Err(error) => self.put_off(inode, error.errno()),
            }
        }
    }

    /// What failed is tried again later: what is wrong will not have passed at once. Nothing is lost, so no file is told.
    fn put_off(&self, inode: &Inode, error: Errno) {
        tracing::warn!("write-back of {:#x}: {error}; it is tried again", inode.ino);
        self.cache.dirty.lock().insert(inode.ino, Instant::now());
    }

    /// Asks for all the frames that the dirty pages of these files need.
    ///
    /// The files stay claimed until the frames have come: a block that gets a larger frame loses the one that is known
    /// here, and whoever read or wrote that one meanwhile would read zeros, or another file's data, or lose what it wrote. A
    /// file that is not free at once asks for itself later, so nobody waits here with other files claimed.
    fn allocate_group(&self, held: &[(Arc<Inode>, Guard)]) -> Res<()> {
        let mut claimed: HashMap<usize, Claimed<'_>> = HashMap::new();
        let mut by_node: HashMap<u16, Vec<Wanted>> = HashMap::new();
        for (i, (inode, guard)) in held.iter().enumerate() {
            let Some(mut state) = inode.try_claim_raw() else {
                continue;
            };
            inode.sync(&mut state, guard.version());
            if state.lasting.gone || state.pages.dirty() == 0 {
                continue;
            }
            state.check_layout();
            for (block, size) in crate::data::writing::frames_wanted(&state) {
                let node = self.session.storage_of(inode.ino, block);
                // What a block has where that was never asked is found out when the file is written back by itself.
                let loaded = state.frames.loaded.contains(&node);
                if loaded && state.frames.known().get(&block).is_none_or(|f| f.size < size) {
                    let reserved = state.frames.reserved.get(&block).copied().unwrap_or(0);
                    let want = BlockWant {
                        ino: inode.ino,
                        block,
                        size: state.frames.size_of(block, size),
                    };
                    by_node.entry(node).or_default().push(Wanted {
                        file: i,
                        want,
                        reserved,
                    });
                }
            }
            claimed.insert(i, state.away());
        }
        let requests = by_node.iter().map(|(&node, wants)| {
            let reserved = wants.iter().map(|w| u64::from(w.reserved)).sum();
            let wants = wants.iter().map(|w| w.want).collect();
            (node, ask::storage::Allocate { wants, reserved })
        });
        let requests: Vec<_> = requests.collect();
        let answers = self.session.net.storage.ask_each(&requests);
        let mut result = Ok(());
        for ((node, request), answer) in requests.iter().zip(answers) {
            match answer {
                Ok(frames) => {
                    self.space.accounts.used(*node, request.reserved);
                    for (wanted, frame) in by_node[node].iter().zip(frames) {
                        if let Some(claimed) = claimed.get_mut(&wanted.file) {
                            claimed.with(|state| state.take_frame(wanted.want.block, frame));
                        }
                    }
                }
                Err(error) => {
                    for wanted in by_node[node].iter().filter(|_| !error.is_refusal()) {
                        if let Some(claimed) = claimed.get_mut(&wanted.file) {
                            claimed.with(|state| state.doubt_frames(*node, [wanted.want.block]));
                        }
                    }
                    result = Err(error.into());
                }
            }
        }
        result
    }

    /// Writes everything back; for leaving.
    pub fn write_all(&self) {
        self.pinning.drop_pins(true);
        self.write_dirty();
    }

    /// Writes back what is dirty now.
    pub fn write_dirty(&self) {
        let all: Vec<u64> = self.cache.dirty.lock().keys().copied().collect();
        for part in all.chunks(GROUP) {
            self.write_group(part);
        }
    }

    /// Drops clean pages until the buffer cache has its size again.
    fn shrink(&self) {
        for inode in self.cache.inodes.all() {
            if self.cache.cached_pages.load(Ordering::Relaxed) <= self.cache.max_pages * 3 / 4 {
                return;
            }
            if let Some(mut state) = inode.try_claim_raw() {
                self.cache.drop_clean(&mut state);
            }
        }
    }
}
