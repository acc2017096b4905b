//! Reading data, and finding and allocating the frames it lives in.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::cache::claims::{Purpose, Span};
use crate::cache::durable::Durable;
use crate::cache::inode::{Inode, Locked};
use crate::cache::pages::PAGE;
use crate::cache::state::State;
use crate::data::space::Space;
use crate::data::transfer::{PoolOp, Transfer, Transfers};
use crate::session::Session;
use crate::session::ctx::{Ctx, Res, fail};
use fsd_proto::ask;
use fsd_proto::layout::BLOCK;
use fsd_proto::wire::{BlockFrame, BlockWant, Frame, Part};

/// Frames asked for in one request.
const LOOKUP_COUNT: u32 = 4096;
/// So many dirty pages go along with the request to make them durable.
const CARRIED: usize = 16;
/// Frames allocated in one request.
const ALLOCATED_AT_ONCE: usize = 512;

/// One segment of a transfer within one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Block number.
    pub block: u64,
    /// Offset in the block.
    pub at: u64,
    /// Offset in the caller's buffer.
    pub pos: usize,
    /// Length.
    pub len: usize,
}

/// Cuts `offset .. offset + len` at block boundaries.
pub fn segments(offset: u64, len: usize) -> impl Iterator<Item = Segment> {
    let end = offset + len as u64;
    let mut from = offset;
    std::iter::from_fn(move || {
        if from >= end {
            return None;
        }
        let block = from / BLOCK;
        let to = end.min((block + 1) * BLOCK);
        let segment = Segment {
            block,
            at: from % BLOCK,
            pos: (from - offset) as usize,
            len: (to - from) as usize,
        };
        from = to;
        Some(segment)
    })
}

/// The storage nodes to be asked to make something durable, and what.
pub type Flushes = Vec<(u16, ask::storage::Flush)>;

/// What the storage nodes have of files.
pub struct Stored {
    pub(crate) session: Arc<Session>,
    pub(crate) space: Arc<Space>,
    pub(crate) transfer: Arc<Transfer>,
}

impl Stored {
    /// Makes the map of frames complete for the storage nodes of blocks `first ..= last`, which are claimed.
    ///
    /// # Errors
    /// Park; the storage node cannot be reached.
    pub fn load_frames(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        first: u64,
        last: u64,
    ) -> Res<()> {
        state.check_layout();
        let nodes = u64::from(self.session.net.storage.count());
        let here =
            (first..=last.min(first + nodes - 1)).map(|block| self.session.storage_of(inode.ino, block));
        let lacking: Vec<u16> = here.filter(|n| !state.frames.loaded.contains(n)).collect();
        if lacking.is_empty() {
            return Ok(());
        }
        ctx.may_wait()?;
        let found = state.unlocked(|| self.ask_for_frames(inode.ino, &lacking));
        // What is claimed has not changed its place, but frames of other blocks may have.
        state.check_layout();
        for (&node, blocks) in lacking.iter().zip(found) {
            let blocks = blocks?;
            if !state.frames.loaded.insert(node) {
                // Somebody else has asked, too, and may have changed something since.
                continue;
            }
            for block in &blocks {
                // What is known is newer: in a node's part that was in doubt, other tasks may have got frames meanwhile.
                if !state.frames.known().contains_key(&block.block) {
                    state.frames.learn(block.block, block.frame);
                }
            }
            let lost = blocks.iter().filter(|b| b.lost).map(|b| b.block);
            state.frames.lost.extend(lost);
        }
        Ok(())
    }

    /// All frames that storage nodes have of a file.
    fn ask_for_frames(&self, ino: u64, nodes: &[u16]) -> Vec<Res<Vec<BlockFrame>>> {
        let part = |first| ask::storage::Lookup {
            ino,
            first,
            count: LOOKUP_COUNT,
        };
        let asked: Vec<_> = nodes.iter().map(|&node| (node, part(0))).collect();
        let begun = self.session.net.storage.ask_each(&asked);
        let whole = nodes.iter().zip(begun).map(|(&node, begin)| {
            let mut all = begin?;
            let mut full = all.len() == LOOKUP_COUNT as usize;
            while let Some(end) = all.last().filter(|_| full) {
                let more = self.session.net.storage.ask(node, part(end.block + 1))?;
                full = more.len() == LOOKUP_COUNT as usize;
                all.extend(more);
            }
            Ok(all)
        });
        whole.collect()
    }

    /// Makes the whole map of frames complete.
    ///
    /// # Errors
    /// As [`Stored::load_frames`].
    pub fn load_all_frames(&self, ctx: &Ctx<'_>, inode: &Inode, state: &mut Locked<'_>) -> Res<()> {
        self.load_frames(
            ctx,
            inode,
            state,
            0,
            u64::from(self.session.net.storage.count()) - 1,
        )
    }

