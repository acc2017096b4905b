//! Writes of mapped pages.
//!
//! The kernel writes dirty mapped pages back whenever it likes, without asking for a lease first, and keeps them locked to
//! invalidation until the write is answered. Such a write may therefore not wait for the exclusive lease while this mount's
//! own lease is being revoked: it is answered at once, and applied when the lease has come.
//!
//! Until then it stands in a queue. Nobody on this mount may see the file without it, for the process that stored to the mapping
//! may be the one that looks, through a page that the revocation has made the kernel drop: reads lay the queue over what is
//! stored. And nothing may be applied before it that was done after it: whatever changes the file under the exclusive lease
//! applies the queue first, in order. On other mounts the stores are seen when they are applied: a shared writable mapping on a
//! stock kernel promises no more.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rt::sync::{Condvar, Mutex};

use crate::cache::write::Queued;
use fsd_proto::rpc::Errno;

/// A reply that either the writer or a revocation gives.
pub type Answer = Box<dyn FnOnce(Result<(), Errno>) + Send>;

struct Entry {
    number: u64,
    /// Who waits for it; none: it has been answered.
    answer: Option<Answer>,
    /// None while its own thread applies it.
    queued: Option<Arc<Queued>>,
}

#[derive(Default)]
struct Queue {
    entries: VecDeque<Entry>,
    next: u64,
    revoking: bool,
}

/// The writes of mapped pages of one file that are not applied yet.
#[derive(Default)]
pub struct MappedWrites {
    queue: Mutex<Queue>,
    /// How many of them are queued, so that reads need not lock to find that there are none.
    queued: AtomicUsize,
    applied: Condvar,
}

impl std::fmt::Debug for MappedWrites {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MappedWrites({})", self.queue.lock().entries.len())
    }
}

impl MappedWrites {
    /// A write begins. Returns its number, and whether its own thread may try to apply it at once: nothing is queued that has to be
    /// applied before it, and no revocation waits for its answer.
    pub fn begin(&self, answer: Answer) -> (u64, bool) {
        let mut queue = self.queue.lock();
        let number = queue.next;
        queue.next += 1;
        queue.entries.push_back(Entry {
            number,
            answer: Some(answer),
            queued: None,
        });
        let first = self.queued.load(Ordering::SeqCst) == 0;
        (number, first && !queue.revoking)
    }

    /// It has to wait: others may apply it from now on. During a revocation it is answered at once.
    pub fn enqueue(&self, number: u64, write: Queued) {
        let mut queue = self.queue.lock();
        let revoking = queue.revoking;
        let Some(entry) = queue.entries.iter_mut().find(|e| e.number == number) else {
            return;
        };
        entry.queued = Some(Arc::new(write));
        let answer = entry.answer.take_if(|_| revoking);
        self.queued.fetch_add(1, Ordering::SeqCst);
        drop(queue);
        if let Some(answer) = answer {
            answer(Ok(()));
        }
    }

    /// The first that is to be applied; the caller has locked the inode until it says what came of it.
    pub(crate) fn front(&self) -> Option<(u64, Arc<Queued>)> {
        if self.queued.load(Ordering::SeqCst) == 0 {
            return None;
        }
        let queue = self.queue.lock();
        let mut entries = queue.entries.iter();
        entries.find_map(|e| Some((e.number, Arc::clone(e.queued.as_ref()?))))
    }

    /// A write that is still queued.
    pub(crate) fn find(&self, number: u64) -> Option<Arc<Queued>> {
        let queue = self.queue.lock();
        let entry = queue.entries.iter().find(|e| e.number == number)?;
        entry.queued.clone()
    }

    /// A write has been applied, or has failed: who waits is told. An error that nobody waits for is returned.
    pub fn end(&self, number: u64, result: Result<(), Errno>) -> Option<Errno> {
        let mut queue = self.queue.lock();
        let place = queue.entries.iter().position(|e| e.number == number)?;
        let entry = queue.entries.remove(place)?;
        if entry.queued.is_some() {
            self.queued.fetch_sub(1, Ordering::SeqCst);
        }
        drop(queue);
        self.applied.notify_all();
        match entry.answer {
            Some(answer) => {
                answer(result);
                None
            }
            None => result.err(),
        }
    }

