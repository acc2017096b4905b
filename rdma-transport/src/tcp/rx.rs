//! The receiving half of a connection: frames in, operations executed, messages delivered.
//!
//! Frames are parsed out of one buffer of fixed size. Bytes of large writes and of large results bypass it:
//! the socket is read straight into the region, or into the buffer of the caller who waits.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::net::RecvFlags;

use super::conn::TcpConn;
use super::frame::{DESC, Desc, DescKind, HEADER, Header, Kind, OK, REFUSED};
use crate::common::remote_access;
use crate::error::TransportError;
use crate::fabric::{Connection, Handler};
use crate::mem::SharedMem;
use crate::ops::{Access, RemoteAddr};
use crate::regions::{Regions, place_in};

/// Holds the longest frame that is not streamed, with room for what follows it.
const BUFFER: usize = 256 * 1024;
/// Bytes received from one connection before the others get a turn.
const BUDGET: usize = 4 * 1024 * 1024;
/// Payloads with more than this outstanding bypass the buffer.
const BYPASS: usize = 16 * 1024;
/// Results are collected up to this size before they are sent.
const REPLY: usize = 64 * 1024;

/// The memory that peers reach.
pub(super) type Memory = Regions<Arc<SharedMem>>;

/// A batch of the peer being executed.
struct Job {
    batch: u64,
    ops: Vec<Desc>,
    /// The operation whose turn it is.
    at: usize,
    /// Bytes of that write which have arrived.
    off: usize,
}

enum State {
    Header,
    Ops(Job),
    Result {
        header: Header,
        off: usize,
    },
    /// An operation has failed: the rest is taken from the wire and forgotten, so that the peer gets to read
    /// the reason instead of a reset.
    Discard,
}

/// What is left to do after a turn.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// The socket is empty.
    Empty,
    /// There may be more.
    More,
    /// The peer has ended the connection.
    Ended,
}

pub(super) struct Rx {
    buf: Box<[u8]>,
    start: usize,
    end: usize,
    state: State,
    reply: Vec<u8>,
}

impl Rx {
    pub(super) fn new() -> Self {
        Self {
            buf: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            state: State::Header,
            reply: Vec::new(),
        }
    }

    /// Whether only the end is awaited.
    pub(super) fn discarding(&self) -> bool {
        matches!(self.state, State::Discard)
    }

