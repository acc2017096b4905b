//! Attributes: getattr, setattr.

use std::sync::Arc;
use std::time::Duration;

use lockmgr::Mode;

use crate::cache::claims::{Purpose, Span};
use crate::cache::inode::Inode;
use crate::cache::state::State;
use crate::cache::suid::{kill_suid, kill_suid_for};
use crate::cache::{Cache, MAX_FILE_SIZE};
use crate::data::discard::Discards;
use crate::kernel::caches::KernelCaches;
use crate::kernel::front::Front;
use crate::namespace::xattrs::Xattrs;
use crate::session::Session;
use crate::session::caller::Caller;
use crate::session::ctx::{Ctx, Res, fail};
use fsd_node::config::CacheMode;
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
    /// New owner (chown).
    pub uid: Option<u32>,
    /// New group (chown).
    pub gid: Option<u32>,
    /// New length in bytes (truncate); a shorter one frees blocks.
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

/// `getattr` and `setattr`.
pub struct Attrs {
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) kernel: Arc<KernelCaches>,
    pub(crate) front: Arc<Front>,
    pub(crate) discards: Arc<Discards>,
    pub(crate) xattrs: Arc<Xattrs>,
}

impl Attrs {
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
        let guard = self.cache.lease(ctx, inode, inode.mode_of_look())?;
        let (attr, ttl) = {
            let mut state = inode.lock(ctx, guard.version())?;
            let attr = self.cache.load_last_attr(ctx, inode, &mut state)?;
            let ttl = if state.lasting.gone {
                Duration::ZERO
            } else {
                self.kernel.attr_ttl(inode, attr.kind)
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
        let guard = self.cache.lease(ctx, inode, Mode::Exclusive)?;
        if set.size.is_some() {
            self.xattrs.drop_capability(ctx, inode, &guard)?;
        }
        let attr = {
            let mut state = match set.size {
                Some(_) => inode.claim(ctx, guard.version(), Span::ALL, Purpose::Change)?,
                None => inode.lock(ctx, guard.version())?,
            };
            // In write-back mode the kernel tells the times it has kept when it comes to it, perhaps after the last name
            // and the last open file have gone: an error would stay in its state of the whole file system, where
            // somebody else's `syncfs` finds it.
            if self.kernel.mode == CacheMode::Writeback && set.tells_times() {
                let last = self.cache.load_last_attr(ctx, inode, &mut state)?;
                if state.lasting.gone {
                    return Ok(answer(&last, Duration::ZERO));
                }
            }
            let before = self.cache.load_attr(ctx, inode, &mut state)?;
            if let Some(size) = set.size {
                match before.kind {
                    Kind::File => {}
                    Kind::Directory => return fail(libc::EISDIR),
                    _ => return fail(libc::EINVAL),
                }
                if size > MAX_FILE_SIZE {
                    return fail(libc::EFBIG);
                }
                self.discards.truncate(ctx, inode, &mut state, size)?;
            }
            Self::apply(&mut state, set, self.session.net.meta.now());
            state.touch();
            let attr = state.attr.unwrap_or(before);
            self.front.attributes_changed(inode, &attr);
            state.shown(&attr)
        };
        self.cache.note_dirty(inode.ino);
        self.kernel.invalidate_attrs(inode);
        let done = answer(&attr, self.kernel.late_attr_ttl(attr.kind));
        drop(guard);
        Ok(done)
    }

    fn apply(state: &mut State, set: &SetAttr, now: Time) {
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
