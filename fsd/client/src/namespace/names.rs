//! Changing the namespace: create, link, unlink, rmdir, rename.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::cache::Cache;
use crate::cache::claims::{Purpose, Span};
use crate::cache::follow::Deed;
use crate::cache::inode::{Inode, Locked};
use crate::data::reservations::Reservations;
use crate::kernel::caches::KernelCaches;
use crate::kernel::front::Front;
use crate::namespace::dirs::{ATTEMPTS, Directories};
use crate::namespace::numbers::Numbers;
use crate::namespace::transactions::Transactions;
use crate::opens::pins::Pinning;
use crate::session::ctx::{Ctx, Res, Stop, fail};
use crate::session::{Guards, Session, Versions};
use fsd_proto::rpc::Errno;
use fsd_proto::wire::{Attr, Created, Kind, NamespaceOp};
use lockmgr::Mode;

/// A new inode.
#[derive(Debug, Clone)]
pub struct New {
    /// Type.
    pub kind: Kind,
    /// Permission bits, umask applied.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number.
    pub rdev: u32,
    /// Target of a symbolic link.
    pub target: Vec<u8>,
}

/// Changing names.
pub struct Names {
    /// Numbers for new inodes.
    pub numbers: Arc<Numbers>,
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) kernel: Arc<KernelCaches>,
    pub(crate) front: Arc<Front>,
    pub(crate) reservations: Arc<Reservations>,
    pub(crate) pinning: Arc<Pinning>,
    pub(crate) transactions: Arc<Transactions>,
    pub(crate) directories: Arc<Directories>,
}

impl Names {
    /// Makes a new inode under a name; `answer` runs while its lease is held.
    ///
    /// # Errors
    /// Park; `EEXIST`, `ENOENT`, `ENOSPC`…
    pub fn create<T>(
        &self,
        ctx: &Ctx<'_>,
        dir: &Inode,
        name: &[u8],
        new: &New,
        answer: impl FnOnce(&Arc<Inode>, &Attr) -> Res<T>,
    ) -> Res<T> {
        // Everything below waits for the metadata server: stop here, before a number is taken.
        ctx.may_wait()?;
        let number = self.numbers.take(ctx)?;
        let made = self.create_as(ctx, dir, name, new, number, answer);
        if matches!(
            &made,
            Err(Stop::Errno(Errno(
                libc::EEXIST | libc::ENOENT | libc::ENAMETOOLONG
            )))
        ) {
            // Refused before anything was made of it.
            self.numbers.give_back(number);
        }
        made
    }

    fn create_as<T>(
        &self,
        ctx: &Ctx<'_>,
        dir: &Inode,
        name: &[u8],
        new: &New,
        number: u64,
        answer: impl FnOnce(&Arc<Inode>, &Attr) -> Res<T>,
    ) -> Res<T> {
        let inode = self.cache.inode(number);
        // Nobody else knows the number yet, so this waits for nobody and may come before the directory.
        let own = self.cache.lease(ctx, &inode, Mode::Exclusive)?;
        let guards = self.cache.lease_all(ctx, &[(dir, Mode::Exclusive)])?;
        let above = {
            let mut state = dir.lock(ctx, guards.version_of(dir.ino))?;
            if state.lasting.gone {
                self.kernel.tell_gone(dir, &mut state);
            }
            // The kernel may have looked it up under an earlier lease.
            let found = match &state.lasting.former {
                Some(_) => self.directories.entry_held(ctx, dir, &mut state, name)?.map(drop),
                None => self.entry_held_cached(&mut state, name)?.map(drop),
            };
            if found.is_some() {
                return fail(libc::EEXIST);
            }
            self.cache.load_attr(ctx, dir, &mut state)?
        };
        let inherits = above.mode & libc::S_ISGID as u16 != 0;
        let inherited = if inherits && new.kind == Kind::Directory {
            libc::S_ISGID as u16
        } else {
            0
        };
        self.pinning.made(&inode);
        let op = NamespaceOp::Create {
            parent: dir.ino,
            name: name.to_vec(),
            ino: number,
            version: own.version(),
            kind: new.kind,
            mode: (new.mode as u16 & 0o7777) | inherited,
            uid: new.uid,
            gid: if inherits { above.gid } else { new.gid },
            rdev: new.rdev,
            target: new.target.clone(),
        };
        let created = self.transactions.namespace(ctx, &[dir], &guards, op)?;
        let Some(attr) = created.attrs.iter().find(|a| a.ino == number).copied() else {
            return fail(libc::EPROTO);
        };
        dir.lock(ctx, guards.version_of(dir.ino))?
            .dir
            .add(name, number, new.kind, created.cookie);
        drop(guards);
        {
            let mut state = inode.lock(ctx, own.version())?;
            state.attr = Some(attr);
            state.modified = true;
            state.check_layout();
            state.frames.loaded.extend(0..self.session.net.storage.count());
            if new.kind == Kind::Directory {
                state.dir.completed(Vec::new());
            }
            state.xattrs = Some(std::collections::BTreeMap::new());
            state.lasting.target = (new.kind == Kind::Symlink).then(|| new.target.clone().into());
            self.front
                .delegate_ahead(&inode, Mode::Exclusive, own.version(), &attr, &state);
        }
        inode.kernel.lookups.fetch_add(1, Ordering::SeqCst);
        let done = answer(&inode, &attr);
        drop(own);
        done
    }

