//! Space for what the kernel writes into its page cache: reserved before it does, and told in the entry of its lease.
//!
//! What the kernel is told is one range of the file, all of which has frames, or has space set aside (`FrameMap::reserved`)
//! that later blocks and the first one are allocated with. The reservation stands while the exclusive lease is delegated: it may be
//! used at any time, and when it was the mount hears of it with the WRITE. So the ways out are few:
//!
//! | reservations go | because nobody writes by then |
//! | --- | --- |
//! | with the mount's exclusive lease | the kernel has flushed |
//! | with the last handle that writes | its RELEASE comes after all its WRITEs, also those of its mappings |
//! | by truncation and holes | the kernel has the inode locked meanwhile; what is mapped it drops afterwards |
//! | by being recalled, where the pool is getting full | they are recalled like a lease, down to a shared one |
//!
//! More than is asked for is reserved as long as the storage nodes have plenty: an eighth of what they have at a time, so
//! that what one mount hoards shrinks as the pool fills.

use std::sync::Arc;

use crate::cache::frames::frame_size;
use crate::cache::inode::{Inode, Locked};
use crate::cache::pages::PAGE;
use crate::cache::range::{beyond, covered, range_at, reserved_in};
use crate::cache::state::State;
use crate::cache::{Cache, MAX_FILE_SIZE};
use crate::data::space::{CHUNK, Space};
use crate::data::stored::{Stored, segments};
use crate::kernel::front::Front;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res, Stop, fail};
use fsd_proto::layout::BLOCK;
use fsd_proto::rpc::Errno;

/// So much is reserved at a time; the kernel asks again for the rest.
pub(crate) const AT_ONCE: u64 = 64 << 20;
/// A mount that has so much set aside reserves what is asked for, and no more.
pub(crate) const HOARD: u64 = 256 << 20;
/// A mount that has set aside more than such a part of what is left to all gives it back.
pub(crate) const SHARE: u64 = 4;

/// Space set aside for blocks.
pub struct Reservations {
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) front: Arc<Front>,
    pub(crate) space: Arc<Space>,
    pub(crate) stored: Arc<Stored>,
}

impl Reservations {
    /// Sets aside what a write lacks, and more where that is cheap. How many bytes from its beginning there is space for.
    pub(crate) fn reserve_range(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        offset: u64,
        len: u64,
    ) -> Res<u32> {
        let len = len.clamp(1, AT_ONCE);
        let Some(end) = offset.checked_add(len).filter(|&e| e <= MAX_FILE_SIZE) else {
            return fail(libc::EFBIG);
        };
        self.stored.load_all_frames(ctx, inode, state)?;
        let needed: Vec<(u64, u64)> = segments(offset, len as usize)
            .map(|s| (s.block, u64::from(frame_size(s.block, s.at + s.len as u64))))
            .filter(|&(block, size)| covered(state, block) < size)
            .collect();
        let more = self.worth_reserving(state, offset, end);
        if !needed.is_empty() || !more.is_empty() {
            self.fill_account(ctx, inode, state, &needed, &more)?;
        }
        for &(block, size) in &needed {
            if self.reserve_block(inode, state, block, size) {
                continue;
            }
            // No space to set aside, but perhaps still a frame.
            ctx.may_wait()?;
            match self.stored.allocate(inode, state, &[(block, size as u32)]) {
                Ok(()) => self.cache.note_dirty(inode.ino),
                Err(Stop::Errno(Errno(libc::ENOSPC))) if block * BLOCK > offset => break,
                Err(Stop::Errno(Errno(libc::ENOSPC))) if offset % BLOCK < covered(state, block) => break,
                Err(stop) => return Err(stop),
            }
        }
        for block in more {
            if !self.reserve_block(inode, state, block, BLOCK) {
                break;
            }
        }
        let (_, to) = range_at(state, offset);
        Ok(to.saturating_sub(offset).min(len) as u32)
    }

    /// Blocks beyond those of a write that something is to be set aside for, the nearest ones first.
    fn worth_reserving(&self, state: &State, offset: u64, end: u64) -> Vec<u64> {
        let held: u64 = self.space.accounts.held().iter().map(|(_, bytes)| bytes).sum();
        if held >= HOARD {
            return Vec::new();
        }
        let size = state.attr.map_or(0, |a| a.size);
        let (begin, _) = range_at(state, offset.saturating_sub(1));
        let (first, last, most) = beyond(offset, end, size, begin);
        let own = offset / BLOCK..end.div_ceil(BLOCK);
        let lacks = |block: &u64| !own.contains(block) && covered(state, *block) < BLOCK;
        let after = (own.end.max(first)..last).filter(lacks);
        let before = (first..own.start.min(last)).rev().filter(lacks);
        after.chain(before).take(most as usize).collect()
    }

