//! The kernel's requests.
//!
//! Each is tried on the event loop it came to; one that has to wait where it must not is started again on
//! a worker (see `ctx`). Answers are sent while the lease they depend on is still held.

mod attrs;
mod convert;
mod created;
mod data;
mod descriptors;
mod dirs;
pub mod events;
mod files;
pub mod handshake;
pub mod inherited;
mod locks;
pub mod loops;
mod made_up;
mod names;
mod serve;
mod xattrs;

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLock, ReplyLseek,
    ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use crate::client::Client;
use crate::files::attrs::SetAttr;
use crate::files::locks::kind_of;
use crate::storing::syncing::Scope;
use convert::{caller_of, from_library, time_of};
use fsd_node::config::CacheMode;
use handshake::Handshake;
use loops::Loops;

/// Longest request of the kernel, bytes.
const MAX_REQUEST: u32 = 1 << 20;

/// The file system as the FUSE library sees it.
pub struct FsdFs {
    client: Arc<Client>,
    loops: Arc<Loops>,
}

impl FsdFs {
    /// For a client that has joined.
    #[must_use]
    pub fn new(client: Arc<Client>, loops: Arc<Loops>) -> Self {
        Self { client, loops }
    }
}

// The library wants all of them in one place: what each does is in the module of its concern.
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
            | InitFlags::FUSE_EXPORT_SUPPORT
            | InitFlags::FUSE_DONT_MASK;
        // A kernel without one of these does without.
        let mut wanted = wanted;
        if self.client.kernel.caches.mode == CacheMode::Writeback {
            wanted |= InitFlags::FUSE_WRITEBACK_CACHE;
        }
        if self.client.kernel.caches.mode == CacheMode::Writeback
            || self.client.opens.open_files.shared_mappings
        {
            // Without it the kernel refuses to map what was opened past the page cache, which is what other mounts have open.
            wanted |= InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP;
        }
        let asked = wanted & config.capabilities();
        let _ = self.loops.handshake.set(Handshake::new(config, asked.bits()));
        let _ = config.add_capabilities(asked);
        let _ = config.set_max_write(MAX_REQUEST);
        let _ = config.set_max_background(64);
        Ok(())
    }

    fn destroy(&mut self) {
        self.loops.ended.store(true, Ordering::SeqCst);
        self.client.session.fate.may_end();
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        names::lookup(&self.client, req, parent, name, reply);
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        if !self.loops.is_made_up(ino.0, nlookup) {
            self.client.revoke.forgetting.forget(ino.0, nlookup);
        }
    }

    fn getattr(&self, req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        attrs::getattr(&self.client, req, ino, reply);
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
        ctime: Option<SystemTime>,
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
            ctime: ctime.map(from_library),
            caller: caller_of(req),
            keep_ctime: false,
        };
        attrs::setattr(&self.client, req, ino, set, reply);
    }

    fn readlink(&self, req: &Request, ino: INodeNo, reply: ReplyData) {
        attrs::readlink(&self.client, req, ino, reply);
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
        names::mknod(&self.client, req, parent, name, mode & !umask, rdev, reply);
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        names::mkdir(&self.client, req, parent, name, mode & !umask, reply);
    }

    fn symlink(&self, req: &Request, parent: INodeNo, link_name: &OsStr, target: &Path, reply: ReplyEntry) {
        names::symlink(&self.client, req, parent, link_name, target, reply);
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        names::remove(&self.client, req, parent, name, false, reply);
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        names::remove(&self.client, req, parent, name, true, reply);
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        names::rename(
            &self.client,
            req,
            (parent, name),
            (newparent, newname),
            flags,
            reply,
        );
    }

    fn link(&self, req: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        names::link(&self.client, req, ino, newparent, newname, reply);
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        files::open(&self.client, req, ino, flags, reply);
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
        files::create(&self.client, req, parent, name, mode & !umask, flags, reply);
    }

    fn read(
        &self,
        req: &Request,
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
        data::read(&self.client, req, ino, offset, size, fills, reply);
    }

    fn write(
        &self,
        req: &Request,
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
        let handle = self.client.opens.open_files.handles.get(fh.0);
        let cached = mapped || handle.as_ref().is_some_and(|h| h.cached);
        if let Some(handle) = &handle {
            self.client.kernel.caches.knows_handle(&handle.inode, fh.0);
        }
        let kind = crate::cache::write::WriteFlags {
            append: flags.0 & libc::O_APPEND != 0 && !mapped,
            kill_suid: write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID),
            cached,
        };
        // The flags of this call: those of the file, and what RWF_DSYNC and RWF_SYNC add. O_SYNC has the bit of O_DSYNC in it. Through
        // the page cache the kernel sends an FSYNC of its own.
        let sync = (!cached && flags.0 & libc::O_DSYNC != 0)
            .then(|| Scope::of_datasync(flags.0 & libc::O_SYNC != libc::O_SYNC));
        let write = crate::cache::write::Write {
            offset,
            data,
            flags: kind,
        };
        match handle.zip(sync) {
            Some((handle, scope)) => data::write_sync(&self.client, req, handle, &write, scope, reply),
            None => data::write(&self.client, req, ino, &write, mapped, reply),
        }
    }

    fn flush(&self, req: &Request, _ino: INodeNo, fh: FileHandle, lock_owner: LockOwner, reply: ReplyEmpty) {
        files::flush(&self.client, req, fh, lock_owner, reply);
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
        files::release(&self.client, ino, fh, lock_owner, reply);
    }

    fn fsync(&self, req: &Request, ino: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        let scope = Scope::of_datasync(datasync);
        files::fsync(&self.client, req, (ino, fh), scope, reply);
    }

    fn opendir(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        dirs::opendir(&self.client, req, ino, flags, reply);
    }

    fn readdir(&self, req: &Request, ino: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        dirs::readdir(&self.client, req, ino, fh, offset, reply);
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        dirs::releasedir(&self.client, fh, reply);
    }

    fn fsyncdir(&self, req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        dirs::fsyncdir(&self.client, req, ino, reply);
    }

    fn statfs(&self, req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        attrs::statfs(&self.client, req, reply);
    }

    fn setxattr(
        &self,
        req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        xattrs::setxattr(&self.client, req, ino, name, value, flags, reply);
    }

    fn getxattr(&self, req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        xattrs::getxattr(&self.client, req, ino, name, size, reply);
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        xattrs::listxattr(&self.client, req, ino, size, reply);
    }

    fn removexattr(&self, req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        xattrs::removexattr(&self.client, req, ino, name, reply);
    }

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // With default_permissions the kernel decides and does not ask; should it, it may.
        reply.ok();
    }

    fn getlk(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        lock_owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        match kind_of(typ) {
            Ok(kind) => {
                let owner = self.client.files.locks.lock_owner(lock_owner.0, false);
                let lock = crate::files::locks::Locks::lock_spec(ino.0, owner, pid, (start, end), kind);
                locks::getlk(&self.client, req, lock, reply);
            }
            Err(_) => reply.error(fuser::Errno::EINVAL),
        }
    }

    fn setlk(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        lock_owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        match kind_of(typ) {
            Ok(kind) => {
                let flock = locks::is_flock(req, fh, lock_owner, (start, end));
                let owner = self.client.files.locks.lock_owner(lock_owner.0, flock);
                let lock = crate::files::locks::Locks::lock_spec(ino.0, owner, pid, (start, end), kind);
                locks::setlk(&self.client, req, lock, fh.0, sleep, reply);
            }
            Err(_) => reply.error(fuser::Errno::EINVAL),
        }
    }

    /// Nothing here is a device. Programs ask every file whether it is a terminal.
    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(fuser::Errno::ENOTTY);
    }

    /// Files are always ready: the kernel does not ask again.
    fn poll(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _ph: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn fallocate(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        files::fallocate(&self.client, req, ino, offset, length, mode, reply);
    }

    fn lseek(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        files::lseek(&self.client, req, ino, offset, whence, reply);
    }

    fn copy_file_range(
        &self,
        req: &Request,
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
        data::copy_file_range(
            &self.client,
            req,
            (ino_in, offset_in),
            (ino_out, offset_out),
            len,
            reply,
        );
    }
}
