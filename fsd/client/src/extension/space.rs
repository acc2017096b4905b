//! Space for what the kernel writes into its page cache: promised before it does, and told in the entry of its lease.
//!
//! What the kernel is told is one range of the file, all of which has frames, or has space set aside (`FrameMap::reserved`)
//! that later blocks and the first one are allocated with. The promise stands while the exclusive lease is lent: it may be
//! used at any time, and when it was the mount hears of it with the WRITE. So the ways out are few:
//!
//! | promises go | because nobody writes by then |
//! | --- | --- |
//! | with the mount's exclusive lease | the kernel has flushed |
//! | with the last handle that writes | its RELEASE comes after all its WRITEs, also those of its mappings |
//! | by truncation and holes | the kernel has the inode locked meanwhile; what is mapped it drops afterwards |
//! | by being recalled, where the pool is getting full | they are taken back like a lease, down to a shared one |
//!
//! More than is asked for is promised as long as the storage nodes have plenty: an eighth of what they have at a time, so
//! that what one mount hoards shrinks as the pool fills.

use std::sync::Arc;

use distfuse_abi::{Answer, Call};
use lockmgr::Mode;

use super::super::Client;
use super::super::MAX_FILE_SIZE;
use super::super::ctx::{Ctx, Res, Stop, fail, is_full};
use super::super::data::stretches;
use super::super::inode::{Inode, Locked, State};
use super::super::pages::PAGE;
use super::super::space::{CHUNK, frame_size};
use super::Extension;
use super::lend::Lending;
use super::range::{beyond, covered, promised, range_at, range_of};
use fsd_proto::layout::BLOCK;
use fsd_proto::rpc::Errno;

/// So much is promised at a time; the kernel asks again for the rest.
const AT_ONCE: u64 = 64 << 20;
/// A mount that has so much set aside promises what is asked for, and no more.
const HOARD: u64 = 256 << 20;
/// A mount that has set aside more than such a part of what is left to all gives it back.
const SHARE: u64 = 4;

impl Client {
    /// A task wants to write and has no space for it. Called on a thread that must not wait.
    pub(super) fn provide_space(self: &Arc<Self>, ext: &Arc<Extension>, call: Call) {
        match self.space_now(&Ctx::on_loop(&ext.nobody_waits), ext, &call) {
            Err(Stop::Park | Stop::Errno(Errno(libc::ENOSPC))) => {
                let (me, ext) = (Arc::clone(self), Arc::clone(ext));
                self.workers.run(move || {
                    let ctx = Ctx::on_worker();
                    let wanted = u64::from(call.len).min(AT_ONCE);
                    let lacks = |result: &Res<Answer>| match result {
                        Ok(Answer::Done(covered)) => u64::from(*covered) < wanted,
                        result => is_full(result),
                    };
                    let mut result = me.with_frees(&ctx, lacks, || me.space_now(&ctx, &ext, &call));
                    if result == fail(libc::ENOSPC) && me.recall_space(&ext, Some(call.ino)) {
                        result = me.space_now(&ctx, &ext, &call);
                    }
                    ext.answer(&call, super::calls::answer_of(result));
                });
            }
            result => ext.answer(&call, super::calls::answer_of(result)),
        }
    }

    /// Promises, and lends the lease if the kernel has it no more: so the task finds both, for as long as who asks for a
    /// lease is left it.
    fn space_now(&self, ctx: &Ctx<'_>, ext: &Extension, call: &Call) -> Res<Answer> {
        let inode = self.inode(call.ino);
        loop {
            let guard = self.lease(ctx, &inode, Mode::Exclusive)?;
            if let Some(_arranging) = inode.lent.arrange() {
                let mut state = self.claim_to_change(ctx, &inode, guard.version())?;
                let attr = self.load_attr(ctx, &inode, &mut state)?;
                let covered = self.promise(ctx, &inode, &mut state, call.offset, u64::from(call.len))?;
                let range = range_at(&state, call.offset);
                match self.lend(
                    ext,
                    &inode,
                    Mode::Exclusive,
                    guard.version(),
                    (&attr, range),
                    true,
                )? {
                    Lending::Done { wake } => {
                        if wake {
                            ext.wake(call.ino, None);
                        }
                        return Ok(Answer::Done(covered));
                    }
                    // As it asks for the lease, room is made.
                    Lending::Full { .. } => return Ok(Answer::Again),
                    Lending::Taking => {}
                }
            }
            drop(guard);
            ctx.may_wait()?;
            inode.lent.settled();
        }
    }

