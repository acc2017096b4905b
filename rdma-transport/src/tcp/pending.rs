//! Batches whose results are still to come, in the order in which they were sent.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::frame::{Header, OK};
use crate::mem::Lent;
use crate::{Completion, OpResult, RemoteAddr, TransportError};

/// Where the result of one operation goes.
#[derive(Debug)]
pub(super) enum Slot {
    Read(Lent),
    Write,
    Word,
    Words(usize),
}

impl Slot {
    fn len(&self) -> usize {
        match self {
            Self::Read(lent) => lent.len(),
            Self::Write => 0,
            Self::Word => 8,
            Self::Words(n) => n * 8,
        }
    }
}

/// One operation of a pending batch.
#[derive(Debug)]
pub(super) struct Expected {
    pub(super) slot: Slot,
    /// For the error, should the target refuse.
    pub(super) at: RemoteAddr,
    pub(super) len: u64,
}

/// What a blocked caller waits on.
#[derive(Debug, Default)]
pub(super) struct Waiter {
    done: AtomicBool,
    result: Mutex<Option<Result<Vec<u64>, TransportError>>>,
    cond: Condvar,
}

impl Waiter {
    fn finish(&self, result: Result<Vec<u64>, TransportError>) {
        *self.result.lock() = Some(result);
        self.done.store(true, Ordering::Release);
        self.cond.notify_one();
    }

    /// The values before each atomic, or None at the deadline.
    pub(super) fn wait(&self, spin: Duration, deadline: Instant) -> Option<Result<Vec<u64>, TransportError>> {
        let start = Instant::now();
        while !self.done.load(Ordering::Acquire) && start.elapsed() < spin {
            // The thread that brings the result may need this core.
            std::thread::yield_now();
        }
        let mut result = self.result.lock();
        while result.is_none() {
            if self.cond.wait_until(&mut result, deadline).timed_out() {
                break;
            }
        }
        result.take()
    }
}

pub(super) enum Owner {
    Blocked(Arc<Waiter>),
    Async(Completion, Vec<OpResult>),
}

pub(super) struct Batch {
    pub(super) id: u64,
    pub(super) owner: Owner,
    pub(super) expected: Vec<Expected>,
    pub(super) olds: Vec<u64>,
    pub(super) next: usize,
}

impl Batch {
    pub(super) fn new(id: u64, owner: Owner, expected: Vec<Expected>) -> Self {
        Self {
            id,
            owner,
            expected,
            olds: Vec::new(),
            next: 0,
        }
    }

    /// Tells the owner. Called without any lock held.
    pub(super) fn finish(self, result: Result<(), TransportError>) {
        match self.owner {
            Owner::Blocked(waiter) => waiter.finish(result.map(|()| self.olds)),
            Owner::Async(done, results) => done(result.map(|()| results)),
        }
    }
}

/// The batches under way.
#[derive(Default)]
pub(super) struct Pending(pub(super) VecDeque<Batch>);

/// Why a result is not acceptable.
pub(super) type Bad = &'static str;

impl Pending {
    /// Whether a result that begins is the one that comes next.
    pub(super) fn check(&self, header: &Header) -> Result<(), Bad> {
        let batch = self.0.front().ok_or("a result nobody asked for")?;
        let expected = batch.expected.get(batch.next).ok_or("a result too many")?;
        if header.batch != batch.id || usize::from(header.index) != batch.next {
            return Err("a result out of order");
        }
        if header.status == OK && header.len as usize != expected.slot.len() {
            return Err("a result of a wrong length");
        }
        Ok(())
    }

    /// Puts bytes read into the caller's buffer.
    pub(super) fn fill(&mut self, off: usize, bytes: &[u8]) -> Result<(), Bad> {
        match self.current() {
            Some(Slot::Read(lent)) => {
                if lent.fill(off, bytes) {
                    Ok(())
                } else {
                    Err("a result beyond its buffer")
                }
            }
            _ => Err("a result nobody waits for"),
        }
    }

    /// Receives bytes read straight into the caller's buffer.
    pub(super) fn recv(&mut self, sock: BorrowedFd<'_>, off: usize) -> io::Result<usize> {
        match self.current() {
            Some(Slot::Read(lent)) => lent.recv_from(sock, off),
            _ => Err(io::Error::other("a result nobody waits for")),
        }
    }

    fn current(&mut self) -> Option<&mut Slot> {
        let batch = self.0.front_mut()?;
        batch.expected.get_mut(batch.next).map(|e| &mut e.slot)
    }

    /// Whether the current result goes straight to a caller's buffer.
    pub(super) fn streams(&mut self) -> bool {
        matches!(self.current(), Some(Slot::Read(_)))
    }

    /// Takes a complete result (`bytes` is empty for reads, which are in place); the batch if that was its last.
    pub(super) fn complete(&mut self, bytes: &[u8]) -> Result<Option<Batch>, Bad> {
        let batch = self.0.front_mut().ok_or("a result nobody waits for")?;
        let expected = batch.expected.get(batch.next).ok_or("a result too many")?;
        let (words, _) = bytes.as_chunks::<8>();
        let mut words = words.iter().map(|w| u64::from_le_bytes(*w));
        match (&expected.slot, &mut batch.owner) {
            (Slot::Read(_) | Slot::Write, _) => {}
            (Slot::Word, Owner::Async(_, results)) => {
                results.push(OpResult::Old(words.next().ok_or("a word is missing")?));
            }
            (Slot::Words(_), Owner::Async(_, results)) => results.push(OpResult::Words(words.collect())),
            (Slot::Word | Slot::Words(_), _) => batch.olds.push(words.next().ok_or("a word is missing")?),
        }
        batch.next += 1;
        if batch.next < batch.expected.len() {
            Ok(None)
        } else {
            Ok(self.0.pop_front())
        }
    }
}
