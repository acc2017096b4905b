//! Space for what tasks are about to write through the kernel's page cache.

use std::sync::Arc;

use distfuse_abi::{Answer, Call};
use lockmgr::Mode;
use rt::sync::Mutex;

use crate::cache::Cache;
use crate::cache::inode::Inode;
use crate::cache::range::range_at;
use crate::data::reservations::{AT_ONCE, Reservations, SHARE};
use crate::data::space::Space;
use crate::data::stored::Stored;
use crate::kernel::delegations::{Delegating, Delegations};
use crate::kernel::extension::Extension;
use crate::kernel::recalls::Recalls;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res, Stop, fail, is_full};
use fsd_proto::rpc::Errno;

/// Space for what the kernel is about to write.
pub struct SpaceCalls {
    /// Held while reservations are recalled.
    pub(crate) recalling: Mutex<()>,
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) delegations: Arc<Delegations>,
    pub(crate) recalls: Arc<Recalls>,
    pub(crate) space: Arc<Space>,
    pub(crate) stored: Arc<Stored>,
    pub(crate) reservations: Arc<Reservations>,
}

impl SpaceCalls {
    /// A task wants to write and has no space for it. Called on a thread that must not wait.
    pub(crate) fn provide_space(self: &Arc<Self>, ext: &Arc<Extension>, call: Call) {
        match self.space_now(&Ctx::on_loop(&ext.nobody_waits), ext, &call) {
            Err(Stop::Park | Stop::Errno(Errno(libc::ENOSPC))) => {
                let (me, ext) = (Arc::clone(self), Arc::clone(ext));
                self.session.threads.workers.run(move || {
                    let ctx = Ctx::on_worker();
                    let wanted = u64::from(call.len).min(AT_ONCE);
                    let lacks = |result: &Res<Answer>| match result {
                        Ok(Answer::Done(covered)) => u64::from(*covered) < wanted,
                        result => is_full(result),
                    };
                    let mut result = me
                        .space
                        .with_frees(&ctx, lacks, || me.space_now(&ctx, &ext, &call));
                    if result == fail(libc::ENOSPC) && me.recall_space(Some(call.ino)) {
                        result = me.space_now(&ctx, &ext, &call);
                    }
                    ext.answer(&call, super::here::answer_of(result));
                });
            }
            result => ext.answer(&call, super::here::answer_of(result)),
        }
    }

    /// Reserves, and delegates the lease if the kernel has it no more: so the task finds both, for as long as who asks for a
    /// lease is left it.
    fn space_now(&self, ctx: &Ctx<'_>, ext: &Extension, call: &Call) -> Res<Answer> {
        let inode = self.cache.inode(call.ino);
        loop {
            let guard = self.cache.lease(ctx, &inode, Mode::Exclusive)?;
            if let Some(_arranging) = inode.delegation.arrange() {
                let mut state = self.stored.claim_to_change(ctx, &inode, guard.version())?;
                let attr = self.cache.load_attr(ctx, &inode, &mut state)?;
                let covered = self.reservations.reserve_range(
                    ctx,
                    &inode,
                    &mut state,
                    call.offset,
                    u64::from(call.len),
                )?;
                let range = range_at(&state, call.offset);
                match self
                    .delegations
                    .lend(&inode, Mode::Exclusive, guard.version(), (&attr, range), true)?
                {
                    Delegating::Done { wake } => {
                        if wake {
                            ext.wake(call.ino, None);
                        }
                        return Ok(Answer::Done(covered));
                    }
                    // As it asks for the lease, room is made.
                    Delegating::Full { .. } => return Ok(Answer::Again),
                    Delegating::Taking => {}
                }
            }
            drop(guard);
            ctx.may_wait()?;
            inode.delegation.settled();
        }
    }

    /// Recalls what is reserved for the kernel, and with it the exclusive leases delegated for it; of all inodes but one.
    /// False: there was nothing. The caller may hold nothing that a request of the kernel could wait for.
    fn recall_space(&self, but: Option<u64>) -> bool {
        let _one = self.recalling.lock();
        let mut any = false;
        for ino in self.space.accounts.all_delegated() {
            if Some(ino) == but {
                continue;
            }
            any = true;
            let Some(inode) = self.cache.inodes.find(ino) else {
                self.space.accounts.recalled(ino);
                continue;
            };
            self.recall_with_space(&inode, Some(Mode::Shared));
        }
        any
    }

    /// Recalls what was delegated of an inode to the kernel, and what is reserved with it. The mount's lease stays.
    pub(crate) fn recall_with_space(&self, inode: &Arc<Inode>, to: Option<Mode>) {
        self.recalls.recall(inode, to);
        self.reservations.release_unused(inode, &mut inode.claim_raw());
        inode.delegation.again();
    }

    /// Every now and then: a mount that has much set aside where little is left gives it back to all.
    pub(crate) fn share_space(self: &Arc<Self>) {
        if self.recalling.is_locked() || self.space.accounts.held().iter().all(|(_, bytes)| *bytes == 0) {
            return;
        }
        let me = Arc::clone(self);
        self.session.threads.workers.run(move || {
            for inode in me
                .space
                .accounts
                .all_delegated()
                .into_iter()
                .filter_map(|ino| me.cache.inodes.find(ino))
            {
                me.reservations.settle_space(&inode);
            }
            // What is reserved for nobody first: that may be enough.
            if me.holds_too_much() {
                me.space.return_space();
            }
            if me.holds_too_much() {
                me.recall_space(None);
                me.space.return_space();
            }
        });
    }

    fn holds_too_much(&self) -> bool {
        let held = self.space.accounts.held().into_iter();
        held.filter(|(_, bytes)| *bytes > 0)
            .any(|(node, bytes)| self.space.pool_space(node).is_ok_and(|s| s.free / SHARE < bytes))
    }
}
