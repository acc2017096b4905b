//! Reading under a lease that is held.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::cache::Cache;
use crate::cache::claims::{Purpose, Span};
use crate::cache::inode::{Inode, Locked};
use crate::cache::pages::{PAGE, page_from, page_of};
use crate::cache::state::State;
use crate::data::buffers::{Buffers, Lent};
use crate::data::stored::Stored;
use crate::data::transfer::Transfers;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res};

/// The contents of files up to this size come when they are opened, bytes.
const SMALL: usize = 64 << 10;

/// Reads.
pub struct Reads {
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) stored: Arc<Stored>,
    pub(crate) buffers: Buffers,
}

impl Reads {
    /// Reads what a system call would, under a lease that is held, of a range that is claimed: `len` bytes, fewer at the end of the file.
    /// `keep`: it is worth keeping here what came from the storage nodes.
    ///
    /// # Errors
    /// As [`Stored::read_stored`](crate::data::stored::Stored::read_stored).
    pub fn read_held(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        offset: u64,
        len: usize,
        keep: bool,
    ) -> Res<Lent<'_>> {
        let attr = self.cache.load_attr(ctx, inode, state)?;
        let len = attr.size.saturating_sub(offset).min(len as u64) as usize;
        // Not before the lease, the claim and the attributes: those who wait for them would each hold one.
        let mut out = self.buffers.lend(len);
        if len == 0 {
            return Ok(out);
        }
        let (first, last) = (page_of(offset), page_of(offset + len as u64 - 1));
        if !state.pages.covers(first, last) {
            self.stored.read_stored(ctx, inode, state, offset, &mut out)?;
            if keep && self.session.cache_reads {
                self.keep(state, offset, &out, attr.size);
            }
        }
        state.pages.overlay(offset, &mut out);
        if let Some(mapped) = inode.waiting.mapped.get() {
            mapped.overlay(offset, &mut out);
        }
        Ok(out)
    }

    /// Locks an inode to read a range of the file under a lease of `version`.
    ///
    /// # Errors
    /// Park.
    pub fn claim_to_read<'a>(
        &self,
        ctx: &Ctx<'_>,
        inode: &'a Inode,
        version: u64,
        offset: u64,
        len: usize,
    ) -> Res<Locked<'a>> {
        let span = Span {
            from: offset,
            to: offset.saturating_add(len as u64),
        };
        inode.claim(ctx, version, span, Purpose::Read)
    }

    /// Does something that asks the storage node of a file's record, under a lease of `version`, and has the contents of a small file of
    /// which nothing is here come at the same time: whoever opens such a file is about to read it.
    pub fn with_contents<T>(&self, ctx: &Ctx<'_>, inode: &Inode, version: u64, act: impl Fn() -> T) -> T {
        let mut done = None;
        self.fetch_small(ctx, inode, version, || done = Some(act()));
        done.unwrap_or_else(act)
    }

    /// Runs `beside` while the contents come, if they do, and keeps them.
    fn fetch_small(&self, ctx: &Ctx<'_>, inode: &Inode, version: u64, beside: impl FnOnce()) {
        // What the kernel has it does not ask for.
        if !self.session.cache_reads || inode.kernel.pages.load(Ordering::SeqCst) {
            return;
        }
        let Ok(mut state) = self.claim_to_read(ctx, inode, version, 0, SMALL) else {
            return;
        };
        let size = state.attr.map_or(0, |attr| attr.size);
        let nodes = self.session.net.storage.count();
        let last = page_of(size.saturating_sub(1));
        if size == 0
            || size > SMALL as u64
            || !state.is_mapped(nodes)
            || state.frames.any_lost(0, 0)
            || state.pages.covers(0, last)
        {
            return;
        }
        let mut out = self.buffers.lend(size as usize);
        let mut reads = Transfers::default();
        self.stored.add_reads(inode, &state, 0, &mut out, &mut reads);
        if state.unlocked(|| self.stored.transfer.once_with(reads, beside)) {
            self.keep(&mut state, 0, &out, size);
        }
    }

    /// Keeps whole pages of what has been read.
    fn keep(&self, state: &mut State, offset: u64, data: &[u8], size: u64) {
        let end = offset + data.len() as u64;
        let before = state.pages.len();
        let mut page = offset.div_ceil(PAGE);
        while page * PAGE < end {
            let from = (page * PAGE - offset) as usize;
            let to = data.len().min(from + PAGE as usize);
            // A short page is whole only at the end of the file.
            if (to - from == PAGE as usize || end >= size) && state.pages.get(page).is_none() {
                state.pages.insert(page, page_from(&data[from..to]), false);
            }
            page += 1;
        }
        self.cache.count_pages(before, state.pages.len());
    }
}
