//! Open files: handles, and what the lease record says of who has a file open.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lockmgr::{Mode, RecordLayout};
use rdma_transport::Op;
use rt::sync::Mutex;
use rt::time::Instant;

use super::Client;
use super::attrs::kill_suid_for;
use super::caller::Caller;
use super::ctx::{Ctx, Res, Stop, fail};
use super::inode::Inode;
use super::pins::{ONE_PIN, pinned};
use fsd_node::config::CacheMode;
use fsd_proto::ask;
use fsd_proto::rpc::Errno;
use fsd_proto::wire::Kind;

/// In word 1 of a lease record: the inode has no name left, or is about to lose its last.
pub const FLAG_UNLINKED: u64 = 1;
/// In word 1 of a lease record: unit of the number of mounts that have the file open for writing.
pub const ONE_WRITER: u64 = 1 << 32;

/// What changes in the words of a lease record that say who has the file open, each by one or not at all.
#[derive(Debug, Clone, Copy, Default)]
pub struct RecordChange {
    /// This mount's bit in the opens bitmap.
    pub open: i8,
    /// The number of mounts that have it open for writing.
    pub writers: i8,
    /// The number of mounts that pin it.
    pub pins: i8,
}

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
    /// It counts among [`super::inode::Opens::page_writers`].
    page_writer: bool,
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

/// Does a handle go through the page cache of a stock kernel? `shared` says that other mounts have the file open,
/// `written` that one of them has it open for writing.
///
/// Such a kernel puts written data into its page cache before the lease is asked for, and drops a new file size that
/// an invalidation overtakes. So handles for writing go past the page cache unless nobody else has the file, and
/// handles for reading do where another mount writes.
///
/// `cache_shared` keeps them in it nevertheless. Not appends, in either case: the kernel would file those under the end
/// of file that it knows of, which another mount may have moved since the open, and later read them from there.
fn through_stock_cache(flags: i32, shared: bool, written: bool, cache_shared: bool) -> bool {
    let access = flags & libc::O_ACCMODE;
    if flags & libc::O_DIRECT != 0 || (flags & libc::O_APPEND != 0 && access != libc::O_RDONLY) {
        return false;
    }
    if cache_shared {
        return true;
    }
    match access {
        libc::O_RDONLY => !written,
        libc::O_RDWR => !shared,
        // Uncached writes cost no more, and nothing can be read through this handle.
        _ => false,
    }
}

impl Client {
    /// Waits until the storage node that has an inode's record is there: one that is just being started again is no error yet. Not while
    /// `opens` is locked, nor on a thread that brings answers from the fabric.
    fn reach_record(&self, inode: &Inode) -> Res<()> {
        let record = inode.record();
        if !self.net.knows_record(record) {
            self.net.find_record(record)?;
        }
        Ok(())
    }

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

