//! Open files: open, release, flush, fsync, fallocate, lseek, copy_file_range.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lockmgr::{Mode, RecordLayout};
use parking_lot::Mutex;
use rdma_transport::Op;

use super::attrs::SUID_SGID;
use super::caller::Caller;
use super::ctx::{Ctx, Res, Stop, fail};
use super::inode::Inode;
use super::pages::{PAGE, page_of};
use super::space::frame_size;
use super::{Client, MAX_FILE_SIZE};
use crate::config::CacheMode;
use crate::rpc::Errno;
use crate::storage::BLOCK;
use crate::wire::{Kind, MetaRequest, StorageReply, StorageRequest, Time};

/// In word 1 of a lease record: the inode has no name left, or is about to lose its last.
pub const FLAG_UNLINKED: u64 = 1;
/// In word 1 of a lease record: unit of the number of mounts that have the file open for writing.
pub const ONE_WRITER: u64 = 1 << 32;

/// An open file or directory.
#[derive(Debug)]
pub struct Handle {
    /// Inode.
    pub inode: Arc<Inode>,
    /// Flags of `open`.
    pub flags: i32,
    /// Reads go into the kernel's page cache.
    pub cached: bool,
    /// It is open for writing.
    pub writer: bool,
    /// Delayed errors it has been told of.
    pub seen: AtomicU64,
    /// Listing of a directory, taken when reading began.
    pub listing: Mutex<Option<super::inode::Listing>>,
    is_file: bool,
}

/// All open files of a mount.
#[derive(Debug, Default)]
pub struct Handles {
    next: AtomicU64,
    open: Mutex<HashMap<u64, Arc<Handle>>>,
}

impl Handles {
    fn add(&self, handle: Handle) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        self.open.lock().insert(number, Arc::new(handle));
        number
    }

    /// An open file.
    #[must_use]
    pub fn get(&self, number: u64) -> Option<Arc<Handle>> {
        self.open.lock().get(&number).cloned()
    }

    fn remove(&self, number: u64) -> Option<Arc<Handle>> {
        self.open.lock().remove(&number)
    }
}

impl Client {
    fn word(
        &self,
        inode: &Inode,
        offset: u64,
    ) -> Res<(Arc<dyn rdma_transport::Connection>, rdma_transport::RemoteAddr)> {
        let (conn, at) = self
            .net
            .record(inode.record())
            .map_err(|e| Stop::Errno(super::lease_errno(&e)))?;
        Ok((conn, at.plus(offset)))
    }

    /// Reads the flags word and the opens bitmap, after changing this mount's bit by `change` and the
    /// number of writing mounts by `writer`.
    fn opens(&self, inode: &Inode, change: i8, writer: i8) -> Res<(u64, Vec<u64>)> {
        let add = |unit: u64, n: i8| if n < 0 { unit.wrapping_neg() } else { unit };
        let layout = self.layout;
        let (conn, record) = self.word(inode, 0)?;
        let (offset, bit) = layout.open_bit(self.node);
        let words = layout.map_words() as usize;
        let (mut flags, mut bitmap) = ([0u8; 8], vec![0u8; words * 8]);
        let mut ops = Vec::with_capacity(4);
        if change != 0 {
            ops.push(Op::Faa {
                at: record.plus(offset),
                add: add(bit, change),
                old: 0,
            });
        }
        if writer != 0 {
            ops.push(Op::Faa {
                at: record.plus(RecordLayout::FLAGS),
                add: add(ONE_WRITER, writer),
                old: 0,
            });
        }
        ops.push(Op::Read {
            at: record.plus(RecordLayout::FLAGS),
            into: &mut flags,
        });
        ops.push(Op::Read {
            at: record.plus(layout.opens()),
            into: &mut bitmap,
        });
        conn.execute(&mut ops).map_err(|error| {
            tracing::error!("opens of {:#x}: {error}", inode.ino);
            Stop::Errno(Errno(libc::EIO))
        })?;
        let bitmap = bitmap
            .chunks_exact(8)
            .map(|b| u64::from_ne_bytes(b.try_into().unwrap_or_default()))
            .collect();
        Ok((u64::from_ne_bytes(flags), bitmap))
    }

