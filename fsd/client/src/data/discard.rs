//! Taking data away: truncation, holes, zeros.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::cache::Cache;
use crate::cache::inode::{Inode, Locked};
use crate::cache::pages::PAGE;
use crate::data::reservations::Reservations;
use crate::data::stored::{Stored, frames_in};
use crate::data::writing::{Whole, Writing};
use crate::kernel::front::Front;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res};
use fsd_proto::ask;
use fsd_proto::layout::BLOCK;
use fsd_proto::wire::BlockRange;

/// Data that is taken away.
pub struct Discards {
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) front: Arc<Front>,
    pub(crate) stored: Arc<Stored>,
    pub(crate) reservations: Arc<Reservations>,
    pub(crate) writing: Arc<Writing>,
}

impl Discards {
    /// Sets a file's size. Keeps the rule that stored bytes beyond the end are zero.
    ///
    /// # Errors
    /// Park (nothing has changed then); I/O errors.
    pub fn truncate(&self, ctx: &Ctx<'_>, inode: &Inode, state: &mut Locked<'_>, size: u64) -> Res<()> {
        self.writing.take_mapped(ctx, inode, state)?;
        let old = self.cache.load_attr(ctx, inode, state)?.size;
        self.front.size_changes(inode);
        if size < old {
            self.front.space_changes(inode);
            let discarded = self.discard(ctx, inode, state, size, u64::MAX, Whole::Free);
            self.front.space_settled(inode, state);
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
        self.stored.load_all_frames(ctx, inode, state)?;
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
        self.stored.write_frames(ctx, inode, state, parts)?;
        if frees {
            self.free_blocks(inode, state, first_whole, end_whole - 1)?;
        }
        let before = state.pages.len();
        state.pages.zero(from, to);
        let (first_page, end_page) = (from.div_ceil(PAGE), to / PAGE);
        if first_page < end_page {
            state.pages.remove(first_page, end_page - 1);
        }
        self.cache.count_pages(before, state.pages.len());
        if to == u64::MAX {
            self.reservations.release_reservations(inode, state, first_whole);
        }
        Ok(())
    }

    /// Frees the frames of blocks `first ..= last`.
    ///
    /// # Errors
    /// A storage node refuses, or cannot be reached: what it has of the file is found out when it is needed.
    pub fn free_blocks(&self, inode: &Inode, state: &mut Locked<'_>, first: u64, last: u64) -> Res<()> {
        let mut by_node: BTreeMap<u16, Vec<u64>> = BTreeMap::new();
        for (block, _) in frames_in(state, first, last) {
            let node = self.session.storage_of(inode.ino, block);
            by_node.entry(node).or_default().push(block);
        }
        if let Some((&last, _)) = state.frames.known().range(first..=last).next_back() {
            state.frees_up_to(last);
        }
        for &node in by_node.keys() {
            state.changed_at(node);
        }
        let ino = inode.ino;
        let free = || ask::storage::Free {
            ranges: vec![BlockRange { ino, first, last }],
        };
        let frees: Vec<_> = by_node.keys().map(|&node| (node, free())).collect();
        let answers = state.unlocked(|| self.session.net.storage.ask_each(&frees));
        let mut result = Ok(());
        for ((node, blocks), answer) in by_node.into_iter().zip(answers) {
            match answer {
                // They may be another file's by now, whatever the other nodes say.
                Ok(_) => blocks.into_iter().for_each(|block| state.drop_frame(block)),
                Err(error) => {
                    if !error.is_refusal() {
                        state.doubt_frames(node, blocks);
                    }
                    result = Err(error.into());
                }
            }
        }
        result
    }
}
