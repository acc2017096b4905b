//! What this mount has carried out of the namespace itself, under exclusive leases, and is still to tell the metadata server.
//!
//! A change is answered to its program when it is in here. It goes to the server a moment later, together with what comes meanwhile, in
//! order. Whatever else is asked of the server that concerns an inode waits until the server has carried out the changes of that
//! inode; so does giving its lease up, for others then ask the server.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rt::sync::{Condvar, Mutex};
use rt::time::Instant;

use fsd_proto::rpc::Errno;
use fsd_proto::wire::{Carried, MetaRequest, NamespaceOp};

/// How long a change waits for others to go with it, unless somebody waits for it.
const GATHER: Duration = Duration::from_millis(2);
/// Most changes in one message.
const MOST: usize = 128;
/// Bytes of names and targets in one message, about.
const BYTES: usize = 32 << 10;
/// Most changes that wait: who makes another one waits until there are fewer.
const WAITING: usize = 2048;
/// It took too long.
const LATE: InVain = InVain(Errno(libc::ETIMEDOUT));
/// How often those who wait look whether it is of any use.
const LOOK: Duration = Duration::from_millis(500);

/// The inodes that a request concerns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Concern {
    /// None.
    Nothing,
    /// These.
    Inodes(Vec<u64>),
    /// Everything that this mount has done.
    Everything,
}

/// What a request concerns: what has been done to that the server must know before it is asked.
pub(super) fn concern(request: &MetaRequest) -> Concern {
    use MetaRequest as R;
    match request {
        R::Clock
        | R::Join { .. }
        | R::Tables { .. }
        | R::Peer { .. }
        | R::ReserveInodes { .. }
        | R::Replay { .. }
        | R::WriteBack { .. }
        | R::StatFs
        | R::Heartbeat
        | R::Evict { .. }
        | R::Relay { .. }
        | R::Status
        | R::Cluster => Concern::Nothing,
        // Whoever gets the locks goes on with everything else, too.
        R::Leave | R::Sync | R::Settle | R::GiveLocks { .. } => Concern::Everything,
        R::Lookup { parent, .. } | R::LookupAgain { parent, .. } => Concern::Inodes(vec![*parent]),
        R::GetAttr { ino }
        | R::ReadDir { ino, .. }
        | R::ReadLink { ino }
        | R::GetXattrs { ino }
        | R::Reap { ino } => Concern::Inodes(vec![*ino]),
        R::ReleaseLocks { ino, .. } => Concern::Inodes(vec![*ino]),
        R::GetLock { lock } | R::SetLock { lock, .. } | R::CancelLock { lock } => {
            Concern::Inodes(vec![lock.ino])
        }
        R::Namespace { touched, op, .. } => Concern::Inodes(op.inodes(touched).collect()),
        R::Update { updates } => Concern::Inodes(updates.iter().map(|u| u.ino).collect()),
    }
}

/// Changes on their way.
#[derive(Debug, Default)]
struct Queue {
    /// Those that have not been answered, in order.
    waiting: VecDeque<Carried>,
    /// The number of the first of them.
    first: u64,
    /// The last one that concerns an inode, while it has not been answered.
    last: HashMap<u64, u64>,
    /// Somebody waits for those up to this one.
    wanted: u64,
    /// No more are sent.
    ended: bool,
    /// Why the server takes none just now.
    trouble: Option<Errno>,
}

impl Queue {
    fn next(&self) -> u64 {
        self.first + self.waiting.len() as u64
    }

    /// The last change that a request has to wait for, if it has not been answered.
    fn needed(&self, concern: &Concern) -> Option<u64> {
        match concern {
            Concern::Nothing => None,
            Concern::Inodes(inos) => inos.iter().filter_map(|ino| self.last.get(ino)).max().copied(),
            Concern::Everything => self.next().checked_sub(1).filter(|n| *n >= self.first),
        }
    }

    /// The changes to be sent next.
    fn part(&self) -> Vec<Carried> {
        let mut bytes = 0;
        let fits = |change: &&Carried| {
            bytes += len_of(&change.op);
            bytes <= BYTES
        };
        let some: Vec<Carried> = self.waiting.iter().take(MOST).take_while(fits).cloned().collect();
        if some.is_empty() {
            self.waiting.front().cloned().into_iter().collect()
        } else {
            some
        }
    }