    /// Allocates frames for blocks, which are claimed: (block, least size). Exact bookkeeping of blocks and reservations.
    ///
    /// # Errors
    /// `ENOSPC`; the storage node cannot be reached. What other nodes have allocated is known all the same.
    pub fn allocate(&self, inode: &Inode, state: &mut Locked<'_>, wants: &[(u64, u32)]) -> Res<()> {
        let mut by_node: BTreeMap<u16, Vec<BlockWant>> = BTreeMap::new();
        for &(block, size) in wants {
            if state.frames.known().get(&block).is_none_or(|f| f.size < size) {
                let size = state.frames.size_of(block, size);
                let node = self.session.storage_of(inode.ino, block);
                by_node.entry(node).or_default().push(BlockWant {
                    ino: inode.ino,
                    block,
                    size,
                });
            }
        }
        let mut asked: Vec<(u16, ask::storage::Allocate)> = Vec::new();
        for (node, wants) in by_node {
            for part in wants.chunks(ALLOCATED_AT_ONCE) {
                let set_aside = part.iter().filter_map(|w| state.frames.reserved.get(&w.block));
                let reserved = set_aside.map(|&bytes| u64::from(bytes)).sum();
                let wants = part.to_vec();
                asked.push((node, ask::storage::Allocate { wants, reserved }));
            }
        }
        for (node, _) in &asked {
            state.changed_at(*node);
        }
        let answers = state.unlocked(|| self.session.net.storage.ask_each(&asked));
        let mut result = Ok(());
        for ((node, request), answer) in asked.into_iter().zip(answers) {
            match answer {
                Ok(frames) => {
                    self.space.accounts.used(node, request.reserved);
                    for (want, frame) in request.wants.iter().zip(frames) {
                        state.take_frame(want.block, frame);
                    }
                }
                Err(error) => {
                    if !error.is_refusal() {
                        state.doubt_frames(node, request.wants.iter().map(|want| want.block));
                    }
                    result = Err(error.into());
                }
            }
        }
        result
    }

    /// Reads stored data of a range that is claimed into `out`, not looking at cached pages; holes read as zeros.
    ///
    /// # Errors
    /// Park; the storage node cannot be reached.
    pub fn read_stored(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        offset: u64,
        out: &mut [u8],
    ) -> Res<()> {
        if out.is_empty() {
            return Ok(());
        }
        let last = (offset + out.len() as u64 - 1) / BLOCK;
        self.load_frames(ctx, inode, state, offset / BLOCK, last)?;
        if state.frames.any_lost(offset / BLOCK, last) {
            return fail(libc::EIO);
        }
        let mut reads = Transfers::default();
        self.add_reads(inode, state, offset, out, &mut reads);
        state.unlocked(|| self.transfer.all(ctx, reads))
    }

