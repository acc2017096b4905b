//! A task of a mount: what system calls do, on the client's functions, as the FUSE layer and the kernel call them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fsd_client::Client;
use fsd_client::cache::inode::Inode;
use fsd_client::cache::write::{Write, WriteFlags};
use fsd_client::files::attrs::SetAttr;
use fsd_client::namespace::names::New;
use fsd_client::opens::handles::Handle;
use fsd_client::session::caller::Caller;
use fsd_client::session::ctx::{Ctx, Res, Stop};
use fsd_client::storing::syncing::Scope;
use fsd_proto::ino::ROOT;
use fsd_proto::rpc::Errno;
use fsd_proto::wire::Kind;
use rt::sync::{Mutex, RwLock};

use crate::chance::once_in;

/// Requests that clients have served in all simulations of this process: how fast they go is told by it.
pub static REQUESTS: AtomicU64 = AtomicU64::new(0);

/// Result of a system call.
pub type Sys<T> = Result<T, i32>;

/// The locks of a mount that its kernel takes around requests.
#[derive(Default)]
pub struct Kernel {
    /// The root directory's.
    dir: RwLock<()>,
    /// Those of files.
    files: Mutex<BTreeMap<u64, Arc<Mutex<()>>>>,
}

impl Kernel {
    fn file(&self, ino: u64) -> Arc<Mutex<()>> {
        Arc::clone(self.files.lock().entry(ino).or_default())
    }
}

/// A task.
pub struct Task {
    client: Arc<Client>,
    kernel: Arc<Kernel>,
    thread: u32,
    late: bool,
}

/// What tasks need of a mount.
#[derive(Clone)]
pub struct Mounted {
    /// What does its work.
    pub client: Arc<Client>,
    /// What its kernel keeps.
    pub kernel: Arc<Kernel>,
    /// It answers although its term has passed.
    pub late: bool,
}

impl Mounted {
    /// Has its life ended?
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.client.session.term.is_over() || self.client.session.fate.doomed.load(Ordering::SeqCst)
    }

    /// May it answer what it has cached?
    #[must_use]
    pub fn answers(&self) -> bool {
        !self.is_over() && self.client.session.term.is_valid()
    }
}

/// An open file.
pub struct File {
    inode: Arc<Inode>,
    number: u64,
    handle: Arc<Handle>,
}

impl Task {
    /// A task of a mount; `thread` is its own.
    #[must_use]
    pub fn new(mount: &Mounted, thread: u32) -> Self {
        Self {
            client: Arc::clone(&mount.client),
            kernel: Arc::clone(&mount.kernel),
            thread,
            late: mount.late,
        }
    }

