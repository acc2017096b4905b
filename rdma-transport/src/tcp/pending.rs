//! Batches whose results are still to come, in the order in which they were sent.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use super::frame::{Header, OK};
use crate::buffer::Buffer;
use crate::error::TransportError;
use crate::mem::Lent;
use crate::ops::{BatchError, Completion, OpResult, RemoteAddr};

/// Where the result of one operation goes. Buffers of asynchronous operations wait here; a blocked caller has lent
/// its own, and gets no result for them.
#[derive(Debug)]
pub(super) enum Slot {
    Read(Lent, Option<Buffer>),
    Write(Option<Buffer>),
    Word,
    Words(usize),
}

impl Slot {
    fn len(&self) -> usize {
        match self {
            Self::Read(lent, _) => lent.len(),
            Self::Write(_) => 0,
            Self::Word => 8,
            Self::Words(n) => n * 8,
        }
    }

    fn into_buffer(self) -> Option<Buffer> {
        match self {
            Self::Read(_, buffer) | Self::Write(buffer) => buffer,
            Self::Word | Self::Words(_) => None,
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

pub(super) struct Batch {
    pub(super) id: u64,
    /// Bytes of results that count against what may be asked for at once.
    pub(super) reads: usize,
    done: Completion,
    expected: VecDeque<Expected>,
    /// Results that have come.
    next: usize,
    results: Vec<OpResult>,
}

impl Batch {
    pub(super) fn new(id: u64, reads: usize, expected: VecDeque<Expected>, done: Completion) -> Self {
        Self {
            id,
            reads,
            done,
            results: Vec::with_capacity(expected.len()),
            expected,
            next: 0,
        }
    }

    /// The operation whose result comes next.
    pub(super) fn current(&self) -> Option<&Expected> {
        self.expected.front()
    }

    /// Tells the owner. Called without any lock held.
    pub(super) fn finish(self, result: Result<(), TransportError>) {
        let outcome = match result {
            Ok(()) => Ok(self.results),
            Err(why) => {
                let came = self.results.into_iter().filter_map(OpResult::into_buffer);
                let rest = self.expected.into_iter().filter_map(|e| e.slot.into_buffer());
                Err(BatchError {
                    why,
                    buffers: came.chain(rest).collect(),
                })
            }
        };
        (self.done)(outcome);
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
        let expected = batch.current().ok_or("a result too many")?;
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
        match self.reading() {
            Some(lent) => {
                if lent.fill(off, bytes) {
                    Ok(())
                } else {
                    Err("a result beyond its buffer")
                }
            }
            None => Err("a result nobody waits for"),
        }
    }

    /// Receives bytes read straight into the caller's buffer.
    pub(super) fn recv(&mut self, sock: BorrowedFd<'_>, off: usize) -> io::Result<usize> {
        match self.reading() {
            Some(lent) => lent.recv_from(sock, off),
            None => Err(io::Error::other("a result nobody waits for")),
        }
    }

    /// The buffer that the current result goes straight to, if it does.
    fn reading(&mut self) -> Option<&mut Lent> {
        match &mut self.0.front_mut()?.expected.front_mut()?.slot {
            Slot::Read(lent, _) => Some(lent),
            _ => None,
        }
    }

    /// Whether the current result goes straight to a caller's buffer.
    pub(super) fn streams(&mut self) -> bool {
        self.reading().is_some()
    }

    /// Takes a complete result (`bytes` is empty for reads, which are in place); the batch if that was its last.
    pub(super) fn complete(&mut self, bytes: &[u8]) -> Result<Option<Batch>, Bad> {
        let batch = self.0.front_mut().ok_or("a result nobody waits for")?;
        let expected = batch.expected.pop_front().ok_or("a result too many")?;
        batch.next += 1;
        let (words, _) = bytes.as_chunks::<8>();
        let mut words = words.iter().map(|w| u64::from_le_bytes(*w));
        match expected.slot {
            Slot::Read(_, buffer) => batch.results.extend(buffer.map(OpResult::Read)),
            Slot::Write(buffer) => batch.results.extend(buffer.map(OpResult::Written)),
            Slot::Word => batch
                .results
                .push(OpResult::Old(words.next().ok_or("a word is missing")?)),
            Slot::Words(_) => batch.results.push(OpResult::Words(words.collect())),
        }
        if batch.expected.is_empty() {
            Ok(self.0.pop_front())
        } else {
            Ok(None)
        }
    }
}
