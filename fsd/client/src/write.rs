//! Changing data: write, truncate, punch; and bringing dirty pages to the storage nodes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use lockmgr::{Guard, Mode};

use super::claims::{Purpose, Span};
use super::ctx::{Ctx, Res, Stop, fail, is_full};
use super::data::{PoolOp, Transfers, frames_in, stretches};
use super::inode::{Inode, Locked, State};
use super::pages::{PAGE, page_from, page_of};
use super::{Client, MAX_FILE_SIZE};
use fsd_node::config::CacheMode;
use fsd_proto::ask;
use fsd_proto::layout::BLOCK;
use fsd_proto::rpc::Errno;

/// The pages (first, last) that the kernel may keep locked during a write through its page cache: one folio, if the write
/// does not cover it and it was not up to date. That is the last page of a write that begins at the beginning of a page. One
/// that begins elsewhere is sent folio by folio, and since Linux 6.17 a folio may be as large as the write.
fn edge_of(offset: u64, len: u64) -> Option<(u64, u64)> {
    let end = offset.checked_add(len).filter(|_| len > 0)?;
    let last = page_of(end - 1);
    if !offset.is_multiple_of(PAGE) {
        return Some((page_of(offset), last));
    }
    (!end.is_multiple_of(PAGE)).then_some((last, last))
}

/// Aligned writes of at least this length go straight to the storage nodes.
const DIRECT_MIN: usize = 64 << 10;

/// What a write is besides its data.
#[derive(Debug, Clone, Copy, Default)]
pub struct WriteFlags {
    /// At the end of the file, wherever that is now.
    pub append: bool,
    /// Clear set-user-id bits.
    pub kill_suid: bool,
    /// The kernel has put the data into its page cache.
    pub cached: bool,
    /// Answered only when data and attributes are durable: O_SYNC, O_DSYNC, or pwritev2(2) with the like, past the page cache
    /// (through it the kernel sends an FSYNC of its own).
    pub sync: bool,
}

/// A write.
#[derive(Debug, Clone, Copy)]
pub struct Write<'a> {
    /// Where, in bytes; of an append where the kernel thinks that the file ends.
    pub offset: u64,
    /// What.
    pub data: &'a [u8],
    /// What else belongs to it.
    pub flags: WriteFlags,
}

/// The bytes whose data or frames a write changes: its blocks; and up to the end of time if it may make the file longer, so that
/// appends come one after the other.
fn span_of(state: &State, write: &Write<'_>) -> Span {
    let end = write.offset.saturating_add(write.data.len() as u64);
    match &state.attr {
        Some(attr) if !write.flags.append && end <= attr.size => Span {
            from: write.offset / BLOCK * BLOCK,
            to: end.div_ceil(BLOCK) * BLOCK,
        },
        _ => Span::ALL,
    }
}

/// What becomes of the frames of blocks that lie wholly in a range to be discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whole {
    /// They are freed.
    Free,
    /// They are zeroed and kept.
    Zero,
}

/// The frames (block, least size) that the dirty pages of a file need, by block.
#[must_use]
pub fn frames_wanted(state: &State) -> Vec<(u64, u32)> {
    let mut ends: BTreeMap<u64, u64> = BTreeMap::new();
    for (page, _) in state.pages.dirty_pages() {
        let end = ends.entry(page * PAGE / BLOCK).or_default();
        *end = (*end).max(page * PAGE % BLOCK + PAGE);
    }
    ends.into_iter()
        .map(|(block, end)| (block, state.frames.size_for(block, end)))
        .collect()
}

impl Client {
    /// The `write` system call.
    ///
    /// # Errors
    /// Park; `EFBIG`, `ENOSPC`, I/O errors.
    pub fn write(&self, ctx: &Ctx<'_>, inode: &Inode, write: &Write<'_>) -> Res<u32> {
        self.with_frees(ctx, is_full, || self.write_at_once(ctx, inode, write))
    }

