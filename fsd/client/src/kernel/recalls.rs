//! Recalling what was delegated.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use distfuse_abi::{Command, Error, Revoked};
use lockmgr::Mode;
use rt::time::Instant;

use crate::cache::Cache;
use crate::cache::delegation::DelegationState;
use crate::cache::inode::Inode;
use crate::kernel::delegations::{Delegations, to_kernel_mode};
use crate::kernel::extension::{Extension, Flushed};
use crate::session::Session;
use fsd_proto::rpc::Errno;

/// Tasks that asked for a lease have this long to come in before it is recalled: else two mounts that want the
/// same file could pass it to and fro without anybody getting anything done.
const FIRST_USE: Duration = Duration::from_millis(2);
/// A lease in use is kept so many times as long as recalling it took last: the other node's part of a hand-over takes
/// about as long, so half of the time goes into work.
const TENURE: u32 = 2;
/// But not for longer than this.
const LONGEST_TENURE: Duration = Duration::from_millis(10);
/// A lease that nobody has used for such a part of its tenure is not in use.
const IDLE_PART: u32 = 16;
const SHORTEST_LOOK: Duration = Duration::from_micros(20);
/// How often to say that the kernel does not give a lease back.
const COMPLAIN: Duration = Duration::from_secs(30);
/// Longest wait for the RELEASE of a file that the kernel has closed.
const RELEASE_WAIT: Duration = Duration::from_secs(10);

impl DelegationState {
    /// How long a lease is left to those who asked for it, while they use it.
    fn tenure(&self) -> Duration {
        (self.took * TENURE).min(LONGEST_TENURE)
    }
}

impl Extension {
    /// Takes an inode's entry down to `target`, unless somebody is inside or has left something to be flushed: then it is as
    /// before. Tasks that wait ask again.
    pub(crate) fn take_if_clean(&self, ino: u64, target: distfuse_abi::Mode) -> bool {
        let table = self.attachment.table();
        let (taken, wake) = match table.revoke(ino, target, true) {
            Revoked::Done { wake } => (true, wake),
            _ => (false, table.cancel(ino)),
        };
        if wake {
            self.wake(ino, None);
        }
        taken
    }
}

/// Recalls of what was delegated to the kernel.
pub struct Recalls {
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) delegations: Arc<Delegations>,
}

impl Recalls {
    /// Recalls what was delegated to the kernel, down to `to`, where that takes neither a system call nor a wait. If so,
    /// nothing is delegated until [`Delegation::again`](crate::cache::delegation::Delegation::again).
    pub fn recall_at_once(&self, inode: &Inode, to: Option<Mode>) -> bool {
        let ext = &self.delegations.ext;
        let Some(mut lent) = inode.delegation.state.try_lock() else {
            return false;
        };
        let table = ext.attachment.table();
        let clean = table.word(inode.ino).is_none_or(|word| {
            let unused = lent.asked.is_some_and(|at| {
                !word.has(distfuse_abi::word::USED)
                    || at.elapsed() < lent.tenure().saturating_sub(SHORTEST_LOOK)
            });
            word.mode() <= to_kernel_mode(to) || (word.clean(to_kernel_mode(to)) && !unused)
        });
        if lent.recalling || lent.arranging > 0 || !clean {
            return false;
        }
        if !ext.take_if_clean(inode.ino, to_kernel_mode(to)) {
            return false;
        }
        lent.recalling = true;
        lent.asked = None;
        lent.closed = Some(Instant::now());
        Self::lost(ext, inode.ino, &mut lent);
        true
    }

    /// Recalls what was delegated to the kernel, down to `to`; waits for that. Nothing is delegated until
    /// [`Delegation::again`](crate::cache::delegation::Delegation::again).
    pub fn recall(&self, inode: &Arc<Inode>, to: Option<Mode>) {
        let ext = &self.delegations.ext;
        let target = to_kernel_mode(to);
        let (asked, tenure) = {
            let mut lent = inode.delegation.state.lock();
            while lent.recalling {
                inode.delegation.changed.wait(&mut lent);
            }
            lent.recalling = true;
            while lent.arranging > 0 {
                inode.delegation.changed.wait(&mut lent);
            }
            (lent.asked.take(), lent.tenure())
        };
        if let Some(at) = asked {
            Self::leave_in_use(ext, inode.ino, at, tenure);
        }
        {
            let mut lent = inode.delegation.state.lock();
            lent.closed = Some(Instant::now());
            Self::lost(ext, inode.ino, &mut lent);
        }
        let table = ext.attachment.table();
        let writes = table
            .word(inode.ino)
            .is_some_and(|word| word.mode() == distfuse_abi::Mode::Exclusive);
        // Before anybody is kept out: what sets the size from now on is newer than what the flush will say.
        let resized = inode.delegation.resized.load(Ordering::SeqCst);
        let mut complain = Instant::now() + COMPLAIN;
        let mut seen = ext.answers.lock().seen;
        let mut revoked = table.revoke(inode.ino, target, true);
        loop {
            match revoked {
                Revoked::Done { wake } => {
                    if wake {
                        ext.wake(inode.ino, None);
                    }
                    return;
                }
                // Not if told to take it in any case.
                Revoked::Unused => {}
                Revoked::Pending(pending) if pending.needs_flush(target) => {
                    match self.flush_kernel(ext, inode, to, &mut complain) {
                        Some(flushed) => {
                            let known = (writes && pending.dirty).then_some(resized);
                            self.flushed(inode, &flushed, known);
                        }
                        None => return,
                    }
                }
                Revoked::Pending(pending) => {
                    let mut answers = ext.answers.lock();
                    while answers.seen == seen {
                        let late = ext.answered.wait_until(&mut answers, complain).timed_out();
                        if late {
                            tracing::error!(
                                "inode {:#x}: {} tasks in the kernel have been at it for long",
                                inode.ino,
                                pending.inside
                            );
                            complain = Instant::now() + COMPLAIN;
                            break;
                        }
                    }
                    seen = answers.seen;
                }
            }
            if self.kernel_is_gone(ext) {
                return;
            }
            revoked = table.finish(inode.ino, target);
        }
    }