    /// The first `count` have been answered.
    fn answered(&mut self, count: usize) {
        for change in self.waiting.drain(..count) {
            for ino in change.inodes() {
                if self.last.get(&ino) == Some(&self.first) {
                    self.last.remove(&ino);
                }
            }
            self.first += 1;
        }
    }
}

/// About how many bytes a change takes besides what all take.
fn len_of(op: &NamespaceOp) -> usize {
    const ALL: usize = 128;
    let names = match op {
        NamespaceOp::Create { name, target, .. } => name.len() + target.len(),
        NamespaceOp::Link { name, .. }
        | NamespaceOp::Unlink { name, .. }
        | NamespaceOp::Rmdir { name, .. }
        | NamespaceOp::RemoveXattr { name, .. } => name.len(),
        NamespaceOp::Rename { name, new_name, .. } => name.len() + new_name.len(),
        NamespaceOp::SetXattr { name, value, .. } => name.len() + value.len(),
    };
    ALL + names
}

/// Why somebody waits in vain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InVain(pub(super) Errno);

/// Changes that are still to be told.
#[derive(Debug)]
pub(super) struct Outbox {
    queue: Mutex<Queue>,
    /// There is something to be sent, or somebody waits for it.
    stirred: Condvar,
    /// Some have been answered.
    answered: Condvar,
    /// There is nothing: looked at without the lock.
    empty: AtomicBool,
}

impl Default for Outbox {
    fn default() -> Self {
        let queue = Queue {
            first: 1,
            ..Queue::default()
        };
        Self {
            queue: Mutex::new(queue),
            stirred: Condvar::new(),
            answered: Condvar::new(),
            empty: AtomicBool::new(true),
        }
    }
}

impl Outbox {
    /// Takes a change in, which is thereby carried out. Does not wait. It comes back where nothing is sent any more.
    pub(super) fn push(&self, change: Carried) -> Result<(), Box<Carried>> {
        let mut queue = self.queue.lock();
        if queue.ended {
            return Err(Box::new(change));
        }
        let number = queue.next();
        for ino in change.inodes() {
            queue.last.insert(ino, number);
        }
        let idle = queue.waiting.is_empty();
        queue.waiting.push_back(change);
        self.empty.store(false, Ordering::SeqCst);
        if idle || queue.waiting.len() == MOST {
            self.stirred.notify_all();
        }
        Ok(())
    }

    /// Waits until there is room for another change. `give_up` says whether that is of no use any more.
    pub(super) fn make_room(&self, give_up: impl Fn() -> bool) -> Result<(), InVain> {
        if self.empty.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut queue = self.queue.lock();
        if let Some(error) = queue.trouble.filter(|_| !queue.waiting.is_empty()) {
            return Err(InVain(error));
        }
        while queue.waiting.len() >= WAITING && !queue.ended {
            if give_up() {
                return Err(LATE);
            }
            self.answered.wait_for(&mut queue, LOOK);
        }
        Ok(())
    }

    /// Has everything that concerns a request been answered?
    pub(super) fn is_settled(&self, concern: impl FnOnce() -> Concern) -> bool {
        self.empty.load(Ordering::SeqCst) || self.queue.lock().needed(&concern()).is_none()
    }

    /// Waits until everything that concerns a request has been answered. `give_up` says whether that is of no use any more.
    pub(super) fn settle(
        &self,
        concern: impl FnOnce() -> Concern,
        give_up: impl Fn() -> bool,
    ) -> Result<(), InVain> {
        if self.empty.load(Ordering::SeqCst) {
            return Ok(());
        }
        let concern = concern();
        if concern == Concern::Nothing {
            return Ok(());
        }
        let mut queue = self.queue.lock();
        let Some(number) = queue.needed(&concern) else {
            return Ok(());
        };
        if queue.wanted < number {
            queue.wanted = number;
            self.stirred.notify_all();
        }
        while queue.first <= number {
            if queue.ended || give_up() {
                return Err(LATE);
            }
            if let Some(error) = queue.trouble {
                return Err(InVain(error));
            }
            self.answered.wait_for(&mut queue, LOOK);
        }
        Ok(())
    }

    /// Waits for changes to be sent, together with those that come within a moment: the number of the first, and the changes. None:
    /// nothing is sent any more.
    pub(super) fn next(&self) -> Option<(u64, Vec<Carried>)> {
        let mut queue = self.queue.lock();
        while queue.waiting.is_empty() {
            if queue.ended {
                return None;
            }
            self.stirred.wait(&mut queue);
        }
        let until = Instant::now() + GATHER;
        while queue.waiting.len() < MOST && queue.wanted < queue.first && !queue.ended {
            if self.stirred.wait_until(&mut queue, until).timed_out() {
                break;
            }
        }
        (!queue.ended).then(|| (queue.first, queue.part()))
    }

