//! File locks: the metadata server keeps them; the mount remembers what it holds, to tell a server that
//! has restarted, and which open file each was taken through.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use rt::sync::Mutex;
use serde::{Deserialize, Serialize};

use crate::session::Session;
use crate::session::caller::Caller;
use crate::session::ctx::{Ctx, Res, Stop, fail};
use crate::session::waiting::{Until, Waits};
use fsd_proto::ask;
use fsd_proto::locks::LockTable;
use fsd_proto::rpc::{Errno, RpcError};
use fsd_proto::wire::{LockKind, LockOwner, LockRange, LockSpec};

/// The answer to a waiting request.
type Done = Box<dyn FnOnce(Result<(), Errno>) + Send>;

/// A request that waited for a lock.
pub(super) struct Withdrawn {
    pub(super) asked: PassedWaiter,
    pub(super) done: Done,
}

/// A request that waits for a lock, as it passes to a successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassedWaiter {
    /// Its number on the descriptor that it was read from.
    pub unique: u64,
    /// The lock.
    pub lock: LockSpec,
    /// The open file it came through.
    pub handle: u64,
}

/// A request that waits for a lock at the metadata server. No thread waits with it.
struct Waiter {
    lock: LockSpec,
    /// The open file it came through.
    handle: u64,
    /// Its number on the descriptor that it was read from.
    unique: u64,
    /// Its process has got a signal: that is what ends it. A kernel that is told so without one shows the program a number that is no error.
    signalled: bool,
    /// None: its process was killed, and has been answered.
    done: Option<Done>,
    _waits: Waits,
}

#[derive(Debug, Default)]
struct Held {
    table: LockTable,
    /// The open file that an owner took a lock through last.
    through: HashMap<(u64, LockOwner), u64>,
}

/// File locks of this mount's processes: held, and waited for.
#[derive(Default)]
pub struct LocalLocks {
    held: Mutex<Held>,
    waiting: Mutex<HashMap<u64, Waiter>>,
    /// While all that wait are to pass to a successor: those that wait at the metadata server no longer, and are not answered.
    withdrawn: Mutex<Option<Vec<Withdrawn>>>,
    next: AtomicU64,
}

impl LocalLocks {
    pub(super) fn note(&self, lock: &LockSpec, handle: u64) {
        let mut held = self.held.lock();
        held.table.record(lock);
        let key = (lock.ino, lock.owner);
        if held.table.holds(lock.ino, lock.owner) {
            if lock.kind.is_some() {
                held.through.insert(key, handle);
            }
        } else {
            held.through.remove(&key);
        }
    }

    fn holds(&self, ino: u64, owner: LockOwner) -> bool {
        self.held.lock().table.holds(ino, owner)
    }

    fn forget(&self, ino: u64, owner: LockOwner) {
        let mut held = self.held.lock();
        held.table.release(ino, owner);
        held.through.remove(&(ino, owner));
    }

    /// Who took locks on a file through an open file, and holds them.
    fn owners_through(&self, ino: u64, handle: u64) -> Vec<LockOwner> {
        let held = self.held.lock();
        let through = held.through.iter();
        through
            .filter(|((i, _), h)| *i == ino && **h == handle)
            .map(|((_, owner), _)| *owner)
            .collect()
    }

    /// The requests that wait.
    pub(super) fn waiting(&self) -> Vec<LockSpec> {
        self.waiting.lock().values().map(|w| w.lock).collect()
    }

    /// What is withdrawn while requests are to pass to a successor.
    pub(super) fn withdrawn(&self) -> &Mutex<Option<Vec<Withdrawn>>> {
        &self.withdrawn
    }

    /// A request that is not answered, if requests are to pass; else it is given back.
    fn withdraw(&self, waiter: Withdrawn) -> Option<Withdrawn> {
        match self.withdrawn.lock().as_mut() {
            Some(all) => {
                all.push(waiter);
                None
            }
            None => Some(waiter),
        }
    }

    /// All that is held, and the open file that its owner took a lock through last.
    pub(super) fn held_through(&self) -> Vec<(LockSpec, u64)> {
        let held = self.held.lock();
        let through = |lock: &LockSpec| held.through.get(&(lock.ino, lock.owner)).copied();
        let all = held.table.held();
        all.into_iter()
            .map(|lock| (lock, through(&lock).unwrap_or(0)))
            .collect()
    }

    /// Nothing is held any more.
    pub(super) fn clear(&self) {
        *self.held.lock() = Held::default();
    }

    /// All that is held.
    #[must_use]
    pub fn all(&self) -> Vec<LockSpec> {
        self.held.lock().table.held()
    }
}