    /// Sets aside what a write lacks, and more where that is cheap. How many bytes from its beginning there is space for.
    fn promise(
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
        self.load_all_frames(ctx, inode, state)?;
        let needed: Vec<(u64, u64)> = stretches(offset, len as usize)
            .map(|s| (s.block, u64::from(frame_size(s.block, s.at + s.len as u64))))
            .filter(|&(block, size)| covered(state, block) < size)
            .collect();
        let more = self.worth_promising(state, offset, end);
        if !needed.is_empty() || !more.is_empty() {
            self.fill_bank(ctx, inode, state, &needed, &more)?;
        }
        for &(block, size) in &needed {
            if self.promise_block(inode, state, block, size) {
                continue;
            }
            // No space to set aside, but perhaps still a frame.
            ctx.may_wait()?;
            match self.allocate(inode, state, &[(block, size as u32)]) {
                Ok(()) => self.note_dirty(inode.ino),
                Err(Stop::Errno(Errno(libc::ENOSPC))) if block * BLOCK > offset => break,
                Err(Stop::Errno(Errno(libc::ENOSPC))) if offset % BLOCK < covered(state, block) => break,
                Err(stop) => return Err(stop),
            }
        }
        for block in more {
            if !self.promise_block(inode, state, block, BLOCK) {
                break;
            }
        }
        let (_, to) = range_at(state, offset);
        Ok(to.saturating_sub(offset).min(len) as u32)
    }