    /// Makes a change, then reads the flags word and the opens bitmap.
    ///
    /// # Errors
    /// The storage node cannot be reached.
    pub fn change_record(&self, inode: &Inode, change: RecordChange) -> Res<(u64, Vec<u64>)> {
        let add = |unit: u64, n: i8| if n < 0 { unit.wrapping_neg() } else { unit };
        let layout = self.layout;
        let (conn, record) = self.word(inode, 0)?;
        let (offset, bit) = layout.open_bit(self.node);
        let words = layout.map_words() as usize;
        let (mut flags, mut bitmap) = ([0u8; 8], vec![0u8; words * 8]);
        let mut ops = Vec::with_capacity(5);
        if change.open != 0 {
            ops.push(Op::Faa {
                at: record.plus(offset),
                add: add(bit, change.open),
                old: 0,
            });
        }
        for (unit, n) in [(ONE_WRITER, change.writers), (ONE_PIN, change.pins)] {
            if n != 0 {
                ops.push(Op::Faa {
                    at: record.plus(RecordLayout::FLAGS),
                    add: add(unit, n),
                    old: 0,
                });
            }
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

    /// Sets the unlinked flag of an inode about to lose its last name to a request of `thread`, and tells whether it is in use: open
    /// anywhere, or looked up a moment ago. The flag comes first: a last closer either sees it or is seen. If it is not in use,
    /// nobody can open it any more.
    ///
    /// # Errors
    /// The storage node cannot be reached.
    pub fn mark_unlinked(&self, ctx: &Ctx<'_>, inode: &Arc<Inode>, thread: u32) -> Res<bool> {
        ctx.may_wait()?;
        self.reach_record(inode)?;
        self.set_flag(inode, FLAG_UNLINKED, true)?;
        let used = self.is_used(inode, thread);
        if used.is_err() {
            // The name stays; with the flag the next last close would take the file for one without.
            self.clear_unlinked(inode)?;
        }
        used
    }

    fn is_used(&self, inode: &Arc<Inode>, thread: u32) -> Res<bool> {
        let mut opens = inode.opens.lock();
        if inode.looked_up.is_fresh(Some(thread)) {
            self.pin_held(inode, &mut opens)?;
            return Ok(true);
        }
        let (flags, bitmap) = self.change_record(inode, RecordChange::default())?;
        let used = opens.count > 0 || pinned(flags) || bitmap.iter().any(|&w| w != 0);
        opens.removed = !used;
        Ok(used)
    }

    /// Takes the unlinked flag back (the unlink failed, or the record serves a new inode).
    ///
    /// # Errors
    /// The storage node cannot be reached.
    pub fn clear_unlinked(&self, inode: &Inode) -> Res<()> {
        inode.opens.lock().removed = false;
        self.set_flag(inode, FLAG_UNLINKED, false)
    }

    /// Books an open of an inode whose lease is held. Returns whether other mounts have it open, and
    /// whether for writing.
    fn count_open(&self, inode: &Inode, writer: bool) -> Res<(bool, bool)> {
        let mut opens = inode.opens.lock();
        if opens.removed {
            return fail(libc::ESTALE);
        }
        let first_writer = writer && !opens.writer_counted;
        let change = RecordChange {
            open: i8::from(!opens.bit),
            writers: i8::from(first_writer),
            pins: 0,
        };
        let (flags, bitmap) = self.change_record(inode, change)?;
        opens.bit = true;
        opens.writer_counted |= writer;
        opens.count += 1;
        opens.writers += u64::from(writer);
        if writer {
            // See `attr_ttl`.
            self.invalidate_attrs(inode);
        }
        let writers = flags / ONE_WRITER;
        Ok((
            self.opened_elsewhere(&bitmap),
            writers > u64::from(opens.writer_counted),
        ))
    }

    /// Others had the file open. The kernel tells a daemon late of the last close: a file that another mount has just written and closed is
    /// not to be taken for open, or it could not be mapped. Looks for a moment, and not at every open of one that stays open.
    fn look_again(&self, inode: &Inode, enough: &impl Fn(bool, bool) -> bool) -> (bool, bool) {
        const LOOKS: usize = 5;
        const PAUSE: Duration = Duration::from_micros(200);
        const NOT_BEFORE: Duration = Duration::from_secs(1);
        let mut seen = (true, true);
        let mut opens = inode.opens.lock();
        if opens.looked_again.is_some_and(|at| at.elapsed() < NOT_BEFORE) {
            return seen;
        }
        for _ in 0..LOOKS {
            rt::thread::sleep(PAUSE);
            // While its storage node is away nobody closes it either.
            let Ok((flags, bitmap)) = self.change_record(inode, RecordChange::default()) else {
                break;
            };
            let written = flags / ONE_WRITER > u64::from(opens.writer_counted);
            seen = (self.opened_elsewhere(&bitmap), written);
            if enough(seen.0, seen.1) {
                return seen;
            }
        }
        opens.looked_again = Some(Instant::now());
        seen
    }

    /// Makes a handle for an inode whose lease is held. Returns its number and whether the kernel may cache.
    ///
    /// # Errors
    /// The storage node cannot be reached.
    pub fn make_handle(&self, inode: &Arc<Inode>, kind: Kind, flags: i32) -> Res<(u64, bool)> {
        let is_file = kind == Kind::File;
        let access = flags & libc::O_ACCMODE;
        let writer = is_file && access != libc::O_RDONLY;
        let (mut cached, mut page_writer) = (false, false);
        if is_file {
            self.reach_record(inode)?;
            let (shared, written) = self.count_open(inode, writer)?;
            cached = match self.mode {
                // The kernel extension enters the lease for each call, O_DIRECT included.
                CacheMode::Writeback => true,
                CacheMode::Writethrough => {
                    let through =
                        |shared, written| through_stock_cache(flags, shared, written, self.cache_shared);
                    through(shared, written)
                        || (through(false, false) && {
                            let (shared, written) = self.look_again(inode, &through);
                            through(shared, written)
                        })
                }
                _ => false,
            };
            if cached {
                inode.kernel.cached.fetch_add(1, Ordering::SeqCst);
            }
            page_writer = writer && (cached || (access == libc::O_RDWR && self.shared_mappings));
            inode.opens.lock().page_writers += u64::from(page_writer);
            if cached
                && writer
                && self.mode == CacheMode::Writethrough
                && inode.kernel.revoking.load(Ordering::SeqCst)
            {
                // The revocation under way may have looked already whether anybody writes through the page cache.
                inode.kernel.cached.fetch_sub(1, Ordering::SeqCst);
                cached = false;
            }
            if writer {
                self.space_for_writer(inode);
            }
        }
        let seen = AtomicU64::new(inode.errors.seen());
        let handle = Handle {
            inode: Arc::clone(inode),
            flags,
            cached,
            writer,
            page_writer,
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
        if truncate {
            self.drop_capability(ctx, inode, &guard)?;
        }
        if !self.local_memory() && !inode.opens.lock().bit {
            ctx.may_wait()?;
        }
        let kind = {
            let mut state = inode.lock(ctx, guard.version())?;
            let attr = self.load_attr(ctx, inode, &mut state)?;
            if truncate && attr.kind == Kind::File {
                self.truncate(ctx, inode, &mut state, 0)?;
                if let Some(attr) = state.attr.as_mut() {
                    attr.mtime = self.net.now();
                    attr.ctime = attr.mtime;
                    kill_suid_for(attr, caller);
                }
                state.touch();
                if let Some(attr) = &state.attr {
                    self.lent_attr_changed(inode, attr);
                }
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
    pub fn release(self: &Arc<Self>, ctx: &Ctx<'_>, number: u64) -> Res<()> {
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
        if inode.opens.lock().count == 1 {
            self.reach_record(inode)?;
        }
        let Some(handle) = self.handles.remove(number) else {
            return Ok(());
        };
        let done = self.count_close(&handle);
        if handle.writer {
            self.settle_space(&handle.inode);
        }
        done
    }

    fn count_close(self: &Arc<Self>, handle: &Handle) -> Res<()> {
        let inode = &handle.inode;
        let mut opens = inode.opens.lock();
        opens.count = opens.count.saturating_sub(1);
        opens.writers -= u64::from(handle.writer);
        if handle.cached {
            inode.kernel.cached.fetch_sub(1, Ordering::SeqCst);
        }
        opens.page_writers -= u64::from(handle.page_writer);
        let last_writer = opens.writer_counted && opens.writers == 0;
        let last = opens.bit && opens.count == 0;
        if !last && !last_writer {
            return Ok(());
        }
        let change = RecordChange {
            open: -i8::from(last),
            writers: -i8::from(last_writer),
            pins: 0,
        };
        let (flags, bitmap) = self.change_record(inode, change)?;
        opens.writer_counted &= !last_writer;
        if !last {
            return Ok(());
        }
        opens.bit = false;
        if flags & FLAG_UNLINKED != 0 && !pinned(flags) && bitmap.iter().all(|&w| w == 0) {
            opens.removed = true;
            drop(opens);
            self.reap(inode);
        }
        Ok(())
    }

    /// The last close of a file without a name. Aside, for it waits for other mounts; but for one that leaves, whose workers end.
    pub(super) fn reap(self: &Arc<Self>, inode: &Arc<Inode>) {
        if self.leaving.load(Ordering::SeqCst) {
            return self.reap_alone(inode);
        }
        let (me, gone) = (Arc::clone(self), Arc::clone(inode));
        self.workers.run(move || me.reap_alone(&gone));
    }

    /// Removes an orphan under its exclusive lease. A mount that closed the file before may still have data of it to store: that must
    /// not come into frames that have been freed, and are perhaps another file's by then.
    fn reap_alone(&self, inode: &Arc<Inode>) {
        let reaped = self
            .lease(&Ctx::on_worker(), inode, Mode::Exclusive)
            .and_then(|guard| {
                self.net.meta(ask::meta::Reap { ino: inode.ino })?;
                self.forget_data(inode);
                drop(guard);
                Ok(())
            });
        if let Err(stop) = reaped {
            tracing::warn!("orphan {:#x} not removed: {stop:?}", inode.ino);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::through_stock_cache;
    use libc::{O_APPEND, O_DIRECT, O_RDONLY, O_RDWR, O_WRONLY};

    #[test]
    fn a_file_that_others_write_goes_past_the_page_cache() {
        let cached = |flags, shared, written| through_stock_cache(flags, shared, written, false);
        assert!(cached(O_RDONLY, true, false) && !cached(O_RDONLY, true, true));
        assert!(cached(O_RDWR, false, false) && !cached(O_RDWR, true, false));
        assert!(!cached(O_WRONLY, false, false));
        assert!(!cached(O_RDWR | O_DIRECT, false, false));
        assert!(!cached(O_RDWR | O_APPEND, false, false) && cached(O_RDONLY | O_APPEND, false, false));
    }

    #[test]
    fn cache_shared_keeps_it_there_but_for_appends() {
        let cached = |flags| through_stock_cache(flags, true, true, true);
        assert!([O_RDONLY, O_RDWR, O_WRONLY].into_iter().all(cached));
        assert!(!cached(O_RDWR | O_APPEND) && !cached(O_WRONLY | O_APPEND));
        assert!(!cached(O_RDONLY | O_DIRECT));
    }
}