/// From the kernel's `F_RDLCK`, `F_WRLCK`, `F_UNLCK`.
///
/// # Errors
/// `EINVAL`.
pub fn kind_of(typ: i32) -> Res<Option<LockKind>> {
    match typ {
        libc::F_RDLCK => Ok(Some(LockKind::Read)),
        libc::F_WRLCK => Ok(Some(LockKind::Write)),
        libc::F_UNLCK => Ok(None),
        _ => fail(libc::EINVAL),
    }
}

/// To the kernel's number.
#[must_use]
pub fn type_of(kind: Option<LockKind>) -> i32 {
    match kind {
        Some(LockKind::Read) => libc::F_RDLCK,
        Some(LockKind::Write) => libc::F_WRLCK,
        None => libc::F_UNLCK,
    }
}

/// File locks.
pub struct Locks {
    /// File locks held by processes of this mount.
    pub file_locks: LocalLocks,
    pub(crate) session: Arc<Session>,
}

impl Locks {
    /// An owner of locks on this mount.
    #[must_use]
    pub fn lock_owner(&self, owner: u64, flock: bool) -> LockOwner {
        LockOwner {
            node: self.session.node.0,
            owner,
            flock,
        }
    }

    /// A lock in the terms of the cluster.
    #[must_use]
    pub fn lock_spec(
        ino: u64,
        owner: LockOwner,
        pid: u32,
        (start, end): (u64, u64),
        kind: Option<LockKind>,
    ) -> LockSpec {
        LockSpec {
            ino,
            owner,
            pid,
            range: LockRange { start, end },
            kind,
        }
    }

    /// `F_GETLK`: the lock in the way, if any.
    ///
    /// # Errors
    /// Park.
    pub fn getlk(&self, ctx: &Ctx<'_>, lock: LockSpec) -> Res<Option<LockSpec>> {
        ctx.may_wait()?;
        Ok(self.session.net.meta.ask(ask::meta::GetLock { lock })?)
    }

    /// `F_SETLK`, `flock` with `LOCK_NB`, and unlocking, through an open file.
    ///
    /// # Errors
    /// Park; `EAGAIN`.
    pub fn setlk(&self, ctx: &Ctx<'_>, lock: LockSpec, handle: u64) -> Res<()> {
        ctx.may_wait()?;
        self.session
            .net
            .meta
            .ask(ask::meta::SetLock { lock, wait: false })?;
        self.file_locks.note(&lock, handle);
        Ok(())
    }

    /// `F_SETLKW`, and `flock` that waits: `done` gets the result, on some thread. None waits for it.
    pub fn setlk_wait(
        self: &Arc<Self>,
        PassedWaiter { unique, lock, handle }: PassedWaiter,
        done: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        let id = self.file_locks.next.fetch_add(1, Ordering::Relaxed);
        {
            // Who gives up finds the waiter.
            let mut waiting = self.file_locks.waiting.lock();
            let (me, caller) = (
                Arc::downgrade(self),
                Caller {
                    pid: lock.pid,
                    uid: 0,
                },
            );
            let waits = self
                .session
                .threads
                .waiting
                .begin(caller, Until::Signal, move || {
                    if let Some(me) = me.upgrade() {
                        me.cancel(id);
                    }
                });
            let waiter = Waiter {
                lock,
                handle,
                unique,
                signalled: false,
                done: Some(Box::new(done)),
                _waits: waits,
            };
            waiting.insert(id, waiter);
        }
        if self.session.net.meta.is_up() {
            self.ask_for_lock(id);
        } else {
            let me = Arc::clone(self);
            self.session.threads.workers.run(move || me.ask_for_lock(id));
        }
    }

    /// Sends a waiting request to the metadata server.
    fn ask_for_lock(self: &Arc<Self>, id: u64) {
        let Some(lock) = self.file_locks.waiting.lock().get(&id).map(|w| w.lock) else {
            return;
        };
        let me = Arc::downgrade(self);
        let request = ask::meta::SetLock { lock, wait: true };
        let sent = self.session.net.meta.ask_slow(request, move |result| {
            if let Some(client) = Weak::upgrade(&me) {
                client.lock_answered(id, result);
            }
        });
        if let Err(error) = sent {
            self.end_waiting(id, Err(error.errno()));
        }
    }

    fn lock_answered(self: &Arc<Self>, id: u64, result: Result<(), RpcError>) {
        match result {
            // The server restarted: wait at the new one.
            Err(error) if error.is_transport() && !self.session.fate.stopping.load(Ordering::Acquire) => {
                let me = Arc::clone(self);
                self.session.threads.workers.run(move || me.ask_for_lock(id));
            }
            other => self.end_waiting(id, other.map_err(|error| error.errno())),
        }
    }

