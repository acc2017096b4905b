//! Sending messages: the ring if there is room, else a wait (or, for progress threads, a queue).

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::conn::ShmConn;
use super::ring::Producer;
use crate::TransportError;
use crate::common;

#[derive(Debug, Default)]
pub(super) struct Sending {
    ring: Producer,
    /// Messages of progress threads that found the ring full.
    pub(super) overflow: VecDeque<Box<[u8]>>,
}

impl ShmConn {
    /// [`crate::Connection::send`].
    pub(super) fn send_message(&self, message: &[u8]) -> Result<(), TransportError> {
        common::check_message(message)?;
        if !self.alive() {
            return Err(self.base.dead());
        }
        let pushed = {
            let mut sending = self.sending.lock();
            if sending.overflow.is_empty() {
                self.push(&mut sending, message)
            } else {
                Ok(false)
            }
        };
        match pushed {
            Ok(true) => {}
            Ok(false) => self.send_slow(message)?,
            Err(why) => {
                self.fail(why.clone());
                return Err(why);
            }
        }
        self.base.counters.sent(message.len());
        self.ring_bell();
        Ok(())
    }

    fn push(&self, sending: &mut Sending, message: &[u8]) -> Result<bool, TransportError> {
        sending
            .ring
            .push(&self.channel, self.side, message)
            .map_err(|broken| self.base.protocol(broken))
    }

    /// Moves queued messages into the ring and lets blocked senders try again.
    /// Called by the progress thread in every round; true if anything moved.
    pub(super) fn flush(&self) -> bool {
        if !self.waiting.load(Ordering::SeqCst) {
            return false;
        }
        let mut sending = self.sending.lock();
        let mut moved = false;
        loop {
            while let Some(message) = sending.overflow.pop_front() {
                match self.push(&mut sending, &message) {
                    Ok(true) => moved = true,
                    Ok(false) => {
                        sending.overflow.push_front(message);
                        break;
                    }
                    Err(why) => {
                        drop(sending);
                        self.fail(why);
                        return moved;
                    }
                }
            }
            if sending.overflow.is_empty() {
                self.waiting.store(false, Ordering::SeqCst);
                break;
            }
            if self.channel.want_room(self.side).swap(1, Ordering::SeqCst) == 1 {
                break;
            }
            // The flag is new: look once more, or room made just before it would go unnoticed.
        }
        self.room.notify_all();
        drop(sending);
        if moved {
            self.ring_bell();
        }
        moved
    }

    fn send_slow(&self, message: &[u8]) -> Result<(), TransportError> {
        let deadline = Instant::now() + self.core.base.config.timeout;
        let mut sending = self.sending.lock();
        loop {
            if !self.alive() {
                return Err(self.base.dead());
            }
            if sending.overflow.is_empty() {
                // Announced before each attempt, so that room made after a failed one is told to us.
                self.waiting.store(true, Ordering::SeqCst);
                self.channel.want_room(self.side).store(1, Ordering::SeqCst);
                match self.push(&mut sending, message) {
                    Ok(true) => return Ok(()),
                    Ok(false) => {}
                    Err(why) => {
                        drop(sending);
                        self.fail(why.clone());
                        return Err(why);
                    }
                }
            }
            if common::on_progress_thread() {
                sending.overflow.push_back(message.into());
                self.waiting.store(true, Ordering::SeqCst);
                drop(sending);
                self.core.wake_if_sleeping();
                return Ok(());
            }
            // Short waits: the wake-up comes through the progress thread, which may be busy in a callback.
            self.room.wait_for(&mut sending, Duration::from_millis(1));
            if Instant::now() >= deadline {
                drop(sending);
                let why = common::timed_out(&self.base.addr, self.core.base.config.timeout);
                self.fail(why.clone());
                return Err(why);
            }
        }
    }
}
