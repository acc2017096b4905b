//! Attributes: getattr, setattr.

use std::sync::atomic::Ordering;
use std::time::Duration;

use lockmgr::Mode;
use rt::sync::MutexGuard;

use super::caller::Caller;
use super::ctx::{Ctx, Res, Stop, fail};
use super::inode::{Inode, State};
use super::{Client, LEASED_TTL, MAX_FILE_SIZE};
use fsd_node::config::CacheMode;
use fsd_proto::ask;
use fsd_proto::rpc::{Errno, RpcError};
use fsd_proto::wire::{Attr, Kind, Time};

/// A time to be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    /// The clock's.
    Now,
    /// This one.
    At(Time),
}

impl SetAttr {
    /// Only the times of what was written: what the kernel itself sends for an inode whose times it keeps, besides
    /// applications.
    fn tells_times(&self) -> bool {
        let Self {
            mode,
            uid,
            gid,
            size,
            atime,
            ..
        } = self;
        mode.is_none() && uid.is_none() && gid.is_none() && size.is_none() && atime.is_none()
    }
}

impl SetTime {
    fn get(self, now: Time) -> Time {
        match self {
            Self::Now => now,
            Self::At(time) => time,
        }
    }
}

/// What `setattr` is to change.
#[derive(Debug, Clone, Copy, Default)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last modification.
    pub mtime: Option<SetTime>,
    /// Of the change itself, where the kernel decides.
    pub ctime: Option<Time>,
    /// It is no change: an access.
    pub keep_ctime: bool,
    /// Who wants that: set-user-id bits may survive a truncation.
    pub caller: Caller,
}

/// Set-user-id, set-group-id.
pub const SUID_SGID: u16 = (libc::S_ISUID | libc::S_ISGID) as u16;

/// Clears what must not survive a change by somebody unprivileged.
pub fn kill_suid(attr: &mut Attr) {
    if attr.kind != Kind::File {
        return;
    }
    attr.mode &= !(libc::S_ISUID as u16);
    // Set-group-id without group execution marks mandatory locking and stays.
    if attr.mode & libc::S_IXGRP as u16 != 0 {
        attr.mode &= !(libc::S_ISGID as u16);
    }
}

/// The same after a change by this caller, who may be privileged.
pub fn kill_suid_for(attr: &mut Attr, caller: Caller) {
    if attr.mode & SUID_SGID != 0 && !caller.keeps_suid() {
        kill_suid(attr);
    }
}