    fn end_waiting(self: &Arc<Self>, id: u64, result: Result<(), Errno>) {
        let Some(waiter) = self.file_locks.waiting.lock().remove(&id) else {
            return;
        };
        let asked = PassedWaiter {
            unique: waiter.unique,
            lock: waiter.lock,
            handle: waiter.handle,
        };
        match waiter.done {
            // Taken back to pass to a successor; or it was to, and is asked for again meanwhile.
            Some(done) if result == Err(Errno(libc::EINTR)) && !waiter.signalled => {
                if let Some(Withdrawn { asked, done }) = self.file_locks.withdraw(Withdrawn { asked, done }) {
                    let me = Arc::clone(self);
                    self.session
                        .threads
                        .workers
                        .run(move || me.setlk_wait(asked, done));
                }
            }
            Some(done) => {
                if result.is_ok() {
                    self.file_locks.note(&waiter.lock, waiter.handle);
                }
                done(result);
            }
            None if result.is_ok() => self.drop_lock(waiter.lock),
            None => {}
        }
    }

    /// The process behind a waiting request has got a signal, or was killed.
    fn cancel(&self, id: u64) {
        let (lock, done) = {
            let mut waiting = self.file_locks.waiting.lock();
            let Some(waiter) = waiting.get_mut(&id) else {
                return;
            };
            let process = Caller {
                pid: waiter.lock.pid,
                uid: 0,
            };
            waiter.signalled = true;
            let killed = process.is_killed() || process.is_ending();
            (waiter.lock, killed.then(|| waiter.done.take()).flatten())
        };
        self.take_back(lock);
        // Who was killed does not wait for a server that may be away.
        if let Some(done) = done {
            done(Err(Errno(libc::EINTR)));
        }
    }

    /// The answer to a waiting request comes as EINTR soon, or it had been granted.
    pub(super) fn take_back(&self, lock: LockSpec) {
        let request = ask::meta::CancelLock { lock };
        self.session.net.meta.ask_async(request, |result| {
            if let Err(error) = result {
                tracing::debug!("a request for a file lock cannot be taken back: {error}");
            }
        });
    }

    /// A lock was granted to a process that had been killed.
    fn drop_lock(&self, lock: LockSpec) {
        let lock = LockSpec { kind: None, ..lock };
        let request = ask::meta::SetLock { lock, wait: false };
        self.session.net.meta.ask_async(request, |result| {
            if let Err(error) = result {
                tracing::warn!("a file lock of a process that was killed cannot be dropped: {error}");
            }
        });
    }

    /// Drops what an owner holds on a file, if anything.
    ///
    /// # Errors
    /// Park.
    pub fn release_locks(&self, ctx: &Ctx<'_>, ino: u64, owner: LockOwner) -> Res<()> {
        if !self.file_locks.holds(ino, owner) {
            return Ok(());
        }
        ctx.may_wait()?;
        self.file_locks.forget(ino, owner);
        self.session
            .net
            .meta
            .ask(ask::meta::ReleaseLocks { ino, owner })
            .map(drop)
            .map_err(Stop::from)
    }

    /// Drops what was taken through an open file that is closed for good: locks of the open file description (`F_OFD_SETLK`, `flock`), of
    /// whose end the kernel says nothing else. Those of a process were dropped by its own close before.
    ///
    /// # Errors
    /// Park.
    pub fn release_locks_through(&self, ctx: &Ctx<'_>, ino: u64, handle: u64) -> Res<()> {
        let owners = self.file_locks.owners_through(ino, handle);
        owners
            .into_iter()
            .try_for_each(|owner| self.release_locks(ctx, ino, owner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(owner: u64, start: u64, kind: Option<LockKind>) -> LockSpec {
        let owner = LockOwner {
            node: 3,
            owner,
            flock: false,
        };
        Locks::lock_spec(9, owner, 1, (start, start + 9), kind)
    }

    #[test]
    fn what_ends_with_an_open_file_is_what_was_taken_through_it() {
        let locks = LocalLocks::default();
        let (write, owner) = (Some(LockKind::Write), lock(1, 0, None).owner);
        locks.note(&lock(1, 0, write), 5);
        assert_eq!(locks.owners_through(9, 5), [owner]);
        // The process closes, which drops its locks, and takes them again through another open file; only then the first is gone.
        locks.forget(9, owner);
        locks.note(&lock(1, 0, write), 6);
        assert!(locks.owners_through(9, 5).is_empty());
        locks.note(&lock(1, 0, None), 6);
        assert!(locks.owners_through(9, 6).is_empty() && locks.all().is_empty());
    }

    #[test]
    fn pairs_of_locking_and_unlocking_leave_nothing() {
        let locks = LocalLocks::default();
        for i in 0..1000 {
            locks.note(&lock(1, i * 10, Some(LockKind::Read)), 5);
            locks.note(&lock(1, i * 10, None), 5);
        }
        locks.note(&lock(1, 0, Some(LockKind::Write)), 5);
        assert_eq!(locks.all(), [lock(1, 0, Some(LockKind::Write))]);
    }
}
