//! What a mount has cached, and under which version of a lease.

pub mod claims;
pub mod delegation;
pub mod dir_cache;
pub mod durable;
pub mod edges;
pub mod errseq;
pub mod follow;
pub mod frames;
pub mod handover;
pub mod hurry;
pub mod inode;
pub mod inode_table;
pub mod lazy;
pub mod looked_up;
pub mod mapped;
pub mod opens;
pub mod pages;
pub mod path;
pub mod range;
pub mod refills;
pub mod state;
pub mod suid;
pub mod turns;
pub mod write;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use lockmgr::{Guard, LeaseError, Mode, RecordId};
use rt::channel::Sender;
use rt::sync::Mutex;
use rt::time::Instant;

use crate::cache::inode::{Granted, Inode, Locked, Source};
use crate::cache::inode_table::InodeTable;
use crate::cache::state::State;
use crate::session::ctx::{Ctx, Res, Stop, fail};
use crate::session::{Guards, Session, lease_errno};
use fsd_proto::ask;
use fsd_proto::ino;
use fsd_proto::rpc::{Errno, RpcError};
use fsd_proto::wire::Attr;

/// Longest file, bytes.
pub const MAX_FILE_SIZE: u64 = 1 << 60;

/// What all rooms stand on.
pub struct Base {
    /// Connections and threads.
    pub session: Arc<Session>,
    /// What is cached.
    pub cache: Arc<Cache>,
}

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
    /// Whether dirty files are written back before it is their time.
    pub hurry: hurry::Hurry,
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
        self.wake_writer();
    }

    /// There is something to be done in a while.
    pub fn wake_writer(&self) {
        if self.writeback_sleeps.swap(false, Ordering::SeqCst) {
            let _ = self.wake_writeback.try_send(());
        }
    }

    /// Another mount is given a file with data that is here only: if it is one of many, what else is dirty is written back now.
    pub fn taken_dirty(&self, ino: u64) {
        if self.hurry.asked(ino) {
            // Whether it sleeps for good or for a while.
            self.writeback_sleeps.store(false, Ordering::SeqCst);
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
            if state.lasting.gone {
                return fail(libc::ESTALE);
            }
            if let Some(attr) = state.attr {
                state.lasting.last = None;
                return Ok(state.shown(&attr));
            }
            ctx.may_wait()?;
            let asked = state.changes();
            let answer = state.unlocked(|| self.session.net.meta.ask(ask::meta::GetAttr { ino: inode.ino }));
            match answer {
                // Another task has changed them since they were asked for.
                Ok(_) if state.changes() != asked => {}
                Ok(attr) => {
                    // Unless another task has them already, and has perhaps changed them without telling the server.
                    state.attr.get_or_insert(attr);
                }
                Err(RpcError::Errno(Errno(libc::ENOENT))) => state.lasting.gone = true,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// As [`Cache::load_attr`]; of an inode that was looked up a moment ago, and is gone since, the last ones: that is what
    /// can be said of it. The kernel walks a path again only once, and names can be replaced faster than that.
    ///
    /// # Errors
    /// Park; `ESTALE` where nothing was known of it.
    pub fn load_last_attr(&self, ctx: &Ctx<'_>, inode: &Inode, state: &mut Locked<'_>) -> Res<Attr> {
        let last = match &state.lasting.last {
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
        let mut slot = inode.transit.granted.lock();
        if slot.is_none() {
            *slot = Some(Box::new(Granted {
                attr,
                places: None,
                source: Source::Server,
            }));
        }
    }

    /// Enters under an inode's lease, getting it if need be.
    ///
    /// # Errors
    /// Park; or the lease could not be had.
    pub fn lease(&self, ctx: &Ctx<'_>, inode: &Inode, mode: Mode) -> Res<Guard> {
        let record = inode.record();
        if self.session.fate.doomed.load(Ordering::Relaxed) {
            return fail(libc::EIO);
        }
        if let Some(guard) = self.session.leases.try_enter(record, mode) {
            return Ok(guard);
        }
        ctx.may_wait()?;
        let failed = &inode.hints.failed;
        let began = Instant::now();
        let mut told = false;
        loop {
            if !self.session.net.storage.knows_record(record) {
                self.session.net.storage.find_record(record)?;
            }
            let round = Instant::now();
            let error = match self.session.leases.enter(record, mode, self.patience(failed)) {
                Ok(guard) => {
                    failed.store(0, Ordering::Relaxed);
                    return Ok(guard);
                }
                Err(error) => error,
            };
            let in_vain = matches!(error, LeaseError::Timeout { .. } | LeaseError::Unreachable { .. });
            let away = in_vain || matches!(error, LeaseError::StorageLost { .. });
            if away && self.session.waits_on(began, round) {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!("{error}; it is waited for on: a server is away, or was a moment ago");
                }
                continue;
            }
            if in_vain {
                failed.store(self.session.now().max(1), Ordering::Relaxed);
            }
            return Err(Stop::Errno(lease_errno(&error)));
        }
    }

    /// Gets leases of inodes that are likely to be asked for next, and waits for none of them.
    pub fn lease_ahead(&self, inodes: &[u64], mode: Mode) {
        let (leases, storage) = (&self.session.leases, &self.session.net.storage);
        let lacks = |record: RecordId| {
            let held = leases.held(record);
            held.is_none_or(|(held, _)| held == Mode::Shared && mode == Mode::Exclusive)
        };
        // Each is known then, and is forgotten with its lease like any other. The record of one that is gone serves another inode.
        let known = |number: &u64| {
            let inode = self.inode(*number);
            inode.hints.foreseen.store(true, Ordering::Relaxed);
            !inode.hints.superseded.load(Ordering::SeqCst)
        };
        let wanted = inodes.iter().filter(|number| {
            let record = ino::record(**number);
            storage.knows_record(record) && lacks(record) && known(number)
        });
        let mut wanted = wanted.map(|&number| ino::record(number)).peekable();
        if wanted.peek().is_some() {
            leases.acquire_ahead(wanted, mode, Instant::now() + self.session.lease_wait);
        }
    }

    /// How long to wait for a lease; `failed`: when that was last in vain. The kernel sends changes of one directory one after the other: who
    /// comes when one has just given up has waited beside it, behind the kernel's lock, and waits only a little more.
    fn patience(&self, failed: &AtomicU64) -> Duration {
        const JUST_NOW: Duration = Duration::from_secs(1);
        let at = failed.load(Ordering::Relaxed);
        if at > 0 && self.session.now().saturating_sub(at) < JUST_NOW.as_nanos() as u64 {
            return self.session.lease_wait / 30;
        }
        self.session.lease_wait
    }

    /// Enters under several leases, in the order that all mounts keep (so that none waits for another in
    /// a circle). An inode named twice gets the stronger mode, and one guard.
    ///
    /// # Errors
    /// As [`Cache::lease`].
    pub fn lease_all(&self, ctx: &Ctx<'_>, wanted: &[(&Inode, Mode)]) -> Res<Guards> {
        let mut order: Vec<(&Inode, Mode)> = Vec::with_capacity(wanted.len());
        for &(inode, mode) in wanted {
            match order.iter_mut().find(|(i, _)| i.record() == inode.record()) {
                Some(known) if mode == Mode::Exclusive => known.1 = mode,
                Some(_) => {}
                None => order.push((inode, mode)),
            }
        }
        order.sort_by_key(|(i, _)| i.record().0);
        let mut guards = Vec::with_capacity(order.len());
        for (inode, mode) in order {
            guards.push((inode.ino, self.lease(ctx, inode, mode)?));
        }
        Ok(Guards(guards))
    }

    /// Whether the exclusive lease is here, so that a write need not wait.
    #[must_use]
    pub fn holds_exclusively(&self, inode: &Inode) -> bool {
        let held = self.session.leases.held(inode.record());
        held.is_some_and(|(mode, _)| mode == Mode::Exclusive)
    }

    pub(crate) fn holds(&self, inode: &Inode) -> bool {
        self.session.leases.held(inode.record()).is_some()
    }
}
