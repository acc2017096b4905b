//! The floor: a FUSE server that does nothing but keep files in memory.
//!
//! It has no leases, no network, no metadata server; what it costs is what FUSE itself costs on this
//! machine. Every file-system figure is given beside it.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, SessionACL, TimeOrNow,
    WriteFlags,
};
use parking_lot::RwLock;

/// How the kernel may cache the null server's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum NullMode {
    /// No kernel data cache.
    Direct,
    /// Page cache for reads, every write to the server.
    Writethrough,
    /// Page cache for reads and writes.
    Writeback,
}

const TTL: Duration = Duration::from_secs(3600);

struct File {
    kind: FileType,
    data: RwLock<Vec<u8>>,
    /// Of a directory: how many names are in it.
    names: AtomicU64,
}

impl File {
    fn new(kind: FileType) -> std::sync::Arc<Self> {
        std::sync::Arc::new(Self {
            kind,
            data: RwLock::new(Vec::new()),
            names: AtomicU64::new(0),
        })
    }
}

struct Tree {
    /// By directory and name.
    names: BTreeMap<(u64, OsString), u64>,
    files: HashMap<u64, std::sync::Arc<File>>,
}

impl Tree {
    /// There is one name more in a directory, or one less.
    fn count(&self, dir: u64, more: bool) {
        if let Some(dir) = self.files.get(&dir) {
            let one = if more { 1 } else { u64::MAX };
            dir.names.fetch_add(one, Ordering::Relaxed);
        }
    }

    fn add(&mut self, dir: u64, name: OsString, ino: u64) {
        if self.names.insert((dir, name), ino).is_none() {
            self.count(dir, true);
        }
    }

    fn get(&self, dir: u64, name: &OsStr) -> Option<u64> {
        self.names.get(&(dir, name.to_owned())).copied()
    }

    fn take(&mut self, dir: u64, name: &OsStr) -> Option<u64> {
        let ino = self.names.remove(&(dir, name.to_owned()))?;
        self.count(dir, false);
        Some(ino)
    }

    fn list(&self, dir: u64) -> Listing {
        let names = self
            .names
            .range((dir, OsString::new())..(dir + 1, OsString::new()));
        names
            .filter_map(|((_, name), ino)| Some((*ino, self.files.get(ino)?.kind, name.clone())))
            .collect()
    }
}

/// What is in a directory: numbers, kinds, names.
type Listing = Vec<(u64, FileType, OsString)>;

/// Directories, files and symbolic links held in memory.
pub struct NullFs {
    mode: NullMode,
    tree: RwLock<Tree>,
    /// Numbers of inodes, and of open directories.
    next: AtomicU64,
    /// Of open directories, as they were when they were opened.
    listings: RwLock<HashMap<u64, std::sync::Arc<Listing>>>,
}

impl NullFs {
    /// An empty file system.
    #[must_use]
    pub fn new(mode: NullMode) -> Self {
        Self {
            mode,
            tree: RwLock::new(Tree {
                names: BTreeMap::new(),
                files: HashMap::from([(1, File::new(FileType::Directory))]),
            }),
            next: AtomicU64::new(2),
            listings: RwLock::default(),
        }
    }

