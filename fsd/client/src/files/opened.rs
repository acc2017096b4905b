//! Whole files: flush, fsync, lseek, copy_file_range.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use lockmgr::Mode;

use crate::cache::Cache;
use crate::cache::inode::Inode;
use crate::cache::pages::{PAGE, page_of};
use crate::cache::suid::kill_suid_for;
use crate::cache::write::{Write, WriteFlags};
use crate::data::discard::Discards;
use crate::data::reading::Reads;
use crate::data::stored::Stored;
use crate::data::writing::Writing;
use crate::files::atime::Accesses;
use crate::kernel::caches::KernelCaches;
use crate::kernel::front::Front;
use crate::namespace::xattrs::Xattrs;
use crate::opens::handles::{Handle, OpenFiles};
use crate::session::caller::Caller;
use crate::session::ctx::{Ctx, Res, fail};
use crate::session::{Session, Versions};
use crate::storing::syncing::{Scope, Syncing};
use fsd_node::config::CacheMode;
use fsd_proto::layout::BLOCK;
use fsd_proto::wire::Kind;

/// Open files: open, read, sync.
pub struct Files {
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) kernel: Arc<KernelCaches>,
    pub(crate) front: Arc<Front>,
    pub(crate) stored: Arc<Stored>,
    pub(crate) reads: Arc<Reads>,
    pub(crate) writing: Arc<Writing>,
    pub(crate) discards: Arc<Discards>,
    pub(crate) open_files: Arc<OpenFiles>,
    pub(crate) xattrs: Arc<Xattrs>,
    pub(crate) syncing: Arc<Syncing>,
    pub(crate) accesses: Arc<Accesses>,
}

impl Files {
    /// Brings a file's data and attributes to the servers and makes them durable.
    ///
    /// # Errors
    /// I/O errors, also delayed ones this handle has not been told yet.
    pub fn fsync(
        &self,
        ctx: &Ctx<'_>,
        inode: &Arc<Inode>,
        seen: Option<&AtomicU64>,
        scope: Scope,
    ) -> Res<()> {
        self.syncing.sync(ctx, inode, scope)?;
        if let Some(seen) = seen {
            inode.errors.check(seen)?;
        }
        Ok(())
    }

    /// What `close` waits for: mapped pages that are on their way, and delayed errors.
    ///
    /// # Errors
    /// A delayed error.
    pub fn flush(&self, ctx: &Ctx<'_>, handle: &Handle) -> Res<()> {
        if let Some(mapped) = handle.inode.waiting.mapped.get().filter(|m| !m.is_empty()) {
            ctx.may_wait()?;
            mapped.drain();
        }
        if self.front.is_recalling(&handle.inode) {
            // This FLUSH may come from the kernel extension, which writes the file back because its delegation is recalled. A delayed write
            // error is reported once for each open file: an application's close or fsync must still see it.
            return Ok(handle.inode.errors.peek(&handle.seen)?);
        }
        self.accesses.file_accessed(ctx, handle)?;
        Ok(handle.inode.errors.check(&handle.seen)?)
    }

    /// `lseek` with `SEEK_DATA` or `SEEK_HOLE`.
    ///
    /// # Errors
    /// Park; `ENXIO`, `EINVAL`.
    pub fn lseek(&self, ctx: &Ctx<'_>, inode: &Inode, offset: i64, whence: i32) -> Res<i64> {
        let guard = self.cache.lease(ctx, inode, Mode::Shared)?;
        let mut state = self
            .reads
            .claim_to_read(ctx, inode, guard.version(), 0, usize::MAX)?;
        let size = self.cache.load_attr(ctx, inode, &mut state)?.size;
        let Some(from) = u64::try_from(offset).ok().filter(|&o| o < size) else {
            return fail(libc::ENXIO);
        };
        self.stored
            .load_frames(ctx, inode, &mut state, 0, (size - 1) / BLOCK)?;
        // Data: what a frame covers, and cached dirty pages.
        let covered = |at: u64| -> Option<u64> {
            let frame_end = state
                .frames
                .known()
                .get(&(at / BLOCK))
                .map(|f| at / BLOCK * BLOCK + u64::from(f.size))
                .filter(|&end| end > at);
            let page_end = state
                .pages
                .get(page_of(at))
                .filter(|p| p.dirty)
                .map(|_| (page_of(at) + 1) * PAGE);
            frame_end.max(page_end)
        };
        match whence {
            libc::SEEK_HOLE => {
                let mut at = from;
                while at < size {
                    match covered(at) {
                        Some(end) => at = end,
                        None => return Ok(at as i64),
                    }
                }
                Ok(size as i64)
            }
            libc::SEEK_DATA => {
                if covered(from).is_some() {
                    return Ok(offset);
                }
                let frame = state
                    .frames
                    .known()
                    .range(from / BLOCK + 1..)
                    .next()
                    .map(|(&b, _)| b * BLOCK);
                let page = state
                    .pages
                    .dirty_in(page_of(from) + 1, u64::MAX)
                    .next()
                    .map(|p| p * PAGE);
                match frame.into_iter().chain(page).min().filter(|&at| at < size) {
                    Some(at) => Ok(at as i64),
                    None => fail(libc::ENXIO),
                }
            }
            _ => fail(libc::EINVAL),
        }
    }

