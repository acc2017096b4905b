//! Looking names up and listing directories.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lockmgr::Mode;
use rt::time::Instant;

use crate::cache::Cache;
use crate::cache::follow::{Deed, Listing};
use crate::cache::inode::{Inode, Locked};
use crate::kernel::caches::KernelCaches;
use crate::kernel::front::Front;
use crate::opens::pins::Pinning;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res, Stop, fail};
use fsd_proto::ask;
use fsd_proto::layout::NAME_MAX;
use fsd_proto::rpc::{Errno, RpcError};
use fsd_proto::wire::{Attr, DirEntry, Kind};

/// Attempts at an operation whose names change under it, before it fails.
pub const ATTEMPTS: usize = 1000;

/// How often a name is looked at again that is just being removed.
const REMOVAL_POLL: Duration = Duration::from_micros(200);

/// Cookie of `.`.
pub const COOKIE_DOT: u64 = 1;
/// Cookie of `..`.
pub const COOKIE_DOTDOT: u64 = 2;

/// What has come of reading a directory.
enum Read {
    /// All names are known.
    All,
    /// Some are.
    Some,
    /// Names have changed meanwhile: these were so at some time since.
    Overtaken(Vec<DirEntry>),
}

/// Names of a directory, as they were read.
#[derive(Default)]
struct Names {
    entries: Vec<DirEntry>,
    /// Those that nothing was said of.
    left_out: Vec<Vec<u8>>,
    /// There are no others.
    all: bool,
}

/// Looking names up, and listing them.
pub struct Directories {
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) kernel: Arc<KernelCaches>,
    pub(crate) front: Arc<Front>,
    pub(crate) pinning: Arc<Pinning>,
}

impl Directories {
    /// What a name is, in a directory whose lease is held and whose state is locked; not while a server is asked.
    ///
    /// # Errors
    /// Park; `ENOTDIR`, `ENOENT` for a directory that is gone: it was empty.
    pub fn entry_held(
        &self,
        ctx: &Ctx<'_>,
        dir: &Inode,
        state: &mut Locked<'_>,
        name: &[u8],
    ) -> Res<Option<(u64, Kind)>> {
        if name.len() > NAME_MAX {
            return fail(libc::ENAMETOOLONG);
        }
        if state.lasting.gone {
            self.kernel.tell_gone(dir, state);
            return fail(libc::ENOENT);
        }
        if let Some(known) = state.dir.lookup(name) {
            return Ok(known.map(|(ino, kind, _)| (ino, kind)));
        }
        ctx.may_wait()?;
        let foreseen = dir.hints.foreseen.swap(false, Ordering::Relaxed);
        if state.lasting.former.is_none()
            && let Some(most) = state.dir.worth_reading(foreseen)
            && let Ok(Read::All | Read::Some) = self.read_in(dir, state, Some(most))
            && let Some(known) = state.dir.lookup(name)
        {
            return Ok(known.map(|(ino, kind, _)| (ino, kind)));
        }
        let asked = state.changes();
        let answer = self.ask_for(dir, state, name);
        // What other tasks have changed since is not known to it: it is no more than what was so for a moment.
        let lasting = state.changes() == asked;
        let found = match answer {
            Ok(found) => found,
            Err(RpcError::Errno(Errno(libc::ENOENT))) => {
                state.lasting.gone = true;
                self.kernel.tell_gone(dir, state);
                return fail(libc::ENOENT);
            }
            Err(error) => return Err(error.into()),
        };
        Ok(match found {
            Some((cookie, attr)) => {
                if lasting {
                    state.dir.add(name, attr.ino, attr.kind, cookie);
                }
                self.cache.offer(attr);
                Some((attr.ino, attr.kind))
            }
            None => {
                if lasting {
                    state.dir.remove(name);
                }
                None
            }
        })
    }

    /// What a name is.
    ///
    /// # Errors
    /// As [`Directories::entry_held`].
    pub fn entry(&self, ctx: &Ctx<'_>, dir: &Inode, name: &[u8]) -> Res<Option<(u64, Kind)>> {
        self.entry_for(ctx, dir, name, None)
    }

