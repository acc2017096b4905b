//! What a mount has cached, and under which version of a lease.

pub mod claims;
pub mod delegation;
pub mod dir_cache;
pub mod edges;
pub mod errseq;
pub mod frames;
pub mod handover;
pub mod heap;
pub mod inode;
pub mod inode_table;
pub mod lazy;
pub mod looked_up;
pub mod mapped;
pub mod pages;
pub mod range;
pub mod suid;
pub mod write;

use crate::cache::inode::Granted;
use crate::cache::inode::Inode;
use crate::cache::inode::Locked;
use crate::cache::inode::Source;
use crate::cache::inode::State;
use crate::cache::inode_table::InodeTable;
use crate::session::Session;
use crate::session::ctx::Ctx;
use crate::session::ctx::Res;
use crate::session::ctx::Stop;
use crate::session::ctx::fail;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicUsize;
use std::collections::HashMap;
use rt::time::Instant;
use rt::sync::Mutex;
use rt::channel::Sender;
use fsd_proto::rpc::Errno;
use fsd_proto::rpc::RpcError;
use fsd_proto::wire::Attr;
use fsd_proto::ask;
/// Longest file, bytes.
pub const MAX_FILE_SIZE: u64 = 1 << 60;

/// What a mount has cached, and under which version.
pub struct Cache {
    /// The inodes.
    pub inodes: Arc<InodeTable>,
    /// Inodes with something to write back, and since when.
    pub dirty: Mutex<HashMap<u64, Instant>>,
    /// Wakes the writeback thread.
    pub wake_writeback: Sender<()>,
    /// The writeback thread sleeps until it is woken; else it looks by itself, every now and then.
    pub writeback_sleeps: AtomicBool,
    /// Pages in the buffer caches.
    pub cached_pages: AtomicUsize,
    /// Most pages in the buffer caches.
    pub max_pages: usize,
    pub(crate) session: Arc<Session>,
}

impl Cache {
    /// The inode of a number.
    pub fn inode(&self, number: u64) -> Arc<Inode> {
        self.inodes.get(number)
    }

    /// Notes that an inode has something to write back.
    pub fn note_dirty(&self, number: u64) {
        self.dirty.lock().entry(number).or_insert_with(Instant::now);
        if self.writeback_sleeps.swap(false, Ordering::SeqCst) {
            let _ = self.wake_writeback.try_send(());
        }
    }

    /// There is something to be done in a while.
    pub fn wake_writer(&self) {
        if self.writeback_sleeps.swap(false, Ordering::SeqCst) {
            let _ = self.wake_writeback.try_send(());
        }
    }

    /// Books a change of the number of cached pages.
    pub fn count_pages(&self, before: usize, after: usize) {
        use std::sync::atomic::Ordering::Relaxed;
        if after >= before {
            self.cached_pages.fetch_add(after - before, Relaxed);
        } else {
            self.cached_pages.fetch_sub(before - after, Relaxed);
        }
    }

    /// Drops the clean pages of a file.
    pub fn drop_clean(&self, state: &mut State) {
        let before = state.pages.len();
        state.pages.drop_clean();
        self.count_pages(before, state.pages.len());
    }

    /// Makes the attributes valid in a locked state, and returns them.
    ///
    /// # Errors
    /// Park; `ESTALE` for an inode that is gone: the kernel then walks the path again, for the name may
    /// have got another inode.
    pub fn load_attr(&self, ctx: &Ctx<'_>, inode: &Inode, state: &mut Locked<'_>) -> Res<Attr> {
        loop {
            if state.gone {
                return fail(libc::ESTALE);
            }
            if let Some(attr) = state.attr {
                state.last = None;
                return Ok(state.shown(&attr));
            }
            ctx.may_wait()?;
            let asked = state.changes();
            let answer = state.unlocked(|| self.session.net.meta(ask::meta::GetAttr { ino: inode.ino }));
            match answer {
                // Another task has changed them since they were asked for.
                Ok(_) if state.changes() != asked => {}
                Ok(attr) => {
                    // Unless another task has them already, and has perhaps changed them without telling the server.
                    state.attr.get_or_insert(attr);
                }
                Err(RpcError::Errno(Errno(libc::ENOENT))) => state.gone = true,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// As [`Client::load_attr`]; of an inode that was looked up a moment ago, and is gone since, the last ones: that is what
    /// can be said of it. The kernel walks a path again only once, and names can be replaced faster than that.
    ///
    /// # Errors
    /// Park; `ESTALE` where nothing was known of it.
    pub fn load_last_attr(&self, ctx: &Ctx<'_>, inode: &Inode, state: &mut Locked<'_>) -> Res<Attr> {
        let last = match &state.last {
            Some(last) => Some(**last),
            None => state.attr.map(|attr| state.shown(&attr)),
        };
        match (self.load_attr(ctx, inode, state), last) {
            (Err(Stop::Errno(Errno(libc::ESTALE))), Some(last)) => Ok(Attr { nlink: 0, ..last }),
            (result, _) => result,
        }
    }

    /// Attributes that came along with something else: taken over if their version is that of the lease.
    pub(crate) fn offer(&self, attr: Attr) {
        let inode = self.inode(attr.ino);
        let mut slot = inode.granted.lock();
        if slot.is_none() {
            *slot = Some(Box::new(Granted {
                attr,
                source: Source::Server,
            }));
        }
    }
}
