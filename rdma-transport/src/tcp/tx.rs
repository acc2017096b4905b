//! The sending half of a connection.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};

use crate::mem::{Lent, SharedMem};

/// Small pieces are put together up to this size.
const GATHER: usize = 64 * 1024;

/// Something still to be sent.
#[derive(Debug)]
pub(super) enum Out {
    Bytes(Vec<u8>),
    /// The buffer of a caller who is blocked until its batch is done.
    Lent {
        lent: Lent,
        batch: u64,
    },
}

impl Out {
    fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Lent { lent, .. } => lent.len(),
        }
    }
}

/// What a socket has not taken yet. Used under the connection's sending lock.
#[derive(Debug, Default)]
pub(super) struct Tx {
    queue: VecDeque<Out>,
    /// How much of the first entry has been sent.
    sent: usize,
    /// Bytes in the queue, lent ones not counted.
    queued: usize,
    closed: bool,
}

fn again(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

impl Tx {
    pub(super) fn closed(&self) -> bool {
        self.closed
    }

    pub(super) fn queued(&self) -> usize {
        self.queued
    }

    /// Drops everything; what was lent is not looked at again.
    pub(super) fn close(&mut self) {
        self.closed = true;
        self.queue.clear();
        self.sent = 0;
        self.queued = 0;
    }

    /// Whether bytes lent for `batch` are still to be sent.
    pub(super) fn lends(&self, batch: u64) -> bool {
        self.queue
            .iter()
            .any(|out| matches!(out, Out::Lent { batch: b, .. } if *b == batch))
    }

    fn push_bytes(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.queued += bytes.len();
        if let Some(Out::Bytes(last)) = self.queue.back_mut()
            && last.len() + bytes.len() <= GATHER
        {
            last.extend_from_slice(bytes);
        } else {
            self.queue.push_back(Out::Bytes(bytes.to_vec()));
        }
    }

    /// Sends `head` and `body`, queueing what the socket does not take.
    pub(super) fn send(&mut self, sock: BorrowedFd<'_>, head: &[u8], body: &[u8]) -> io::Result<()> {
        let mut sent = 0;
        if self.queue.is_empty() {
            let parts = [IoSlice::new(head), IoSlice::new(body)];
            sent = loop {
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                match rustix::net::sendmsg(sock, &parts, &mut SendAncillaryBuffer::default(), flags) {
                    Ok(n) => break n,
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => break 0,
                    Err(e) => return Err(e.into()),
                }
            };
        }
        self.push_bytes(head.get(sent..).unwrap_or_default());
        self.push_bytes(body.get(sent.saturating_sub(head.len())..).unwrap_or_default());
        // A short count may mean room again: only an attempt that finds none brings the event that continues.
        if self.queue.is_empty() {
            Ok(())
        } else {
            self.flush(sock)
        }
    }

    /// Queues pieces and sends as much as the socket takes.
    pub(super) fn send_all(&mut self, sock: BorrowedFd<'_>, outs: Vec<Out>) -> io::Result<()> {
        for out in outs {
            match out {
                Out::Bytes(bytes) if self.queue.is_empty() => {
                    self.queued += bytes.len();
                    self.queue.push_back(Out::Bytes(bytes));
                }
                Out::Bytes(bytes) => self.push_bytes(&bytes),
                lent @ Out::Lent { .. } => self.queue.push_back(lent),
            }
        }
        self.flush(sock)
    }

    /// Sends `head` and a piece of memory, which is copied only if the socket does not take it at once.
    pub(super) fn send_mem(
        &mut self,
        sock: BorrowedFd<'_>,
        head: &[u8],
        mem: &SharedMem,
        mut off: usize,
        mut len: usize,
    ) -> io::Result<()> {
        self.push_bytes(head);
        self.flush(sock)?;
        while self.queue.is_empty() && len > 0 {
            match mem.send_to(sock, off, len) {
                Ok(n) => {
                    off += n;
                    len -= n;
                }
                Err(e) if again(&e) => break,
                Err(e) => return Err(e),
            }
        }
        if len > 0 {
            let mut rest = vec![0; len];
            mem.read_at(off, &mut rest).map_err(io::Error::other)?;
            self.queued += len;
            self.queue.push_back(Out::Bytes(rest));
            self.flush(sock)?;
        }
        Ok(())
    }

    /// Sends what is queued until the socket takes no more.
    pub(super) fn flush(&mut self, sock: BorrowedFd<'_>) -> io::Result<()> {
        while let Some(first) = self.queue.front() {
            if self.sent < first.len() {
                let result = match first {
                    Out::Bytes(bytes) => {
                        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                        rustix::net::send(sock, &bytes[self.sent..], flags).map_err(io::Error::from)
                    }
                    Out::Lent { lent, .. } => lent.send_to(sock, self.sent),
                };
                match result {
                    Ok(n) => {
                        self.sent += n;
                        if matches!(first, Out::Bytes(_)) {
                            self.queued -= n;
                        }
                    }
                    Err(e) if again(&e) => return Ok(()),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
            } else {
                self.queue.pop_front();
                self.sent = 0;
            }
        }
        Ok(())
    }
}
