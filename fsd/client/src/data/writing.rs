//! Changing data: write, truncate, punch; and bringing dirty pages to the storage nodes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::cache::claims::{Purpose, Span};
use crate::cache::inode::{Inode, Locked};
use crate::cache::mapped::MappedWrites;
use crate::cache::pages::{PAGE, page_from, page_of};
use crate::cache::state::State;
use crate::cache::write::{Queued, Write};
use crate::cache::{Cache, MAX_FILE_SIZE};
use crate::data::space::Space;
use crate::data::stored::{Stored, segments};
use crate::kernel::caches::KernelCaches;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res, Stop, fail};
use fsd_node::config::CacheMode;
use fsd_proto::layout::BLOCK;
use fsd_proto::rpc::Errno;

/// Aligned writes of at least this length go straight to the storage nodes.
const DIRECT_MIN: usize = 64 << 10;

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

/// A page, by its number in the file.
pub(super) type Numbered = (u64, Arc<[u8]>);

/// The dirty pages of a file.
pub(super) fn dirty_pages(state: &State) -> Vec<Numbered> {
    let pages = state.pages.dirty_pages();
    pages.map(|(page, p)| (page, Arc::clone(&p.data))).collect()
}

/// Pages by their block, and offset in it.
pub(super) fn parts_of(pages: &[Numbered]) -> impl Iterator<Item = (u64, u64, &[u8])> {
    let place = |page: u64| (page * PAGE / BLOCK, page * PAGE % BLOCK);
    pages.iter().map(move |(page, data)| {
        let (block, at) = place(*page);
        (block, at, &data[..])
    })
}

/// Writes into the buffer cache, or past it, and from there to the storage nodes.
pub struct Writing {
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) kernel: Arc<KernelCaches>,
    pub(crate) space: Arc<Space>,
    pub(crate) stored: Arc<Stored>,
}

impl Writing {
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
        let queued = inode.waiting.mapped.get().is_some_and(|m| !m.is_empty());
        let full =
            self.cache.cached_pages.load(Ordering::Relaxed) > self.cache.max_pages && state.pages.dirty() > 0;
        let span = if queued || full {
            Span::ALL
        } else {
            span_of(&state, write)
        };
        state = state.claiming(ctx, span, Purpose::Change)?;
        if full {
            ctx.may_wait()?;
            self.flush_pages(ctx, inode, &mut state)?;
            self.cache.drop_clean(&mut state);
        } else if span != Span::ALL && span_of(&state, write) != span {
            // The file has become shorter while the claim waited.
            drop(state);
            state = inode.claim(ctx, version, Span::ALL, Purpose::Change)?;
        }
        Ok(state)
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