    /// What is known of a name without asking anybody.
    fn entry_held_cached(&self, state: &mut crate::cache::state::State, name: &[u8]) -> Res<Option<u64>> {
        if state.lasting.gone {
            return fail(libc::ENOENT);
        }
        if name.len() > fsd_proto::layout::NAME_MAX {
            return fail(libc::ENAMETOOLONG);
        }
        Ok(state.dir.lookup(name).flatten().map(|(ino, _, _)| ino))
    }

    /// Another name for an inode.
    ///
    /// # Errors
    /// Park; `EEXIST`, `EPERM`…
    pub fn link<T>(
        &self,
        ctx: &Ctx<'_>,
        inode: &Arc<Inode>,
        dir: &Inode,
        name: &[u8],
        answer: impl FnOnce(&Arc<Inode>, &Attr, Duration) -> T,
    ) -> Res<T> {
        ctx.may_wait()?;
        let guards = self
            .cache
            .lease_all(ctx, &[(dir, Mode::Exclusive), (inode, Mode::Exclusive)])?;
        let op = NamespaceOp::Link {
            ino: inode.ino,
            parent: dir.ino,
            name: name.to_vec(),
        };
        let created = self.transactions.namespace(ctx, &[dir, inode], &guards, op)?;
        let attr = {
            let mut state = inode.lock(ctx, guards.version_of(inode.ino))?;
            self.cache.load_attr(ctx, inode, &mut state)?
        };
        dir.lock(ctx, guards.version_of(dir.ino))?
            .dir
            .add(name, inode.ino, attr.kind, created.cookie);
        inode.kernel.lookups.fetch_add(1, Ordering::SeqCst);
        let ttl = self.kernel.late_attr_ttl(attr.kind);
        let done = answer(inode, &attr, ttl);
        drop(guards);
        Ok(done)
    }

    /// Leases for an operation on a name, and what the name is while they are held. `None`: it changed
    /// before they came; try again.
    fn hold_name(
        &self,
        ctx: &Ctx<'_>,
        dir: &Inode,
        name: &[u8],
        guards: &Guards,
        expected: Option<u64>,
    ) -> Res<bool> {
        let mut state = dir.lock(ctx, guards.version_of(dir.ino))?;
        let found = self
            .directories
            .entry_held(ctx, dir, &mut state, name)?
            .map(|(ino, _)| ino);
        Ok(found == expected)
    }