    /// The mount is about to give its lease away: for the beginning calls are better.
    fn lost(ext: &Extension, ino: u64, lent: &mut DelegationState) {
        lent.lost();
        ext.attachment.table().hint_calls(ino, true);
    }

    /// Lets the tasks that a lease was delegated to have the good of it: until one has come in, and as long after that as they
    /// use it, for the tenure.
    fn leave_in_use(ext: &Extension, ino: u64, lent: Instant, tenure: Duration) {
        let table = ext.attachment.table();
        while !table.used_again(ino) {
            if lent.elapsed() >= FIRST_USE {
                return;
            }
            rt::thread::sleep(FIRST_USE / 20);
        }
        let look = (tenure / IDLE_PART).max(SHORTEST_LOOK);
        while lent.elapsed() + look < tenure {
            rt::thread::sleep(look);
            if !table.used_again(ino) {
                return;
            }
        }
    }

    fn kernel_is_gone(&self, ext: &Extension) -> bool {
        ext.attachment.is_gone() || self.session.fate.stopping.load(Ordering::Acquire)
    }

    /// Has the kernel write its dirty pages. None if its mount has ended, which has written them before.
    fn flush_kernel(
        &self,
        ext: &Extension,
        inode: &Inode,
        to: Option<Mode>,
        complain: &mut Instant,
    ) -> Option<Flushed> {
        let cookie = ext.cookie.fetch_add(1, Ordering::Relaxed);
        let flush = Command::Flush {
            ino: inode.ino,
            cookie,
            unmap: to.is_none(),
            drop: false,
        };
        if let Err(Error::Gone) = ext.attachment.command(flush) {
            return None;
        }
        let mut answers = ext.answers.lock();
        loop {
            if let Some(flushed) = answers.flushed.remove(&cookie) {
                return Some(flushed);
            }
            if self.kernel_is_gone(ext) {
                return None;
            }
            if ext.answered.wait_until(&mut answers, *complain).timed_out() {
                tracing::error!("inode {:#x}: the kernel is still writing it back", inode.ino);
                *complain = Instant::now() + COMPLAIN;
            }
        }
    }

    /// The kernel's pages have come. Size and times are what it has, if it wrote under the exclusive lease, and unless
    /// the size was set here since (`resized`).
    fn flushed(&self, inode: &Arc<Inode>, flushed: &Flushed, resized: Option<u64>) {
        if let Some(error) = flushed.error {
            tracing::error!(
                "data of {:#x} lost: {}",
                inode.ino,
                std::io::Error::from_raw_os_error(error)
            );
            inode.errors.set(Errno(error));
        }
        if flushed.no_file {
            // What it had written when it was closed comes before the RELEASE. Not of a file that only reads: nothing
            // is written through it, and who has just opened one may wait for this very lease.
            let end = Instant::now() + RELEASE_WAIT;
            while inode.opens.lock().writers > 0 && Instant::now() < end {
                rt::thread::sleep(Duration::from_millis(1));
            }
        }
        let mut state = inode.lock_raw();
        let last = flushed
            .last
            .filter(|_| resized == Some(inode.delegation.resized.load(Ordering::SeqCst)));
        let Some(attr) = state.attr.as_mut() else { return };
        let mut changed = false;
        if let Some(last) = last.filter(|last| *last != (attr.size, attr.mtime, attr.ctime)) {
            (attr.size, attr.mtime, attr.ctime) = last;
            changed = true;
        }
        // What the kernel keeps of the lease it may have to begin anew with: the entry is of the beginning.
        self.delegations.attributes_changed(inode, attr);
        if changed {
            state.touch();
            drop(state);
            self.cache.note_dirty(inode.ino);
        }
    }

    /// The kernel has forgotten an inode: its entry can serve another. If what it wrote is not known to have come, that
    /// is waited for elsewhere: a revocation once begun must be ended, or the inode is never delegated again.
    pub fn forgotten(self: &Arc<Self>, inode: &Arc<Inode>) {
        let ext = &self.delegations.ext;
        if ext.attachment.table().word(inode.ino).is_none() {
            return;
        }
        if self.recall_at_once(inode, None) {
            ext.attachment.table().evict(inode.ino);
            inode.delegation.again();
            return;
        }
        let (me, ext, inode) = (Arc::clone(self), Arc::clone(ext), Arc::clone(inode));
        self.session.threads.revokers.run(move || {
            me.recall(&inode, None);
            ext.attachment.table().evict(inode.ino);
            inode.delegation.again();
        });
    }
}
