//! The kernel's requests.
//!
//! Each is tried on the event loop it came to; one that has to wait where it must not is started again on
//! a worker (see `ctx`). Answers are sent while the lease they depend on is still held.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLock, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::attrs::{SetAttr, SetTime};
use super::caller::Caller;
use super::ctx::{Ctx, Res, Stop};
use super::dirs::{COOKIE_DOT, COOKIE_DOTDOT};
use super::files::Handle;
use super::names::New;
use super::write;
use super::{Client, MAX_FILE_SIZE};
use crate::config::CacheMode;
use crate::ino;
use crate::rpc::Errno;
use crate::storage::BLOCK;
use crate::wire::{Attr, Kind, MetaReply, MetaRequest, StorageReply, StorageRequest, Time};

/// Names are never cached by the kernel: taking them back could deadlock with a create under way.
const NAME_TTL: Duration = Duration::ZERO;
/// Longest request of the kernel, bytes.
const MAX_REQUEST: u32 = 1 << 20;

fn caller_of(req: &Request) -> Caller {
    Caller {
        pid: req.pid(),
        uid: req.uid(),
    }
}

/// The file system as the FUSE library sees it.
pub struct FsdFs {
    client: Arc<Client>,
}

fn error_of(e: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(e.0)
}

fn kind_of(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::Char => FileType::CharDevice,
        Kind::Block => FileType::BlockDevice,
    }
}

fn attr_of(a: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(a.ino),
        size: a.size,
        blocks: a.blocks,
        atime: a.atime.to_system(),
        mtime: a.mtime.to_system(),
        ctime: a.ctime.to_system(),
        crtime: a.btime.to_system(),
        kind: kind_of(a.kind),
        perm: a.mode,
        nlink: a.nlink,
        uid: a.uid,
        gid: a.gid,
        rdev: a.rdev,
        blksize: BLOCK as u32,
        flags: 0,
    }
}

fn time_of(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(t) => SetTime::At(from_library(t)),
    }
}

/// The FUSE library takes the nanoseconds of a time before 1970 for negative ones; they never are.
fn from_library(time: SystemTime) -> Time {
    match SystemTime::UNIX_EPOCH.duration_since(time) {
        Ok(d) if !d.is_zero() => {
            let secs = i64::try_from(d.as_secs()).unwrap_or(i64::MAX);
            Time(
                secs.saturating_mul(-1_000_000_000)
                    .saturating_add(i64::from(d.subsec_nanos())),
            )
        }
        _ => Time::from_system(time),
    }
}

/// A request that can be tried more than once; `T` is its reply, taken when it is answered.
fn serve<T: Send + 'static>(
    client: &Arc<Client>,
    reply: T,
    refuse: fn(T, fuser::Errno),
    mut step: impl FnMut(&Arc<Client>, &Ctx<'_>, &mut Option<T>) -> Res<()> + Send + 'static,
) {
    client.counters.requests.fetch_add(1, Ordering::Relaxed);
    let mut reply = Some(reply);
    let result = step(client, &Ctx::on_loop(&client.permits), &mut reply);
    match result {
        Ok(()) => {}
        Err(Stop::Park) if reply.is_some() => {
            client.counters.parked.fetch_add(1, Ordering::Relaxed);
            let me = Arc::clone(client);
            client.workers.run(move || {
                let result = step(&me, &Ctx::on_worker(), &mut reply);
                if let (Err(stop), Some(reply)) = (result, reply) {
                    refuse(reply, error_of(Client::errno_of(stop)));
                }
            });
        }
        Err(stop) => {
            if let Some(reply) = reply {
                refuse(reply, error_of(Client::errno_of(stop)));
            }
        }
    }
}

impl FsdFs {
    /// For a client that has joined.
    #[must_use]
    pub fn new(client: Arc<Client>) -> Self {
        Self { client }
    }

    fn handle(&self, fh: FileHandle) -> Option<Arc<Handle>> {
        self.client.handles.get(fh.0)
    }

    fn make(&self, req: &Request, parent: INodeNo, name: &OsStr, mut new: New, reply: ReplyEntry) {
        let (name, parent) = (name.as_bytes().to_vec(), parent.0);
        (new.uid, new.gid) = (req.uid(), req.gid());
        serve(&self.client, reply, ReplyEntry::error, move |c, ctx, reply| {
            c.create(ctx, &c.inode(parent), &name, &new, |_, attr, ttl| {
                send_entry(reply, attr, ttl);
                Ok(())
            })
        });
    }

