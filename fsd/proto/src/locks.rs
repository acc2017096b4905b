//! File locks (`fcntl` byte ranges and whole-file `flock`) of the whole cluster; pure, no I/O.
//!
//! Waiters are served in the order they came where they do not conflict. A cycle of owners that wait for
//! each other is refused with `EDEADLK`, as POSIX allows.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::wire::{LockKind, LockOwner, LockRange, LockSpec};

/// Names a waiting request.
pub type Ticket = u64;

/// What became of a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The lock is set (or cleared).
    Done,
    /// Another lock is in the way.
    Conflict,
    /// The request waits; it is answered later.
    Waiting,
    /// Waiting would never end.
    Deadlock,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    owner: LockOwner,
    pid: u32,
    range: LockRange,
    kind: LockKind,
}

impl Held {
    fn spec(&self, ino: u64) -> LockSpec {
        LockSpec {
            ino,
            owner: self.owner,
            pid: self.pid,
            range: self.range,
            kind: Some(self.kind),
        }
    }
}

#[derive(Debug, Default)]
struct File {
    held: Vec<Held>,
    waiting: VecDeque<(Ticket, LockSpec)>,
}

/// All locks.
#[derive(Debug, Default)]
pub struct LockTable {
    files: HashMap<u64, File>,
}

/// Can two owners be in each other's way? `flock` and `fcntl` locks cannot.
fn strangers(a: LockOwner, b: LockOwner) -> bool {
    a != b && a.flock == b.flock
}

fn overlap(a: LockRange, b: LockRange) -> bool {
    a.start <= b.end && b.start <= a.end
}

impl File {
    fn conflict(&self, lock: &LockSpec, kind: LockKind) -> Option<&Held> {
        self.held.iter().find(|h| {
            strangers(h.owner, lock.owner)
                && overlap(h.range, lock.range)
                && (kind == LockKind::Write || h.kind == LockKind::Write)
        })
    }

    /// Cuts the owner's locks out of a range, then adds the new one and joins what touches.
    fn apply(&mut self, lock: &LockSpec) {
        let mut kept = Vec::with_capacity(self.held.len() + 2);
        for h in self.held.drain(..) {
            if h.owner != lock.owner || !overlap(h.range, lock.range) {
                kept.push(h);
                continue;
            }
            if h.range.start < lock.range.start {
                kept.push(Held {
                    range: LockRange {
                        start: h.range.start,
                        end: lock.range.start - 1,
                    },
                    ..h
                });
            }
            if h.range.end > lock.range.end {
                kept.push(Held {
                    range: LockRange {
                        start: lock.range.end + 1,
                        end: h.range.end,
                    },
                    ..h
                });
            }
        }
        if let Some(kind) = lock.kind {
            let mut new = Held {
                owner: lock.owner,
                pid: lock.pid,
                range: lock.range,
                kind,
            };
            kept.retain(|h| {
                let joins = h.owner == new.owner
                    && h.kind == kind
                    && (h.range.end.checked_add(1) == Some(new.range.start)
                        || new.range.end.checked_add(1) == Some(h.range.start));
                if joins {
                    new.range.start = new.range.start.min(h.range.start);
                    new.range.end = new.range.end.max(h.range.end);
                }
                !joins
            });
            kept.push(new);
        }
        self.held = kept;
    }

    /// Serves the waiters that can be; returns their tickets.
    fn serve(&mut self) -> Vec<Ticket> {
        let mut served = Vec::new();
        let mut i = 0;
        while i < self.waiting.len() {
            let (ticket, lock) = self.waiting[i];
            let free = lock.kind.is_none_or(|kind| {
                self.conflict(&lock, kind).is_none()
                    // Not past an earlier waiter that wants the same bytes: writers would starve.
                    && !self.waiting.iter().take(i).any(|(_, w)| {
                        strangers(w.owner, lock.owner)
                            && overlap(w.range, lock.range)
                            && (w.kind == Some(LockKind::Write) || kind == LockKind::Write)
                    })
            });
            if free {
                self.waiting.remove(i);
                self.apply(&lock);
                served.push(ticket);
            } else {
                i += 1;
            }
        }
        served
    }
}

impl LockTable {
    /// The lock that keeps `lock` from being set, if any.
    #[must_use]
    pub fn test(&self, lock: &LockSpec) -> Option<LockSpec> {
        let kind = lock.kind?;
        self.files
            .get(&lock.ino)?
            .conflict(lock, kind)
            .map(|h| h.spec(lock.ino))
    }

