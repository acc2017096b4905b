//! Calls: short reads and writes that the kernel has the mount do, of an inode that mounts take from each other.
//!
//! A lease lent to the kernel pays where it serves several operations: what was written through it has to be flushed
//! when it is taken back, which costs more than having written at once. So of an inode that another mount has taken,
//! operations are calls until a few have come under one hold of the mount's lease; then it is lent again (rent skis
//! until the rent would have bought them: that costs at most twice what knowing the future would have cost).

use std::sync::Arc;

use distfuse_abi::{Act, Answer, Call, Command};
use lockmgr::Mode;

use super::super::Client;
use super::super::ctx::{Ctx, Res, Stop, is_full};
use super::super::inode::{Inode, Locked};
use super::super::write::{Write, WriteFlags};
use super::lend::to_kernel_mode;
use super::visit::Visitors;
use super::{Extension, LentState};
use fsd_proto::rpc::Errno;

/// So many calls under one hold of the lease cost as much as the flush of what would have been written instead.
const RENT: u32 = 3;

/// The lease that a call takes.
pub(super) fn mode_of(call: &Call) -> Mode {
    match call.act {
        Act::Read => Mode::Shared,
        Act::Write { .. } | Act::Space => Mode::Exclusive,
    }
}

/// What stands in the way of a call.
pub(super) enum Admission<'a> {
    Go(Calling<'a>),
    /// The kernel has too much of the lease.
    Kernel,
    /// It is being taken back.
    Taking,
}

/// A call that is being carried out: nothing is lent meanwhile.
pub(super) struct Calling<'a>(&'a Inode);

impl Drop for Calling<'_> {
    fn drop(&mut self) {
        let mut lent = self.0.lent.state.lock();
        lent.calling -= 1;
        if lent.calling == 0 {
            self.0.lent.changed.notify_all();
        }
    }
}

impl LentState {
    /// The lease goes to another mount.
    pub(super) fn lost(&mut self) {
        self.rent = 0;
        self.visitors = Visitors::default();
    }

    /// One more call of this mount's own. Whether so many have come that the lease is better lent.
    pub(super) fn pay_rent(&mut self, writes: bool) -> bool {
        self.visitors.at_home(writes);
        self.rent += 1;
        self.rent >= RENT
    }
}

impl Extension {
    /// What is to be written.
    pub(super) fn data_of(&self, call: &Call) -> Vec<u8> {
        let mut data = vec![0; call.len as usize];
        self.attachment.read_buffer(call.number, &mut data);
        data
    }

    pub(super) fn answer(&self, call: &Call, answer: Answer) {
        self.tell(Command::Answer {
            call: call.number,
            answer,
        });
    }
}

impl Client {
    /// Does what a task wants under this mount's own lease. Called on a thread that must not wait.
    pub(super) fn call_here(self: &Arc<Self>, ext: &Arc<Extension>, call: Call) {
        match self.call_now(&Ctx::on_loop(&ext.nobody_waits), ext, &call) {
            Err(Stop::Park | Stop::Errno(Errno(libc::ENOSPC))) => {
                let (me, ext) = (Arc::clone(self), Arc::clone(ext));
                self.workers.run(move || {
                    let ctx = Ctx::on_worker();
                    let result = me.with_frees(&ctx, is_full, || me.call_now(&ctx, &ext, &call));
                    ext.answer(&call, answer_of(result));
                });
            }
            result => ext.answer(&call, answer_of(result)),
        }
    }

    fn call_now(&self, ctx: &Ctx<'_>, ext: &Extension, call: &Call) -> Res<Answer> {
        let inode = self.inode(call.ino);
        let mode = mode_of(call);
        let writes = mode == Mode::Exclusive;
        loop {
            let guard = self.lease(ctx, &inode, mode)?;
            if writes {
                self.drop_capability(ctx, &inode, &guard)?;
            }
            let calling = match self.admit(ext, &inode, to_kernel_mode(Some(mode)), writes) {
                Admission::Go(calling) => calling,
                Admission::Kernel => return Ok(Answer::Again),
                Admission::Taking => {
                    drop(guard);
                    ctx.may_wait()?;
                    inode.lent.settled();
                    continue;
                }
            };
            let version = guard.version();
            let done = match call.act {
                Act::Read => {
                    let len = call.len as usize;
                    let mut state = self.claim_to_read(ctx, &inode, version, call.offset, len)?;
                    let mut data = vec![0; call.len as usize];
                    self.read_held(ctx, &inode, &mut state, call.offset, &mut data, true)?;
                    ext.attachment.fill_buffer(call.number, &data);
                    data.len() as u32
                }
                Act::Write { kill_priv } => {
                    let data = ext.data_of(call);
                    let write = called_write(call.offset, &data, kill_priv);
                    let mut state = self.claim_to_write(ctx, &inode, version, &write)?;
                    self.call_write(ctx, &inode, &mut state, &write)?;
                    call.len
                }
                // Goes a way of its own, and never comes here.
                Act::Space => return Ok(Answer::Again),
            };
            drop(calling);
            let lend = inode.lent.state.lock().pay_rent(writes);
            let state = inode.lock(ctx, version)?;
            if let (true, Some(attr)) = (lend, state.attr) {
                ext.attachment.table().hint_calls(inode.ino, false);
                self.lend_ahead(&inode, mode, version, &attr, &state);
            }
            return Ok(Answer::Done(done));
        }
    }

    /// Writes under the exclusive lease, of which the kernel has no part.
    pub(super) fn call_write(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        write: &Write<'_>,
    ) -> Res<()> {
        self.write_held(ctx, inode, state, write)?;
        // What the kernel has in its page cache is of before.
        inode.lent.state.lock().caches = None;
        self.note_dirty(inode.ino);
        Ok(())
    }

    /// The kernel must have less of the lease than `below`; and none of it where something is about to be written.
    pub(super) fn admit<'a>(
        &self,
        ext: &Extension,
        inode: &'a Inode,
        below: distfuse_abi::Mode,
        writes: bool,
    ) -> Admission<'a> {
        let mut lent = inode.lent.state.lock();
        if lent.taking {
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
        Admission::Go(Calling(inode))
    }
}

/// What a call writes.
pub(super) fn called_write(offset: u64, data: &[u8], kill_priv: bool) -> Write<'_> {
    let flags = WriteFlags {
        kill_suid: kill_priv,
        ..WriteFlags::default()
    };
    Write { offset, data, flags }
}

pub(super) fn answer_of(result: Res<Answer>) -> Answer {
    result.unwrap_or_else(|stop| Answer::Failed(Client::errno_of(stop).0))
}