    /// Blocks beyond those of a write that something is to be set aside for, the nearest ones first.
    fn worth_promising(&self, state: &State, offset: u64, end: u64) -> Vec<u64> {
        let held: u64 = self.space.held().iter().map(|(_, bytes)| bytes).sum();
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

    /// Sees to it that what is needed is in the bank, and perhaps what is wanted.
    fn fill_bank(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        needed: &[(u64, u64)],
        more: &[u64],
    ) -> Res<()> {
        for node in 0..self.net.storage_count() {
            let here = |block: u64| self.storage_of(inode.ino, block) == node;
            let lacks = |block: u64, size: u64| size - promised(state, block).min(size);
            let need: u64 = needed
                .iter()
                .filter(|(b, _)| here(*b))
                .map(|&(b, size)| lacks(b, size))
                .sum();
            let want: u64 = more.iter().filter(|b| here(**b)).map(|&b| lacks(b, BLOCK)).sum();
            let idle = self.space.idle(node);
            if idle >= need + want {
                continue;
            }
            ctx.may_wait()?;
            let wanted = (need + want).max(CHUNK) - idle.min(need + want);
            let needed = need.saturating_sub(idle);
            let granted = state.unlocked(|| self.ask_for_space(node, needed, wanted))?;
            self.space.put(node, granted);
        }
        Ok(())
    }

    /// Promises what is in the bank; false if it is not enough.
    fn promise_block(&self, inode: &Inode, state: &mut State, block: u64, size: u64) -> bool {
        let lacks = size - promised(state, block).min(size);
        if !self.space.take(self.storage_of(inode.ino, block), lacks) {
            return false;
        }
        let had = promised(state, block);
        state.frames.reserved.insert(block, size.max(had) as u32);
        self.space.lend(inode.ino);
        true
    }

    /// The first page of a file that is open to be written is promised if that costs nothing, for most files are small. Under
    /// a lease.
    pub(super) fn promise_first_page(&self, inode: &Inode, state: &mut State) {
        let loaded = state.frames.loaded.contains(&self.storage_of(inode.ino, 0));
        let known = loaded && state.attr.is_some_and(|a| state.frames.layout == Some(a.layout));
        if known && covered(state, 0) == 0 && inode.opens.try_lock().is_some_and(|o| o.writers > 0) {
            self.promise_block(inode, state, 0, PAGE);
        }
    }

    /// A file was opened to be written, under a lease that the kernel may have already.
    pub fn space_for_writer(&self, inode: &Inode) {
        if self.lent_exclusively(inode)
            && let Some(mut state) = inode.try_claim_raw()
        {
            self.promise_first_page(inode, &mut state);
            self.tell_space(inode, range_of(&state));
        }
    }

    fn lent_exclusively(&self, inode: &Inode) -> bool {
        self.extension.get().is_some_and(|ext| {
            let word = ext.attachment.table().word(inode.ino);
            word.is_some_and(|word| word.mode() == distfuse_abi::Mode::Exclusive)
        })
    }

    fn tell_space(&self, inode: &Inode, range: (u64, u64)) {
        if let Some(ext) = self.extension.get() {
            ext.attachment.table().set_space(inode.ino, range);
        }
    }

    /// Before blocks of a file lose their frames, or promises: the kernel is told of none, until [`Client::space_settled`].
    pub fn space_changes(&self, inode: &Inode) {
        self.tell_space(inode, (0, 0));
    }

    /// After blocks of a file have got or lost their frames.
    pub fn space_settled(&self, inode: &Inode, state: &State) {
        if self.lent_exclusively(inode) {
            self.tell_space(inode, range_of(state));
        }
    }

    /// The last handle that writes may have gone: what is promised, and was not used, is not needed.
    pub fn settle_space(&self, inode: &Inode) {
        if !self.space.is_lent(inode.ino) {
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
        self.space_changes(inode);
        self.release_unused(inode, &mut state);
        self.space_settled(inode, &state);
    }

    /// Takes promises back that no dirty page of this mount needs.
    fn release_unused(&self, inode: &Inode, state: &mut State) {
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
        self.release_promises(inode, state, &unused);
        self.space.unlend(inode.ino);
    }

    /// Takes back what is promised to the kernel, and with it the exclusive leases lent for it; of all inodes but one.
    /// False: there was nothing. The caller may hold nothing that a request of the kernel could wait for.
    fn recall_space(&self, ext: &Extension, but: Option<u64>) -> bool {
        let _one = ext.recalling.lock();
        let mut any = false;
        for ino in self.space.all_lent() {
            if Some(ino) == but {
                continue;
            }
            any = true;
            let Some(inode) = self.inodes.find(ino) else {
                self.space.unlend(ino);
                continue;
            };
            self.take_space_back(ext, &inode, Some(Mode::Shared));
        }
        any
    }

    /// Takes back what the kernel was lent of an inode, and what is promised with it. The mount's lease stays.
    pub(super) fn take_space_back(&self, ext: &Extension, inode: &Arc<Inode>, to: Option<Mode>) {
        self.take_back(ext, inode, to);
        self.release_unused(inode, &mut inode.claim_raw());
        inode.lent.again();
    }

    /// Every now and then: a mount that has much set aside where little is left gives it back to all.
    pub(super) fn share_space(self: &Arc<Self>, ext: &Arc<Extension>) {
        if ext.recalling.is_locked() || self.space.held().iter().all(|(_, bytes)| *bytes == 0) {
            return;
        }
        let (me, ext) = (Arc::clone(self), Arc::clone(ext));
        self.workers.run(move || {
            for inode in me
                .space
                .all_lent()
                .into_iter()
                .filter_map(|ino| me.inodes.find(ino))
            {
                me.settle_space(&inode);
            }
            // What is promised to nobody first: that may be enough.
            if me.holds_too_much() {
                me.return_space();
            }
            if me.holds_too_much() {
                me.recall_space(&ext, None);
                me.return_space();
            }
        });
    }

    fn holds_too_much(&self) -> bool {
        let held = self.space.held().into_iter().filter(|(_, bytes)| *bytes > 0);
        held.into_iter()
            .any(|(node, bytes)| self.pool_space(node).is_ok_and(|s| s.free / SHARE < bytes))
    }
}
