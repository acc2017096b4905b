//! Whole files: flush, fsync, fallocate, lseek, copy_file_range.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use lockmgr::Mode;

use super::ctx::{Ctx, Res, fail};
use super::inode::Inode;
use super::opens::Handle;
use super::pages::{PAGE, page_of};
use super::space::frame_size;
use super::{Client, MAX_FILE_SIZE};
use crate::storage::BLOCK;
use crate::wire::{Kind, MetaRequest, StorageReply, StorageRequest, Time};

impl Client {
    /// Drops what is cached of a file that is gone, and its lease.
    pub fn forget_data(&self, inode: &Inode) {
        if let Some(mut state) = inode.try_lock_raw() {
            self.abandon_pages(inode, &mut state);
            state.attr_dirty = false;
            state.gone = true;
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
        inode.mapped.drain();
        self.write_back(ctx, inode, true)?;
        let nodes: Vec<u16> = (0..self.net.storage_count()).collect();
        if inode.lock_raw().attr.is_none_or(|a| a.kind == Kind::File) {
            for node in nodes {
                let request = StorageRequest::Flush {
                    inos: vec![inode.ino],
                };
                let StorageReply::Done = self.net.ask_storage(node, &request)? else {
                    return fail(libc::EPROTO);
                };
            }
        }
        self.net.meta(&MetaRequest::Sync)?;
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
        if !handle.inode.mapped.is_empty() {
            ctx.may_wait()?;
            handle.inode.mapped.drain();
        }
        Ok(handle.inode.errors.check(&handle.seen)?)
    }

    /// `fallocate`.
    ///
    /// # Errors
    /// Park; `EOPNOTSUPP`, `EFBIG`, `ENOSPC`.
    pub fn fallocate(&self, ctx: &Ctx<'_>, inode: &Inode, offset: u64, len: u64, mode: i32) -> Res<()> {
        const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
        let Some(end) = offset.checked_add(len).filter(|&e| e <= MAX_FILE_SIZE) else {
            return fail(libc::EFBIG);
        };
        if mode & !(KEEP | PUNCH | ZERO) != 0 || (mode & PUNCH != 0 && mode != PUNCH | KEEP) {
            return fail(libc::EOPNOTSUPP);
        }
        ctx.may_wait()?;
        let guard = self.lease(ctx, inode, Mode::Exclusive)?;
        {
            let mut state = inode.lock(ctx, guard.version())?;
            let attr = self.load_attr(ctx, inode, &mut state)?;
            if mode & (PUNCH | ZERO) != 0 {
                self.discard(ctx, inode, &mut state, offset, end)?;
            }
            if mode & PUNCH == 0 {
                self.load_all_frames(ctx, inode, &mut state)?;
                let limit = MAX_FILE_SIZE.min(offset + len);
                let wants: Vec<(u64, u32)> = (offset / BLOCK..=(limit - 1) / BLOCK)
                    .map(|block| (block, frame_size(block, (limit - block * BLOCK).min(BLOCK))))
                    .take(1 << 22)
                    .collect();
                self.allocate_or_undo(inode, &mut state, &wants)?;
            }
            if let Some(attr) = state.attr.as_mut() {
                if mode & KEEP == 0 {
                    attr.size = attr.size.max(end);
                }
                attr.mtime = Time::now();
                attr.ctime = attr.mtime;
            }
            let _ = attr;
            state.touch();
        }
        self.note_dirty(inode.ino);
        self.invalidate_attrs(inode);
        drop(guard);
        Ok(())
    }

    /// Allocates frames; where that fails half-way, frees those that are new and beyond the file's end.
    fn allocate_or_undo(
        &self,
        inode: &Inode,
        state: &mut super::inode::State,
        wants: &[(u64, u32)],
    ) -> Res<()> {
        let before: Vec<u64> = state.frames.known.keys().copied().collect();
        let result = self.allocate(inode, state, wants);
        if result.is_err() {
            let fresh: Vec<u64> = state
                .frames
                .known
                .keys()
                .copied()
                .filter(|b| before.binary_search(b).is_err())
                .collect();
            for block in fresh {
                let request = StorageRequest::Free {
                    ino: inode.ino,
                    first: block,
                    last: block,
                };
                self.net
                    .ask_storage(self.storage_of(inode.ino, block), &request)?;
                state.drop_frame(block);
            }
        }
        result
    }

    /// `lseek` with `SEEK_DATA` or `SEEK_HOLE`.
    ///
    /// # Errors
    /// Park; `ENXIO`, `EINVAL`.
    pub fn lseek(&self, ctx: &Ctx<'_>, inode: &Inode, offset: i64, whence: i32) -> Res<i64> {
        let guard = self.lease(ctx, inode, Mode::Shared)?;
        let mut state = inode.lock(ctx, guard.version())?;
        let size = self.load_attr(ctx, inode, &mut state)?.size;
        let Some(from) = u64::try_from(offset).ok().filter(|&o| o < size) else {
            return fail(libc::ENXIO);
        };
        self.load_frames(ctx, inode, &mut state, 0, (size - 1) / BLOCK)?;
        // Data: what a frame covers, and cached dirty pages.
        let covered = |at: u64| -> Option<u64> {
            let frame_end = state
                .frames
                .known
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
                    .known
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
    ) -> Res<u32> {
        const MOST: u64 = 8 << 20;
        ctx.may_wait()?;
        let guards = self.lease_all(ctx, &[(from, Mode::Shared), (to, Mode::Exclusive)])?;
        let mut data = vec![0; len.min(MOST) as usize];
        {
            let mut state = from.lock(ctx, guards.version(from.ino))?;
            self.read_held(ctx, from, &mut state, from_offset, &mut data)?;
        }
        {
            let mut state = to.lock(ctx, guards.version(to.ino))?;
            self.write_held(ctx, to, &mut state, to_offset, &data)?;
        }
        self.note_dirty(to.ino);
        self.invalidate_attrs(to);
        Ok(data.len() as u32)
    }
}