    /// `copy_file_range`: copies under both leases, so that nobody sees a torn source or target.
    ///
    /// # Errors
    /// Park; I/O errors before the first byte.
    pub fn copy_range(
        &self,
        ctx: &Ctx<'_>,
        (from, from_offset): (&Inode, u64),
        (to, to_offset): (&Inode, u64),
        len: u64,
        caller: Caller,
    ) -> Res<u32> {
        const MOST: u64 = 8 << 20;
        ctx.may_wait()?;
        let guards = self
            .cache
            .lease_all(ctx, &[(from, Mode::Shared), (to, Mode::Exclusive)])?;
        self.xattrs.drop_capability(ctx, to, &guards)?;
        let len = len.min(MOST) as usize;
        let data = {
            let version = guards.version_of(from.ino);
            let mut state = self.reads.claim_to_read(ctx, from, version, from_offset, len)?;
            self.reads
                .read_held(ctx, from, &mut state, from_offset, len, true)?
        };
        {
            let write = Write {
                offset: to_offset,
                data: &data,
                flags: WriteFlags::default(),
            };
            let mut state = self
                .writing
                .claim_to_write(ctx, to, guards.version_of(to.ino), &write)?;
            self.writing.write_held(ctx, to, &mut state, &write)?;
            if let Some(attr) = state.attr.as_mut() {
                kill_suid_for(attr, caller);
            }
        }
        self.cache.note_dirty(to.ino);
        self.kernel.invalidate_attrs(to);
        Ok(data.len() as u32)
    }

    /// The `read` system call; `answer` runs while the lease is held. `fills` says that the kernel puts
    /// what it gets into its page cache.
    ///
    /// # Errors
    /// Park; I/O errors.
    pub fn read<T>(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        offset: u64,
        len: usize,
        fills: bool,
        answer: impl FnOnce(&[u8]) -> T,
    ) -> Res<T> {
        let guard = self.cache.lease(ctx, inode, Mode::Shared)?;
        let data = {
            let mut state = self
                .reads
                .claim_to_read(ctx, inode, guard.version(), offset, len)?;
            if fills && self.kernel.mode != CacheMode::Writeback {
                // With the range claimed: a write that comes behind this read knows of it, and has dropped what it is answered.
                inode
                    .kernel
                    .pages
                    .store(true, std::sync::atomic::Ordering::SeqCst);
                if let Some(refills) = inode.kernel.refills.get() {
                    refills.filled(offset, len as u64);
                }
            }
            // Not what the kernel is about to keep: it would be here twice, and copied once more.
            let keep = !fills || self.kernel.mode == CacheMode::Direct;
            self.reads.read_held(ctx, inode, &mut state, offset, len, keep)?
        };
        if fills && self.kernel.mode != CacheMode::Writeback {
            inode
                .kernel
                .pages
                .store(true, std::sync::atomic::Ordering::SeqCst);
            inode
                .kernel
                .fills
                .fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
        let done = answer(&data);
        drop(guard);
        Ok(done)
    }

    /// Opens a file. Returns its handle and whether the kernel may cache. A truncation may clear
    /// set-user-id bits, depending on the caller.
    ///
    /// # Errors
    /// Park; `ENOENT`, errors of a truncation.
    pub fn open(&self, ctx: &Ctx<'_>, inode: &Arc<Inode>, flags: i32, caller: Caller) -> Res<(u64, bool)> {
        let writer = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let truncate = flags & libc::O_TRUNC != 0 && writer;
        // Others that hold the shared lease need not have said that they read the file, and take it for one that nobody writes (`Telling`).
        let mode = if writer { Mode::Exclusive } else { Mode::Shared };
        let guard = self.cache.lease(ctx, inode, mode)?;
        if truncate {
            self.xattrs.drop_capability(ctx, inode, &guard)?;
        }
        let asks = !inode.lock_opens(ctx)?.asks_nobody(writer) && !self.session.local_memory();
        if asks {
            ctx.may_wait()?;
        }
        let kind = {
            let mut state = if truncate {
                self.stored.claim_to_change(ctx, inode, guard.version())?
            } else {
                inode.lock(ctx, guard.version())?
            };
            let attr = self.cache.load_attr(ctx, inode, &mut state)?;
            if truncate && attr.kind == Kind::File {
                self.discards.truncate(ctx, inode, &mut state, 0)?;
                state.data_changed(self.session.net.meta.now(), caller);
                if let Some(attr) = &state.attr {
                    self.front.attributes_changed(inode, attr);
                }
            }
            attr.kind
        };
        if truncate {
            self.cache.note_dirty(inode.ino);
            self.kernel.invalidate_attrs(inode);
        }
        let make = || self.open_files.make_handle(ctx, inode, kind, flags);
        if asks && !writer && kind == Kind::File {
            return self.reads.with_contents(ctx, inode, guard.version(), make);
        }
        make()
    }
}