    /// What a name is, for something that is done to it. A program that does the same to one name after the other, in the order of the
    /// listing, has the leases of those that follow asked for meanwhile.
    ///
    /// # Errors
    /// As [`Directories::entry_held`].
    pub fn entry_for(
        &self,
        ctx: &Ctx<'_>,
        dir: &Inode,
        name: &[u8],
        deed: Option<Deed>,
    ) -> Res<Option<(u64, Kind)>> {
        let mode = match deed {
            // A moment later the exclusive one is needed.
            Some(Deed::Removed) => Mode::Exclusive,
            _ => dir.mode_of_look(),
        };
        let guard = self.cache.lease(ctx, dir, mode)?;
        let mut state = dir.lock(ctx, guard.version())?;
        let found = self.entry_held(ctx, dir, &mut state, name)?;
        let mut next = deed.map_or_else(Vec::new, |deed| state.dir.follow(deed, name));
        // Where that would take a request, some other time.
        if self.front.wants_names(dir)
            && let Ok(attr) = self.cache.load_attr(ctx, dir, &mut state)
        {
            self.front
                .delegate_ahead(dir, Mode::Shared, guard.version(), &attr, &state);
        }
        drop(state);
        if let Some((number, _)) = found.filter(|_| !next.is_empty()) {
            // Its lease is waited for: it is asked for before the others.
            next.insert(0, number);
            let mode = match deed {
                Some(Deed::Removed) => Mode::Exclusive,
                _ => Mode::Shared,
            };
            self.cache.lease_ahead(&next, mode);
        }
        Ok(found)
    }

    /// Looks a name up for a thread; `answer` runs while the lease on what it names is held.
    ///
    /// # Errors
    /// Park; `ENOENT`…
    pub fn lookup<T>(
        &self,
        ctx: &Ctx<'_>,
        dir: &Inode,
        name: &[u8],
        thread: u32,
        answer: impl FnOnce(&Arc<Inode>, &Attr, Duration) -> T,
    ) -> Res<T> {
        let began = Instant::now();
        let mut attempts = 0;
        while attempts < ATTEMPTS {
            let Some((number, _)) = self.entry_for(ctx, dir, name, Some(Deed::Looked))? else {
                return fail(libc::ENOENT);
            };
            let inode = self.cache.inode(number);
            let guard = self.cache.lease(ctx, &inode, inode.mode_of_look())?;
            let attr = {
                let mut state = inode.lock(ctx, guard.version())?;
                let attr = self.cache.load_attr(ctx, &inode, &mut state);
                if let Ok(attr) = &attr {
                    if attr.kind == Kind::Directory {
                        state.lasting.place = Some(Box::new((dir.ino, name.to_vec())));
                    }
                    if attr.kind == Kind::Symlink {
                        // Asked for next, when the link may be gone already.
                        self.target_held(ctx, &inode, &mut state)?;
                    }
                    self.front
                        .delegate_ahead(&inode, Mode::Shared, guard.version(), attr, &state);
                }
                attr
            };
            match attr {
                Ok(attr) => {
                    if attr.kind == Kind::File && !self.pinning.note_look_up(ctx, &inode, thread)? {
                        // Another request of this mount is just taking the name away.
                        drop(guard);
                        if began.elapsed() > self.session.lease_wait && !self.session.waits_on(began, began) {
                            break;
                        }
                        ctx.may_wait()?;
                        rt::thread::sleep(REMOVAL_POLL);
                        continue;
                    }
                    inode.kernel.lookups.fetch_add(1, Ordering::SeqCst);
                    let ttl = self.kernel.attr_ttl(&inode, attr.kind);
                    let done = answer(&inode, &attr, ttl);
                    drop(guard);
                    return Ok(done);
                }
                // The name got another inode meanwhile, or none: look again.
                Err(Stop::Errno(Errno(libc::ESTALE))) => attempts += 1,
                Err(stop) => return Err(stop),
            }
        }
        fail(libc::ESTALE)
    }

    /// What open_by_handle_at(2) needs: an inode by its number (`.`), or the directory that a directory was found in (`..`).
    ///
    /// # Errors
    /// Park; `ESTALE` for an inode that is gone, or of which that is not known.
    pub fn lookup_by_number<T>(
        &self,
        ctx: &Ctx<'_>,
        number: u64,
        name: &[u8],
        thread: u32,
        answer: impl FnOnce(&Arc<Inode>, &Attr, Duration) -> T,
    ) -> Res<T> {
        ctx.may_wait()?;
        let number = match name {
            b"." => number,
            _ => {
                let inode = self.cache.inodes.find(number);
                let place = inode.and_then(|i| i.lock_raw().lasting.place.clone());
                place.map_or_else(|| fail(libc::ESTALE), |found| Ok(found.0))?
            }
        };
        // Whoever has a handle made the number up, perhaps: there need not be such a record.
        match self.session.net.meta.ask(ask::meta::GetAttr { ino: number }) {
            Err(RpcError::Errno(Errno(libc::ENOENT))) => return fail(libc::ESTALE),
            found => found?,
        };
        let inode = self.cache.inode(number);
        let guard = self.cache.lease(ctx, &inode, Mode::Shared)?;
        let attr = {
            let mut state = inode.lock(ctx, guard.version())?;
            self.cache.load_attr(ctx, &inode, &mut state)?
        };
        if attr.kind == Kind::File && !self.pinning.note_look_up(ctx, &inode, thread)? {
            return fail(libc::ESTALE);
        }
        inode.kernel.lookups.fetch_add(1, Ordering::SeqCst);
        let ttl = self.kernel.attr_ttl(&inode, attr.kind);
        let done = answer(&inode, &attr, ttl);
        drop(guard);
        Ok(done)
    }