    /// Mounts it on `dir` with `loops` event loops.
    ///
    /// # Errors
    /// What the mount system call says.
    pub fn mount(self, dir: &Path, loops: usize) -> std::io::Result<BackgroundSession> {
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("nullfs".into()),
            MountOption::DefaultPermissions,
            MountOption::NoAtime,
        ];
        config.acl = SessionACL::All;
        config.n_threads = Some(loops);
        config.clone_fd = true;
        fuser::Session::new(self, dir, &config)?.spawn()
    }

    fn file(&self, ino: u64) -> Option<std::sync::Arc<File>> {
        self.tree.read().files.get(&ino).cloned()
    }

    fn attr(ino: u64, size: u64, kind: FileType) -> FileAttr {
        let now = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: INodeNo(ino),
            size,
            blocks: size.div_ceil(512),
            atime: now,
            mtime: now,
            ctime: now,
            crtime: now,
            kind,
            perm: if kind == FileType::Directory { 0o755 } else { 0o644 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn attr_of(&self, ino: u64) -> Option<FileAttr> {
        let file = self.file(ino)?;
        let size = file.data.read().len() as u64;
        Some(Self::attr(ino, size, file.kind))
    }

    /// A new file or directory; its number.
    fn make(&self, parent: INodeNo, name: &OsStr, kind: FileType) -> u64 {
        let ino = self.next.fetch_add(1, Ordering::Relaxed);
        let mut tree = self.tree.write();
        tree.files.insert(ino, File::new(kind));
        tree.add(parent.0, name.to_owned(), ino);
        ino
    }

    fn open_flags(&self) -> FopenFlags {
        match self.mode {
            NullMode::Direct => FopenFlags::FOPEN_DIRECT_IO,
            NullMode::Writethrough | NullMode::Writeback => FopenFlags::FOPEN_KEEP_CACHE,
        }
    }
}

impl Filesystem for NullFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let mut wanted = InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2
            | InitFlags::FUSE_EXPLICIT_INVAL_DATA;
        if self.mode == NullMode::Writeback {
            wanted |= InitFlags::FUSE_WRITEBACK_CACHE;
        }
        // A kernel without one of these is still a valid floor.
        let _ = config.add_capabilities(wanted & config.capabilities());
        let _ = config.set_max_write(1 << 20);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let ino = self.tree.read().get(parent.0, name);
        match ino.and_then(|ino| self.attr_of(ino)) {
            Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr_of(ino.0) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if let (Some(size), Some(file)) = (size, self.file(ino.0)) {
            file.data.write().resize(usize::try_from(size).unwrap_or(0), 0);
        }
        self.getattr(_req, ino, None, reply);
    }

    fn create(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let ino = self.make(parent, name, FileType::RegularFile);
        let attr = Self::attr(ino, 0, FileType::RegularFile);
        reply.created(&TTL, &attr, Generation(0), FileHandle(ino), self.open_flags());
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let mut tree = self.tree.write();
        match tree.take(parent.0, name) {
            Some(ino) => {
                tree.files.remove(&ino);
                reply.ok();
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn mkdir(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let ino = self.make(parent, name, FileType::Directory);
        let attr = Self::attr(ino, 0, FileType::Directory);
        reply.entry(&TTL, &attr, Generation(0));
    }

    fn symlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let ino = self.make(parent, name, FileType::Symlink);
        let bytes = target.as_os_str().as_bytes();
        if let Some(file) = self.file(ino) {
            *file.data.write() = bytes.to_vec();
        }
        let attr = Self::attr(ino, bytes.len() as u64, FileType::Symlink);
        reply.entry(&TTL, &attr, Generation(0));
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match self.file(ino.0) {
            Some(file) => reply.data(&file.data.read()),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        let listing = std::sync::Arc::new(self.tree.read().list(ino.0));
        self.listings.write().insert(handle, listing);
        reply.opened(FileHandle(handle), FopenFlags::empty());
    }

    fn readdir(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listing = self.listings.read().get(&fh.0).cloned().unwrap_or_default();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, (ino, kind, name)) in listing.iter().enumerate().skip(from) {
            if reply.add(INodeNo(*ino), at as u64 + 1, *kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.listings.write().remove(&fh.0);
        reply.ok();
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let mut tree = self.tree.write();
        let ino = tree.get(parent.0, name);
        let Some((ino, dir)) = ino.and_then(|ino| Some((ino, tree.files.get(&ino)?))) else {
            return reply.error(Errno::ENOENT);
        };
        if dir.names.load(Ordering::Relaxed) > 0 {
            return reply.error(Errno::ENOTEMPTY);
        }
        tree.take(parent.0, name);
        tree.files.remove(&ino);
        reply.ok();
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        _flags: fuser::RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut tree = self.tree.write();
        let Some(ino) = tree.take(parent.0, name) else {
            return reply.error(Errno::ENOENT);
        };
        if let Some(replaced) = tree.take(new_parent.0, new_name) {
            tree.files.remove(&replaced);
        }
        tree.add(new_parent.0, new_name.to_owned(), ino);
        reply.ok();
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(ino.0), self.open_flags());
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
        let Some(file) = self.file(ino.0) else {
            return reply.error(Errno::ENOENT);
        };
        let data = file.data.read();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(data.len());
        let end = start.saturating_add(size as usize).min(data.len());
        reply.data(&data[start..end]);
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
        let Some(file) = self.file(ino.0) else {
            return reply.error(Errno::ENOENT);
        };
        let Ok(start) = usize::try_from(offset) else {
            return reply.error(Errno::EFBIG);
        };
        let mut bytes = file.data.write();
        if bytes.len() < start + data.len() {
            bytes.resize(start + data.len(), 0);
        }
        bytes[start..start + data.len()].copy_from_slice(data);
        drop(bytes);
        reply.written(u32::try_from(data.len()).unwrap_or(0));
    }

    fn flush(&self, _req: &Request, _i: INodeNo, _fh: FileHandle, _o: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}
