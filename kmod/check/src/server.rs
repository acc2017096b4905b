//! A FUSE server with the write-back cache on, over the shared file: it knows nothing of leases. That is
//! as much of a daemon as the module needs.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use distfuse_abi::Time;
use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, SessionACL, TimeOrNow,
    WriteFlags,
};

use crate::asking;
use crate::control::Control;

/// Under leases attributes of files do not go stale, and the kernel would ask for them at every write.
const TTL: Duration = Duration::from_secs(3600);
const ROOT: INodeNo = INodeNo(1);

struct Server(Arc<Control>, usize, PathBuf);

fn time(time: Time) -> SystemTime {
    UNIX_EPOCH + Duration::new(time.seconds.max(0).unsigned_abs(), time.nanos)
}

fn pause(milliseconds: u64) {
    if milliseconds > 0 {
        std::thread::sleep(Duration::from_millis(milliseconds));
    }
}

impl Server {
    fn attr(&self, ino: INodeNo) -> Option<FileAttr> {
        let mut attr = FileAttr {
            ino,
            size: 0,
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: FileType::Directory,
            perm: 0o755,
            nlink: 2,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        };
        if ino != ROOT {
            let a = self.0.attributes(ino.0)?;
            attr.kind = FileType::RegularFile;
            attr.size = a.size;
            attr.blocks = a.blocks;
            attr.mtime = time(a.mtime);
            attr.ctime = time(a.ctime);
            attr.atime = time(a.atime);
            attr.perm = (a.mode & 0o7777) as u16;
            attr.nlink = 1;
        }
        Some(attr)
    }

    fn count(&self, ino: u64, change: u32) {
        let opens = self.0.meta(ino).and_then(|meta| meta.opens.get(self.1));
        if let Some(opens) = opens {
            opens.fetch_add(change, SeqCst);
        }
    }

    fn change(&self, ino: u64, mode: Option<u32>, size: Option<u64>, mtime: Option<TimeOrNow>) -> bool {
        if let Some(meta) = self.0.meta(ino)
            && let Some(mode) = mode
        {
            meta.mode.store(mode & 0o7777, SeqCst);
        }
        if let Some(size) = size
            && self.0.truncate(ino, size).is_err()
        {
            return false;
        }
        if let Some(when) = mtime {
            let when = match when {
                TimeOrNow::SpecificTime(when) => when,
                TimeOrNow::Now => SystemTime::now(),
            };
            let since = when.duration_since(UNIX_EPOCH).unwrap_or_default();
            let time = Time {
                seconds: since.as_secs().cast_signed(),
                nanos: since.subsec_nanos(),
            };
            self.0.set_mtime(ino, time);
        }
        true
    }

    fn opened(&self, ino: u64) {
        self.count(ino, 1);
    }

    fn other(&self) {
        self.0.block().others.fetch_add(1, SeqCst);
    }
}

impl Filesystem for Server {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        config
            .add_capabilities(
                InitFlags::FUSE_WRITEBACK_CACHE
                    | InitFlags::FUSE_ASYNC_READ
                    | InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            )
            .map_err(|_| std::io::Error::other("no write-back cache"))?;
        let _ = config.set_max_write(1 << 20);
        self.0.block().ready.fetch_add(1, SeqCst);
        Ok(())
    }

    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.0.block().lookups.fetch_add(1, SeqCst);
        let found = self
            .0
            .names()
            .into_iter()
            .find(|(known, _)| name == known.as_str());
        match found.and_then(|(_, ino)| self.attr(INodeNo(ino))) {
            Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.0.block().getattrs.fetch_add(1, SeqCst);
        match self.attr(ino) {
            Some(attr) if ino == ROOT => reply.attr(&Duration::ZERO, &attr),
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let block = self.0.block();
        block.setattrs.fetch_add(1, SeqCst);
        pause(block.setattr_delay.load(SeqCst));
        let change = || self.change(ino.0, mode, size, mtime);
        match asking::under(&self.2, self.1, ino.0, change) {
            Ok(true) => {}
            Ok(false) => return reply.error(Errno::EFBIG),
            Err(_) => return reply.error(Errno::EIO),
        }
        match self.attr(ino) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.other();
        let found = self
            .0
            .names()
            .into_iter()
            .find(|(known, _)| name == known.as_str());
        match found {
            Some((_, ino)) => {
                self.0.remove(ino);
                reply.ok();
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.other();
        self.opened(ino.0);
        reply.opened(FileHandle(1), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let block = self.0.block();
        block.reads.fetch_add(1, SeqCst);
        pause(block.read_delay.load(SeqCst));
        match self.0.read(ino.0, offset, size as usize) {
            Ok(data) => reply.data(&data),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let block = self.0.block();
        block.writes.fetch_add(1, SeqCst);
        pause(block.write_delay.load(SeqCst));
        let error = block.write_error.load(SeqCst);
        if error == 0 && self.0.write(ino.0, offset, data).is_ok() {
            block.written.fetch_add(1, SeqCst);
            reply.written(data.len() as u32);
        } else {
            block.written.fetch_add(1, SeqCst);
            reply.error(if error == 0 {
                Errno::EFBIG
            } else {
                Errno::from_i32(error.cast_signed())
            });
        }
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        self.other();
        reply.ok();
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.other();
        self.count(ino.0, u32::MAX);
        reply.ok();
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.0.block().fsyncs.fetch_add(1, SeqCst);
        reply.ok();
    }

    fn readdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        self.other();
        for (next, (name, ino)) in (1..).zip(self.0.names()) {
            if next > offset && reply.add(INodeNo(ino), next, FileType::RegularFile, name) {
                break;
            }
        }
        reply.ok();
    }

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        self.other();
        let made = self.0.create(&name.to_string_lossy(), mode).ok();
        match made.and_then(|ino| self.attr(INodeNo(ino))) {
            Some(attr) => {
                self.opened(attr.ino.0);
                let flags = FopenFlags::FOPEN_KEEP_CACHE;
                reply.created(&TTL, &attr, Generation(0), FileHandle(1), flags);
            }
            None => reply.error(Errno::ENOSPC),
        }
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
        self.other();
        match self.0.meta(ino.0) {
            Some(meta) if mode == 0 => {
                meta.size.fetch_max(offset + length, SeqCst);
                reply.ok();
            }
            _ => reply.error(Errno::EOPNOTSUPP),
        }
    }
}

/// Serves the mount of that number until it is unmounted, or this process is killed.
pub fn serve(point: &Path, control: &Path, number: usize) -> Result<()> {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("kmod-check".into()),
        MountOption::Subtype("distfuse".into()),
        MountOption::DefaultPermissions,
    ];
    config.acl = SessionACL::All;
    config.n_threads = Some(4);
    config.clone_fd = true;
    let server = Server(
        Arc::new(Control::open(control)?),
        number,
        control.with_file_name(asking::NAME),
    );
    fuser::mount(server, point, &config)?;
    Ok(())
}