    fn write_at_once(&self, ctx: &Ctx<'_>, inode: &Inode, write: &Write<'_>) -> Res<u32> {
        let cached = write.flags.cached;
        if !cached && inode.kernel.pages.load(Ordering::SeqCst) {
            // The kernel's pages will have to be invalidated, which may wait for a read.
            ctx.may_wait()?;
        }
        let guard = self.lease_for_write(ctx, inode, write)?;
        // With the write-back cache the kernel does it when it is written to.
        if self.mode != CacheMode::Writeback {
            self.drop_capability(ctx, inode, &guard)?;
        }
        let at = {
            let mut state = self.claim_to_write(ctx, inode, guard.version(), write)?;
            self.take_mapped(ctx, inode, &mut state)?;
            let offset = if write.flags.append {
                self.load_attr(ctx, inode, &mut state)?.size
            } else {
                write.offset
            };
            self.write_held(ctx, inode, &mut state, &Write { offset, ..*write })?;
            offset
        };
        self.note_dirty(inode.ino);
        self.invalidate_attrs(inode);
        let stale = !cached && inode.kernel.pages.load(Ordering::SeqCst);
        if cached && self.mode != CacheMode::Writeback {
            inode.kernel.pages.store(true, Ordering::SeqCst);
        } else if stale {
            inode.kernel.invals.fetch_add(1, Ordering::SeqCst);
        }
        // Not held any longer: a read may keep the page locked that is to be invalidated, and wait for a
        // gate that a revocation closes until we have left. No lease goes while `invals` counts us.
        drop(guard);
        if stale {
            // Other open files of this mount read through the page cache, and one of their reads may have
            // filled it after the kernel invalidated the range for this write.
            self.invalidate_range(inode, at, write.data.len() as u64);
            inode.kernel.invals.fetch_sub(1, Ordering::SeqCst);
        }
        u32::try_from(write.data.len()).map_err(|_| Stop::Errno(Errno(libc::EINVAL)))
    }

