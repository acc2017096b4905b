//! Space set aside on the storage nodes, so that a write that has been acknowledged can also be stored.
//!
//! A storage node sets bytes aside for the mount as a whole. Here they are in the accounts until they are reserved for a
//! block (`FrameMap::reserved`); what was reserved and is not needed comes back to the accounts, and what lies there unused
//! goes back to the storage node.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use rt::sync::Mutex;
use rt::time::Instant;

use crate::session::Session;
use crate::session::ctx::{Ctx, Res, fail};
use fsd_proto::ask;
use fsd_proto::wire::PoolSpace;

/// Reserved in one request, bytes.
pub const CHUNK: u64 = 8 << 20;

/// So much of a storage node is kept in the accounts while the mount is busy.
const MOST_IDLE: u64 = 4 * CHUNK;

/// Before a full pool is told of, files that have lost their names are waited for so often, and so long at a time: in all a
/// little longer than a mount keeps what it was looked up a moment ago (`pins`).
const CLOSE_WAITS: u32 = 50;
const CLOSE_WAIT: Duration = Duration::from_millis(50);
/// After that was in vain they are not waited for again for so long: who has such a file open may keep it for days, and every
/// write to a full file system would wait.
const CLOSE_PAUSE: Duration = Duration::from_secs(10);

/// What a storage node has set aside for this mount.
#[derive(Debug, Default)]
struct Account {
    /// In all, as far as is known here.
    held: u64,
    /// Not reserved for a block.
    idle: u64,
}

#[derive(Debug, Default)]
struct All {
    accounts: HashMap<u16, Account>,
    /// Inodes whose kernel may write to blocks that something is set aside for.
    delegated: HashSet<u64>,
}

/// What is set aside, by storage node.
#[derive(Debug, Default)]
pub struct Accounts(Mutex<All>);

/// When files that have lost their names were waited for in vain.
#[derive(Debug, Default)]
pub struct ClosesAwaited(Mutex<Option<Instant>>);

impl ClosesAwaited {
    fn in_vain(&self) {
        *self.0.lock() = Some(Instant::now());
    }

    fn lately_in_vain(&self) -> bool {
        self.0.lock().is_some_and(|at| at.elapsed() < CLOSE_PAUSE)
    }
}

/// Waits for space in one operation.
#[derive(Debug, Default)]
struct Waits {
    done: u32,
    /// Nothing more is about to come back: one more attempt, and no wait.
    last: bool,
}

impl Accounts {
    /// Reserves bytes for a block, if they are there.
    pub fn take(&self, node: u16, bytes: u64) -> bool {
        let mut all = self.0.lock();
        let account = all.accounts.entry(node).or_default();
        if account.idle < bytes {
            return false;
        }
        account.idle -= bytes;
        true
    }

    /// Gives back what a block needs no more: not more than the storage node knows of, which may have restarted since.
    pub fn put(&self, node: u16, bytes: u64) {
        let mut all = self.0.lock();
        let account = all.accounts.entry(node).or_default();
        account.idle = account.idle.saturating_add(bytes).min(account.held);
    }

    /// What is not reserved.
    #[must_use]
    pub fn idle(&self, node: u16) -> u64 {
        self.0.lock().accounts.get(&node).map_or(0, |a| a.idle)
    }

    /// Is anything not reserved?
    #[must_use]
    pub fn has_idle(&self) -> bool {
        self.0.lock().accounts.values().any(|a| a.idle > 0)
    }

    /// All that is set aside, reserved or not.
    #[must_use]
    pub fn held(&self) -> Vec<(u16, u64)> {
        let all = self.0.lock();
        all.accounts.iter().map(|(&node, a)| (node, a.held)).collect()
    }

    /// A storage node has set so much more aside.
    pub fn granted(&self, node: u16, bytes: u64) {
        self.0.lock().accounts.entry(node).or_default().held += bytes;
    }

    /// A storage node has made frames out of it, or got it back.
    pub fn used(&self, node: u16, bytes: u64) {
        let mut all = self.0.lock();
        let account = all.accounts.entry(node).or_default();
        account.held = account.held.saturating_sub(bytes);
        account.idle = account.idle.min(account.held);
    }

    /// A storage node has restarted or the connection broke: its reservations are void.
    pub fn forget(&self, node: u16) {
        self.0.lock().accounts.remove(&node);
    }

    /// Takes out what there is in it beyond `keep`, to be given back.
    pub fn drain(&self, keep: u64) -> Vec<(u16, u64)> {
        let mut all = self.0.lock();
        let over = all.accounts.iter_mut().filter(|(_, a)| a.idle > keep);
        over.map(|(&node, account)| {
            let bytes = account.idle - keep;
            account.idle = keep;
            account.held = account.held.saturating_sub(bytes);
            (node, bytes)
        })
        .collect()
    }

    /// Something is set aside for what the kernel may write to an inode.
    pub fn lend(&self, ino: u64) {
        self.0.lock().delegated.insert(ino);
    }

    /// No more of an inode's.
    pub fn recalled(&self, ino: u64) {
        self.0.lock().delegated.remove(&ino);
    }

