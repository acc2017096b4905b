//! Delegating what tasks in the kernel wait for.

use std::sync::Arc;

use lockmgr::Mode;

use crate::cache::Cache;
use crate::cache::claims::{Purpose, Span};
use crate::cache::inode::Inode;
use crate::cache::range::range_of;
use crate::calls::space::SpaceCalls;
use crate::data::reservations::Reservations;
use crate::data::space::Space;
use crate::kernel::delegations::{Delegating, Delegations};
use crate::kernel::extension::Extension;
use crate::kernel::recalls::Recalls;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res, Stop};

/// Delegating what the kernel asks for.
pub struct Grants {
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) delegations: Arc<Delegations>,
    pub(crate) recalls: Arc<Recalls>,
    pub(crate) space: Arc<Space>,
    pub(crate) reservations: Arc<Reservations>,
    pub(crate) space_calls: Arc<SpaceCalls>,
}

impl Grants {
    /// Tasks in the kernel wait for a lease. Not for them to be woken in vain: they sleep until it is delegated, or is
    /// not to be had.
    pub(crate) fn delegate_to_waiters(
        self: &Arc<Self>,
        ext: &Arc<Extension>,
        ino: u64,
        mode: distfuse_abi::Mode,
    ) {
        let (me, ext) = (Arc::clone(self), Arc::clone(ext));
        self.session.in_term(move |held| match held {
            Ok(()) => me.delegate_in_term(&ext, ino, mode),
            Err(errno) => ext.wake(ino, Some(errno.0)),
        });
    }

    fn delegate_in_term(self: &Arc<Self>, ext: &Arc<Extension>, ino: u64, mode: distfuse_abi::Mode) {
        let mode = match mode {
            distfuse_abi::Mode::Exclusive => Mode::Exclusive,
            _ => Mode::Shared,
        };
        let inode = self.cache.inode(ino);
        let finish = move |ext: &Extension, result: Res<()>| match result {
            Ok(()) => ext.wake(ino, None),
            Err(stop) => ext.wake(ino, Some(stop.errno().0)),
        };
        match self.delegate_now(&Ctx::on_loop(&ext.nobody_waits), &inode, mode) {
            Err(Stop::Park) => {
                let (me, ext) = (Arc::clone(self), Arc::clone(ext));
                self.session
                    .threads
                    .workers
                    .run(move || finish(&ext, me.delegate_now(&Ctx::on_worker(), &inode, mode)));
            }
            result => finish(ext, result),
        }
    }

    fn delegate_now(&self, ctx: &Ctx<'_>, inode: &Arc<Inode>, mode: Mode) -> Res<()> {
        loop {
            let lending = {
                let guard = self.cache.lease(ctx, inode, mode)?;
                // Not in the middle of a change. And nothing is set aside beside one.
                let mut state = inode.claim(ctx, guard.version(), Span::ALL, Purpose::Change)?;
                // Who looks at what is gone is shown the last of it.
                let attr = if mode == Mode::Shared {
                    self.cache.load_last_attr(ctx, inode, &mut state)?
                } else {
                    self.cache.load_attr(ctx, inode, &mut state)?
                };
                if mode == Mode::Exclusive {
                    self.reservations.reserve_first_page(inode, &mut state);
                }
                let about = (&attr, range_of(&state));
                self.delegations.lend(inode, mode, guard.version(), about, true)?
            };
            match lending {
                Delegating::Done { .. } => return Ok(()),
                Delegating::Taking => {
                    ctx.may_wait()?;
                    inode.delegation.settled();
                }
                Delegating::Full { victim } => {
                    let victim = self.cache.inode(victim);
                    // Where that takes nothing but a word, the task need not wait for another thread.
                    if !self.space.accounts.is_delegated(victim.ino)
                        && self.recalls.recall_at_once(&victim, None)
                    {
                        victim.delegation.again();
                        continue;
                    }
                    ctx.may_wait()?;
                    self.space_calls.recall_with_space(&victim, None);
                }
            }
        }
    }
}