    /// Locks an inode for a write, under the exclusive lease of `version`; makes room in the buffer cache first.
    ///
    /// # Errors
    /// Park; I/O errors of what makes room.
    pub fn claim_to_write<'a>(
        &self,
        ctx: &Ctx<'_>,
        inode: &'a Inode,
        version: u64,
        write: &Write<'_>,
    ) -> Res<Locked<'a>> {
        let mut state = inode.lock(ctx, version)?;
        let queued = inode.mapped.get().is_some_and(|m| !m.is_empty());
        let full = self.cached_pages.load(Ordering::Relaxed) > self.max_pages && state.pages.dirty() > 0;
        let span = if queued || full {
            Span::ALL
        } else {
            span_of(&state, write)
        };
        state = state.claiming(ctx, span, Purpose::Change)?;
        if full {
            ctx.may_wait()?;
            self.flush_pages(ctx, inode, &mut state)?;
            self.drop_clean(&mut state);
        } else if span != Span::ALL && span_of(&state, write) != span {
            // The file has become shorter while the claim waited.
            drop(state);
            state = inode.claim(ctx, version, Span::ALL, Purpose::Change)?;
        }
        Ok(state)
    }

    /// Claims all of a file for a change, under the exclusive lease of `version`.
    ///
    /// # Errors
    /// Park.
    pub fn claim_to_change<'a>(&self, ctx: &Ctx<'_>, inode: &'a Inode, version: u64) -> Res<Locked<'a>> {
        inode.claim(ctx, version, Span::ALL, Purpose::Change)
    }

    /// Pages that the kernel writes back, or that somebody has stored to through a mapping.
    ///
    /// Those of a file that is gone, whose last name and last open file are no more, are of no use to anybody. They are
    /// taken and dropped: the kernel would keep an error in its state of the whole file system, where somebody else's
    /// `syncfs` finds it.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub fn write_pages(&self, ctx: &Ctx<'_>, inode: &Inode, write: &Write<'_>) -> Res<u32> {
        match self.write(ctx, inode, write) {
            Err(Stop::Errno(Errno(libc::ESTALE))) if inode.lock_raw().gone => Ok(write.data.len() as u32),
            result => result,
        }
    }

    /// The exclusive lease for a write. While it waits, the kernel may keep pages locked ([`edge_of`]); see `revoke` for
    /// why that must be known.
    ///
    /// # Errors
    /// Park; the lease is not to be had.
    pub fn lease_for_write(&self, ctx: &Ctx<'_>, inode: &Inode, write: &Write<'_>) -> Res<Guard> {
        if let Some(guard) = self.leases.try_enter(inode.record(), Mode::Exclusive) {
            return Ok(guard);
        }
        ctx.may_wait()?;
        let edge = write
            .flags
            .cached
            .then(|| edge_of(write.offset, write.data.len() as u64));
        let edge = edge.flatten();
        if let Some(pages) = edge {
            inode.edges.begin(pages);
        }
        let guard = self.lease(ctx, inode, Mode::Exclusive);
        if let Some(pages) = edge {
            inode.edges.end(pages);
        }
        guard
    }

    fn invalidate_range(&self, inode: &Inode, offset: u64, len: u64) {
        if let Some(notifier) = self.notifier.get() {
            // An inode the kernel does not know (any more) has no pages.
            let _ = notifier.inval_inode(fuser::INodeNo(inode.ino), offset as i64, len as i64);
        }
    }

    /// Writes to a range that is claimed, under the exclusive lease; writes of mapped pages that came before are applied first.
    ///
    /// # Errors
    /// Park (nothing of this write has been done then); `EFBIG`, `ENOSPC`, I/O errors.
    pub fn write_held(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        write: &Write<'_>,
    ) -> Res<()> {
        self.take_mapped(ctx, inode, state)?;
        self.write_next(ctx, inode, state, write)
    }

    /// As [`Client::write_held`], of a write that is next: nothing has to be applied before it.
    ///
    /// # Errors
    /// As [`Client::write_held`].
    pub fn write_next(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        &Write { offset, data, flags }: &Write<'_>,
    ) -> Res<()> {
        if data.is_empty() {
            return Ok(());
        }
        let end = offset
            .checked_add(data.len() as u64)
            .filter(|&e| e <= MAX_FILE_SIZE);
        let Some(end) = end else { return fail(libc::EFBIG) };
        let attr = self.load_attr(ctx, inode, state)?;
        let (first, last) = (offset / BLOCK, (end - 1) / BLOCK);
        self.load_frames(ctx, inode, state, first, last)?;
        if state.frames.any_lost(first, last) {
            // What is left of the block would read as zeros.
            return fail(libc::EIO);
        }
        let aligned = offset.is_multiple_of(PAGE) && (end.is_multiple_of(PAGE) || end >= attr.size);
        if aligned && data.len() >= DIRECT_MIN {
            self.write_through(ctx, inode, state, offset, data)?;
        } else {
            self.write_cached(ctx, inode, state, offset, data)?;
        }
        if let Some(attr) = state.attr.as_mut() {
            attr.size = attr.size.max(end);
            // Pages that are written back are not written now: the kernel tells the times of that itself.
            if !(self.mode == CacheMode::Writeback && flags.cached) {
                attr.mtime = self.net.now();
                attr.ctime = attr.mtime;
            }
            if flags.kill_suid {
                super::attrs::kill_suid(attr);
            }
        }
        state.touch();
        Ok(())
    }

    fn write_through(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        offset: u64,
        data: &[u8],
    ) -> Res<()> {
        let cut: Vec<_> = stretches(offset, data.len()).collect();
        let wants: Vec<(u64, u32)> = cut
            .iter()
            .map(|s| {
                // What follows on the first is written in order.
                let size = if s.block > cut[0].block {
                    BLOCK as u32
                } else {
                    state.frames.size_for(s.block, s.at + s.len as u64)
                };
                (s.block, size)
            })
            .filter(|(block, size)| state.frames.known().get(block).is_none_or(|f| f.size < *size))
            .collect();
        if !wants.is_empty() {
            ctx.may_wait()?;
            self.allocate(inode, state, &wants)?;
        }
        // What is cached of the range is replaced; done first, so that a failure cannot leave old dirty
        // pages over new data.
        let before = state.pages.len();
        state
            .pages
            .remove(page_of(offset), page_of(offset + data.len() as u64 - 1));
        self.count_pages(before, state.pages.len());
        let parts = cut.iter().map(|s| (s.block, s.at, &data[s.pos..s.pos + s.len]));
        self.write_frames(ctx, inode, state, parts)
    }

    /// Writes into frames of claimed blocks, which are there: (block, offset in it, data).
    fn write_frames<'a>(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        parts: impl Iterator<Item = (u64, u64, &'a [u8])>,
    ) -> Res<()> {
        let mut writes = Transfers::default();
        for (block, at, from) in parts {
            let Some(frame) = state.frames.known().get(&block) else {
                return fail(libc::EIO);
            };
            let offset = frame.offset + at;
            writes.add(self.storage_of(inode.ino, block), PoolOp::Write { offset, from });
        }
        state.unlocked(|| self.transfer_all(ctx, writes))
    }

    fn write_cached(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        offset: u64,
        data: &[u8],
    ) -> Res<()> {
        let size = state.attr.map_or(0, |a| a.size);
        let end = offset + data.len() as u64;
        let (first, last) = (page_of(offset), page_of(end - 1));
        // Fetch the old contents of pages that are only partly overwritten: at most the two at the ends.
        let mut old: Vec<(u64, Arc<[u8]>)> = Vec::new();
        for page in [first, last] {
            let start = page * PAGE;
            let whole = offset <= start && end >= start + PAGE;
            if whole || state.pages.get(page).is_some() || old.iter().any(|(p, _)| *p == page) {
                continue;
            }
            let mut bytes = vec![0; PAGE as usize];
            if start < size {
                self.read_stored(ctx, inode, state, start, &mut bytes)?;
            }
            old.push((page, bytes.into()));
        }
        for s in stretches(offset, data.len()) {
            self.secure_space(ctx, inode, state, s.block, s.at + s.len as u64)?;
        }
        // From here on nothing fails.
        let before = state.pages.len();
        for (page, bytes) in old {
            state.pages.insert(page, bytes, false);
        }
        let mut at = offset;
        while at < end {
            let page = page_of(at);
            let stop = end.min((page + 1) * PAGE);
            let bytes = &data[(at - offset) as usize..(stop - offset) as usize];
            if !state.pages.patch(page, (at % PAGE) as usize, bytes) {
                state.pages.insert(page, page_from(bytes), true);
            }
            at = stop;
        }
        self.count_pages(before, state.pages.len());
        Ok(())
    }

    /// Makes sure that a block with data up to `end` (offset in it) can be stored later.
    fn secure_space(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        block: u64,
        end: u64,
    ) -> Res<()> {
        let size = state.frames.size_for(block, end);
        let reserved = state.frames.reserved.get(&block).copied().unwrap_or(0);
        if state.frames.known().get(&block).is_some_and(|f| f.size >= size) || reserved >= size {
            return Ok(());
        }
        let node = self.storage_of(inode.ino, block);
        match state.unlocked(|| self.reserve(ctx, node, u64::from(size - reserved))) {
            Ok(()) => {
                state.frames.reserved.insert(block, size);
                Ok(())
            }
            // No space to set aside, but perhaps still a frame.
            Err(Stop::Errno(Errno(libc::ENOSPC))) => self.allocate(inode, state, &[(block, size)]),
            Err(stop) => Err(stop),
        }
    }

    /// Brings all dirty pages of a file, all of which is claimed, to the storage nodes.
    ///
    /// # Errors
    /// The storage cannot take them; they stay dirty.
    pub fn flush_pages(&self, ctx: &Ctx<'_>, inode: &Inode, state: &mut Locked<'_>) -> Res<()> {
        if state.pages.dirty() == 0 {
            return Ok(());
        }
        ctx.may_wait()?;
        let blocks = |state: &State| state.attr.map(|attr| state.shown(&attr).blocks);
        let before = blocks(state);
        let wants = frames_wanted(state);
        let (first, last) = (wants[0].0, wants[wants.len() - 1].0);
        self.load_frames(ctx, inode, state, first, last)?;
        self.allocate(inode, state, &wants)?;
        let pages = state.pages.dirty_pages();
        let pages: Vec<(u64, Arc<[u8]>)> = pages.map(|(page, p)| (page, Arc::clone(&p.data))).collect();
        let parts = pages.iter();
        let parts = parts.map(|(page, data)| (page * PAGE / BLOCK, page * PAGE % BLOCK, &data[..]));
        self.write_frames(ctx, inode, state, parts)?;
        drop(pages);
        state.pages.mark_clean();
        if blocks(state) != before {
            self.invalidate_attrs(inode);
        }
        if !self.cache_reads {
            // The storage node's memory is as near as our own: keeping a copy gains nothing.
            self.drop_clean(state);
        }
        Ok(())
    }

    /// Drops the clean pages of a file.
    pub fn drop_clean(&self, state: &mut State) {
        let before = state.pages.len();
        state.pages.drop_clean();
        self.count_pages(before, state.pages.len());
    }

    /// Drops dirty pages that can never be stored, and the space set aside for them.
    pub fn abandon_pages(&self, inode: &Inode, state: &mut State) {
        let before = state.pages.len();
        state.pages.clear();
        self.count_pages(before, 0);
        self.space_changes(inode);
        self.release_reservations(inode, state, 0);
    }

    /// Gives up what is set aside for blocks from `from_block` on, none of which is dirty any more.
    pub fn release_reservations(&self, inode: &Inode, state: &mut State, from_block: u64) {
        let reserved = state.frames.reserved.keys();
        let gone: Vec<u64> = reserved.filter(|b| **b >= from_block).copied().collect();
        self.release_promises(inode, state, &gone);
        if from_block == 0 {
            self.space.unlend(inode.ino);
        }
    }

    /// Gives up what is set aside for some blocks.
    pub fn release_promises(&self, inode: &Inode, state: &mut State, blocks: &[u64]) {
        for block in blocks {
            if let Some(bytes) = state.frames.unreserve(*block) {
                self.space
                    .put(self.storage_of(inode.ino, *block), u64::from(bytes));
            }
        }
        if !blocks.is_empty() {
            self.note_idle_space();
        }
    }

    /// Sets a file's size. Keeps the rule that stored bytes beyond the end are zero.
    ///
    /// # Errors
    /// Park (nothing has changed then); I/O errors.
    pub fn truncate(&self, ctx: &Ctx<'_>, inode: &Inode, state: &mut Locked<'_>, size: u64) -> Res<()> {
        self.take_mapped(ctx, inode, state)?;
        let old = self.load_attr(ctx, inode, state)?.size;
        if self.extension.get().is_some() {
            inode.lent.resize();
        }
        if size < old {
            self.space_changes(inode);
            let discarded = self.discard(ctx, inode, state, size, u64::MAX, Whole::Free);
            self.space_settled(inode, state);
            discarded?;
        }
        if let Some(attr) = state.attr.as_mut() {
            attr.size = size;
        }
        Ok(())
    }

    /// Makes `from .. to` read as zeros: zeroes the frames of blocks that lie in it partly, and frees
    /// those of whole blocks or zeroes them, too.
    ///
    /// # Errors
    /// Park (nothing has changed then); I/O errors.
    pub fn discard(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        from: u64,
        to: u64,
        whole: Whole,
    ) -> Res<()> {
        if from >= to {
            return Ok(());
        }
        self.load_all_frames(ctx, inode, state)?;
        let (first_whole, end_whole) = (from.div_ceil(BLOCK), to / BLOCK);
        let mut frees = false;
        let mut zeroed: Vec<(u64, u64, u64)> = Vec::new();
        for (block, frame) in frames_in(state, from / BLOCK, (to - 1) / BLOCK) {
            if whole == Whole::Free && (first_whole..end_whole).contains(&block) {
                frees = true;
                continue;
            }
            let start = from.saturating_sub(block * BLOCK);
            let end = (to - block * BLOCK).min(u64::from(frame.size));
            if start < end {
                zeroed.push((block, start, end - start));
            }
        }
        if frees || !zeroed.is_empty() {
            ctx.may_wait()?;
        }
        let zeros = vec![0u8; BLOCK as usize];
        let parts = zeroed
            .into_iter()
            .map(|(block, at, len)| (block, at, &zeros[..len as usize]));
        self.write_frames(ctx, inode, state, parts)?;
        if frees {
            self.free_blocks(inode, state, first_whole, end_whole - 1)?;
        }
        let before = state.pages.len();
        state.pages.zero(from, to);
        let (first_page, end_page) = (from.div_ceil(PAGE), to / PAGE);
        if first_page < end_page {
            state.pages.remove(first_page, end_page - 1);
        }
        self.count_pages(before, state.pages.len());
        if to == u64::MAX {
            self.release_reservations(inode, state, first_whole);
        }
        Ok(())
    }

    /// Frees the frames of blocks `first ..= last`.
    ///
    /// # Errors
    /// A storage node cannot be reached; the frames then still count as the file's.
    pub fn free_blocks(&self, inode: &Inode, state: &mut Locked<'_>, first: u64, last: u64) -> Res<()> {
        let mut nodes: Vec<u16> = frames_in(state, first, last)
            .iter()
            .map(|(b, _)| self.storage_of(inode.ino, *b))
            .collect();
        nodes.sort_unstable();
        nodes.dedup();
        let ino = inode.ino;
        let frees = nodes.into_iter();
        let frees = frees.map(|node| (node, ask::storage::Free { ino, first, last }));
        let done = state.unlocked(|| self.net.ask_each(frees.collect()));
        done.into_iter().collect::<Result<Vec<_>, _>>()?;
        for (block, _) in frames_in(state, first, last) {
            state.drop_frame(block);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_locked_is_the_last_page_or_an_unaligned_write() {
        assert_eq!(edge_of(0, PAGE), None);
        assert_eq!(edge_of(PAGE, 10), Some((1, 1)));
        assert_eq!(edge_of(0, 2 * PAGE + 1), Some((2, 2)));
        assert_eq!(edge_of(5, 0), None);
        // A large folio may hold all of these.
        assert_eq!(edge_of(PAGE + 10, PAGE - 10), Some((1, 1)));
        assert_eq!(edge_of(100, 2 * PAGE - 100), Some((0, 1)));
        assert_eq!(edge_of(100, 2 * PAGE), Some((0, 2)));
    }
}