    /// The first `count` changes have been carried out by the server, or refused.
    pub(super) fn done(&self, count: usize) {
        let mut queue = self.queue.lock();
        queue.answered(count);
        self.empty.store(queue.waiting.is_empty(), Ordering::SeqCst);
        drop(queue);
        self.answered.notify_all();
    }

    /// The server takes none just now, or does again.
    pub(super) fn trouble(&self, why: Option<Errno>) {
        self.queue.lock().trouble = why;
        self.answered.notify_all();
    }

    /// Is nothing sent any more?
    pub(super) fn is_ended(&self) -> bool {
        self.queue.lock().ended
    }

    /// Nothing is sent any more: what is still here is lost.
    pub(super) fn end(&self) -> usize {
        let mut queue = self.queue.lock();
        queue.ended = true;
        let lost = queue.waiting.len();
        drop(queue);
        self.stirred.notify_all();
        self.answered.notify_all();
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsd_proto::wire::{Time, Touched};

    fn unlink(parent: u64, ino: u64) -> Carried {
        let touched = [parent, ino].map(|ino| Touched { ino, version: 1 });
        Carried {
            now: Time(0),
            touched: touched.to_vec(),
            op: NamespaceOp::Unlink {
                parent,
                name: vec![b'a'; 200],
                ino,
                keep: false,
            },
            cookie: 0,
        }
    }

    fn settled(outbox: &Outbox, ino: u64) -> bool {
        outbox.is_settled(|| Concern::Inodes(vec![ino]))
    }

    #[test]
    fn what_has_been_answered_is_not_waited_for() {
        let outbox = Outbox::default();
        assert!(outbox.is_settled(|| Concern::Everything));
        for ino in [11, 12, 13] {
            outbox.push(unlink(1, ino)).unwrap();
        }
        let (first, part) = outbox.next().unwrap();
        assert_eq!((first, part.len()), (1, 3));
        outbox.done(2);
        assert!(settled(&outbox, 11) && settled(&outbox, 12) && settled(&outbox, 99));
        assert!(!settled(&outbox, 13) && !settled(&outbox, 1) && !outbox.is_settled(|| Concern::Everything));
        assert_eq!(outbox.settle(|| Concern::Inodes(vec![1]), || true), Err(LATE));
        outbox.trouble(Some(Errno(libc::ENOSPC)));
        let full = Err(InVain(Errno(libc::ENOSPC)));
        assert_eq!(
            (
                outbox.make_room(|| false),
                outbox.settle(|| Concern::Everything, || false)
            ),
            (full, full)
        );
        outbox.trouble(None);
        assert_eq!(outbox.next().unwrap().0, 3);
        outbox.done(1);
        assert!(settled(&outbox, 1) && outbox.is_settled(|| Concern::Everything));
        assert_eq!(outbox.settle(|| Concern::Everything, || true), Ok(()));
        assert_eq!(outbox.end(), 0);
        assert!(outbox.next().is_none() && outbox.push(unlink(1, 14)).is_err());
    }

    #[test]
    fn messages_are_bounded() {
        let outbox = Outbox::default();
        for ino in 0..WAITING as u64 {
            outbox.push(unlink(1, ino)).unwrap();
        }
        let part = outbox.next().unwrap().1;
        assert!(part.len() <= MOST && part.iter().map(|c| len_of(&c.op)).sum::<usize>() <= BYTES);
        assert_eq!(outbox.make_room(|| true), Err(LATE));
        outbox.done(part.len());
        assert_eq!(outbox.make_room(|| true), Ok(()));
    }

    #[test]
    fn requests_concern_what_they_ask_about() {
        let get = |ino| MetaRequest::GetAttr { ino };
        assert_eq!(concern(&get(7)), Concern::Inodes(vec![7]));
        assert_eq!(concern(&MetaRequest::Sync), Concern::Everything);
        assert_eq!(concern(&MetaRequest::Heartbeat), Concern::Nothing);
        let Carried { now, touched, op, .. } = unlink(1, 5);
        let change = MetaRequest::Namespace {
            seq: 1,
            acknowledged: 1,
            now,
            touched,
            op,
        };
        assert_eq!(concern(&change), Concern::Inodes(vec![1, 5]));
    }
}