    /// Lays what is queued over what was read at `offset`.
    pub fn overlay(&self, offset: u64, out: &mut [u8]) {
        if self.queued.load(Ordering::SeqCst) == 0 {
            return;
        }
        let end = offset + out.len() as u64;
        for write in self.queue.lock().entries.iter().filter_map(|e| e.queued.as_ref()) {
            let (from, to) = (
                write.offset.max(offset),
                (write.offset + write.data.len() as u64).min(end),
            );
            if from < to {
                let data = &write.data[(from - write.offset) as usize..(to - write.offset) as usize];
                out[(from - offset) as usize..(to - offset) as usize].copy_from_slice(data);
            }
        }
    }

    /// A revocation begins or ends; when it begins, everything that is queued is answered. Not what its own thread tries to apply:
    /// that does not wait, and until it is applied, or queued, nobody may be told that it is.
    pub fn revoking(&self, yes: bool) {
        let mut queue = self.queue.lock();
        queue.revoking = yes;
        let answers: Vec<Answer> = if yes {
            let queued = queue.entries.iter_mut().filter(|e| e.queued.is_some());
            queued.filter_map(|e| e.answer.take()).collect()
        } else {
            Vec::new()
        };
        drop(queue);
        for answer in answers {
            answer(Ok(()));
        }
    }

    /// Is nothing waiting?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.lock().entries.is_empty()
    }

    /// Waits until everything that waits now has been applied.
    pub fn drain(&self) {
        let mut queue = self.queue.lock();
        let last = queue.next;
        while queue.entries.iter().any(|e| e.number < last) {
            self.applied.wait(&mut queue);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::cache::write::WriteFlags;

    fn write(offset: u64, byte: u8, len: usize) -> Queued {
        Queued {
            offset,
            data: vec![byte; len],
            flags: WriteFlags::default(),
        }
    }

    #[test]
    fn what_is_queued_is_read_in_order_and_applied_in_order() {
        let mapped = MappedWrites::default();
        let (first, at_once) = mapped.begin(Box::new(|_| ()));
        assert!(at_once);
        mapped.enqueue(first, write(4, 1, 8));
        let (second, at_once) = mapped.begin(Box::new(|_| ()));
        assert!(!at_once, "has to come behind the first");
        mapped.enqueue(second, write(8, 2, 2));
        let mut read = [0; 12];
        mapped.overlay(2, &mut read);
        assert_eq!(read, [0, 0, 1, 1, 1, 1, 2, 2, 1, 1, 0, 0]);
        assert_eq!(mapped.front().map(|(n, _)| n), Some(first));
        assert_eq!(mapped.end(first, Ok(())), None);
        assert_eq!(mapped.front().map(|(n, _)| n), Some(second));
        let mut read = [0; 2];
        mapped.overlay(4, &mut read);
        assert_eq!(read, [0, 0]);
        mapped.end(second, Ok(()));
        assert!(mapped.is_empty() && mapped.front().is_none());
    }

    #[test]
    fn a_revocation_answers_what_waits_and_what_comes_while_it_lasts() {
        let mapped = MappedWrites::default();
        let (tx, rx) = channel();
        let answer = |n: u8| -> Answer {
            let tx = tx.clone();
            Box::new(move |result| {
                let _ = tx.send((n, result));
            })
        };
        let (zero, _) = mapped.begin(answer(0));
        let (one, _) = mapped.begin(answer(1));
        mapped.enqueue(one, write(0, 1, 1));
        assert!(rx.try_recv().is_err());
        mapped.revoking(true);
        assert_eq!(rx.try_recv(), Ok((1, Ok(()))));
        assert!(rx.try_recv().is_err(), "its own thread is at it");
        mapped.enqueue(zero, write(1, 1, 1));
        assert_eq!(rx.try_recv(), Ok((0, Ok(()))));
        let (two, at_once) = mapped.begin(answer(2));
        assert!(!at_once && rx.try_recv().is_err());
        mapped.enqueue(two, write(2, 1, 1));
        assert_eq!(rx.try_recv(), Ok((2, Ok(()))));
        mapped.revoking(false);
        let (three, _) = mapped.begin(answer(3));
        let full = Errno(libc::ENOSPC);
        // Nobody waits for these any more: the file keeps the error.
        assert_eq!(mapped.end(one, Err(full)), Some(full));
        assert_eq!(mapped.end(two, Ok(())), None);
        assert_eq!(mapped.end(three, Err(full)), None);
        assert_eq!(rx.try_recv(), Ok((3, Err(full))));
    }
}