    /// As [`Writing::write_held`], of a write that is next: nothing has to be applied before it.
    ///
    /// # Errors
    /// As [`Writing::write_held`].
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
        let attr = self.cache.load_attr(ctx, inode, state)?;
        let (first, last) = (offset / BLOCK, (end - 1) / BLOCK);
        self.stored.load_frames(ctx, inode, state, first, last)?;
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
            if !(self.kernel.mode == CacheMode::Writeback && flags.cached) {
                attr.mtime = self.session.net.meta.now();
                attr.ctime = attr.mtime;
            }
            if flags.kill_suid {
                crate::cache::suid::kill_suid(attr);
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
        let cut: Vec<_> = segments(offset, data.len()).collect();
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
            self.stored.allocate(inode, state, &wants)?;
        }
        if !self.session.local_memory() || state.pages.dirty() > 0 {
            // From here on this must not park: what is dirty of the range is nowhere else, and would be missing until the write goes on.
            ctx.may_wait()?;
        }
        // What is cached of the range is replaced; done first, so that a failure cannot leave old dirty
        // pages over new data.
        let before = state.pages.len();
        state
            .pages
            .remove(page_of(offset), page_of(offset + data.len() as u64 - 1));
        self.cache.count_pages(before, state.pages.len());
        let parts = cut.iter().map(|s| (s.block, s.at, &data[s.pos..s.pos + s.len]));
        self.stored.write_frames(ctx, inode, state, parts)
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
                self.stored.read_stored(ctx, inode, state, start, &mut bytes)?;
            }
            old.push((page, bytes.into()));
        }
        for s in segments(offset, data.len()) {
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
        self.cache.count_pages(before, state.pages.len());
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
        let node = self.session.storage_of(inode.ino, block);
        match state.unlocked(|| self.space.reserve(ctx, node, u64::from(size - reserved))) {
            Ok(()) => {
                state.frames.reserved.insert(block, size);
                Ok(())
            }
            // No space to set aside, but perhaps still a frame.
            Err(Stop::Errno(Errno(libc::ENOSPC))) => self.stored.allocate(inode, state, &[(block, size)]),
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
        self.find_frames(ctx, inode, state)?;
        self.store_by(state, |state, pages| {
            self.stored.write_frames(ctx, inode, state, parts_of(pages))
        })
        .map(drop)
    }

    /// Gets frames for all dirty pages of a file, all of which is claimed.
    ///
    /// # Errors
    /// The storage has none, or cannot be reached.
    pub fn find_frames(&self, ctx: &Ctx<'_>, inode: &Inode, state: &mut Locked<'_>) -> Res<()> {
        if state.pages.dirty() == 0 {
            return Ok(());
        }
        ctx.may_wait()?;
        let blocks = |state: &State| state.attr.map(|attr| state.shown(&attr).blocks);
        let before = blocks(state);
        let wants = frames_wanted(state);
        let (first, last) = (wants[0].0, wants[wants.len() - 1].0);
        self.stored.load_frames(ctx, inode, state, first, last)?;
        self.stored.allocate(inode, state, &wants)?;
        for &(block, _) in &wants {
            state.changed_at(self.session.storage_of(inode.ino, block));
        }
        if blocks(state) != before {
            self.kernel.invalidate_attrs(inode);
        }
        Ok(())
    }

    /// Brings all dirty pages of a file into their frames. `then` runs when they are on their way: what it sends to the same storage
    /// nodes comes behind them. Returns what it has returned, unless something had to be repeated.
    ///
    /// # Errors
    /// The storage cannot take them; they stay dirty.
    pub fn store_pages<T>(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        then: impl FnOnce() -> T,
    ) -> Res<Option<T>> {
        if state.pages.dirty() == 0 {
            return Ok(Some(then()));
        }
        self.store_by(state, |state, pages| {
            self.stored
                .write_frames_then(ctx, inode, state, parts_of(pages), then)
        })
    }

    /// Dirty pages are clean when `write` has written them.
    fn store_by<T>(
        &self,
        state: &mut Locked<'_>,
        write: impl FnOnce(&mut Locked<'_>, &[Numbered]) -> Res<T>,
    ) -> Res<T> {
        let pages = dirty_pages(state);
        let sent = write(state, &pages)?;
        drop(pages);
        self.are_stored(state);
        Ok(sent)
    }

    /// All dirty pages of a file, all of which is claimed, have come to the storage nodes.
    pub(crate) fn are_stored(&self, state: &mut State) {
        state.pages.mark_clean();
        if !self.session.cache_reads {
            // The storage node's memory is as near as our own: keeping a copy gains nothing.
            self.cache.drop_clean(state);
        }
    }

    /// Applies what is queued; under the exclusive lease, with all of the file claimed.
    ///
    /// # Errors
    /// Park. Other errors are told to who waits for the write, or kept for the open files.
    pub fn take_mapped(&self, ctx: &Ctx<'_>, inode: &Inode, state: &mut Locked<'_>) -> Res<()> {
        if !state.claims_all() {
            // When the range was claimed nothing was queued: what is by now comes after.
            return Ok(());
        }
        while let Some((number, write)) = inode.waiting.mapped.get().and_then(MappedWrites::front) {
            let result = match self.apply_mapped(ctx, inode, state, &write) {
                Err(Stop::Park) => return Err(Stop::Park),
                // Of use to nobody any more: see `write_pages`.
                Err(Stop::Errno(Errno(libc::ESTALE))) if state.lasting.gone => Ok(()),
                result => result.map_err(Stop::errno),
            };
            if let Some(error) = inode.waiting.mapped.end(number, result) {
                inode.errors.set(error);
            }
        }
        Ok(())
    }

    fn apply_mapped(&self, ctx: &Ctx<'_>, inode: &Inode, state: &mut Locked<'_>, queued: &Queued) -> Res<()> {
        let size = self.cache.load_attr(ctx, inode, state)?.size;
        let mut write = queued.write();
        if self.kernel.mode != CacheMode::Writeback {
            // A store to a mapping makes no file longer; another mount may have cut it.
            let len = size.saturating_sub(write.offset).min(write.data.len() as u64);
            write.data = &write.data[..len as usize];
        }
        self.write_next(ctx, inode, state, &write)?;
        if self.kernel.mode != CacheMode::Writeback {
            inode.kernel.pages.store(true, Ordering::SeqCst);
        }
        Ok(())
    }
}
