//! The `write` system call, and writes of mapped pages.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use lockmgr::{Guard, Mode};

use crate::cache::Cache;
use crate::cache::edges::edge_of;
use crate::cache::inode::Inode;
use crate::cache::write::Write;
use crate::data::space::Space;
use crate::data::stored::Stored;
use crate::data::writing::Writing;
use crate::kernel::caches::KernelCaches;
use crate::namespace::xattrs::Xattrs;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res, Stop, is_full};
use fsd_node::config::CacheMode;
use fsd_proto::rpc::Errno;

/// The `write` system call.
pub struct Writes {
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) kernel: Arc<KernelCaches>,
    pub(crate) space: Arc<Space>,
    pub(crate) stored: Arc<Stored>,
    pub(crate) writing: Arc<Writing>,
    pub(crate) xattrs: Arc<Xattrs>,
}

impl Writes {
    /// The `write` system call.
    ///
    /// # Errors
    /// Park; `EFBIG`, `ENOSPC`, I/O errors.
    pub fn write(&self, ctx: &Ctx<'_>, inode: &Inode, write: &Write<'_>) -> Res<u32> {
        self.space
            .with_frees(ctx, is_full, || self.write_at_once(ctx, inode, write))
    }

    fn write_at_once(&self, ctx: &Ctx<'_>, inode: &Inode, write: &Write<'_>) -> Res<u32> {
        let cached = write.flags.cached;
        let refills = || inode.kernel.refills.get().filter(|_| cached);
        let came = self.session.now();
        let len = write.data.len() as u64;
        let old = |at| refills().and_then(|r| r.may_be_old(came, at, len));
        let emptied = refills().is_some_and(|r| r.emptied_lately(came));
        if !cached && inode.kernel.pages.load(Ordering::SeqCst) || emptied {
            // The kernel's pages will have to be invalidated, which may wait for a read.
            ctx.may_wait()?;
        }
        let guard = self.lease_for_write(ctx, inode, write)?;
        // With the write-back cache the kernel does it when it is written to.
        if self.kernel.mode != CacheMode::Writeback {
            self.xattrs.drop_capability(ctx, inode, &guard)?;
        }
        let at = {
            let mut state = self.writing.claim_to_write(ctx, inode, guard.version(), write)?;
            self.writing.take_mapped(ctx, inode, &mut state)?;
            let offset = if write.flags.append {
                self.cache.load_attr(ctx, inode, &mut state)?.size
            } else {
                write.offset
            };
            self.writing
                .write_next(ctx, inode, &mut state, &Write { offset, ..*write })?;
            offset
        };
        self.cache.note_dirty(inode.ino);
        self.kernel.invalidate_attrs(inode);
        let stale = !cached
            && (inode.kernel.pages.load(Ordering::SeqCst) || inode.kernel.drops.load(Ordering::SeqCst) > 0);
        let old = old(at);
        if cached && self.kernel.mode != CacheMode::Writeback {
            inode.kernel.pages.store(true, Ordering::SeqCst);
        }
        if stale || old.is_some() {
            inode.kernel.invals.fetch_add(1, Ordering::SeqCst);
        }
        // Not held any longer: a read may keep the page locked that is to be invalidated, and wait for a
        // gate that a revocation closes until we have left. No lease goes while `invals` counts us.
        drop(guard);
        if stale {
            // Other open files of this mount read through the page cache, and one of their reads may have
            // filled it after the kernel invalidated the range for this write.
            self.kernel.invalidate_range(inode, at, len);
        }
        if let (Some(number), Some(refills)) = (old, refills())
            && self.kernel.invalidate_written(inode, at, len)
        {
            refills.dropped(number, at, len);
        }
        if stale || old.is_some() {
            inode.kernel.invals.fetch_sub(1, Ordering::SeqCst);
        }
        u32::try_from(write.data.len()).map_err(|_| Stop::Errno(Errno(libc::EINVAL)))
    }

    /// Pages that the kernel writes back, or that somebody has stored to through a mapping.
    ///
    /// Those of a file that is gone, whose last name and last open file are no more, are of no use to anybody. They are
    /// taken and dropped: the kernel would keep an error in its state of the whole file system, where somebody else's
    /// `syncfs` finds it.
    ///
    /// # Errors
    /// As [`Writes::write`].
    pub fn write_pages(&self, ctx: &Ctx<'_>, inode: &Inode, write: &Write<'_>) -> Res<u32> {
        match self.write(ctx, inode, write) {
            Err(Stop::Errno(Errno(libc::ESTALE))) if inode.lock_raw().lasting.gone => {
                Ok(write.data.len() as u32)
            }
            result => result,
        }
    }

    /// The exclusive lease for a write. While it waits, the kernel may keep pages locked ([`edge_of`]); see `revoke` for
    /// why that must be known.
    ///
    /// # Errors
    /// Park; the lease is not to be had.
    pub fn lease_for_write(&self, ctx: &Ctx<'_>, inode: &Inode, write: &Write<'_>) -> Res<Guard> {
        if let Some(guard) = self.session.leases.try_enter(inode.record(), Mode::Exclusive) {
            return Ok(guard);
        }
        ctx.may_wait()?;
        let edge = write
            .flags
            .cached
            .then(|| edge_of(write.offset, write.data.len() as u64));
        let edge = edge.flatten();
        if let Some(pages) = edge {
            inode.waiting.edges.begin(pages);
        }
        let guard = self.cache.lease(ctx, inode, Mode::Exclusive);
        if let Some(pages) = edge {
            inode.waiting.edges.end(pages);
        }
        guard
    }

    /// Gets the lease for a write that is queued, and applies it with what stands before it, unless somebody else has.
    pub fn bring_mapped(&self, ctx: &Ctx<'_>, inode: &Inode, number: u64) {
        let Some(write) = inode.waiting.mapped.find(number) else {
            return;
        };
        let brought = || -> Res<()> {
            let guard = self.lease_for_write(ctx, inode, &write.write())?;
            if self.kernel.mode != CacheMode::Writeback {
                self.xattrs.drop_capability(ctx, inode, &guard)?;
            }
            self.writing.take_mapped(
                ctx,
                inode,
                &mut self.stored.claim_to_change(ctx, inode, guard.version())?,
            )?;
            self.cache.note_dirty(inode.ino);
            self.kernel.invalidate_attrs(inode);
            Ok(())
        };
        if let Err(stop) = brought()
            && let Some(error) = inode.waiting.mapped.end(number, Err(stop.errno()))
        {
            inode.errors.set(error);
        }
    }
}