    /// The listing of a directory as it is now.
    ///
    /// # Errors
    /// Park; `ENOENT`, `ENOTDIR`.
    pub fn listing(&self, ctx: &Ctx<'_>, dir: &Inode) -> Res<Listing> {
        let guard = self.cache.lease(ctx, dir, Mode::Shared)?;
        let mut state = dir.lock(ctx, guard.version())?;
        if state.lasting.gone {
            return Ok(Listing::default());
        }
        if !state.dir.is_complete() {
            ctx.may_wait()?;
            if let Read::Overtaken(entries) = self.read_in(dir, &mut state, None)? {
                // Names that come and go while a directory is read may be listed or not.
                let listed = entries.into_iter();
                return Ok(Arc::new(
                    listed.map(|e| (e.cookie, (e.name, e.ino, e.kind))).collect(),
                ));
            }
        }
        Ok(state.dir.list())
    }

    /// Asks the server for a name. What was known when this directory's lease went to others is known again with the answer, but for the
    /// names that they have changed.
    fn ask_for(
        &self,
        dir: &Inode,
        state: &mut Locked<'_>,
        name: &[u8],
    ) -> Result<Option<(u64, Attr)>, RpcError> {
        let (parent, name) = (dir.ino, name.to_vec());
        let Some(since) = state.lasting.former.as_ref().and_then(|former| former.heard) else {
            return state.unlocked(|| self.session.net.meta.ask(ask::meta::Lookup { parent, name }));
        };
        let request = ask::meta::LookupAgain { parent, name, since };
        let (found, changed) = state.unlocked(|| self.session.net.meta.ask(request))?;
        // Unless this mount has changed names meanwhile: then it is no more.
        if let (Some(former), Some(changed)) = (state.lasting.former.take(), changed) {
            state.dir.come_back(*former, changed);
        }
        Ok(found)
    }

    /// Takes in the names of a directory, if nobody changes any while they are read: all of them, or, ahead of who will want them, about
    /// so many.
    fn read_in(&self, dir: &Inode, state: &mut Locked<'_>, ahead: Option<usize>) -> Res<Read> {
        let asked = state.changes();
        let names = state.unlocked(|| self.read_names(dir.ino, ahead))?;
        if state.changes() != asked {
            state.dir.read_in_vain();
            return Ok(Read::Overtaken(names.entries));
        }
        for entry in names.entries {
            state.dir.add(&entry.name, entry.ino, entry.kind, entry.cookie);
        }
        if !names.all {
            return Ok(Read::Some);
        }
        state.dir.completed(names.left_out);
        state.dir.list();
        Ok(Read::All)
    }

    /// Names of a directory, from the metadata server.
    fn read_names(&self, ino: u64, ahead: Option<usize>) -> Res<Names> {
        let (mut names, mut after) = (Names::default(), Vec::new());
        let most = ahead.unwrap_or(usize::MAX);
        while names.entries.len() < most {
            let request = ask::meta::ReadDir {
                ino,
                after,
                most: u32::try_from(most - names.entries.len()).unwrap_or(u32::MAX),
                ahead: ahead.is_some(),
            };
            let page = self.session.net.meta.ask(request)?;
            for (entry, attr) in page.entries {
                names.entries.push(entry);
                self.cache.offer(attr);
            }
            names.left_out.extend(page.left_out);
            match page.next {
                Some(next) => after = next,
                None => {
                    names.all = true;
                    break;
                }
            }
        }
        Ok(names)
    }

    /// Target of a symbolic link.
    ///
    /// # Errors
    /// Park; `EINVAL` for anything else.
    pub fn readlink(&self, ctx: &Ctx<'_>, inode: &Inode) -> Res<Vec<u8>> {
        let guard = self.cache.lease(ctx, inode, Mode::Shared)?;
        let mut state = inode.lock(ctx, guard.version())?;
        self.target_held(ctx, inode, &mut state)
    }

    /// As [`Directories::readlink`], with the lease held and the state locked.
    fn target_held(&self, ctx: &Ctx<'_>, inode: &Inode, state: &mut Locked<'_>) -> Res<Vec<u8>> {
        if let Some(target) = &state.lasting.target {
            return Ok(target.to_vec());
        }
        if self.cache.load_attr(ctx, inode, state)?.kind != Kind::Symlink {
            return fail(libc::EINVAL);
        }
        ctx.may_wait()?;
        let target = state.unlocked(|| self.session.net.meta.ask(ask::meta::ReadLink { ino: inode.ino }))?;
        state.lasting.target = Some(target.as_slice().into());
        Ok(target)
    }
}
