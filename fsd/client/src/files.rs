//! Whole files: flush, fsync, lseek, copy_file_range.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use lockmgr::Mode;

use super::attrs::kill_suid_for;
use super::caller::Caller;
use super::ctx::{Ctx, Res, fail};
use super::inode::Inode;
use super::opens::Handle;
use super::pages::{PAGE, page_of};
use super::write::{Write, WriteFlags};
use super::{Client, Versions};
use fsd_proto::ask;
use fsd_proto::layout::BLOCK;
use fsd_proto::wire::Kind;

impl Client {
    /// Drops what is cached of a file that is gone, and its lease.
    pub fn forget_data(&self, inode: &Inode) {
        if let Some(mut state) = inode.try_claim_raw() {
            self.abandon_pages(inode, &mut state);
            state.attr_dirty = false;
            state.gone = true;
            inode.push.lock().waiting = None;
        }
        self.dirty.lock().remove(&inode.ino);
        self.leases.release(inode.record());
    }

    /// Brings a file's data and attributes to the servers and makes them durable.
    ///
    /// # Errors
    /// I/O errors, also delayed ones this handle has not been told yet.
    pub fn fsync(&self, ctx: &Ctx<'_>, inode: &Arc<Inode>, seen: Option<&AtomicU64>) -> Res<()> {
        ctx.may_wait()?;
        if let Some(mapped) = inode.mapped.get() {
            mapped.drain();
        }
        self.write_back(ctx, inode, true)?;
        if inode.lock_raw().attr.is_none_or(|a| a.kind == Kind::File) {
            let flush = |node| {
                (
                    node,
                    ask::storage::Flush {
                        inos: vec![inode.ino],
                    },
                )
            };
            let flushed = self
                .net
                .ask_each((0..self.net.storage_count()).map(flush).collect());
            flushed.into_iter().collect::<Result<Vec<()>, _>>()?;
        }
        self.net.meta(ask::meta::Sync {})?;
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
        if let Some(mapped) = handle.inode.mapped.get().filter(|m| !m.is_empty()) {
            ctx.may_wait()?;
            mapped.drain();
        }
        if self.extension.get().is_some() && handle.inode.lent.is_taken_back() {
            // Perhaps not the application, but the kernel extension on its way to give a lease back. It must not be
            // the only one to be told; an application that closes is told, and nobody after it can be.
            return Ok(handle.inode.errors.peek(&handle.seen)?);
        }
        self.file_accessed(ctx, handle)?;
        Ok(handle.inode.errors.check(&handle.seen)?)
    }

    /// `lseek` with `SEEK_DATA` or `SEEK_HOLE`.
    ///
    /// # Errors
    /// Park; `ENXIO`, `EINVAL`.
    pub fn lseek(&self, ctx: &Ctx<'_>, inode: &Inode, offset: i64, whence: i32) -> Res<i64> {
        let guard = self.lease(ctx, inode, Mode::Shared)?;
        let mut state = self.claim_to_read(ctx, inode, guard.version(), 0, usize::MAX)?;
        let size = self.load_attr(ctx, inode, &mut state)?.size;
        let Some(from) = u64::try_from(offset).ok().filter(|&o| o < size) else {
            return fail(libc::ENXIO);
        };
        self.load_frames(ctx, inode, &mut state, 0, (size - 1) / BLOCK)?;
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
        let guards = self.lease_all(ctx, &[(from, Mode::Shared), (to, Mode::Exclusive)])?;
        self.drop_capability(ctx, to, &guards)?;
        let mut data = vec![0; len.min(MOST) as usize];
        {
            let version = guards.version_of(from.ino);
            let mut state = self.claim_to_read(ctx, from, version, from_offset, data.len())?;
            self.read_held(ctx, from, &mut state, from_offset, &mut data, true)?;
        }
        {
            let write = Write {
                offset: to_offset,
                data: &data,
                flags: WriteFlags::default(),
            };
            let mut state = self.claim_to_write(ctx, to, guards.version_of(to.ino), &write)?;
            self.write_held(ctx, to, &mut state, &write)?;
            if let Some(attr) = state.attr.as_mut() {
                kill_suid_for(attr, caller);
            }
        }
        self.note_dirty(to.ino);
        self.invalidate_attrs(to);
        Ok(data.len() as u32)
    }
}
