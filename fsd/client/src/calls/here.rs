//! Calls: short reads and writes that the kernel has the mount do, of an inode that mounts take from each other.
//!
//! A lease delegated to the kernel pays where it serves several operations: what was written through it has to be flushed
//! when it is recalled, which costs more than having written at once. So of an inode that another mount has taken,
//! operations are calls until a few have come under one hold of the mount's lease; then it is delegated again (rent skis
//! until the rent would have bought them: that costs at most twice what knowing the future would have cost).

use std::sync::Arc;

use distfuse_abi::{Act, Answer, Call};
use lockmgr::Mode;

use crate::cache::Cache;
use crate::cache::delegation::Calling;
use crate::cache::inode::{Inode, Locked};
use crate::cache::write::{Write, WriteFlags};
use crate::data::reading::Reads;
use crate::data::space::Space;
use crate::data::writing::Writing;
use crate::kernel::delegations::{Delegations, to_kernel_mode};
use crate::kernel::extension::Extension;
use crate::namespace::xattrs::Xattrs;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res, Stop, is_full};
use fsd_proto::rpc::Errno;

/// The lease that a call takes.
pub(crate) fn mode_of(call: &Call) -> Mode {
    match call.act {
        Act::Read => Mode::Shared,
        Act::Write { .. } | Act::Space => Mode::Exclusive,
    }
}

/// What stands in the way of a call.
pub(crate) enum Admission<'a> {
    Go(Calling<'a>),
    /// The kernel has too much of the lease.
    Kernel,
    /// It is being recalled.
    Taking,
}

/// Calls carried out at this mount.
pub struct Here {
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) delegations: Arc<Delegations>,
    pub(crate) space: Arc<Space>,
    pub(crate) reads: Arc<Reads>,
    pub(crate) writing: Arc<Writing>,
    pub(crate) xattrs: Arc<Xattrs>,
}

impl Here {
    /// Does what a task wants under this mount's own lease. Called on a thread that must not wait.
    pub(crate) fn call_here(self: &Arc<Self>, ext: &Arc<Extension>, call: Call) {
        match self.call_now(&Ctx::on_loop(&ext.nobody_waits), ext, &call) {
            Err(Stop::Park | Stop::Errno(Errno(libc::ENOSPC))) => {
                let (me, ext) = (Arc::clone(self), Arc::clone(ext));
                self.session.threads.workers.run(move || {
                    let ctx = Ctx::on_worker();
                    let result = me
                        .space
                        .with_frees(&ctx, is_full, || me.call_now(&ctx, &ext, &call));
                    me.answer(&ext, call, answer_of(result));
                });
            }
            result => self.answer(ext, call, answer_of(result)),
        }
    }

    /// Answers a call, while the mount may act: by then others may have written what was read.
    pub(crate) fn answer(&self, ext: &Arc<Extension>, call: Call, answer: Answer) {
        let ext = Arc::clone(ext);
        self.session.in_term(move |held| {
            ext.answer(
                &call,
                held.map_or_else(|errno| Answer::Failed(errno.0), |()| answer),
            );
        });
    }

    fn call_now(&self, ctx: &Ctx<'_>, ext: &Extension, call: &Call) -> Res<Answer> {
        let inode = self.cache.inode(call.ino);
        let mode = mode_of(call);
        let writes = mode == Mode::Exclusive;
        loop {
            let guard = self.cache.lease(ctx, &inode, mode)?;
            if writes {
                self.xattrs.drop_capability(ctx, &inode, &guard)?;
            }
            let calling = match self.admit(ext, &inode, to_kernel_mode(Some(mode)), writes) {
                Admission::Go(calling) => calling,
                Admission::Kernel => return Ok(Answer::Again),
                Admission::Taking => {
                    drop(guard);
                    ctx.may_wait()?;
                    inode.delegation.settled();
                    continue;
                }
            };
            let version = guard.version();
            let done = match call.act {
                Act::Read => {
                    let len = call.len as usize;
                    let mut state = self.reads.claim_to_read(ctx, &inode, version, call.offset, len)?;
                    let data = self
                        .reads
                        .read_held(ctx, &inode, &mut state, call.offset, len, true)?;
                    ext.attachment.fill_buffer(call.number, &data);
                    data.len() as u32
                }
                Act::Write { kill_priv } => {
                    let data = ext.data_of(call);
                    let write = called_write(call.offset, &data, kill_priv);
                    let mut state = self.writing.claim_to_write(ctx, &inode, version, &write)?;
                    self.call_write(ctx, &inode, &mut state, &write)?;
                    call.len
                }
                // Goes a way of its own, and never comes here.
                Act::Space => return Ok(Answer::Again),
            };
            drop(calling);
            let lend = inode.delegation.state.lock().pay_rent(writes);
            // The call has been carried out, and must not be again: where the inode is not free at once, the next call delegates.
            if lend
                && let Ok(state) = inode.lock(ctx, version)
                && let Some(attr) = state.attr
            {
                ext.attachment.table().hint_calls(inode.ino, false);
                self.delegations
                    .delegate_ahead(&inode, mode, version, &attr, &state);
            }
            return Ok(Answer::Done(done));
        }
    }

    /// Writes under the exclusive lease, of which the kernel has no part.
    pub(crate) fn call_write(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        write: &Write<'_>,
    ) -> Res<()> {
        self.writing.write_held(ctx, inode, state, write)?;
        // What the kernel has in its page cache is of before.
        inode.delegation.state.lock().caches = None;
        self.cache.note_dirty(inode.ino);
        Ok(())
    }

    /// The kernel must have less of the lease than `below`; and none of it where something is about to be written.
    pub(crate) fn admit<'a>(
        &self,
        ext: &Extension,
        inode: &'a Inode,
        below: distfuse_abi::Mode,
        writes: bool,
    ) -> Admission<'a> {
        let mut lent = inode.delegation.state.lock();
        if lent.recalling {
            return Admission::Taking;
        }
        let word = ext.attachment.table().word(inode.ino);
        if word.is_some_and(|word| word.mode() >= below) {
            return Admission::Kernel;
        }
        if writes && word.is_some_and(|word| word.mode() != distfuse_abi::Mode::None) {
            // Else somebody reads, or has it mapped.
            if !ext.take_if_clean(inode.ino, distfuse_abi::Mode::None) {
                return Admission::Kernel;
            }
            lent.asked = None;
        }
        lent.calling += 1;
        Admission::Go(Calling(&inode.delegation))
    }
}

/// What a call writes.
pub(crate) fn called_write(offset: u64, data: &[u8], kill_priv: bool) -> Write<'_> {
    let flags = WriteFlags {
        kill_suid: kill_priv,
        ..WriteFlags::default()
    };
    Write { offset, data, flags }
}

pub(crate) fn answer_of(result: Res<Answer>) -> Answer {
    result.unwrap_or_else(|stop| Answer::Failed(stop.errno().0))
}