    /// Is anything set aside for what the kernel may write to an inode?
    #[must_use]
    pub fn is_delegated(&self, ino: u64) -> bool {
        self.0.lock().delegated.contains(&ino)
    }

    /// All such inodes.
    #[must_use]
    pub fn all_delegated(&self) -> Vec<u64> {
        self.0.lock().delegated.iter().copied().collect()
    }
}

/// Space set aside on the storage nodes.
pub struct Space {
    /// What is set aside.
    pub accounts: Accounts,
    /// When files without names were last waited for in vain, in a full pool.
    pub closes_awaited: ClosesAwaited,
    pub(crate) session: Arc<Session>,
}

impl Space {
    /// How full a storage node is.
    ///
    /// # Errors
    /// It cannot be reached.
    pub fn pool_space(&self, node: u16) -> Res<PoolSpace> {
        Ok(self.session.net.storage.ask(node, ask::storage::Space {})?)
    }

    /// Has a storage node set aside what is `needed` for this mount, or less, or up to what is `wanted`;
    /// returns how much it was, which is the caller's to put into the accounts, or to give back.
    ///
    /// # Errors
    /// It cannot be reached.
    pub fn ask_for_space(&self, node: u16, needed: u64, wanted: u64) -> Res<u64> {
        let granted = self
            .session
            .net
            .storage
            .ask(node, ask::storage::Reserve { needed, wanted })?;
        self.accounts.granted(node, granted);
        Ok(granted)
    }

    /// Does what needs space. Where that `lacks` some, it is done again when the blocks of files that have been removed are
    /// free, which happens after the removal has been answered; and, for a while, as files are closed that have lost their
    /// names: the kernel tells of a close when it has returned, and a mount keeps what was looked up a moment ago. Nothing may be
    /// held meanwhile, no lease and no inode: others may need it, to write what is there or to give some up.
    ///
    /// # Errors
    /// Those of `act`; park.
    pub fn with_frees<T>(
        &self,
        ctx: &Ctx<'_>,
        lacks: impl Fn(&Res<T>) -> bool,
        mut act: impl FnMut() -> Res<T>,
    ) -> Res<T> {
        let mut waits = Waits::default();
        loop {
            let result = act();
            if !lacks(&result) {
                return result;
            }
            ctx.may_wait()?;
            if !self.wait_for_frees(&mut waits) {
                return result;
            }
        }
    }

    /// False: asking again is in vain.
    fn wait_for_frees(&self, waits: &mut Waits) -> bool {
        if waits.last {
            return false;
        }
        if waits.done > 0 {
            rt::thread::sleep(CLOSE_WAIT);
        }
        waits.done += 1;
        let Ok(orphans) = self.session.net.meta.ask(ask::meta::Settle {}) else {
            return false;
        };
        if orphans > 0 && waits.done >= CLOSE_WAITS {
            self.closes_awaited.in_vain();
        }
        waits.last = orphans == 0 || self.closes_awaited.lately_in_vain();
        true
    }

    /// Sets `bytes` aside on a storage node.
    ///
    /// # Errors
    /// Park; `ENOSPC`.
    pub fn reserve(&self, ctx: &Ctx<'_>, node: u16, bytes: u64) -> Res<()> {
        if self.accounts.take(node, bytes) {
            return Ok(());
        }
        ctx.may_wait()?;
        let granted = self.ask_for_space(node, bytes, CHUNK)?;
        self.accounts.put(node, granted);
        if self.accounts.take(node, bytes) {
            return Ok(());
        }
        fail(libc::ENOSPC)
    }

    /// Tells a storage node that what was set aside, and is in no account any more, is not needed.
    pub fn give_space_back(&self, node: u16, bytes: u64) {
        if let Err(error) = self
            .session
            .net
            .storage
            .ask(node, ask::storage::Unreserve { bytes })
        {
            tracing::debug!("reservation not given back to storage node {node}: {error}");
        }
    }

    /// Gives back what is set aside and not reserved.
    pub fn return_space(&self) {
        self.return_beyond(0);
    }

    /// The same of what a busy mount has no use for, either.
    pub fn return_surplus(&self) {
        self.return_beyond(MOST_IDLE);
    }

    fn return_beyond(&self, keep: u64) {
        for (node, bytes) in self.accounts.drain(keep) {
            self.give_space_back(node, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_promised_is_promised_once() {
        let all = Accounts::default();
        assert!(!all.take(1, 1));
        all.granted(1, 100);
        all.put(1, 100);
        assert!(all.take(1, 60) && !all.take(1, 60) && all.take(1, 40));
        all.used(1, 40);
        // Of the 60 that are still reserved no more comes back than there is.
        all.put(1, 100);
        assert_eq!((all.idle(1), all.held()), (60, vec![(1, 60)]));
        assert_eq!(all.drain(50), [(1, 10)]);
        assert_eq!((all.idle(1), all.held()), (50, vec![(1, 50)]));
    }

    #[test]
    fn promises_of_a_server_that_restarted_are_void() {
        let all = Accounts::default();
        all.granted(1, 100);
        all.forget(1);
        all.put(1, 100);
        assert_eq!(all.idle(1), 0);
    }
}