    /// Sets, clears or waits for a lock. The tickets are those of waiters that were served thereby.
    pub fn set(&mut self, lock: &LockSpec, wait: Option<Ticket>) -> (Outcome, Vec<Ticket>) {
        let file = self.files.entry(lock.ino).or_default();
        if let Some(kind) = lock.kind
            && file.conflict(lock, kind).is_some()
        {
            let Some(ticket) = wait else {
                return (Outcome::Conflict, Vec::new());
            };
            file.waiting.push_back((ticket, *lock));
            // For flock(2) nobody looks after that.
            if !lock.owner.flock && self.waits_for_itself(lock.owner) {
                self.cancel_ticket(lock.ino, ticket);
                return (Outcome::Deadlock, Vec::new());
            }
            return (Outcome::Waiting, Vec::new());
        }
        file.apply(lock);
        let served = file.serve();
        self.tidy(lock.ino);
        (Outcome::Done, served)
    }

    /// Notes what has become of an owner's locks elsewhere, whoever else seems to be in the way.
    pub fn record(&mut self, lock: &LockSpec) {
        self.files.entry(lock.ino).or_default().apply(lock);
        self.tidy(lock.ino);
    }

    /// All locks that are held.
    #[must_use]
    pub fn held(&self) -> Vec<LockSpec> {
        let files = self.files.iter();
        files
            .flat_map(|(&ino, file)| file.held.iter().map(move |h| h.spec(ino)))
            .collect()
    }

    /// Does an owner hold anything on a file?
    #[must_use]
    pub fn holds(&self, ino: u64, owner: LockOwner) -> bool {
        self.files
            .get(&ino)
            .is_some_and(|f| f.held.iter().any(|h| h.owner == owner))
    }

    /// Drops the waiting requests of a mount: it has come on a new connection, and asks again.
    pub fn forget_waiters(&mut self, node: u16) -> Vec<Ticket> {
        let inos: Vec<u64> = self.files.keys().copied().collect();
        let mut served = Vec::new();
        for ino in inos {
            if let Some(file) = self.files.get_mut(&ino) {
                file.waiting.retain(|(_, l)| l.owner.node != node);
                served.extend(file.serve());
            }
            self.tidy(ino);
        }
        served
    }

    /// Owners that `owner` waits for, directly.
    fn blockers(&self, owner: LockOwner) -> Vec<LockOwner> {
        let mut found = Vec::new();
        for file in self.files.values() {
            for (_, lock) in file.waiting.iter().filter(|(_, l)| l.owner == owner) {
                let Some(kind) = lock.kind else { continue };
                found.extend(
                    file.held
                        .iter()
                        .filter(|h| {
                            strangers(h.owner, owner)
                                && overlap(h.range, lock.range)
                                && (kind == LockKind::Write || h.kind == LockKind::Write)
                        })
                        .map(|h| h.owner),
                );
            }
        }
        found
    }

    fn waits_for_itself(&self, owner: LockOwner) -> bool {
        let mut seen = HashSet::new();
        let mut todo = self.blockers(owner);
        while let Some(next) = todo.pop() {
            if next == owner {
                return true;
            }
            if seen.insert(next) {
                todo.extend(self.blockers(next));
            }
        }
        false
    }

    fn cancel_ticket(&mut self, ino: u64, ticket: Ticket) {
        if let Some(file) = self.files.get_mut(&ino) {
            file.waiting.retain(|(t, _)| *t != ticket);
        }
        self.tidy(ino);
    }

    /// Takes a waiting request out; returns its ticket (to be answered) and those served thereby.
    pub fn cancel(&mut self, lock: &LockSpec) -> (Option<Ticket>, Vec<Ticket>) {
        let Some(file) = self.files.get_mut(&lock.ino) else {
            return (None, Vec::new());
        };
        let at = file
            .waiting
            .iter()
            .position(|(_, l)| l.owner == lock.owner && l.range == lock.range);
        let ticket = at.and_then(|i| file.waiting.remove(i)).map(|(t, _)| t);
        let served = file.serve();
        self.tidy(lock.ino);
        (ticket, served)
    }

