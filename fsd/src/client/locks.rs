//! File locks: the metadata server keeps them; the mount remembers what it holds, to tell a server that
//! has restarted.
//!
//! `flock` and `fcntl` locks share one space, as on NFS: the library that speaks to the kernel does not
//! pass on which of the two a request is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::Client;
use super::caller::Caller;
use super::ctx::{Ctx, Res, Stop, fail};
use crate::rpc::{Errno, RpcError};
use crate::wire::{LockKind, LockOwner, LockRange, LockSpec, MetaReply, MetaRequest};

/// How often a waiting request looks whether its process has got a signal.
const SIGNAL_POLL: Duration = Duration::from_millis(50);

/// Locks held by this mount's processes, as told to the server, in order.
#[derive(Debug, Default)]
pub struct LocalLocks(Mutex<BTreeMap<(u64, LockOwner), Vec<LockSpec>>>);

impl LocalLocks {
    fn note(&self, lock: &LockSpec) {
        let mut all = self.0.lock();
        let whole = lock.range.start == 0 && lock.range.end >= i64::MAX as u64;
        let history = all.entry((lock.ino, lock.owner)).or_default();
        if whole {
            history.clear();
        }
        if lock.kind.is_some() || !whole {
            history.push(*lock);
        }
        if history.is_empty() {
            all.remove(&(lock.ino, lock.owner));
        }
    }

    fn forget(&self, ino: u64, owner: LockOwner) -> bool {
        self.0.lock().remove(&(ino, owner)).is_some()
    }

    /// Everything that leads to the locks held now.
    #[must_use]
    pub fn all(&self) -> Vec<LockSpec> {
        self.0.lock().values().flatten().copied().collect()
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

fn lock_caller(lock: &LockSpec) -> Caller {
    Caller {
        pid: lock.pid,
        uid: 0,
    }
}

impl Client {
    /// A lock in the terms of the cluster.
    #[must_use]
    pub fn lock_spec(
        &self,
        ino: u64,
        owner: u64,
        pid: u32,
        start: u64,
        end: u64,
        kind: Option<LockKind>,
    ) -> LockSpec {
        LockSpec {
            ino,
            owner: LockOwner {
                node: self.node.0,
                owner,
            },
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
        match self.net.meta(&MetaRequest::GetLock { lock })? {
            MetaReply::Lock(found) => Ok(found),
            _ => fail(libc::EPROTO),
        }
    }

    /// `F_SETLK`.
    ///
    /// # Errors
    /// Park; `EAGAIN`.
    pub fn setlk(&self, ctx: &Ctx<'_>, lock: LockSpec) -> Res<()> {
        ctx.may_wait()?;
        self.net.meta(&MetaRequest::SetLock { lock, wait: false })?;
        self.file_locks.note(&lock);
        Ok(())
    }

    /// `F_SETLKW`: waits on a thread of its own; `done` gets the result.
    pub fn setlk_wait(
        self: &Arc<Self>,
        lock: LockSpec,
        done: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        let me = Arc::clone(self);
        self.workers.run(move || {
            let (tx, rx) = crossbeam::channel::bounded::<Result<MetaReply, RpcError>>(1);
            loop {
                let tx = tx.clone();
                let sent = me
                    .net
                    .meta_slow(&MetaRequest::SetLock { lock, wait: true }, move |result| {
                        let _ = tx.send(result);
                    });
                if let Err(error) = sent {
                    return done(Err(error.errno()));
                }
                let mut cancelled = false;
                let result = loop {
                    match rx.recv_timeout(SIGNAL_POLL) {
                        Ok(result) => break result,
                        Err(_) if !cancelled && lock_caller(&lock).has_signal() => {
                            cancelled = true;
                            // The answer to the waiting request then comes as EINTR, or it had been granted.
                            if let Err(error) = me.net.meta(&MetaRequest::CancelLock { lock }) {
                                return done(Err(error.errno()));
                            }
                        }
                        Err(_) => {}
                    }
                };
                match result {
                    Ok(_) => {
                        me.file_locks.note(&lock);
                        return done(Ok(()));
                    }
                    // The server restarted: wait at the new one.
                    Err(error) if error.is_transport() => {}
                    Err(error) => return done(Err(error.errno())),
                }
            }
        });
    }

    /// Drops what an owner holds on a file, if anything.
    ///
    /// # Errors
    /// Park.
    pub fn release_locks(&self, ctx: &Ctx<'_>, ino: u64, owner: u64) -> Res<()> {
        let owner = LockOwner {
            node: self.node.0,
            owner,
        };
        if !self.file_locks.0.lock().contains_key(&(ino, owner)) {
            return Ok(());
        }
        ctx.may_wait()?;
        if self.file_locks.forget(ino, owner) {
            self.net
                .meta(&MetaRequest::ReleaseLocks { ino, owner })
                .map_err(Stop::from)?;
        }
        Ok(())
    }
}
