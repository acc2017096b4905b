//! Inode numbers for what this mount makes, and their leases, which it gets before they are needed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lockmgr::Mode;
use rt::sync::Mutex;
use rt::time::Instant;

use crate::session::Session;
use crate::session::ctx::{Ctx, Res};
use fsd_proto::ask::meta::ReserveInodes;
use fsd_proto::ino;

/// Inode numbers fetched at once, and the number left at which more are fetched. The server makes durable that it has given
/// them out, which takes as long as its disk does; so that is not waited for.
const NUMBERS: u32 = 512;
const LOW: usize = 256;
/// So many of the numbers that come next have had their leases asked for, as soon as there are only half as many.
const AHEAD: usize = 64;

/// Numbers that no file has yet.
#[derive(Debug, Default)]
struct Free {
    /// In the order in which they are used.
    numbers: VecDeque<u64>,
    /// The leases of so many of the first have been asked for.
    ahead: usize,
}

impl Free {
    fn take(&mut self) -> Option<u64> {
        let number = self.numbers.pop_front()?;
        self.ahead = self.ahead.saturating_sub(1);
        Some(number)
    }

    /// Whose leases are to be asked for next.
    fn next(&mut self) -> Vec<u64> {
        if self.ahead > AHEAD / 2 {
            return Vec::new();
        }
        let next = self.numbers.iter().take(AHEAD).skip(self.ahead);
        let next: Vec<u64> = next.copied().collect();
        self.ahead += next.len();
        next
    }
}

/// Inode numbers for new files.
pub struct Numbers {
    free: Mutex<Free>,
    /// More are on their way.
    fetching: AtomicBool,
    session: Arc<Session>,
}

impl Numbers {
    /// None yet.
    #[must_use]
    pub fn new(session: &Arc<Session>) -> Self {
        Self {
            free: Mutex::default(),
            fetching: AtomicBool::new(false),
            session: Arc::clone(session),
        }
    }

    /// A number for a new inode. Nobody else asks for its lease; in the long run that is here already.
    pub(super) fn take(self: &Arc<Self>, ctx: &Ctx<'_>) -> Res<u64> {
        loop {
            let (number, left, next) = {
                let mut free = self.free.lock();
                (free.take(), free.numbers.len(), free.next())
            };
            self.lease(&next);
            if left < LOW && number.is_some() {
                self.fetch();
            }
            if let Some(number) = number {
                return Ok(number);
            }
            ctx.may_wait()?;
            let range = self.session.net.meta.ask(ReserveInodes { count: NUMBERS })?;
            self.free.lock().numbers.extend(range.inos);
        }
    }

    /// A number that no inode was made of.
    pub(super) fn give_back(&self, number: u64) {
        self.free.lock().numbers.push_back(number);
    }

    fn fetch(self: &Arc<Self>) {
        if self.fetching.swap(true, Ordering::AcqRel) {
            return;
        }
        let me = Arc::clone(self);
        let request = ReserveInodes { count: NUMBERS };
        self.session.net.meta.ask_async(request, move |answer| {
            // Who comes to the end of those that are left asks himself, and is told what is wrong.
            if let Ok(range) = answer {
                me.free.lock().numbers.extend(range.inos);
            }
            me.fetching.store(false, Ordering::Release);
        });
    }

    /// Asks for the leases of numbers, where it is known where their records are; who makes an inode gets those that do not come.
    fn lease(&self, numbers: &[u64]) {
        let storage = &self.session.net.storage;
        let records = numbers.iter().map(|&number| ino::record(number));
        let known = records.filter(|&record| storage.knows_record(record));
        let deadline = Instant::now() + self.session.lease_wait;
        self.session
            .leases
            .acquire_ahead(known, Mode::Exclusive, deadline);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_are_asked_for_once_each_and_in_time() {
        let mut free = Free {
            numbers: (0..300).collect(),
            ahead: 0,
        };
        let mut asked = Vec::new();
        for number in 0..300 {
            assert_eq!(free.take(), Some(number));
            let next = free.next();
            // Half of them together, but for the first ones and the last.
            assert!(number == 0 || next.is_empty() || next.len() >= AHEAD / 2 || free.numbers.len() < AHEAD);
            asked.extend(next);
            let ahead = free.numbers.iter().take_while(|n| asked.contains(n)).count();
            assert!(ahead > AHEAD / 2 || ahead == free.numbers.len());
        }
        assert_eq!(asked, (1..300).collect::<Vec<_>>());
        assert_eq!((free.take(), free.next()), (None, Vec::new()));
    }
}