    fn drop_where(&mut self, ino: u64, gone: impl Fn(&LockOwner) -> bool) -> Vec<Ticket> {
        let Some(file) = self.files.get_mut(&ino) else {
            return Vec::new();
        };
        file.held.retain(|h| !gone(&h.owner));
        file.waiting.retain(|(_, l)| !gone(&l.owner));
        let served = file.serve();
        self.tidy(ino);
        served
    }

    /// Drops an owner's locks on a file.
    pub fn release(&mut self, ino: u64, owner: LockOwner) -> Vec<Ticket> {
        self.drop_where(ino, |o| *o == owner)
    }

    /// Drops everything of a mount.
    pub fn release_node(&mut self, node: u16) -> Vec<Ticket> {
        let inos: Vec<u64> = self.files.keys().copied().collect();
        inos.into_iter()
            .flat_map(|ino| self.drop_where(ino, |o| o.node == node))
            .collect()
    }

    /// What a mount holds is another one's from now on: the same owners, as that one names them. Nobody else can have got any of it in
    /// between.
    pub fn give(&mut self, from: u16, to: u16) {
        for held in self.files.values_mut().flat_map(|f| &mut f.held) {
            if held.owner.node == from {
                held.owner.node = to;
            }
        }
    }

    /// Locks held by a mount.
    #[must_use]
    pub fn count(&self, node: u16) -> u64 {
        self.files
            .values()
            .flat_map(|f| &f.held)
            .filter(|h| h.owner.node == node)
            .count() as u64
    }

