//! A connection as the application sees it.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::attend::{self, Attendance};
use super::conn::{LINGER, VerbsConn};
use super::request;
use super::submit::{self, Prepared};
use super::unit::Owner;
use crate::base::{ConnBase, answered_by_base};
use crate::common::{self, disconnected};
use crate::error::TransportError;
use crate::fabric::Connection;
use crate::ops::{AsyncOp, BatchError, Completion, Op};
use crate::stream::Linked;

/// What tells a connection from all others of this process.
fn place(conn: &VerbsConn) -> usize {
    std::ptr::from_ref(conn).addr()
}

impl Linked for VerbsConn {
    fn base(&self) -> &ConnBase {
        &self.base
    }

    fn sock(&self) -> &OwnedFd {
        &self.stream.sock
    }

    fn fail(&self, why: TransportError) {
        VerbsConn::fail(self, why);
    }

    fn writable(&self) {
        if let Err(e) = self.stream.flush() {
            self.fail(self.lost(&e));
        }
    }

    fn finish(&self) {
        self.cut();
        let (units, mut guilty) = self.take_all();
        self.stream.close();
        for unit in units {
            let why = guilty.take().unwrap_or_else(|| self.base.dead());
            if let Some(due) = unit.finish(Err(why)) {
                self.adapter.owe(due);
            }
        }
        self.notify_senders();
    }
}

impl Connection for VerbsConn {
    answered_by_base!();

    fn execute(&self, ops: &mut [Op<'_>]) -> Result<(), TransportError> {
        let bytes = common::check_ops(ops)?;
        if !self.alive() {
            return Err(self.base.dead());
        }
        request::run(self, ops)?;
        self.base.counters.did_ops(ops.len(), bytes);
        Ok(())
    }

    fn submit(&self, batch: Vec<AsyncOp>, done: Completion) {
        let moved = match common::check_batch(&batch) {
            Ok(bytes) => bytes,
            Err(invalid) => return done(Err(BatchError::unstarted(invalid, batch))),
        };
        if !self.alive() {
            return done(Err(BatchError::unstarted(self.base.dead(), batch)));
        }
        let count = batch.len();
        if count == 0 {
            return done(Ok(Vec::new()));
        }
        let Prepared { requests, asked } = match submit::prepare(&self.adapter, self.pair.inline, batch) {
            Ok(prepared) => prepared,
            Err(failed) => return done(Err(failed)),
        };
        let attended = attend::current(place(self));
        // The progress thread sees to it by itself before it sleeps, and so does who attends to it.
        let looked_for = attended.is_some() || common::on_progress_thread();
        let owner = Owner::Async {
            done,
            asked,
            attended,
        };
        match self.enqueue(requests, owner) {
            Ok(()) => {
                self.base.counters.did_ops(count, moved);
                if !looked_for {
                    self.arm();
                }
            }
            Err((owner, why)) => owner.refuse(why),
        }
    }

    fn attend(&self, start: &mut dyn FnMut(), done: &dyn Fn() -> bool) {
        let attendance = match Attendance::begin(place(self)) {
            Some(attendance) if !common::on_progress_thread() => attendance,
            _ => return start(),
        };
        let begun = Instant::now();
        start();
        let spin = self.pace.patience(self.host.base.config.spin);
        let mut measured = false;
        while !done() {
            self.reap();
            if attendance.call() && !std::mem::replace(&mut measured, true) {
                self.pace.took(begun.elapsed());
            }
            if done() || begun.elapsed() >= spin {
                break;
            }
            // On few cores the one we wait for may need this core.
            std::thread::yield_now();
        }
        drop(attendance);
        if self.awaited() {
            self.arm();
        }
    }

    fn send(&self, message: &[u8]) -> Result<(), TransportError> {
        self.send_message(message, !common::on_progress_thread())
    }

    fn queue(&self, message: &[u8]) -> Result<(), TransportError> {
        self.send_message(message, false)
    }

    fn close(&self) {
        self.lingers.store(true, Ordering::SeqCst);
        if !common::on_progress_thread() {
            self.drain(Instant::now() + LINGER);
        }
        self.fail(disconnected(&self.base.addr, "closed on this side"));
        if common::on_progress_thread() {
            return;
        }
        let deadline = Instant::now() + LINGER;
        while self.lingering(deadline) {
            std::thread::sleep(Duration::from_micros(100));
        }
        self.cut();
    }
}
