//! Sending messages: the ring if there is room, else a wait, or a queue for who must not wait.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::layout::{Channel, Side};
use super::ring::{Broken, Producer};

#[derive(Debug, Default)]
struct Sending {
    ring: Producer,
    /// Messages that found the ring full, and whose senders did not wait.
    overflow: VecDeque<Box<[u8]>>,
}

/// The messages that a connection sends.
#[derive(Debug)]
pub(super) struct Outbox {
    side: Side,
    sending: Mutex<Sending>,
    room: Condvar,
    /// Somebody waits for room: the progress thread looks after it.
    waiting: AtomicBool,
}

/// Why a message was not sent.
pub(super) enum Unsent {
    /// What the reader's side of the ring says is impossible.
    Broken(Broken),
    /// The connection is over.
    Dead,
    /// There was no room in time.
    Late,
}

/// What became of a message.
pub(super) enum Sent {
    InRing,
    /// The progress thread is to look after it.
    Queued,
}

impl Outbox {
    pub(super) fn new(side: Side) -> Self {
        Self {
            side,
            sending: Mutex::default(),
            room: Condvar::new(),
            waiting: AtomicBool::new(false),
        }
    }

    /// Sends a message, waiting for room at most for `patience`; without that it is queued instead.
    pub(super) fn send(
        &self,
        channel: &Channel,
        message: &[u8],
        alive: impl Fn() -> bool,
        patience: Option<Duration>,
    ) -> Result<Sent, Unsent> {
        let pushed = {
            let mut sending = self.sending.lock();
            sending.overflow.is_empty() && self.push(channel, &mut sending, message)?
        };
        if pushed {
            return Ok(Sent::InRing);
        }
        self.send_slow(channel, message, alive, patience)
    }

    #[inline]
    fn push(&self, channel: &Channel, sending: &mut Sending, message: &[u8]) -> Result<bool, Unsent> {
        let pushed = sending.ring.push(channel, self.side, message);
        pushed.map_err(Unsent::Broken)
    }

    fn send_slow(
        &self,
        channel: &Channel,
        message: &[u8],
        alive: impl Fn() -> bool,
        patience: Option<Duration>,
    ) -> Result<Sent, Unsent> {
        let deadline = patience.map(|patience| Instant::now() + patience);
        let mut sending = self.sending.lock();
        loop {
            if !alive() {
                return Err(Unsent::Dead);
            }
            if sending.overflow.is_empty() {
                // Announced before each attempt, so that room made after a failed one is told to us.
                self.waiting.store(true, Ordering::SeqCst);
                channel.want_room(self.side).store(1, Ordering::SeqCst);
                if self.push(channel, &mut sending, message)? {
                    return Ok(Sent::InRing);
                }
            }
            let Some(deadline) = deadline else {
                sending.overflow.push_back(message.into());
                self.waiting.store(true, Ordering::SeqCst);
                return Ok(Sent::Queued);
            };
            // Short waits: the wake-up comes through the progress thread, which may be busy in a callback.
            self.room.wait_for(&mut sending, Duration::from_millis(1));
            if Instant::now() >= deadline {
                return Err(Unsent::Late);
            }
        }
    }

    /// Moves queued messages into the ring and lets blocked senders try again.
    /// Called by the progress thread in every round; true if anything moved.
    #[inline]
    pub(super) fn flush(&self, channel: &Channel) -> Result<bool, Unsent> {
        if !self.waiting.load(Ordering::SeqCst) {
            return Ok(false);
        }
        self.flush_waiting(channel)
    }

    fn flush_waiting(&self, channel: &Channel) -> Result<bool, Unsent> {
        let mut sending = self.sending.lock();
        let mut moved = false;
        loop {
            while let Some(message) = sending.overflow.pop_front() {
                if !self.push(channel, &mut sending, &message)? {
                    sending.overflow.push_front(message);
                    break;
                }
                moved = true;
            }
            if sending.overflow.is_empty() {
                self.waiting.store(false, Ordering::SeqCst);
                break;
            }
            if channel.want_room(self.side).swap(1, Ordering::SeqCst) == 1 {
                break;
            }
            // The flag is new: look once more, or room made just before it would go unnoticed.
        }
        self.room.notify_all();
        Ok(moved)
    }

    /// Lets blocked senders see that the connection is over.
    pub(super) fn wake_all(&self) {
        // Under the lock, or a sender between its check and its wait would miss this.
        let _sending = self.sending.lock();
        self.room.notify_all();
    }

    /// Forgets what is queued.
    pub(super) fn clear(&self) {
        self.sending.lock().overflow.clear();
    }
}
