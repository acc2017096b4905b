//! Open files: handles, and what the lease record says of who has a file open.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rt::sync::Mutex;
use rt::time::Instant;

use crate::cache::inode::Inode;
use crate::data::reservations::Reservations;
use crate::kernel::caches::KernelCaches;
use crate::opens::pins::Pinning;
use crate::opens::record::OpenRecords;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res, fail};
use fsd_node::config::CacheMode;
use fsd_proto::wire::Kind;

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
    /// It counts among [`crate::cache::opens::Opens::page_writers`].
    pub(super) page_writer: bool,
    /// Delayed errors it has been told of.
    pub seen: AtomicU64,
    /// Listing of a directory, taken when reading began.
    pub listing: Mutex<Option<crate::cache::follow::Listing>>,
    pub(super) is_file: bool,
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

    /// All open files by number, and the number that was given last.
    #[must_use]
    pub fn all(&self) -> (Vec<(u64, Arc<Handle>)>, u64) {
        let open = self.open.lock();
        let all = open.iter().map(|(number, h)| (*number, Arc::clone(h)));
        (all.collect(), self.next.load(Ordering::Relaxed))
    }

    /// An open file that has its number already.
    pub(super) fn put(&self, number: u64, handle: Handle) {
        self.open.lock().insert(number, Arc::new(handle));
    }

    /// Numbers up to this have been given.
    pub fn go_on_from(&self, last: u64) {
        self.next.fetch_max(last, Ordering::Relaxed);
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

/// Open files and directories.
pub struct OpenFiles {
    /// Open files and directories.
    pub handles: Handles,
    /// Mode [`CacheMode::Writethrough`] with shared files in the page cache, as the paper's baseline has them.
    pub cache_shared: bool,
    /// Shared mappings also of files that other mounts have open ([`fsd_node::config::MountConfig::shared_mappings`]).
    pub shared_mappings: bool,
    pub(crate) session: Arc<Session>,
    pub(crate) kernel: Arc<KernelCaches>,
    pub(crate) reservations: Arc<Reservations>,
    pub(crate) records: Arc<OpenRecords>,
    pub(crate) pinning: Arc<Pinning>,
}

impl OpenFiles {
    /// Books an open of an inode whose lease is held. Returns whether other mounts have it open, and
    /// whether for writing.
    pub(super) fn count_open(&self, inode: &Arc<Inode>, writer: bool) -> Res<(bool, bool)> {
        let mut opens = inode.opens.lock();
        if opens.removed {
            return fail(libc::ESTALE);
        }
        opens.count += 1;
        opens.writers += u32::from(writer);
        let seen = self.records.record_held(inode, &mut opens);
        if seen.is_err() {
            opens.count -= 1;
            opens.writers -= u32::from(writer);
            self.pinning.record_later(inode, &opens);
        } else if writer {
            // See `attr_ttl`.
            self.kernel.invalidate_attrs(inode);
        }
        let seen = seen?;
        Ok((seen.opened_by_others(), seen.written_by_others()))
    }

    /// Others had the file open. The kernel tells a daemon late of the last close: a file that another mount has just written and closed is
    /// not to be taken for open, or it could not be mapped. Looks for a moment, and not at every open of one that stays open.
    fn look_again(&self, inode: &Inode, enough: &impl Fn(bool, bool) -> bool) -> (bool, bool) {
        const LOOKS: usize = 5;
        const PAUSE: Duration = Duration::from_micros(200);
        let mut seen = (true, true);
        let mut opens = inode.opens.lock();
        if opens.met_others() {
            return seen;
        }
        for _ in 0..LOOKS {
            rt::thread::sleep(PAUSE);
            // While its storage node is away nobody closes it either.
            let Ok(now) = self.records.look(inode, &opens) else {
                break;
            };
            seen = (now.opened_by_others(), now.written_by_others());
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
    pub fn make_handle(&self, ctx: &Ctx<'_>, inode: &Arc<Inode>, kind: Kind, flags: i32) -> Res<(u64, bool)> {
        let is_file = kind == Kind::File;
        let access = flags & libc::O_ACCMODE;
        let writer = is_file && access != libc::O_RDONLY;
        let (mut cached, mut page_writer) = (false, false);
        if is_file {
            let (shared, written) = self
                .records
                .patiently(ctx, inode, || self.count_open(inode, writer))?;
            cached = match self.kernel.mode {
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
            inode.opens.lock().page_writers += u32::from(page_writer);
            if cached
                && writer
                && self.kernel.mode == CacheMode::Writethrough
                && inode.kernel.revoking.load(Ordering::SeqCst)
            {
                // The revocation under way may have looked already whether anybody writes through the page cache.
                inode.kernel.cached.fetch_sub(1, Ordering::SeqCst);
                cached = false;
            }
            if writer {
                self.reservations.space_for_writer(inode);
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
        let recorded = {
            let opens = inode.lock_opens(ctx)?;
            opens.count == 1 && !opens.asks_nobody(handle.writer)
        };
        if recorded {
            if !self.session.local_memory() {
                ctx.may_wait()?;
            }
            self.records.reach_record(ctx, inode)?;
        }
        let Some(handle) = self.handles.remove(number) else {
            return Ok(());
        };
        let done = self.count_close(&handle);
        if handle.writer {
            self.reservations.settle_space(&handle.inode);
        }
        done
    }

    /// Closes whatever is still open, for leaving: the bits in the lease records are of a number that another mount may be given. Gives
    /// up at the first file whose storage node is not there.
    pub fn close_all(self: &Arc<Self>) {
        let mut open: Vec<u64> = self.handles.open.lock().keys().copied().collect();
        open.sort_unstable();
        for number in open {
            if let Err(stop) = self.release(&Ctx::on_worker(), number) {
                tracing::warn!("files that are still open cannot be closed: {stop:?}");
                return;
            }
        }
    }

    pub(super) fn count_close(self: &Arc<Self>, handle: &Handle) -> Res<()> {
        let inode = &handle.inode;
        let mut opens = inode.opens.lock();
        opens.count = opens.count.saturating_sub(1);
        opens.writers -= u32::from(handle.writer);
        if handle.cached {
            inode.kernel.cached.fetch_sub(1, Ordering::SeqCst);
        }
        opens.page_writers -= u32::from(handle.page_writer);
        if opens.is_recorded() {
            return Ok(());
        }
        match self.records.record(inode, &mut opens) {
            Ok(seen) if seen.is_orphan() => self.pinning.left(inode, opens),
            Ok(_) => {}
            Err(stop) => {
                self.pinning.record_later(inode, &opens);
                return Err(stop);
            }
        }
        Ok(())
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
