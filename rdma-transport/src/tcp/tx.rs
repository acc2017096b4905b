//! The sending half of a connection.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};

use crate::mem::{Lent, SharedMem};

/// Most bytes of results asked for and not yet received.
pub(super) const READS: usize = 64 * 1024 * 1024;
/// Small pieces are put together up to this size.
const GATHER: usize = 64 * 1024;

/// Something still to be sent.
#[derive(Debug)]
pub(super) enum Out {
    Bytes(Vec<u8>),
    /// A buffer that stays where it is until its batch is done.
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
    /// Bytes of results asked for.
    reading: usize,
    /// What must not be sent before some of those have come, in its order; with it what is behind it. Results for
    /// the peer pass: both sides may be at this limit.
    held: VecDeque<Held>,
    /// Bytes in there, as in `queued`.
    held_bytes: usize,
    closed: bool,
}

/// A batch, or a message, that waits for results of earlier ones.
#[derive(Debug)]
struct Held {
    reads: usize,
    outs: Vec<Out>,
}

impl Held {
    fn bytes(&self) -> usize {
        let copied = self.outs.iter().filter(|o| matches!(o, Out::Bytes(_)));
        copied.map(Out::len).sum()
    }
}

fn again(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

impl Tx {
    pub(super) fn closed(&self) -> bool {
        self.closed
    }

    /// Bytes that the socket has not taken; lent ones do not count.
    pub(super) fn queued(&self) -> usize {
        self.queued
    }

    /// As [`Tx::queued`], with what waits for results.
    pub(super) fn backlog(&self) -> usize {
        self.queued + self.held_bytes
    }

    /// Drops everything; what was lent is not looked at again.
    pub(super) fn close(&mut self) {
        self.closed = true;
        self.queue.clear();
        self.held.clear();
        self.sent = 0;
        self.queued = 0;
        self.held_bytes = 0;
    }

    /// Whether bytes lent for `batch` are still to be sent.
    pub(super) fn lends(&self, batch: u64) -> bool {
        let held = self.held.iter().flat_map(|h| &h.outs);
        let mut outs = self.queue.iter().chain(held);
        outs.any(|out| matches!(out, Out::Lent { batch: b, .. } if *b == batch))
    }

    /// Whether so many bytes of results may be asked for now.
    fn admits(&self, reads: usize) -> bool {
        reads == 0 || self.reading == 0 || self.reading + reads <= READS
    }

    fn hold(&mut self, reads: usize, outs: Vec<Out>) {
        let held = Held { reads, outs };
        self.held_bytes += held.bytes();
        self.held.push_back(held);
    }

    /// Sends a batch that asks for so many bytes, now or when there is room for its results.
    pub(super) fn ask(&mut self, sock: BorrowedFd<'_>, reads: usize, outs: Vec<Out>) -> io::Result<()> {
        if !self.held.is_empty() || !self.admits(reads) {
            self.hold(reads, outs);
            return Ok(());
        }
        self.reading += reads;
        self.send_all(sock, outs)
    }

    /// Results of so many bytes have come.
    pub(super) fn answered(&mut self, sock: BorrowedFd<'_>, reads: usize) -> io::Result<()> {
        self.reading = self.reading.saturating_sub(reads);
        while self.held.front().is_some_and(|h| self.admits(h.reads)) {
            if let Some(held) = self.held.pop_front() {
                self.held_bytes -= held.bytes();
                self.reading += held.reads;
                self.send_all(sock, held.outs)?;
            }
        }
        Ok(())
    }

    /// Sends a message behind everything that was asked for before.
    pub(super) fn send_behind(&mut self, sock: BorrowedFd<'_>, head: &[u8], body: &[u8]) -> io::Result<()> {
        if self.held.is_empty() {
            return self.send(sock, head, body);
        }
        self.hold(0, vec![Out::Bytes([head, body].concat())]);
        Ok(())
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
    fn send_all(&mut self, sock: BorrowedFd<'_>, outs: Vec<Out>) -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn received(from: &UnixStream) -> Vec<u8> {
        let mut bytes = [0; 64];
        let n = std::io::Read::read(&mut &*from, &mut bytes).unwrap_or(0);
        bytes[..n].to_vec()
    }

    fn bytes(text: &[u8]) -> Vec<Out> {
        vec![Out::Bytes(text.to_vec())]
    }

    #[test]
    fn what_would_ask_for_too_much_waits_and_results_pass_it() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let sock = ours.as_fd();
        let mut tx = Tx::default();
        tx.ask(sock, READS - 10, bytes(b"first ")).unwrap();
        tx.ask(sock, 10, bytes(b"second ")).unwrap();
        assert_eq!(received(&theirs), b"first second ");
        tx.ask(sock, 1, bytes(b"third ")).unwrap();
        tx.ask(sock, 0, bytes(b"fourth ")).unwrap();
        tx.send_behind(sock, b"mess", b"age").unwrap();
        assert_eq!(tx.backlog(), 20);
        tx.send(sock, b"result", b"").unwrap();
        assert_eq!((received(&theirs), tx.queued()), (b"result".to_vec(), 0));
        tx.answered(sock, 10).unwrap();
        assert_eq!(received(&theirs), b"third fourth message");
        assert_eq!(tx.backlog(), 0);
        // However much it is, it is asked for when nothing else is.
        tx.answered(sock, READS - 9).unwrap();
        tx.ask(sock, 2 * READS, bytes(b"huge")).unwrap();
        assert_eq!(received(&theirs), b"huge");
        tx.ask(sock, 1, bytes(b"never")).unwrap();
        tx.close();
        assert_eq!((received(&theirs), tx.backlog()), (Vec::new(), 0));
    }
}
