//! `fallocate`.

use std::sync::Arc;

use lockmgr::Mode;

use crate::cache::inode::Inode;
use crate::cache::{Cache, MAX_FILE_SIZE};
use crate::data::allocation::{Allocator, KEEP, PUNCH, ZERO};
use crate::data::discard::Discards;
use crate::data::space::Space;
use crate::data::stored::Stored;
use crate::data::writing::{Whole, Writing};
use crate::kernel::caches::KernelCaches;
use crate::kernel::front::Front;
use crate::namespace::xattrs::Xattrs;
use crate::session::Session;
use crate::session::caller::Caller;
use crate::session::ctx::{Ctx, Res, fail, is_full};

/// `fallocate`.
pub struct Allocations {
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) kernel: Arc<KernelCaches>,
    pub(crate) front: Arc<Front>,
    pub(crate) space: Arc<Space>,
    pub(crate) stored: Arc<Stored>,
    pub(crate) writing: Arc<Writing>,
    pub(crate) discards: Arc<Discards>,
    pub(crate) allocator: Arc<Allocator>,
    pub(crate) xattrs: Arc<Xattrs>,
}

impl Allocations {
    /// `fallocate`; it clears set-user-id bits as a write does, depending on the caller.
    ///
    /// # Errors
    /// Park; `EOPNOTSUPP`, `EFBIG`, `ENOSPC` (nothing has changed then).
    pub fn fallocate(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        (offset, len): (u64, u64),
        mode: i32,
        caller: Caller,
    ) -> Res<()> {
        if len == 0 {
            return fail(libc::EINVAL);
        }
        let Some(end) = offset.checked_add(len).filter(|&e| e <= MAX_FILE_SIZE) else {
            return fail(libc::EFBIG);
        };
        if mode & !(KEEP | PUNCH | ZERO) != 0 || (mode & PUNCH != 0 && mode != PUNCH | KEEP) {
            return fail(libc::EOPNOTSUPP);
        }
        ctx.may_wait()?;
        self.space.with_frees(ctx, is_full, || {
            self.fallocate_at_once(ctx, inode, (offset, end), mode, caller)
        })
    }

    fn fallocate_at_once(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        (offset, end): (u64, u64),
        mode: i32,
        caller: Caller,
    ) -> Res<()> {
        let guard = self.cache.lease(ctx, inode, Mode::Exclusive)?;
        self.xattrs.drop_capability(ctx, inode, &guard)?;
        let result = {
            let mut state = self.stored.claim_to_change(ctx, inode, guard.version())?;
            self.cache.load_attr(ctx, inode, &mut state)?;
            self.writing.take_mapped(ctx, inode, &mut state)?;
            self.front.space_changes(inode);
            let result = if mode & PUNCH != 0 {
                self.discards
                    .discard(ctx, inode, &mut state, offset, end, Whole::Free)
            } else {
                self.allocator
                    .provide(ctx, inode, &mut state, (offset, end), mode & ZERO != 0)
            };
            self.front.space_settled(inode, &state);
            if result.is_ok() {
                if let Some(attr) = state.attr.as_mut().filter(|_| mode & KEEP == 0) {
                    attr.size = attr.size.max(end);
                }
                state.data_changed(self.session.net.meta.now(), caller);
            }
            if let Some(attr) = &state.attr {
                self.front.attributes_changed(inode, attr);
            }
            result
        };
        // Also after a failure half-way: frames may have come and gone.
        self.cache.note_dirty(inode.ino);
        self.kernel.invalidate_attrs(inode);
        drop(guard);
        result
    }
}