    fn tidy(&mut self, ino: u64) {
        if self
            .files
            .get(&ino)
            .is_some_and(|f| f.held.is_empty() && f.waiting.is_empty())
        {
            self.files.remove(&ino);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(owner: u64, start: u64, end: u64, kind: Option<LockKind>) -> LockSpec {
        on(7, owner, start, end, kind)
    }

    fn on(ino: u64, owner: u64, start: u64, end: u64, kind: Option<LockKind>) -> LockSpec {
        LockSpec {
            ino,
            owner: LockOwner {
                node: owner as u16,
                owner,
                flock: false,
            },
            pid: 1,
            range: LockRange { start, end },
            kind,
        }
    }

    const R: Option<LockKind> = Some(LockKind::Read);
    const W: Option<LockKind> = Some(LockKind::Write);

    #[test]
    fn readers_share_and_a_writer_waits_its_turn() {
        let mut t = LockTable::default();
        assert_eq!(t.set(&lock(1, 0, 9, R), None).0, Outcome::Done);
        assert_eq!(t.set(&lock(2, 5, 9, R), None).0, Outcome::Done);
        assert_eq!(t.set(&lock(3, 9, 9, W), None).0, Outcome::Conflict);
        assert_eq!(t.set(&lock(3, 9, 9, W), Some(30)).0, Outcome::Waiting);
        assert_eq!(t.set(&lock(1, 0, 9, None), None).1, Vec::<Ticket>::new());
        assert_eq!(t.release(7, lock(2, 0, 0, None).owner), vec![30]);
        assert_eq!(t.test(&lock(1, 9, 9, R)).map(|l| l.owner.owner), Some(3));
    }

    #[test]
    fn unlocking_the_middle_leaves_both_ends() {
        let mut t = LockTable::default();
        t.set(&lock(1, 0, 99, W), None);
        t.set(&lock(1, 40, 59, None), None);
        assert_eq!(
            t.test(&lock(2, 39, 39, R)).map(|l| l.range),
            Some(LockRange { start: 0, end: 39 })
        );
        assert_eq!(t.test(&lock(2, 40, 59, W)), None);
        assert_eq!(
            t.test(&lock(2, 60, 60, R)).map(|l| l.range),
            Some(LockRange { start: 60, end: 99 })
        );
    }

    #[test]
    fn what_is_given_is_held_all_the_time() {
        let mut t = LockTable::default();
        t.set(&lock(1, 0, 9, W), None);
        t.set(&lock(2, 20, 29, R), None);
        assert_eq!(t.set(&lock(3, 0, 9, W), Some(30)).0, Outcome::Waiting);
        t.give(1, 5);
        assert_eq!((t.count(1), t.count(2), t.count(5)), (0, 1, 1));
        let given = LockOwner {
            node: 5,
            ..lock(1, 0, 9, None).owner
        };
        assert_eq!(t.test(&lock(3, 0, 9, W)).map(|l| l.owner), Some(given));
        assert_eq!(t.release_node(1), Vec::<Ticket>::new());
        assert_eq!(t.release(7, given), vec![30]);
    }

    #[test]
    fn a_cycle_over_two_files_is_a_deadlock() {
        let mut t = LockTable::default();
        t.set(&on(1, 1, 0, 0, W), None);
        t.set(&on(2, 2, 0, 0, W), None);
        assert_eq!(t.set(&on(2, 1, 0, 0, W), Some(1)).0, Outcome::Waiting);
        assert_eq!(t.set(&on(1, 2, 0, 0, W), Some(2)).0, Outcome::Deadlock);
        assert_eq!(t.release(2, lock(2, 0, 0, None).owner), vec![1]);
    }

    fn flock(owner: u64, kind: Option<LockKind>) -> LockSpec {
        let mut lock = lock(owner, 0, i64::MAX as u64, kind);
        lock.owner.flock = true;
        lock
    }

    #[test]
    fn flock_and_fcntl_locks_do_not_meet() {
        let mut t = LockTable::default();
        assert_eq!(t.set(&flock(1, W), None).0, Outcome::Done);
        assert_eq!(t.set(&lock(2, 0, 9, W), None).0, Outcome::Done);
        assert_eq!(t.set(&lock(1, 10, 19, W), None).0, Outcome::Done);
        assert_eq!(t.set(&flock(2, R), Some(1)).0, Outcome::Waiting);
        // One waits for the other in both spaces: nobody looks after that.
        assert_eq!(t.set(&lock(1, 0, 0, R), Some(2)).0, Outcome::Waiting);
        assert_eq!(t.release(7, flock(1, None).owner), vec![1]);
        assert!(t.holds(7, lock(1, 0, 0, None).owner));
    }

    #[test]
    fn what_is_held_is_told_once() {
        let mut t = LockTable::default();
        for i in 0..5000 {
            t.record(&lock(1, i % 7 * 10, i % 7 * 10 + 5, W));
            t.record(&lock(1, i % 7 * 10, i % 7 * 10 + 5, None));
        }
        assert!(t.held().is_empty() && t.files.is_empty());
        t.record(&lock(1, 0, 9, W));
        t.record(&lock(2, 5, 9, R));
        assert_eq!(t.held().len(), 2);
    }

    #[test]
    fn who_asks_again_waits_once() {
        let mut t = LockTable::default();
        t.set(&lock(1, 0, 9, W), None);
        t.set(&lock(2, 0, 9, W), Some(5));
        t.set(&lock(3, 0, 9, R), Some(6));
        assert!(t.forget_waiters(2).is_empty());
        assert_eq!(t.release(7, lock(1, 0, 0, None).owner), vec![6]);
    }

    #[test]
    fn a_dead_mount_lets_go_of_everything() {
        let mut t = LockTable::default();
        t.set(&lock(1, 0, 9, W), None);
        t.set(&lock(2, 0, 9, W), Some(5));
        assert_eq!(t.count(1), 1);
        assert_eq!(t.release_node(1), vec![5]);
        assert_eq!((t.count(1), t.count(2)), (0, 1));
    }

    proptest::proptest! {
        /// Against a model that holds the owner of every single byte.
        #[test]
        fn ranges_agree_with_a_byte_map(ops in proptest::collection::vec((1u64..4, 0u64..12, 0u64..12, 0u8..3), 1..80)) {
            let mut t = LockTable::default();
            let mut bytes: HashMap<(u64, u64), LockKind> = HashMap::new();
            for (owner, a, b, kind) in ops {
                let (start, end) = (a.min(b), a.max(b));
                let kind = [None, R, W][kind as usize];
                let clash = kind.is_some_and(|k| bytes.iter().any(|(&(o, byte), &held)| {
                    o != owner && byte >= start && byte <= end && (k == LockKind::Write || held == LockKind::Write)
                }));
                let (outcome, _) = t.set(&lock(owner, start, end, kind), None);
                proptest::prop_assert_eq!(outcome == Outcome::Conflict, clash);
                if !clash {
                    for byte in start..=end {
                        match kind {
                            Some(k) => { bytes.insert((owner, byte), k); }
                            None => { bytes.remove(&(owner, byte)); }
                        }
                    }
                }
            }
        }
    }
}