    fn remove(&self, parent: INodeNo, name: &OsStr, directory: bool, reply: ReplyEmpty) {
        let (name, parent) = (name.as_bytes().to_vec(), parent.0);
        serve(&self.client, reply, ReplyEmpty::error, move |c, ctx, reply| {
            c.remove(ctx, &c.inode(parent), &name, directory)?;
            done(reply);
            Ok(())
        });
    }
}

fn send_entry(reply: &mut Option<ReplyEntry>, attr: &Attr, ttl: Duration) {
    if let Some(reply) = reply.take() {
        reply.entry_with_ttls(
            &ttl,
            &NAME_TTL,
            &attr_of(attr),
            Generation(u64::from(ino::generation(attr.ino))),
        );
    }
}

fn send_attr(reply: &mut Option<ReplyAttr>, attr: &Attr, ttl: Duration) {
    if let Some(reply) = reply.take() {
        reply.attr(&ttl, &attr_of(attr));
    }
}

fn done(reply: &mut Option<ReplyEmpty>) {
    if let Some(reply) = reply.take() {
        reply.ok();
    }
}

fn send_xattr(reply: &mut Option<ReplyXattr>, value: &[u8], size: u32) {
    let Some(reply) = reply.take() else { return };
    if size == 0 {
        reply.size(value.len() as u32);
    } else if value.len() > size as usize {
        reply.error(fuser::Errno::ERANGE);
    } else {
        reply.data(value);
    }
}

fn open_flags(mode: CacheMode, cached: bool, is_dir: bool) -> FopenFlags {
    if is_dir {
        FopenFlags::empty()
    } else if cached && mode == CacheMode::Writethrough {
        // What the kernel has is valid as long as the lease is held, so it may keep it over an open.
        FopenFlags::FOPEN_KEEP_CACHE
    } else {
        FopenFlags::FOPEN_DIRECT_IO
    }
}

