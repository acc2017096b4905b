//! Times of last access, where a mount keeps them (`-o relatime`): as on Linux only where the last one is not later than the last
//! change, or a day old.
//!
//! The kernel leaves them to the file system, which is not told of reads from the page cache. So an open counts: of a file, when it
//! is closed again; of a directory, at once and aside. An access time is changed under the exclusive lease like any other
//! attribute, so of what many mounts read the first one pays, once after each change.

use std::sync::Arc;

use rustix::mount::MountFlags;

use crate::cache::inode::Inode;
use crate::files::attrs::{Attrs, SetAttr, SetTime};
use crate::opens::handles::Handle;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res};
use fsd_proto::wire::{Attr, Kind, Time};

/// An access time is renewed after so long, nanoseconds.
const DAY: i64 = 24 * 3600 * 1_000_000_000;

/// Of what a mount keeps access times.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AccessTimes {
    files: bool,
    directories: bool,
}

impl AccessTimes {
    /// As the options of the mount say.
    #[must_use]
    pub fn of(flags: MountFlags) -> Self {
        let files = !flags.intersects(MountFlags::NOATIME | MountFlags::RDONLY);
        Self {
            files,
            directories: files && !flags.contains(MountFlags::NODIRATIME),
        }
    }

    fn of_kind(self, kind: Kind) -> bool {
        match kind {
            Kind::Directory => self.directories,
            _ => self.files,
        }
    }
}

/// Does an access now change the access time?
fn is_due(attr: &Attr, now: Time) -> bool {
    attr.atime <= attr.mtime || attr.atime <= attr.ctime || now.0.saturating_sub(attr.atime.0) >= DAY
}

/// Access times.
pub struct Accesses {
    /// Of what access times are kept.
    pub access_times: AccessTimes,
    pub(crate) session: Arc<Session>,
    pub(crate) attrs: Arc<Attrs>,
}

impl Accesses {
    /// A handle is closed: what was opened to be read has been accessed.
    ///
    /// # Errors
    /// Park. Nobody is told that an access time could not be changed.
    pub fn file_accessed(&self, ctx: &Ctx<'_>, handle: &Handle) -> Res<()> {
        let reads = handle.flags & libc::O_ACCMODE != libc::O_WRONLY && handle.flags & libc::O_NOATIME == 0;
        if !reads || !self.access_times.files || !self.access_is_due(&handle.inode) {
            return Ok(());
        }
        ctx.may_wait()?;
        self.set_access_time(ctx, &handle.inode);
        Ok(())
    }

    /// A directory is opened to be listed.
    pub fn directory_accessed(self: &Arc<Self>, inode: &Arc<Inode>, flags: i32) {
        if self.access_times.directories && flags & libc::O_NOATIME == 0 && self.access_is_due(inode) {
            let (me, inode) = (Arc::clone(self), Arc::clone(inode));
            self.session
                .threads
                .workers
                .run(move || me.set_access_time(&Ctx::on_worker(), &inode));
        }
    }

    /// By what is known here, which may be old: then it is not changed, or once too often.
    fn access_is_due(&self, inode: &Inode) -> bool {
        let known = inode
            .try_lock_raw()
            .filter(|state| !state.lasting.gone)
            .and_then(|s| s.attr);
        known.is_some_and(|attr| {
            self.access_times.of_kind(attr.kind) && is_due(&attr, self.session.net.meta.now())
        })
    }

    fn set_access_time(&self, ctx: &Ctx<'_>, inode: &Inode) {
        let set = SetAttr {
            atime: Some(SetTime::Now),
            keep_ctime: true,
            ..SetAttr::default()
        };
        if let Err(stop) = self.attrs.setattr(ctx, inode, &set, |_, _| ()) {
            tracing::debug!("access time of {:#x}: {stop:?}", inode.ino);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_counts_after_a_change_and_once_a_day() {
        let mut attr = Attr::of_file(1, 0, 0);
        let at = |atime, mtime, ctime| Attr {
            atime: Time(atime),
            mtime: Time(mtime),
            ctime: Time(ctime),
            ..attr
        };
        assert!(is_due(&at(5, 5, 1), Time(9)) && is_due(&at(5, 1, 5), Time(9)));
        assert!(!is_due(&at(6, 5, 5), Time(9)) && !is_due(&at(6, 5, 5), Time(DAY)));
        assert!(is_due(&at(6, 5, 5), Time(DAY + 6)));
        attr = at(i64::MIN, i64::MIN + 1, 0);
        assert!(is_due(&attr, Time(i64::MAX)));
    }

    #[test]
    fn options_say_of_what_they_are_kept() {
        let none = AccessTimes::default();
        assert_eq!(AccessTimes::of(MountFlags::NOATIME | MountFlags::RELATIME), none);
        assert_eq!(AccessTimes::of(MountFlags::RDONLY), none);
        let all = AccessTimes::of(MountFlags::empty());
        assert!(all.of_kind(Kind::File) && all.of_kind(Kind::Directory));
        let files = AccessTimes::of(MountFlags::NODIRATIME);
        assert!(files.of_kind(Kind::File) && !files.of_kind(Kind::Directory));
    }
}