    /// Receives and acts until the socket is empty or the others' turn has come.
    pub(super) fn receive_all(
        &mut self,
        conn: &Arc<TcpConn>,
        dynamic: &Arc<dyn Connection>,
        handler: &dyn Handler,
        regions: &Memory,
    ) -> Result<Turn, TransportError> {
        let mut taken = 0;
        let turn = loop {
            if taken > BUDGET {
                break Turn::More;
            }
            if !conn.alive() && !self.discarding() {
                break Turn::Empty;
            }
            match self.receive(conn, regions) {
                Ok(0) => break Turn::Ended,
                Ok(n) => {
                    taken += n;
                    self.parse(conn, dynamic, handler, regions)?;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break Turn::Empty,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(crate::common::disconnected(&conn.peer_addr(), &e.to_string())),
            }
        };
        self.flush_reply(conn)?;
        Ok(turn)
    }

    /// One read from the socket, to where the bytes belong.
    fn receive(&mut self, conn: &TcpConn, regions: &Memory) -> io::Result<usize> {
        let sock = conn.sock.as_fd();
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
            match &mut self.state {
                State::Ops(job) => {
                    if let Some(op) = job.ops.get(job.at)
                        && op.len - job.off > BYPASS
                    {
                        let (off, len) = (job.off, op.len - job.off);
                        let direct = conn.executing(|| {
                            on_region(
                                regions,
                                op.at,
                                op.len,
                                |a| a.write,
                                |mem, base| mem.recv_from(sock, base + off, len),
                            )
                        });
                        if let Some(Ok(received)) = direct {
                            job.off += *received.as_ref().unwrap_or(&0);
                            return received;
                        }
                        // Ended or refused in the middle: `parse` finds out with the next bytes.
                    }
                }
                State::Result { header, off }
                    if header.status == OK && header.len as usize - *off > BYPASS =>
                {
                    let mut pending = conn.pending.lock();
                    if pending.streams() {
                        let n = pending.recv(sock, *off)?;
                        *off += n;
                        return Ok(n);
                    }
                }
                _ => {}
            }
        } else if self.start > 0 && self.buf.len() - self.end < BUFFER / 2 {
            self.buf.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let (n, _) = rustix::net::recv(sock, &mut self.buf[self.end..], RecvFlags::DONTWAIT)?;
        self.end += n;
        Ok(n)
    }

    /// Acts on everything complete in the buffer.
    fn parse(
        &mut self,
        conn: &Arc<TcpConn>,
        dynamic: &Arc<dyn Connection>,
        handler: &dyn Handler,
        regions: &Memory,
    ) -> Result<(), TransportError> {
        loop {
            if !conn.alive() && !self.discarding() {
                return Ok(());
            }
            let go_on = match self.state {
                State::Header => self.begin(conn, dynamic, handler)?,
                State::Ops(_) => self.work(conn, regions)?,
                State::Result { header, off } => self.result(conn, header, off)?,
                State::Discard => {
                    self.start = self.end;
                    false
                }
            };
            if !go_on {
                return Ok(());
            }
            if self.reply.len() > REPLY {
                self.flush_reply(conn)?;
            }
        }
    }

    fn flush_reply(&mut self, conn: &TcpConn) -> Result<(), TransportError> {
        if self.reply.is_empty() {
            return Ok(());
        }
        let sent = conn.send_raw(&self.reply);
        self.reply.clear();
        sent
    }

    /// A frame begins; false if it is not all there yet.
    fn begin(
        &mut self,
        conn: &Arc<TcpConn>,
        dynamic: &Arc<dyn Connection>,
        handler: &dyn Handler,
    ) -> Result<bool, TransportError> {
        let have = &self.buf[self.start..self.end];
        let Some((head, body)) = have.split_first_chunk::<HEADER>() else {
            return Ok(false);
        };
        let header = Header::decode(head).map_err(|e| conn.base.protocol(e))?;
        let len = header.len as usize;
        match header.kind {
            Kind::Result => {
                conn.pending
                    .lock()
                    .check(&header)
                    .map_err(|e| conn.base.protocol(e))?;
                self.start += HEADER;
                self.state = State::Result { header, off: 0 };
            }
            Kind::Ops => {
                let Some(body) = body.get(..len) else {
                    return Ok(false);
                };
                let (descs, _) = body.as_chunks::<DESC>();
                let ops: Result<Vec<_>, _> = descs.iter().map(Desc::decode).collect();
                let ops = ops.map_err(|e| conn.base.protocol(e))?;
                self.start += HEADER + len;
                self.state = State::Ops(Job {
                    batch: header.batch,
                    ops,
                    at: 0,
                    off: 0,
                });
            }
            Kind::Message => {
                if body.len() < len {
                    return Ok(false);
                }
                // The handler may take its time.
                self.flush_reply(conn)?;
                let at = self.start + HEADER;
                conn.base.counters.received(len);
                handler.message(dynamic, &self.buf[at..at + len]);
                self.start = at + len;
            }
        }
        Ok(true)
    }

    /// Executes as much of the current batch as possible; false if bytes are missing.
    fn work(&mut self, conn: &TcpConn, regions: &Memory) -> Result<bool, TransportError> {
        let State::Ops(job) = &mut self.state else {
            return Ok(true);
        };
        let Some(op) = job.ops.get(job.at).copied() else {
            self.state = State::Header;
            return Ok(true);
        };
        let outcome = if op.kind == DescKind::Write {
            let have = self.end - self.start;
            let take = have.min(op.len - job.off);
            let bytes = &self.buf[self.start..self.start + take];
            let off = job.off;
            let written = conn.executing(|| {
                on_region(
                    regions,
                    op.at,
                    op.len,
                    |a| a.write,
                    |mem, base| mem.write_at(base + off, bytes),
                )
            });
            self.start += take;
            job.off += take;
            let Some(written) = written else { return Ok(false) };
            let written = written.and_then(|w| w);
            if written.is_ok() && job.off < op.len {
                return Ok(false);
            }
            if written.is_ok() {
                self.reply
                    .extend_from_slice(&Header::result(job.batch, job.at, OK, 0).encode());
            }
            written
        } else if op.kind == DescKind::Read && op.len > BYPASS {
            let found = on_region(
                regions,
                op.at,
                op.len,
                |a| a.read,
                |mem, base| (Arc::clone(mem), base),
            );
            match found {
                Ok((mem, base)) => {
                    let head = Header::result(job.batch, job.at, OK, op.len).encode();
                    let mut reply = std::mem::take(&mut self.reply);
                    reply.extend_from_slice(&head);
                    conn.send_mem(&reply, &mem, base, op.len)?;
                    Ok(())
                }
                Err(e) => Err(e),
            }
        } else {
            let reply = &mut self.reply;
            let head = Header::result(job.batch, job.at, OK, op.len).encode();
            let done = conn.executing(|| small(regions, op, &head, reply));
            let Some(done) = done else { return Ok(false) };
            done
        };
        match outcome {
            Ok(()) => {
                job.at += 1;
                job.off = 0;
                Ok(true)
            }
            Err(error) => {
                let reason = match &error {
                    TransportError::RemoteAccess { reason, .. } => reason.clone(),
                    other => other.to_string(),
                };
                let head = Header::result(job.batch, job.at, REFUSED, reason.len()).encode();
                self.reply.extend_from_slice(&head);
                self.reply.extend_from_slice(reason.as_bytes());
                self.state = State::Discard;
                self.flush_reply(conn)?;
                conn.fail_politely(error);
                Ok(true)
            }
        }
    }

    /// Takes a result, or a part of one; false if bytes are missing.
    fn result(&mut self, conn: &TcpConn, header: Header, off: usize) -> Result<bool, TransportError> {
        let len = header.len as usize;
        let have = &self.buf[self.start..self.end];
        if header.status != OK {
            let Some(reason) = have.get(..len) else {
                return Ok(false);
            };
            return Err(conn.refused(&String::from_utf8_lossy(reason)));
        }
        let mut pending = conn.pending.lock();
        let bytes = if pending.streams() {
            let take = have.len().min(len - off);
            pending
                .fill(off, &have[..take])
                .map_err(|e| conn.base.protocol(e))?;
            self.start += take;
            if off + take < len {
                self.state = State::Result {
                    header,
                    off: off + take,
                };
                return Ok(false);
            }
            &[][..]
        } else {
            let Some(bytes) = have.get(..len) else {
                return Ok(false);
            };
            self.start += len;
            bytes
        };
        drop(pending);
        self.state = State::Header;
        conn.complete(bytes)?;
        Ok(true)
    }
}

/// Executes an operation whose result is small, appending the result.
fn small(regions: &Memory, op: Desc, head: &[u8], reply: &mut Vec<u8>) -> Result<(), TransportError> {
    let permits = |a: Access| match op.kind {
        DescKind::Cas | DescKind::Faa => a.atomic,
        _ => a.read,
    };
    let act = |mem: &Arc<SharedMem>, off: usize| -> Result<(), TransportError> {
        let value = match op.kind {
            DescKind::Cas => mem.compare_and_swap(off, op.a, op.b)?,
            DescKind::Faa => mem.word(off)?.fetch_add(op.a, Ordering::SeqCst),
            DescKind::Words => {
                reply.extend_from_slice(head);
                for i in 0..op.len / 8 {
                    reply.extend_from_slice(&mem.word(off + i * 8)?.load(Ordering::SeqCst).to_le_bytes());
                }
                return Ok(());
            }
            DescKind::Read | DescKind::Write => {
                reply.extend_from_slice(head);
                let at = reply.len();
                reply.resize(at + op.len, 0);
                return mem.read_at(off, &mut reply[at..]);
            }
        };
        reply.extend_from_slice(head);
        reply.extend_from_slice(&value.to_le_bytes());
        Ok(())
    };
    on_region(regions, op.at, op.len, permits, act)?
}

/// Acts on a piece of a registered region, which cannot be deregistered meanwhile.
fn on_region<R>(
    regions: &Memory,
    at: RemoteAddr,
    len: usize,
    permits: impl Fn(Access) -> bool,
    act: impl FnOnce(&Arc<SharedMem>, usize) -> R,
) -> Result<R, TransportError> {
    regions.with(at.key, |found| match found {
        Some((mem, access)) => {
            let off = place_in((mem, *access), at, len, permits)?;
            Ok(act(mem, off))
        }
        None => Err(remote_access(at, len as u64, "no such region")),
    })
}