impl Filesystem for FsdFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_POSIX_LOCKS
            | InitFlags::FUSE_FLOCK_LOCKS
            | InitFlags::FUSE_ATOMIC_O_TRUNC
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2
            | InitFlags::FUSE_EXPLICIT_INVAL_DATA
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP
            | InitFlags::FUSE_DONT_MASK;
        // A kernel without one of these does without.
        let _ = config.add_capabilities(wanted & config.capabilities());
        let _ = config.set_max_write(MAX_REQUEST);
        let _ = config.set_max_background(64);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (name, parent) = (name.as_bytes().to_vec(), parent.0);
        serve(&self.client, reply, ReplyEntry::error, move |c, ctx, reply| {
            c.lookup(ctx, &c.inode(parent), &name, |_, attr, ttl| {
                send_entry(reply, attr, ttl)
            })
        });
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.client.forget(ino.0, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        serve(&self.client, reply, ReplyAttr::error, move |c, ctx, reply| {
            c.getattr(ctx, &c.inode(ino.0), |attr, ttl| send_attr(reply, attr, ttl))
        });
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttr {
            mode,
            uid,
            gid,
            size,
            atime: atime.map(time_of),
            mtime: mtime.map(time_of),
            caller: caller_of(req),
        };
        serve(&self.client, reply, ReplyAttr::error, move |c, ctx, reply| {
            c.setattr(ctx, &c.inode(ino.0), &set, |attr, ttl| {
                send_attr(reply, attr, ttl)
            })
        });
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        serve(&self.client, reply, ReplyData::error, move |c, ctx, reply| {
            let target = c.readlink(ctx, &c.inode(ino.0))?;
            if let Some(reply) = reply.take() {
                reply.data(&target);
            }
            Ok(())
        });
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let Some(kind) = Kind::from_mode(mode) else {
            return reply.error(fuser::Errno::EINVAL);
        };
        let new = New {
            kind,
            mode: mode & !umask,
            uid: 0,
            gid: 0,
            rdev,
            target: Vec::new(),
        };
        self.make(req, parent, name, new, reply);
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let new = New {
            kind: Kind::Directory,
            mode: mode & !umask,
            uid: 0,
            gid: 0,
            rdev: 0,
            target: Vec::new(),
        };
        self.make(req, parent, name, new, reply);
    }

    fn symlink(&self, req: &Request, parent: INodeNo, link_name: &OsStr, target: &Path, reply: ReplyEntry) {
        let target = target.as_os_str().as_bytes().to_vec();
        let new = New {
            kind: Kind::Symlink,
            mode: 0o777,
            uid: 0,
            gid: 0,
            rdev: 0,
            target,
        };
        self.make(req, parent, link_name, new, reply);
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.remove(parent, name, false, reply);
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.remove(parent, name, true, reply);
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (name, newname) = (name.as_bytes().to_vec(), newname.as_bytes().to_vec());
        serve(&self.client, reply, ReplyEmpty::error, move |c, ctx, reply| {
            let (from, to) = (c.inode(parent.0), c.inode(newparent.0));
            c.rename(ctx, (&from, &name), (&to, &newname), flags.bits())?;
            done(reply);
            Ok(())
        });
    }

    fn link(&self, _req: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let name = newname.as_bytes().to_vec();
        serve(&self.client, reply, ReplyEntry::error, move |c, ctx, reply| {
            let (inode, dir) = (c.inode(ino.0), c.inode(newparent.0));
            c.link(ctx, &inode, &dir, &name, |_, attr, ttl| {
                send_entry(reply, attr, ttl)
            })
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let caller = caller_of(req);
        serve(&self.client, reply, ReplyOpen::error, move |c, ctx, reply| {
            let (fh, cached) = c.open(ctx, &c.inode(ino.0), flags.0, caller)?;
            if let Some(reply) = reply.take() {
                reply.opened(FileHandle(fh), open_flags(c.mode, cached, false));
            }
            Ok(())
        });
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (name, parent) = (name.as_bytes().to_vec(), parent.0);
        let caller = caller_of(req);
        let new = New {
            kind: Kind::File,
            mode: mode & !umask,
            uid: req.uid(),
            gid: req.gid(),
            rdev: 0,
            target: Vec::new(),
        };
        serve(&self.client, reply, ReplyCreate::error, move |c, ctx, reply| {
            let dir = c.inode(parent);
            let mut send = |attr: &Attr, ttl: Duration, (fh, cached): (u64, bool)| {
                if let Some(reply) = reply.take() {
                    let generation = Generation(u64::from(ino::generation(attr.ino)));
                    // One time to live serves both here: names must not be kept, so neither are attributes.
                    let _ = ttl;
                    let open = open_flags(c.mode, cached, false);
                    reply.created(&NAME_TTL, &attr_of(attr), generation, FileHandle(fh), open);
                }
            };
            for _ in 0..super::dirs::ATTEMPTS {
                let made = c.create(ctx, &dir, &name, &new, |inode, attr, ttl| {
                    send(attr, ttl, c.make_handle(inode, Kind::File, flags)?);
                    Ok(())
                });
                match made {
                    Err(Stop::Errno(Errno(libc::EEXIST))) if flags & libc::O_EXCL == 0 => {}
                    other => return other,
                }
                // Somebody else was faster: open what is there now.
                let mut found = None;
                match c.lookup(ctx, &dir, &name, |inode, attr, ttl| {
                    found = Some((Arc::clone(inode), *attr, ttl))
                }) {
                    Err(Stop::Errno(Errno(libc::ENOENT))) => continue,
                    other => other?,
                }
                if let Some((inode, attr, ttl)) = found {
                    send(&attr, ttl, c.open(ctx, &inode, flags, caller)?);
                    return Ok(());
                }
            }
            Err(Stop::Errno(Errno(libc::ESTALE)))
        });
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        // The kernel names a lock owner for reads that go past its page cache; those that fill it (mapped
        // pages also through uncached handles) have none.
        let fills = lock_owner.is_none();
        serve(&self.client, reply, ReplyData::error, move |c, ctx, reply| {
            let mut buffer = super::buffers::take(size as usize);
            let result = c.read(ctx, &c.inode(ino.0), offset, &mut buffer, fills, |data| {
                if let Some(reply) = reply.take() {
                    reply.data(data);
                }
            });
            super::buffers::give(buffer);
            result
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mapped = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let handle = self.handle(fh);
        let how = write::WriteFlags {
            append: flags.0 & libc::O_APPEND != 0 && !mapped,
            kill_suid: write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID),
            cached: mapped || handle.is_some_and(|h| h.cached),
        };
        self.client.counters.requests.fetch_add(1, Ordering::Relaxed);
        let inode = self.client.inode(ino.0);
        // The data is only borrowed here: the first attempt uses it in place.
        if !mapped {
            let first = self
                .client
                .write(&Ctx::on_loop(&self.client.permits), &inode, offset, data, how);
            return match first {
                Ok(n) => reply.written(n),
                Err(Stop::Errno(e)) => reply.error(error_of(e)),
                Err(Stop::Park) => self.write_later(inode, offset, data.to_vec(), how, reply),
            };
        }
        if self
            .client
            .leases
            .held(inode.record())
            .is_some_and(|(m, _)| m == lockmgr::Mode::Exclusive)
        {
            match self
                .client
                .write(&Ctx::on_loop(&self.client.permits), &inode, offset, data, how)
            {
                Ok(n) => return reply.written(n),
                Err(Stop::Errno(e)) => return reply.error(error_of(e)),
                Err(Stop::Park) => {}
            }
        }
        self.write_mapped(inode, offset, data.to_vec(), how, reply);
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, lock_owner: LockOwner, reply: ReplyEmpty) {
        let handle = self.handle(fh);
        serve(&self.client, reply, ReplyEmpty::error, move |c, ctx, reply| {
            if let Some(handle) = &handle {
                c.release_locks(ctx, handle.inode.ino, lock_owner.0)?;
                c.flush(ctx, handle)?;
            }
            done(reply);
            Ok(())
        });
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        serve(&self.client, reply, ReplyEmpty::error, move |c, ctx, reply| {
            if let Some(owner) = lock_owner {
                c.release_locks(ctx, ino.0, owner.0)?;
            }
            c.release(ctx, fh.0)?;
            done(reply);
            Ok(())
        });
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let handle = self.handle(fh);
        serve(&self.client, reply, ReplyEmpty::error, move |c, ctx, reply| {
            c.fsync(ctx, &c.inode(ino.0), handle.as_ref().map(|h| &h.seen))?;
            done(reply);
            Ok(())
        });
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        serve(&self.client, reply, ReplyOpen::error, move |c, _ctx, reply| {
            let (fh, _) = c.make_handle(&c.inode(ino.0), Kind::Directory, flags.0)?;
            if let Some(reply) = reply.take() {
                reply.opened(FileHandle(fh), open_flags(c.mode, false, true));
            }
            Ok(())
        });
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        let handle = self.handle(fh);
        serve(
            &self.client,
            reply,
            ReplyDirectory::error,
            move |c, ctx, reply| {
                let listing = {
                    let kept = handle
                        .as_ref()
                        .and_then(|h| h.listing.lock().clone())
                        .filter(|_| offset > 0);
                    match kept {
                        Some(listing) => listing,
                        None => {
                            // From the start: as it is now (rewinddir shows what has changed since).
                            let listing = c.listing(ctx, &c.inode(ino.0))?;
                            if let Some(handle) = &handle {
                                *handle.listing.lock() = Some(Arc::clone(&listing));
                            }
                            listing
                        }
                    }
                };
                let Some(mut reply) = reply.take() else {
                    return Ok(());
                };
                let dots = [(COOKIE_DOT, "."), (COOKIE_DOTDOT, "..")];
                for (cookie, name) in dots {
                    if offset < cookie && reply.add(ino, cookie, FileType::Directory, name) {
                        reply.ok();
                        return Ok(());
                    }
                }
                for (&cookie, (name, number, kind)) in listing.range(offset.max(COOKIE_DOTDOT) + 1..) {
                    if reply.add(INodeNo(*number), cookie, kind_of(*kind), OsStr::from_bytes(name)) {
                        break;
                    }
                }
                reply.ok();
                Ok(())
            },
        );
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        serve(&self.client, reply, ReplyEmpty::error, move |c, ctx, reply| {
            c.release(ctx, fh.0)?;
            done(reply);
            Ok(())
        });
    }

    fn fsyncdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        serve(&self.client, reply, ReplyEmpty::error, move |c, ctx, reply| {
            c.fsync(ctx, &c.inode(ino.0), None)?;
            done(reply);
            Ok(())
        });
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        serve(&self.client, reply, ReplyStatfs::error, move |c, ctx, reply| {
            ctx.may_wait()?;
            let (mut total, mut free) = (0, 0);
            for node in 0..c.net.storage_count() {
                if let StorageReply::Status(s) = c.net.ask_storage(node, &StorageRequest::Status)? {
                    total += s.total;
                    free += s.free;
                }
            }
            let MetaReply::StatFs(meta) = c.net.meta(&MetaRequest::StatFs)? else {
                return Err(Stop::Errno(Errno(libc::EPROTO)));
            };
            if let Some(reply) = reply.take() {
                let unit = 4096;
                let free = free / unit;
                reply.statfs(
                    total / unit,
                    free,
                    free,
                    meta.inodes + meta.free,
                    meta.free,
                    unit as u32,
                    255,
                    unit as u32,
                );
            }
            Ok(())
        });
    }

    fn setxattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let (name, value) = (name.as_bytes().to_vec(), value.to_vec());
        serve(&self.client, reply, ReplyEmpty::error, move |c, ctx, reply| {
            c.setxattr(ctx, &c.inode(ino.0), &name, &value, flags)?;
            done(reply);
            Ok(())
        });
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let name = name.as_bytes().to_vec();
        serve(&self.client, reply, ReplyXattr::error, move |c, ctx, reply| {
            let value = c.getxattr(ctx, &c.inode(ino.0), &name)?;
            send_xattr(reply, &value, size);
            Ok(())
        });
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let privileged = req.uid() == 0;
        serve(&self.client, reply, ReplyXattr::error, move |c, ctx, reply| {
            let names = c.listxattr(ctx, &c.inode(ino.0), privileged)?;
            send_xattr(reply, &names, size);
            Ok(())
        });
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.as_bytes().to_vec();
        serve(&self.client, reply, ReplyEmpty::error, move |c, ctx, reply| {
            c.removexattr(ctx, &c.inode(ino.0), &name)?;
            done(reply);
            Ok(())
        });
    }

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // With default_permissions the kernel decides and does not ask; should it, it may.
        reply.ok();
    }

    fn getlk(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        lock_owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        serve(&self.client, reply, ReplyLock::error, move |c, ctx, reply| {
            let kind = super::locks::kind_of(typ)?;
            let found = c.getlk(ctx, c.lock_spec(ino.0, lock_owner.0, pid, start, end, kind))?;
            if let Some(reply) = reply.take() {
                match found {
                    // A process of another host has no number here.
                    Some(l) => {
                        let pid = if l.owner.node == c.node.0 { l.pid } else { 0 };
                        reply.locked(l.range.start, l.range.end, super::locks::type_of(l.kind), pid);
                    }
                    None => reply.locked(0, 0, libc::F_UNLCK, 0),
                }
            }
            Ok(())
        });
    }

    fn setlk(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        lock_owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let kind = match super::locks::kind_of(typ) {
            Ok(kind) => kind,
            Err(_) => return reply.error(fuser::Errno::EINVAL),
        };
        let lock = self.client.lock_spec(ino.0, lock_owner.0, pid, start, end, kind);
        if sleep && kind.is_some() {
            return self.client.setlk_wait(lock, move |result| match result {
                Ok(()) => reply.ok(),
                Err(e) => reply.error(error_of(e)),
            });
        }
        serve(&self.client, reply, ReplyEmpty::error, move |c, ctx, reply| {
            c.setlk(ctx, lock)?;
            done(reply);
            Ok(())
        });
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        serve(&self.client, reply, ReplyEmpty::error, move |c, ctx, reply| {
            c.fallocate(ctx, &c.inode(ino.0), offset, length, mode)?;
            done(reply);
            Ok(())
        });
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        serve(&self.client, reply, ReplyLseek::error, move |c, ctx, reply| {
            let at = c.lseek(ctx, &c.inode(ino.0), offset, whence)?;
            if let Some(reply) = reply.take() {
                reply.offset(at);
            }
            Ok(())
        });
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        ino_in: INodeNo,
        _fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        _fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        if offset_out.saturating_add(len) > MAX_FILE_SIZE {
            return reply.error(fuser::Errno::EFBIG);
        }
        serve(&self.client, reply, ReplyWrite::error, move |c, ctx, reply| {
            let (from, to) = (c.inode(ino_in.0), c.inode(ino_out.0));
            let n = c.copy_range(ctx, (&from, offset_in), (&to, offset_out), len)?;
            if let Some(reply) = reply.take() {
                reply.written(n);
            }
            Ok(())
        });
    }
}