    /// Adds what is to be read of a range that is claimed, and whose frames are known, into `out`; holes are zeros at once.
    pub(crate) fn add_reads<'a>(
        &self,
        inode: &Inode,
        state: &State,
        offset: u64,
        out: &'a mut [u8],
        reads: &mut Transfers<'a>,
    ) {
        let mut rest = out;
        for s in segments(offset, rest.len()).collect::<Vec<_>>() {
            let (part, tail) = rest.split_at_mut(s.len);
            rest = tail;
            let stored = match state.frames.known().get(&s.block) {
                Some(frame) => u64::from(frame.size).saturating_sub(s.at).min(s.len as u64) as usize,
                None => 0,
            };
            let (data, hole) = part.split_at_mut(stored);
            hole.fill(0);
            if let Some(frame) = state.frames.known().get(&s.block).filter(|_| stored > 0) {
                let node = self.session.storage_of(inode.ino, s.block);
                let offset = frame.offset + s.at;
                reads.add(node, PoolOp::Read { offset, into: data });
            }
        }
    }

    /// Writes into frames of claimed blocks, which are there: (block, offset in it, data).
    pub(crate) fn write_frames<'a>(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        parts: impl Iterator<Item = (u64, u64, &'a [u8])>,
    ) -> Res<()> {
        let mut writes = Transfers::default();
        self.add_writes(inode, state, parts, &mut writes)?;
        state.unlocked(|| self.transfer.all(ctx, writes))
    }

    /// As [`Stored::write_frames`]; `then` runs when the writes are on their way, so that what it sends to the same storage nodes
    /// comes behind them. Returns what it has returned, if that is so: where writes had to be repeated it is not.
    pub(crate) fn write_frames_then<'a, T>(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        parts: impl Iterator<Item = (u64, u64, &'a [u8])>,
        then: impl FnOnce() -> T,
    ) -> Res<Option<T>> {
        let mut writes = Transfers::default();
        self.add_writes(inode, state, parts, &mut writes)?;
        state.unlocked(|| self.transfer.all_then(ctx, writes, then))
    }

    /// Adds what is to be written into frames of claimed blocks, which are there.
    pub(crate) fn add_writes<'a>(
        &self,
        inode: &Inode,
        state: &mut Locked<'_>,
        parts: impl Iterator<Item = (u64, u64, &'a [u8])>,
        writes: &mut Transfers<'a>,
    ) -> Res<()> {
        for (block, at, from) in parts {
            let Some(frame) = state.frames.known().get(&block) else {
                return fail(libc::EIO);
            };
            let offset = frame.offset + at;
            let node = self.session.storage_of(inode.ino, block);
            state.changed_at(node);
            writes.add(node, PoolOp::Write { offset, from });
        }
        Ok(())
    }

    /// What to ask those storage nodes that may have something of a file which is not durable. Where its size is not known: all.
    #[must_use]
    pub fn flushes(&self, inode: &Inode, state: &State) -> Flushes {
        let freed = state.lasting.durable.as_deref().map_or(0, Durable::freed_before);
        let blocks = state
            .attr
            .map_or(u64::MAX, |attr| attr.size.div_ceil(BLOCK).max(freed));
        self.flushes_of(inode, state, 0, blocks)
    }

    /// As [`Stored::flushes`], of the storage nodes alone that had blocks which this mount has freed, and that the file does not reach
    /// any more.
    #[must_use]
    pub fn flushes_of_freed(&self, inode: &Inode, state: &State) -> Flushes {
        let freed = state.lasting.durable.as_deref().map_or(0, Durable::freed_before);
        let reach = state.attr.map_or(0, |attr| attr.size.div_ceil(BLOCK));
        let reached = self.flushes_of(inode, &State::default(), 0, reach);
        let mut flushes = self.flushes_of(inode, state, reach, freed);
        flushes.retain(|(node, _)| reached.iter().all(|(other, _)| other != node));
        flushes
    }

    /// Of the nodes that blocks from `first` on and before `end` are on.
    fn flushes_of(&self, inode: &Inode, state: &State, first: u64, end: u64) -> Flushes {
        let durable = state.lasting.durable.as_deref();
        let count = u64::from(self.session.net.storage.count());
        let blocks = first..end.min(first.saturating_add(count));
        let nodes = blocks.map(|block| self.session.storage_of(inode.ino, block));
        let inos = vec![inode.ino];
        nodes
            .filter(|&node| durable.is_none_or(|d| !d.is_stored(node)))
            .map(|node| {
                let (inos, parts, data) = (inos.clone(), Vec::new(), Vec::new());
                (node, ask::storage::Flush { inos, parts, data })
            })
            .collect()
    }

    /// Has requests to make durable bring the dirty pages of a file along, all of which is claimed and whose frames are there. Of storage
    /// nodes that had all else `durable` nothing else is asked. False: they are too many for that, and are to be written before.
    #[must_use]
    pub fn carry(&self, inode: &Inode, state: &State, durable: &[u16], flushes: &mut Flushes) -> bool {
        if !(1..=CARRIED).contains(&state.pages.dirty()) {
            return false;
        }
        let ino = inode.ino;
        let mut carrying = flushes.clone();
        for (page, contents) in state.pages.dirty_pages() {
            let (block, at) = (page * PAGE / BLOCK, (page * PAGE % BLOCK) as u32);
            let node = self.session.storage_of(ino, block);
            let Some((_, flush)) = carrying.iter_mut().find(|(id, _)| *id == node) else {
                return false;
            };
            if durable.contains(&node) {
                flush.inos.clear();
            }
            let len = contents.data.len() as u32;
            flush.parts.push(Part { ino, block, at, len });
            flush.data.extend_from_slice(&contents.data);
        }
        *flushes = carrying;
        true
    }

    /// Claims all of a file for a change, under the exclusive lease of `version`.
    ///
    /// # Errors
    /// Park.
    pub fn claim_to_change<'a>(&self, ctx: &Ctx<'_>, inode: &'a Inode, version: u64) -> Res<Locked<'a>> {
        inode.claim(ctx, version, Span::ALL, Purpose::Change)
    }
}

/// The frames of blocks `first ..= last`.
pub fn frames_in(state: &State, first: u64, last: u64) -> Vec<(u64, Frame)> {
    state
        .frames
        .known()
        .range(first..=last)
        .map(|(&b, &f)| (b, f))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transfers_are_cut_at_blocks() {
        let cut: Vec<Segment> = segments(BLOCK - 10, 20 + BLOCK as usize).collect();
        assert_eq!(cut.len(), 3);
        assert_eq!(
            cut[0],
            Segment {
                block: 0,
                at: BLOCK - 10,
                pos: 0,
                len: 10
            }
        );
        assert_eq!(
            cut[1],
            Segment {
                block: 1,
                at: 0,
                pos: 10,
                len: BLOCK as usize
            }
        );
        assert_eq!(
            cut[2],
            Segment {
                block: 2,
                at: 0,
                pos: 10 + BLOCK as usize,
                len: 10
            }
        );
        assert_eq!(segments(5, 0).count(), 0);
    }
}
