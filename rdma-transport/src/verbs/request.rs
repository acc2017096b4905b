//! Blocking batches: long transfers in pieces, a few of them under way while others are copied.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cells::{Cell, LARGE};
use super::conn::VerbsConn;
use super::unit::{Action, Data, Done, Owner, Request};
use crate::common;
use crate::waiter::Waiter;
use crate::{Op, TransportError};

/// Bytes that are posted together, requests that are, and how often that may be under way for one caller.
const UNIT: usize = 4 * LARGE;
const REQUESTS: usize = 64;
const AHEAD: usize = 4;
/// Which part of which operation a request is.
struct Piece {
    op: usize,
    off: usize,
    len: usize,
}

struct Ahead {
    waiter: Arc<Waiter<Done>>,
    pieces: Vec<Piece>,
}

/// A caller's batch on its way.
struct Run<'a> {
    conn: &'a VerbsConn,
    deadline: Instant,
    requests: Vec<Request>,
    pieces: Vec<Piece>,
    bytes: usize,
    ahead: VecDeque<Ahead>,
}

/// Runs a batch and waits for it.
pub(super) fn run(conn: &VerbsConn, ops: &mut [Op<'_>]) -> Result<(), TransportError> {
    let mut run = Run {
        conn,
        deadline: Instant::now() + conn.host.base.config.timeout,
        requests: Vec::new(),
        pieces: Vec::new(),
        bytes: 0,
        ahead: VecDeque::new(),
    };
    run.all(ops)
}

/// Waits for a unit, driving the completion queue for as long as it is worth not to sleep.
fn wait(conn: &VerbsConn, waiter: &Waiter<Done>, deadline: Instant) -> Result<Vec<Request>, TransportError> {
    let start = Instant::now();
    let spin = conn.pace.patience(conn.host.base.config.spin);
    loop {
        conn.reap();
        if let Some(outcome) = waiter.take() {
            conn.pace.took(start.elapsed());
            return outcome;
        }
        if start.elapsed() >= spin {
            break;
        }
        // On few cores the one we wait for may need this core.
        std::thread::yield_now();
    }
    conn.arm();
    match waiter.wait(Duration::ZERO, deadline) {
        Some(outcome) => {
            conn.pace.took(start.elapsed());
            outcome
        }
        None => {
            let timeout = conn.host.base.config.timeout;
            let why = common::timed_out(&conn.base.addr, timeout);
            conn.fail(why.clone());
            Err(why)
        }
    }
}

fn length(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

impl Run<'_> {
    fn all(&mut self, ops: &mut [Op<'_>]) -> Result<(), TransportError> {
        for n in 0..ops.len() {
            self.add(ops, n)?;
        }
        self.post()?;
        while !self.ahead.is_empty() {
            self.settle(ops)?;
        }
        Ok(())
    }

    /// The failure of what is still under way, if it has failed: it came before `why`, which says that there is
    /// nothing more to be posted to.
    fn first_failure(&mut self, why: TransportError) -> TransportError {
        while let Some(oldest) = self.ahead.pop_front() {
            if let Err(earlier) = wait(self.conn, &oldest.waiter, self.deadline) {
                return earlier;
            }
        }
        why
    }

    /// Adds an operation, posting on the way what is enough to be posted.
    fn add(&mut self, ops: &mut [Op<'_>], n: usize) -> Result<(), TransportError> {
        let (action, at, whole) = match &ops[n] {
            Op::Read { at, into } => (Action::Read, *at, into.len()),
            Op::Write { at, from } => (Action::Write, *at, from.len()),
            Op::Cas { at, expect, new, .. } => (
                Action::Cas {
                    expect: *expect,
                    new: *new,
                },
                *at,
                8,
            ),
            Op::Faa { at, add, .. } => (Action::Faa { add: *add }, *at, 8),
        };
        let mut off = 0;
        while off < whole {
            let len = (whole - off).min(LARGE);
            if self.bytes + len > UNIT || self.requests.len() >= REQUESTS {
                self.post()?;
            }
            let data = match &ops[n] {
                Op::Write { from, .. } if len <= self.conn.pair.inline => {
                    Data::Inline(from[off..off + len].to_vec())
                }
                _ => Data::Cell(self.cell(len, ops)?),
            };
            if let (Op::Write { from, .. }, Data::Cell(cell)) = (&ops[n], &data) {
                cell.fill(0, &from[off..off + len])?;
            }
            self.requests.push(Request {
                action,
                at: at.plus(off as u64),
                len: length(len),
                data,
            });
            self.pieces.push(Piece { op: n, off, len });
            self.bytes += len;
            off += len;
            while self.ahead.len() >= AHEAD {
                self.settle(ops)?;
            }
        }
        Ok(())
    }

    /// A cell; where they are short, those that this batch holds are put to use first.
    fn cell(&mut self, len: usize, ops: &mut [Op<'_>]) -> Result<Cell, TransportError> {
        loop {
            let idle = self.ahead.is_empty() && self.requests.is_empty();
            let deadline = idle.then_some(self.deadline);
            if let Some(cell) = self.conn.adapter.cells.take_some(len, deadline)? {
                return Ok(cell);
            }
            if idle {
                let why = common::timed_out(&self.conn.base.addr, self.conn.host.base.config.timeout);
                return Err(why);
            }
            self.post()?;
            self.settle(ops)?;
        }
    }

    fn post(&mut self) -> Result<(), TransportError> {
        if self.requests.is_empty() {
            return Ok(());
        }
        let waiter = Arc::new(Waiter::default());
        let requests = std::mem::take(&mut self.requests);
        self.bytes = 0;
        self.conn
            .enqueue(requests, Owner::Blocked(Arc::clone(&waiter)))
            .map_err(|(_, why)| self.first_failure(why))?;
        self.ahead.push_back(Ahead {
            waiter,
            pieces: std::mem::take(&mut self.pieces),
        });
        Ok(())
    }

    /// Waits for the oldest part under way and takes its results.
    fn settle(&mut self, ops: &mut [Op<'_>]) -> Result<(), TransportError> {
        let Some(oldest) = self.ahead.pop_front() else {
            return Ok(());
        };
        // Each part gets the whole time: many of them take longer than one.
        let deadline = Instant::now() + self.conn.host.base.config.timeout.max(Duration::from_millis(1));
        let requests = wait(self.conn, &oldest.waiter, deadline)?;
        for (request, piece) in requests.iter().zip(&oldest.pieces) {
            match &mut ops[piece.op] {
                Op::Read { into, .. } => request.copy_to(&mut into[piece.off..piece.off + piece.len])?,
                Op::Cas { old, .. } | Op::Faa { old, .. } => *old = request.old()?,
                Op::Write { .. } => {}
            }
        }
        Ok(())
    }
}
