//! Reading under a lease that is held.

use std::sync::Arc;

use crate::cache::Cache;
use crate::cache::claims::{Purpose, Span};
use crate::cache::inode::{Inode, Locked};
use crate::cache::pages::{PAGE, page_from, page_of};
use crate::cache::state::State;
use crate::data::buffers::{Buffers, Lent};
use crate::data::stored::Stored;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res};

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