    /// Sees to it that what is needed is in the accounts, and perhaps what is wanted.
    fn fill_account(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        needed: &[(u64, u64)],
        more: &[u64],
    ) -> Res<()> {
        for node in 0..self.session.net.storage.count() {
            let here = |block: u64| self.session.storage_of(inode.ino, block) == node;
            let lacks = |block: u64, size: u64| size - reserved_in(state, block).min(size);
            let need: u64 = needed
                .iter()
                .filter(|(b, _)| here(*b))
                .map(|&(b, size)| lacks(b, size))
                .sum();
            let want: u64 = more.iter().filter(|b| here(**b)).map(|&b| lacks(b, BLOCK)).sum();
            let idle = self.space.accounts.idle(node);
            if idle >= need + want {
                continue;
            }
            ctx.may_wait()?;
            let wanted = (need + want).max(CHUNK) - idle.min(need + want);
            let needed = need.saturating_sub(idle);
            let granted = state.unlocked(|| self.space.ask_for_space(node, needed, wanted))?;
            self.space.accounts.put(node, granted);
        }
        Ok(())
    }

    /// Reserves what is in the accounts; false if it is not enough.
    fn reserve_block(&self, inode: &Inode, state: &mut State, block: u64, size: u64) -> bool {
        let lacks = size - reserved_in(state, block).min(size);
        if !self
            .space
            .accounts
            .take(self.session.storage_of(inode.ino, block), lacks)
        {
            return false;
        }
        let had = reserved_in(state, block);
        state.frames.reserved.insert(block, size.max(had) as u32);
        self.space.accounts.lend(inode.ino);
        true
    }

    /// The first page of a file that is open to be written is reserved if that costs nothing, for most files are small. Under
    /// a lease.
    pub(crate) fn reserve_first_page(&self, inode: &Inode, state: &mut State) {
        let loaded = state
            .frames
            .loaded
            .contains(&self.session.storage_of(inode.ino, 0));
        let known = loaded && state.attr.is_some_and(|a| state.frames.layout == Some(a.layout));
        if known && covered(state, 0) == 0 && inode.opens.try_lock().is_some_and(|o| o.writers > 0) {
            self.reserve_block(inode, state, 0, PAGE);
        }
    }

    /// A file was opened to be written, under a lease that the kernel may have already.
    pub fn space_for_writer(&self, inode: &Inode) {
        if self.front.may_write(inode)
            && let Some(mut state) = inode.try_claim_raw()
        {
            self.reserve_first_page(inode, &mut state);
            self.front.space_settled(inode, &state);
        }
    }

    /// The last handle that writes may have gone: what is reserved, and was not used, is not needed.
    pub fn settle_space(&self, inode: &Inode) {
        if !self.space.accounts.is_delegated(inode.ino) {
            return;
        }
        // Whoever is about to open it is told what is left when this is over.
        let Some(mut state) = inode.try_claim_raw() else {
            return;
        };
        let Some(opens) = inode.opens.try_lock() else {
            return;
        };
        if opens.writers > 0 {
            return;
        }
        self.front.space_changes(inode);
        self.release_unused(inode, &mut state);
        self.front.space_settled(inode, &state);
    }

    /// Takes reservations back that no dirty page of this mount needs.
    pub(crate) fn release_unused(&self, inode: &Inode, state: &mut State) {
        let per_block = BLOCK / PAGE;
        let unused: Vec<u64> = state
            .frames
            .reserved
            .keys()
            .filter(|b| {
                let first = *b * per_block;
                state
                    .pages
                    .dirty_in(first, first + per_block - 1)
                    .next()
                    .is_none()
            })
            .copied()
            .collect();
        self.release_blocks(inode, state, &unused);
        self.space.accounts.recalled(inode.ino);
    }

    /// Drops dirty pages that can never be stored, and the space set aside for them.
    pub fn abandon_pages(&self, inode: &Inode, state: &mut State) {
        let before = state.pages.len();
        state.pages.clear();
        self.cache.count_pages(before, 0);
        self.front.space_changes(inode);
        self.release_reservations(inode, state, 0);
    }

    /// Gives up what is set aside for blocks from `from_block` on, none of which is dirty any more.
    pub fn release_reservations(&self, inode: &Inode, state: &mut State, from_block: u64) {
        let reserved = state.frames.reserved.keys();
        let gone: Vec<u64> = reserved.filter(|b| **b >= from_block).copied().collect();
        self.release_blocks(inode, state, &gone);
        if from_block == 0 {
            self.space.accounts.recalled(inode.ino);
        }
    }

    /// Gives up what is set aside for some blocks.
    pub fn release_blocks(&self, inode: &Inode, state: &mut State, blocks: &[u64]) {
        for block in blocks {
            if let Some(bytes) = state.frames.unreserve(*block) {
                self.space
                    .accounts
                    .put(self.session.storage_of(inode.ino, *block), u64::from(bytes));
            }
        }
        if !blocks.is_empty() {
            self.note_idle_space();
        }
    }

    /// Reservations have come back to the accounts: unless somebody needs them soon, the storage nodes get them.
    pub fn note_idle_space(&self) {
        self.cache.wake_writer();
    }

    /// Drops what is cached of a file that is gone, and its lease. All of the file has been claimed since before the server was told
    /// to remove it: what is stored of it later would come into frames that are another file's.
    pub fn forget_data(&self, inode: &Inode, mut claimed: Locked<'_>) {
        self.abandon_pages(inode, &mut claimed);
        claimed.attr_dirty = false;
        claimed.lasting.gone = true;
        inode.transit.push.lock().waiting = None;
        drop(claimed);
        self.cache.dirty.lock().remove(&inode.ino);
    }
}