    /// Removes a name for a thread (`directory`: of an empty directory).
    ///
    /// # Errors
    /// Park; `ENOENT`, `EISDIR`, `ENOTDIR`, `ENOTEMPTY`…
    pub fn remove(&self, ctx: &Ctx<'_>, dir: &Inode, name: &[u8], directory: bool, thread: u32) -> Res<()> {
        ctx.may_wait()?;
        for _ in 0..ATTEMPTS {
            let found = self.directories.entry_for(ctx, dir, name, Some(Deed::Removed))?;
            let Some((number, kind)) = found else {
                return fail(libc::ENOENT);
            };
            match (directory, kind == Kind::Directory) {
                (true, false) => return fail(libc::ENOTDIR),
                (false, true) => return fail(libc::EISDIR),
                _ => {}
            }
            let victim = self.cache.inode(number);
            // Ends after `guards` have been given back.
            let _removal = (!directory).then(|| self.pinning.unlinking(&victim));
            let guards = self
                .cache
                .lease_all(ctx, &[(dir, Mode::Exclusive), (&victim, Mode::Exclusive)])?;
            if !self.hold_name(ctx, dir, name, &guards, Some(number))? {
                continue;
            }
            let (last, keep) = self.about_to_unlink(ctx, &victim, &guards, directory, thread)?;
            let op = if directory {
                NamespaceOp::Rmdir {
                    parent: dir.ino,
                    name: name.to_vec(),
                    ino: number,
                }
            } else {
                NamespaceOp::Unlink {
                    parent: dir.ino,
                    name: name.to_vec(),
                    ino: number,
                    keep,
                }
            };
            // Nothing of it may be stored any more when its blocks are another file's.
            let mut gone = self.claim_gone(ctx, &victim, &guards, last && !keep)?;
            let change = || self.transactions.namespace(ctx, &[dir, &victim], &guards, op);
            let result = match &mut gone {
                Some(state) => state.unlocked(change),
                None => change(),
            };
            if let Some(state) = gone.filter(|_| result.is_ok()) {
                self.reservations.forget_data(&victim, state);
            }
            if self.is_stale(ctx, &result, &[dir], &guards)? {
                continue;
            }
            if let Err(stop) = result {
                if last && !directory {
                    self.pinning.clear_unlinked(&victim)?;
                }
                return Err(stop);
            }
            dir.lock(ctx, guards.version_of(dir.ino))?.dir.remove(name);
            return Ok(());
        }
        fail(libc::ESTALE)
    }