    /// Sets or clears a flag; the number of writers beside it may change at any time.
    fn set_flag(&self, inode: &Inode, flag: u64, on: bool) -> Res<()> {
        let (conn, at) = self.word(inode, RecordLayout::FLAGS)?;
        let mut expect = if on { 0 } else { flag };
        loop {
            let new = if on { expect | flag } else { expect & !flag };
            let mut swap = [Op::Cas {
                at,
                expect,
                new,
                old: 0,
            }];
            conn.execute(&mut swap)
                .map_err(|_| Stop::Errno(Errno(libc::EIO)))?;
            match swap {
                [Op::Cas { old, .. }] if old != expect => expect = old,
                _ => return Ok(()),
            }
            if (expect & flag != 0) == on {
                return Ok(());
            }
        }
    }

    fn opened_elsewhere(&self, bitmap: &[u64]) -> bool {
        let set = self.layout.set(bitmap);
        set.iter().any(|n| n != self.node)
    }

    /// Sets the unlinked flag of an inode about to lose its last name, and tells whether it is open
    /// anywhere. The flag comes first: a last closer either sees it or is seen.
    ///
    /// # Errors
    /// The storage node cannot be reached.
    pub fn mark_unlinked(&self, ctx: &Ctx<'_>, inode: &Inode) -> Res<bool> {
        ctx.may_wait()?;
        self.set_flag(inode, FLAG_UNLINKED, true)?;
        let (_, bitmap) = self.opens(inode, 0, 0)?;
        Ok(inode.opens.lock().count > 0 || bitmap.iter().any(|&w| w != 0))
    }

    /// Takes the unlinked flag back (the unlink failed, or the record serves a new inode).
    ///
    /// # Errors
    /// The storage node cannot be reached.
    pub fn clear_unlinked(&self, inode: &Inode) -> Res<()> {
        self.set_flag(inode, FLAG_UNLINKED, false)
    }

    /// Books an open of an inode whose lease is held. Returns whether other mounts have it open, and
    /// whether for writing.
    fn count_open(&self, inode: &Inode, writer: bool) -> Res<(bool, bool)> {
        let mut opens = inode.opens.lock();
        let first_writer = writer && !opens.writer_counted;
        let (flags, bitmap) = self.opens(inode, i8::from(!opens.bit), i8::from(first_writer))?;
        opens.bit = true;
        opens.writer_counted |= writer;
        opens.count += 1;
        opens.writers += u64::from(writer);
        let writers = flags / ONE_WRITER;
        Ok((
            self.opened_elsewhere(&bitmap),
            writers > u64::from(opens.writer_counted),
        ))
    }

    /// Makes a handle for an inode whose lease is held. Returns its number and whether the kernel may cache.
    ///
    /// A stock kernel puts written data into its page cache before the lease is asked for, and drops a new
    /// file size that an invalidation overtakes. So handles for writing go past the page cache unless nobody
    /// else has the file, and handles for reading do where another mount writes.
    ///
    /// # Errors
    /// The storage node cannot be reached.
    pub fn make_handle(&self, inode: &Arc<Inode>, kind: Kind, flags: i32) -> Res<(u64, bool)> {
        let is_file = kind == Kind::File;
        let access = flags & libc::O_ACCMODE;
        let writer = is_file && access != libc::O_RDONLY;
        let mut cached = false;
        if is_file {
            let (shared, written) = self.count_open(inode, writer)?;
            cached = self.mode == CacheMode::Writethrough
                && flags & libc::O_DIRECT == 0
                && match access {
                    libc::O_RDONLY => !written,
                    libc::O_RDWR => !shared,
                    // Uncached writes cost no more, and nothing can be read through this handle.
                    _ => false,
                };
            if cached {
                inode.kernel.cached.fetch_add(1, Ordering::SeqCst);
                inode.opens.lock().cached_writers += u64::from(writer);
            }
        }
        let seen = AtomicU64::new(inode.errors.seen());
        let handle = Handle {
            inode: Arc::clone(inode),
            flags,
            cached,
            writer,
            seen,
            listing: Mutex::default(),
            is_file,
        };
        Ok((self.handles.add(handle), cached))
    }