impl FsdFs {
    fn write_later(
        &self,
        inode: Arc<super::inode::Inode>,
        offset: u64,
        data: Vec<u8>,
        how: write::WriteFlags,
        reply: ReplyWrite,
    ) {
        let client = Arc::clone(&self.client);
        client.counters.parked.fetch_add(1, Ordering::Relaxed);
        self.client.workers.run(
            move || match client.write(&Ctx::on_worker(), &inode, offset, &data, how) {
                Ok(n) => reply.written(n),
                Err(stop) => reply.error(error_of(Client::errno_of(stop))),
            },
        );
    }

    /// A write of mapped pages without the exclusive lease: answered when applied, or when a revocation
    /// cannot wait for that.
    fn write_mapped(
        &self,
        inode: Arc<super::inode::Inode>,
        offset: u64,
        data: Vec<u8>,
        how: write::WriteFlags,
        reply: ReplyWrite,
    ) {
        let len = data.len() as u32;
        let (number, waiting) = inode.mapped.begin(Box::new(move || reply.written(len)));
        let client = Arc::clone(&self.client);
        self.client.workers.run(move || {
            if let Err(stop) = client.write(&Ctx::on_worker(), &inode, offset, &data, how) {
                inode.errors.set(Client::errno_of(stop));
            }
            waiting.answer();
            inode.mapped.end(number);
        });
    }
}