    /// Claims all of a file that is about to be `gone`: nothing of it is being stored then, nor will be.
    fn claim_gone<'a>(
        &self,
        ctx: &Ctx<'_>,
        inode: &'a Inode,
        guards: &Guards,
        gone: bool,
    ) -> Res<Option<Locked<'a>>> {
        if !gone {
            return Ok(None);
        }
        let version = guards.version_of(inode.ino);
        inode.claim(ctx, version, Span::ALL, Purpose::Change).map(Some)
    }

    /// Is an inode about to lose its last name, and is it then still open somewhere?
    fn about_to_unlink(
        &self,
        ctx: &Ctx<'_>,
        victim: &Arc<Inode>,
        guards: &Guards,
        directory: bool,
        thread: u32,
    ) -> Res<(bool, bool)> {
        if directory {
            return Ok((true, false));
        }
        let attr = {
            let mut state = victim.lock(ctx, guards.version_of(victim.ino))?;
            self.cache.load_attr(ctx, victim, &mut state)?
        };
        if attr.nlink > 1 || attr.kind == Kind::Directory {
            return Ok((false, false));
        }
        if attr.kind != Kind::File {
            return Ok((true, false));
        }
        Ok((true, self.pinning.mark_unlinked(ctx, victim, thread)?))
    }

    /// The server knows better what the names are: forget what is cached, and try again.
    fn is_stale(&self, ctx: &Ctx<'_>, result: &Res<Created>, dirs: &[&Inode], guards: &Guards) -> Res<bool> {
        if !matches!(result, Err(Stop::Errno(Errno(libc::ESTALE)))) {
            return Ok(false);
        }
        for dir in dirs {
            tracing::error!(
                "names cached of directory {:#x} were not those of the server",
                dir.ino
            );
            dir.lock(ctx, guards.version_of(dir.ino))?.forget_names();
        }
        Ok(true)
    }

    /// `renameat2`.
    ///
    /// # Errors
    /// Park; as the system call.
    pub fn rename(
        &self,
        ctx: &Ctx<'_>,
        (dir, name): (&Inode, &[u8]),
        (to, to_name): (&Inode, &[u8]),
        flags: u32,
        thread: u32,
    ) -> Res<()> {
        ctx.may_wait()?;
        if flags & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) != 0 {
            return fail(libc::EINVAL);
        }
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        for _ in 0..ATTEMPTS {
            let found = self.directories.entry_for(ctx, dir, name, Some(Deed::Removed))?;
            let Some((number, kind)) = found else {
                return fail(libc::ENOENT);
            };
            let target = self.directories.entry(ctx, to, to_name)?;
            let moved = self.cache.inode(number);
            let other = target.map(|(n, _)| self.cache.inode(n));
            let _removal = other.as_ref().map(|other| self.pinning.unlinking(other));
            let mut wanted = vec![
                (dir, Mode::Exclusive),
                (to, Mode::Exclusive),
                (&*moved, Mode::Exclusive),
            ];
            wanted.extend(other.as_deref().map(|o| (o, Mode::Exclusive)));
            let guards = self.cache.lease_all(ctx, &wanted)?;
            if !self.hold_name(ctx, dir, name, &guards, Some(number))?
                || !self.hold_name(ctx, to, to_name, &guards, target.map(|(n, _)| n))?
            {
                continue;
            }
            if target.is_some_and(|(n, _)| n == number) {
                // Two names of one inode: a transaction that changes nothing tells no attributes, and those of an inode that it
                // does not tell of are taken for gone, with what only this mount knows of its size.
                return if flags & libc::RENAME_NOREPLACE == 0 {
                    Ok(())
                } else {
                    fail(libc::EEXIST)
                };
            }
            let (mut last, mut keep) = (false, false);
            if let (Some(other), Some((_, other_kind)), false) = (&other, target, exchange)
                && flags & libc::RENAME_NOREPLACE == 0
            {
                (last, keep) =
                    self.about_to_unlink(ctx, other, &guards, other_kind == Kind::Directory, thread)?;
            }
            let op = NamespaceOp::Rename {
                parent: dir.ino,
                name: name.to_vec(),
                ino: number,
                new_parent: to.ino,
                new_name: to_name.to_vec(),
                replaced: target.map(|(n, _)| n),
                keep,
                flags,
            };
            let mut held: Vec<&Inode> = vec![dir, &moved];
            if to.ino != dir.ino {
                held.push(to);
            }
            if let Some(other) = other.as_deref() {
                held.push(other);
            }
            let mut gone = match &other {
                Some(other) => self.claim_gone(ctx, other, &guards, last && !keep)?,
                None => None,
            };
            let change = || self.transactions.namespace(ctx, &held, &guards, op);
            let result = match &mut gone {
                Some(state) => state.unlocked(change),
                None => change(),
            };
            if let (Some(other), Some(state)) = (&other, gone.filter(|_| result.is_ok())) {
                self.reservations.forget_data(other, state);
            }
            if self.is_stale(ctx, &result, &[dir, to], &guards)? {
                continue;
            }
            let created = match (result, &other) {
                (Ok(created), _) => created,
                (Err(stop), Some(other)) if last => {
                    self.pinning.clear_unlinked(other)?;
                    return Err(stop);
                }
                (Err(stop), _) => return Err(stop),
            };
            {
                let mut state = dir.lock(ctx, guards.version_of(dir.ino))?;
                match (exchange, target) {
                    (true, Some((n, k))) => state.dir.add(name, n, k, created.second_cookie),
                    _ => state.dir.remove(name),
                }
            }
            to.lock(ctx, guards.version_of(to.ino))?
                .dir
                .add(to_name, number, kind, created.cookie);
            return Ok(());
        }
        fail(libc::ESTALE)
    }
}