    /// Has the life of its mount ended?
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.client.session.term.is_over() || self.client.session.fate.doomed.load(Ordering::SeqCst)
    }

    fn caller(&self) -> Caller {
        Caller {
            pid: self.thread,
            uid: 0,
        }
    }

    /// On an event loop if that may be, else on a worker. As in `fuse/serve.rs`: nothing is begun, and nothing answered, before the
    /// mount may act.
    fn serve<T>(&self, mut step: impl FnMut(&Arc<Client>, &Ctx<'_>) -> Res<T>) -> Sys<T> {
        REQUESTS.fetch_add(1, Ordering::Relaxed);
        rt::sim::point();
        let term = &self.client.session.term;
        let mut step = |client: &Arc<Client>, ctx: &Ctx<'_>| {
            if !self.late && !term.is_valid() {
                ctx.may_wait()?;
                term.hold()?;
            }
            let done = step(client, ctx)?;
            if !self.late {
                term.hold()?;
            }
            Ok(done)
        };
        let first = step(&self.client, &Ctx::on_loop(&self.client.session.threads.permits));
        let result = match first {
            Err(Stop::Park) => step(&self.client, &Ctx::on_worker()),
            other => other,
        };
        match result {
            Ok(done) => Ok(done),
            Err(Stop::Errno(Errno(number))) => Err(number),
            Err(Stop::Park) => Err(libc::EDEADLK),
        }
    }

    /// The kernel walks a path again after ESTALE, once.
    fn again<T>(&self, mut call: impl FnMut() -> Sys<T>) -> Sys<T> {
        match call() {
            Err(libc::ESTALE) => call(),
            other => other,
        }
    }

    fn root(&self) -> Arc<Inode> {
        self.client.cache.inode(ROOT)
    }

    fn lookup(&self, name: &str) -> Sys<(Arc<Inode>, u64)> {
        let found = self.serve(|c, ctx| {
            c.namespace.directories.lookup(
                ctx,
                &self.root(),
                name.as_bytes(),
                self.thread,
                |inode, attr, _| (Arc::clone(inode), attr.size),
            )
        })?;
        Ok(found)
    }

    /// As part of a path: others may look up at the same time, but change nothing.
    fn walk(&self, name: &str) -> Sys<(Arc<Inode>, u64)> {
        let _shared = self.kernel.dir.read();
        self.lookup(name)
    }

    fn forget(&self, inode: &Inode) {
        self.client.revoke.forgetting.forget(inode.ino, 1);
    }

    fn file(&self, inode: Arc<Inode>, number: u64) -> Sys<File> {
        let handle = self
            .client
            .opens
            .open_files
            .handles
            .get(number)
            .ok_or(libc::EBADF)?;
        Ok(File {
            inode,
            number,
            handle,
        })
    }

    /// `open` of a file that is there.
    ///
    /// # Errors
    /// As open(2).
    pub fn open(&self, name: &str, flags: i32) -> Sys<File> {
        self.again(|| {
            let (inode, _) = self.walk(name)?;
            match self.serve(|c, ctx| c.files.opened.open(ctx, &inode, flags, self.caller())) {
                Ok((number, _)) => self.file(inode, number),
                Err(e) => {
                    self.forget(&inode);
                    Err(e)
                }
            }
        })
    }

    /// `open` with O_CREAT and O_EXCL.
    ///
    /// # Errors
    /// As open(2).
    pub fn create(&self, name: &str) -> Sys<File> {
        let new = New {
            kind: Kind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
            rdev: 0,
            target: Vec::new(),
        };
        let _alone = self.kernel.dir.write();
        let (inode, number) = self.serve(|c, ctx| {
            let mut made = None;
            c.namespace
                .names
                .create(ctx, &self.root(), name.as_bytes(), &new, |inode, _| {
                    let (number, _) = c
                        .opens
                        .open_files
                        .make_handle(ctx, inode, Kind::File, libc::O_RDWR)?;
                    made = Some((Arc::clone(inode), number));
                    Ok(())
                })?;
            made.ok_or(Stop::Errno(Errno(libc::EPROTO)))
        })?;
        self.file(inode, number)
    }

    /// `close`.
    pub fn close(&self, file: File) -> Sys<()> {
        let flushed = self.serve(|c, ctx| c.files.opened.flush(ctx, &file.handle));
        let released = self.serve(|c, ctx| c.opens.open_files.release(ctx, file.number));
        self.forget(&file.inode);
        flushed.and(released)
    }

    /// `pread`.
    ///
    /// # Errors
    /// As pread(2).
    pub fn read(&self, file: &File, offset: u64, len: usize) -> Sys<Vec<u8>> {
        self.serve(|c, ctx| {
            c.files
                .opened
                .read(ctx, &file.inode, offset, len, false, <[u8]>::to_vec)
        })
    }

    /// `pwrite`, or `write` with O_APPEND.
    ///
    /// # Errors
    /// As pwrite(2).
    pub fn write(&self, file: &File, offset: u64, data: &[u8], append: bool) -> Sys<u32> {
        let write = Write {
            offset,
            data,
            flags: WriteFlags {
                append,
                ..WriteFlags::default()
            },
        };
        let lock = self.kernel.file(file.inode.ino);
        let _alone = lock.lock();
        self.serve(|c, ctx| c.files.writes.write(ctx, &file.inode, &write))
    }

    /// `ftruncate`.
    ///
    /// # Errors
    /// As ftruncate(2).
    pub fn truncate(&self, file: &File, size: u64) -> Sys<()> {
        let set = SetAttr {
            size: Some(size),
            caller: self.caller(),
            ..SetAttr::default()
        };
        let lock = self.kernel.file(file.inode.ino);
        let _alone = lock.lock();
        self.serve(|c, ctx| c.files.attrs.setattr(ctx, &file.inode, &set, |_, _| ()))
    }

    /// Size and links, as `fstat` has them.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn fstat(&self, file: &File) -> Sys<(u64, u32)> {
        self.serve(|c, ctx| {
            c.files
                .attrs
                .getattr(ctx, &file.inode, |attr, _| (attr.size, attr.nlink))
        })
    }

    /// Size, as `stat` has it.
    ///
    /// # Errors
    /// As stat(2).
    pub fn stat(&self, name: &str) -> Sys<u64> {
        self.again(|| {
            let (inode, size) = self.walk(name)?;
            self.forget(&inode);
            Ok(size)
        })
    }

    /// `fsync` or `fdatasync`: what they leave on disks is told apart by times alone.
    ///
    /// # Errors
    /// As fsync(2).
    pub fn fsync(&self, file: &File) -> Sys<()> {
        let lock = self.kernel.file(file.inode.ino);
        let _alone = lock.lock();
        let (handle, scope) = (&file.handle, Scope::of_datasync(once_in(2)));
        self.serve(|c, ctx| c.files.opened.fsync(ctx, &file.inode, Some(&handle.seen), scope))
    }

    /// `fsync` of the directory.
    ///
    /// # Errors
    /// As fsync(2).
    pub fn fsync_dir(&self) -> Sys<()> {
        self.serve(|c, ctx| c.files.opened.fsync(ctx, &self.root(), None, Scope::All))
    }

    /// `unlink`.
    ///
    /// # Errors
    /// As unlink(2).
    pub fn unlink(&self, name: &str) -> Sys<()> {
        self.again(|| {
            let _alone = self.kernel.dir.write();
            let (inode, _) = self.lookup(name)?;
            let removed = self.serve(|c, ctx| {
                c.namespace
                    .names
                    .remove(ctx, &self.root(), name.as_bytes(), false, self.thread)
            });
            self.forget(&inode);
            removed
        })
    }

    /// `rename`.
    ///
    /// # Errors
    /// As rename(2).
    pub fn rename(&self, from: &str, to: &str) -> Sys<()> {
        self.again(|| {
            let _alone = self.kernel.dir.write();
            let (inode, _) = self.lookup(from)?;
            let replaced = self.lookup(to);
            let renamed = self.serve(|c, ctx| {
                let root = self.root();
                c.namespace.names.rename(
                    ctx,
                    (&root, from.as_bytes()),
                    (&root, to.as_bytes()),
                    0,
                    self.thread,
                )
            });
            self.forget(&inode);
            if let Ok((replaced, _)) = replaced {
                self.forget(&replaced);
            }
            renamed
        })
    }

    /// The names in the directory.
    ///
    /// # Errors
    /// As readdir(3).
    pub fn names(&self) -> Sys<Vec<String>> {
        let _shared = self.kernel.dir.read();
        let listing = self.serve(|c, ctx| c.namespace.directories.listing(ctx, &self.root()))?;
        let names = listing
            .values()
            .map(|(name, _, _)| String::from_utf8_lossy(name).into_owned());
        let mut names: Vec<String> = names.collect();
        names.sort();
        Ok(names)
    }
}