    /// Opens a file. Returns its handle and whether the kernel may cache. A truncation may clear
    /// set-user-id bits, depending on the caller.
    ///
    /// # Errors
    /// Park; `ENOENT`, errors of a truncation.
    pub fn open(&self, ctx: &Ctx<'_>, inode: &Arc<Inode>, flags: i32, caller: Caller) -> Res<(u64, bool)> {
        let truncate = flags & libc::O_TRUNC != 0 && flags & libc::O_ACCMODE != libc::O_RDONLY;
        let mode = if truncate { Mode::Exclusive } else { Mode::Shared };
        let guard = self.lease(ctx, inode, mode)?;
        if !self.local_memory() && !inode.opens.lock().bit {
            ctx.may_wait()?;
        }
        let kind = {
            let mut state = inode.lock(ctx, guard.version())?;
            let attr = self.load_attr(ctx, inode, &mut state)?;
            if truncate && attr.kind == Kind::File {
                self.truncate(ctx, inode, &mut state, 0)?;
                if let Some(attr) = state.attr.as_mut() {
                    attr.mtime = Time::now();
                    attr.ctime = attr.mtime;
                    if attr.mode & SUID_SGID != 0 && !caller.keeps_suid() {
                        super::attrs::kill_suid(attr);
                    }
                }
                state.touch();
            }
            attr.kind
        };
        if truncate {
            self.note_dirty(inode.ino);
            self.invalidate_attrs(inode);
        }
        self.make_handle(inode, kind, flags)
    }

    /// Closes a handle.
    ///
    /// # Errors
    /// Park.
    pub fn release(&self, ctx: &Ctx<'_>, number: u64) -> Res<()> {
        let Some(handle) = self.handles.get(number) else {
            return Ok(());
        };
        if !handle.is_file {
            self.handles.remove(number);
            return Ok(());
        }
        let inode = &handle.inode;
        if !self.local_memory() && inode.opens.lock().count == 1 {
            ctx.may_wait()?;
        }
        let Some(handle) = self.handles.remove(number) else {
            return Ok(());
        };
        let mut opens = inode.opens.lock();
        opens.count = opens.count.saturating_sub(1);
        opens.writers -= u64::from(handle.writer);
        if handle.cached {
            inode.kernel.cached.fetch_sub(1, Ordering::SeqCst);
            opens.cached_writers -= u64::from(handle.writer);
        }
        let last_writer = opens.writer_counted && opens.writers == 0;
        let last = opens.bit && opens.count == 0;
        if !last && !last_writer {
            return Ok(());
        }
        let (flags, bitmap) = self.opens(inode, -i8::from(last), -i8::from(last_writer))?;
        opens.writer_counted &= !last_writer;
        if !last {
            return Ok(());
        }
        opens.bit = false;
        drop(opens);
        if flags & FLAG_UNLINKED != 0 && bitmap.iter().all(|&w| w == 0) {
            self.reap(inode);
        }
        Ok(())
    }

    /// The last close of a file without a name.
    fn reap(&self, inode: &Arc<Inode>) {
        let gone = Arc::clone(inode);
        self.net
            .meta_async(MetaRequest::Reap { ino: inode.ino }, move |result| {
                if let Err(error) = result {
                    tracing::warn!("orphan {:#x} not removed: {error}", gone.ino);
                }
            });
        self.forget_data(inode);
    }

    /// Drops what is cached of a file that is gone, and its lease.
    pub fn forget_data(&self, inode: &Inode) {
        if let Some(mut state) = inode.try_lock_raw() {
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