impl Client {
    /// Makes the attributes valid in a locked state, and returns them.
    ///
    /// # Errors
    /// Park; `ESTALE` for an inode that is gone: the kernel then walks the path again, for the name may
    /// have got another inode.
    pub fn load_attr(&self, ctx: &Ctx<'_>, inode: &Inode, state: &mut State) -> Res<Attr> {
        if state.gone {
            return fail(libc::ESTALE);
        }
        if let Some(attr) = state.attr {
            state.last = None;
            return Ok(state.shown(&attr));
        }
        ctx.may_wait()?;
        match self.net.meta(ask::meta::GetAttr { ino: inode.ino }) {
            Ok(attr) => {
                state.attr = Some(attr);
                state.last = None;
                Ok(attr)
            }
            Err(RpcError::Errno(Errno(libc::ENOENT))) => {
                state.gone = true;
                fail(libc::ESTALE)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// As [`Client::load_attr`]; of an inode that was looked up a moment ago, and is gone since, the last ones: that is what
    /// can be said of it. The kernel walks a path again only once, and names can be replaced faster than that.
    ///
    /// # Errors
    /// Park; `ESTALE` where nothing was known of it.
    pub fn load_last_attr(&self, ctx: &Ctx<'_>, inode: &Inode, state: &mut State) -> Res<Attr> {
        let last = match &state.last {
            Some(last) => Some(**last),
            None => state.attr.map(|attr| state.shown(&attr)),
        };
        match (self.load_attr(ctx, inode, state), last) {
            (Err(Stop::Errno(Errno(libc::ESTALE))), Some(last)) => Ok(Attr { nlink: 0, ..last }),
            (result, _) => result,
        }
    }

    /// How long the kernel may keep attributes that are answered now, under a lease.
    pub fn attr_ttl(&self, inode: &Inode, kind: Kind) -> Duration {
        if self.mode == CacheMode::Writeback && kind == Kind::File {
            // The kernel extension asks for a lease first, and a grant brings the attributes.
            return LEASED_TTL;
        }
        inode.kernel.answered.store(self.now(), Ordering::SeqCst);
        // The kernel takes in late how far a write has made the file grow, and for a moment shows that beside attributes
        // that are newer: so it keeps none while this mount has the file open for writing.
        let written = kind == Kind::File && inode.opens.try_lock().is_none_or(|o| o.writers > 0);
        if written || inode.kernel.revoking.load(Ordering::SeqCst) {
            return Duration::ZERO;
        }
        inode.kernel.attrs.store(true, Ordering::SeqCst);
        LEASED_TTL
    }

    /// As [`Client::attr_ttl`], for answers that the kernel takes in whatever it was told meanwhile (SETATTR, LINK; with
    /// those to GETATTR and LOOKUP it looks whether an invalidation has overtaken them): not at all, for the lease may
    /// be gone by then.
    pub fn late_attr_ttl(&self, inode: &Inode, kind: Kind) -> Duration {
        if self.mode == CacheMode::Writeback && kind == Kind::File {
            return self.attr_ttl(inode, kind);
        }
        Duration::ZERO
    }

    /// Attributes, and how long the kernel may keep them; `answer` runs while the lease is held.
    ///
    /// # Errors
    /// Park; `ENOENT`.
    pub fn getattr<T>(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        answer: impl FnOnce(&Attr, Duration) -> T,
    ) -> Res<T> {
        let guard = self.lease(ctx, inode, Mode::Shared)?;
        let (attr, ttl) = {
            let mut state = inode.lock(ctx, guard.version())?;
            let attr = self.load_last_attr(ctx, inode, &mut state)?;
            let ttl = if state.gone {
                Duration::ZERO
            } else {
                self.attr_ttl(inode, attr.kind)
            };
            (attr, ttl)
        };
        let done = answer(&attr, ttl);
        drop(guard);
        Ok(done)
    }

    /// Changes attributes; `answer` gets the new ones while the lease is held.
    ///
    /// # Errors
    /// Park; `ENOENT`, `EINVAL`, `EFBIG`, I/O errors of a truncation.
    pub fn setattr<T>(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        set: &SetAttr,
        answer: impl FnOnce(&Attr, Duration) -> T,
    ) -> Res<T> {
        let guard = self.lease(ctx, inode, Mode::Exclusive)?;
        if set.size.is_some() {
            self.drop_capability(ctx, inode, &guard)?;
        }
        let attr = {
            let mut state = inode.lock(ctx, guard.version())?;
            // In write-back mode the kernel tells the times it has kept when it comes to it, perhaps after the last name
            // and the last open file have gone: an error would stay in its state of the whole file system, where
            // somebody else's `syncfs` finds it.
            if self.mode == CacheMode::Writeback && set.tells_times() {
                let last = self.load_last_attr(ctx, inode, &mut state)?;
                if state.gone {
                    return Ok(answer(&last, Duration::ZERO));
                }
            }
            let before = self.load_attr(ctx, inode, &mut state)?;
            if let Some(size) = set.size {
                match before.kind {
                    Kind::File => {}
                    Kind::Directory => return fail(libc::EISDIR),
                    _ => return fail(libc::EINVAL),
                }
                if size > MAX_FILE_SIZE {
                    return fail(libc::EFBIG);
                }
                self.truncate(ctx, inode, &mut state, size)?;
            }
            Self::apply(&mut state, set, self.net.now());
            state.touch();
            let attr = state.attr.unwrap_or(before);
            self.lent_attr_changed(inode, &attr);
            state.shown(&attr)
        };
        self.note_dirty(inode.ino);
        self.invalidate_attrs(inode);
        let done = answer(&attr, self.late_attr_ttl(inode, attr.kind));
        drop(guard);
        Ok(done)
    }

    fn apply(state: &mut MutexGuard<'_, State>, set: &SetAttr, now: Time) {
        let Some(attr) = state.attr.as_mut() else { return };
        if let Some(mode) = set.mode {
            attr.mode = mode as u16 & 0o7777;
        }
        if set.uid.is_some() || set.gid.is_some() {
            attr.uid = set.uid.unwrap_or(attr.uid);
            attr.gid = set.gid.unwrap_or(attr.gid);
            if set.mode.is_none() {
                kill_suid(attr);
            }
        }
        if set.size.is_some() {
            attr.mtime = now;
            kill_suid_for(attr, set.caller);
        }
        if let Some(time) = set.atime {
            attr.atime = time.get(now);
        }
        if let Some(time) = set.mtime {
            attr.mtime = time.get(now);
        }
        // In write-back mode the kernel's clock counts, for it shows its own time already.
        if !set.keep_ctime {
            attr.ctime = set.ctime.unwrap_or(now);
        }
    }
}
