//! The writeback thread: bounds how long, and how much, data stays in this mount's memory only.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lockmgr::{Guard, Mode};
use rt::channel::{Receiver, RecvTimeoutError};
use rt::sync::MutexGuard;
use rt::time::Instant;

use super::Client;
use super::ctx::{Ctx, Res};
use super::inode::{Inode, State};
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

impl Client {
    /// Runs until the mount stops. Sleeps for good while nothing is dirty.
    pub fn writeback_loop(self: &Arc<Self>, wake: &Receiver<()>) {
        let mut idle_since = None;
        loop {
            let mut dirty = !self.dirty.lock().is_empty();
            let mut pinned = !self.pins.is_empty();
            if !dirty && !pinned && idle_since.is_none() {
                self.writeback_sleeps.store(true, Ordering::SeqCst);
                // Who noted something before seeing that is seen by this second look.
                dirty = !self.dirty.lock().is_empty();
                pinned = !self.pins.is_empty();
                if self.space.has_idle() {
                    idle_since = Some(Instant::now());
                }
            }
            let event = if dirty || pinned || idle_since.is_some() {
                self.writeback_sleeps.store(false, Ordering::SeqCst);
                wake.recv_timeout(TICK)
            } else {
                wake.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            if matches!(event, Err(RecvTimeoutError::Disconnected)) || self.stopping.load(Ordering::Acquire) {
                return;
            }
            self.drop_pins(false);
            if dirty {
                idle_since = Some(Instant::now());
                self.write_old();
                self.return_surplus();
            } else if idle_since.is_some_and(|t| t.elapsed() > self.writeback_after) {
                self.return_space();
                idle_since = None;
            } else if idle_since.is_none() {
                // Woken for something, or for space that came back: that is not needed for a while.
                idle_since = Some(Instant::now());
            }
            if self.cached_pages.load(Ordering::Relaxed) > self.max_pages {
                self.shrink();
            }
        }
    }

    fn write_old(&self) {
        let full = self.cached_pages.load(Ordering::Relaxed) > self.max_pages / 2;
        let old: Vec<u64> = self
            .dirty
            .lock()
            .iter()
            .filter(|(_, since)| full || since.elapsed() >= self.writeback_after)
            .map(|(&ino, _)| ino)
            .collect();
        for part in old.chunks(GROUP) {
            self.write_group(part);
        }
    }

    /// Writes several files back: one request for space to each storage node and one for the attributes
    /// serve them all.
    fn write_group(&self, inos: &[u64]) {
        let ctx = Ctx::on_worker();
        let mut held: Vec<(Arc<Inode>, Guard)> = Vec::with_capacity(inos.len());
        for &ino in inos {
            // Before it is looked at: what gets dirty from now on is noted anew. Where the lease is being
            // given up, that writes it back.
            self.dirty.lock().remove(&ino);
            let inode = self.inodes.find(ino);
            let guard = inode
                .as_ref()
                .and_then(|i| self.leases.try_enter(i.record(), Mode::Exclusive));
            held.extend(inode.zip(guard));
        }
        if let Err(stop) = self.allocate_group(&held) {
            // Each file finds out for itself what it can have.
            tracing::debug!("allocation for {} files: {stop:?}", held.len());
        }
        let _order = self.attr_push.lock();
        let mut updates = Vec::with_capacity(held.len());
        for (inode, guard) in &held {
            let Ok(mut state) = inode.lock(&ctx, guard.version()) else {
                continue;
            };
            if state.gone {
                continue;
            }
            match self.flush_pages(&ctx, inode, &mut state) {
                Ok(()) => {}
                Err(stop) => {
                    self.put_off(inode, Client::errno_of(stop));
                    continue;
                }
            }
            if std::mem::take(&mut state.attr_dirty)
                && let Some(attr) = &state.attr
            {
                updates.push(AttrUpdate {
                    version: guard.version(),
                    ..AttrUpdate::from(attr)
                });
            }
        }
        if updates.is_empty() {
            return;
        }
        if let Err(error) = self.net.meta(ask::meta::Update { updates }) {
            for (inode, guard) in &held {
                if let Ok(mut state) = inode.lock(&ctx, guard.version()) {
                    state.attr_dirty = true;
                }
                self.put_off(inode, error.errno());
            }
        }
    }

    /// What failed is tried again later: what is wrong will not have passed at once. Nothing is lost, so no file is told.
    fn put_off(&self, inode: &Inode, error: Errno) {
        tracing::warn!("write-back of {:#x}: {error}; it is tried again", inode.ino);
        self.dirty.lock().insert(inode.ino, Instant::now());
    }

    /// Asks for all the frames that the dirty pages of these files need.
    ///
    /// Their states stay locked until the frames have come: a block that gets a larger frame loses the one that is known
    /// here, and whoever read or wrote that one meanwhile would read zeros, or another file's data, or lose what it wrote. A
    /// file whose state is not free at once asks for itself later, so nobody waits here with other states locked.
    fn allocate_group(&self, held: &[(Arc<Inode>, Guard)]) -> Res<()> {
        let mut states: HashMap<usize, MutexGuard<'_, State>> = HashMap::new();
        let mut by_node: HashMap<u16, Vec<Wanted>> = HashMap::new();
        for (i, (inode, guard)) in held.iter().enumerate() {
            let Some(mut state) = inode.try_lock_raw() else {
                continue;
            };
            inode.sync(&mut state, guard.version());
            if state.gone || state.pages.dirty() == 0 {
                continue;
            }
            state.check_layout();
            for (block, size) in super::write::frames_wanted(&state) {
                let node = self.storage_of(inode.ino, block);
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
            states.insert(i, state);
        }
        for (node, wants) in by_node {
            let reserved = wants.iter().map(|w| u64::from(w.reserved)).sum();
            let request = ask::storage::Allocate {
                wants: wants.iter().map(|w| w.want).collect(),
                reserved,
            };
            let frames = self.net.ask_storage(node, request)?;
            self.space.used(node, reserved);
            for (wanted, frame) in wants.iter().zip(frames) {
                if let Some(state) = states.get_mut(&wanted.file) {
                    state.take_frame(wanted.want.block, frame);
                }
            }
        }
        Ok(())
    }

    /// Writes everything back; for leaving.
    pub fn write_all(self: &Arc<Self>) {
        self.drop_pins(true);
        let all: Vec<u64> = self.dirty.lock().keys().copied().collect();
        for part in all.chunks(GROUP) {
            self.write_group(part);
        }
    }

    /// Drops clean pages until the buffer cache has its size again.
    fn shrink(&self) {
        for inode in self.inodes.all() {
            if self.cached_pages.load(Ordering::Relaxed) <= self.max_pages * 3 / 4 {
                return;
            }
            if let Some(mut state) = inode.try_lock_raw() {
                self.drop_clean(&mut state);
            }
        }
    }
}
