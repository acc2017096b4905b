//! The message rings of a channel: single producer (under a lock), single consumer (the progress thread).
//!
//! A record is a word (length below, check above) and the bytes, padded to 8. The consumer trusts nothing it
//! finds: positions and lengths are checked, and the bytes are copied out before anybody looks at them.

use std::sync::atomic::Ordering;

use super::layout::{Channel, RING, Side};
use crate::common::LIMITS;

const CHECK: u32 = 0x5eed_f00d;

/// What is wrong with a ring.
pub(super) type Broken = &'static str;

/// The producer's view.
#[derive(Debug, Default)]
pub(super) struct Producer {
    tail: u64,
    head_seen: u64,
}

/// The consumer's view.
#[derive(Debug, Default)]
pub(super) struct Consumer {
    head: u64,
}

fn record_len(message: usize) -> u64 {
    8 + message.next_multiple_of(8) as u64
}

fn check_of(pos: u64) -> u32 {
    CHECK ^ (pos as u32)
}

impl Producer {
    /// Puts a message into the ring if there is room.
    pub(super) fn push(&mut self, channel: &Channel, side: Side, message: &[u8]) -> Result<bool, Broken> {
        let need = record_len(message.len());
        if self.tail - self.head_seen + need > RING as u64 {
            let head = channel.head(side).load(Ordering::SeqCst);
            if head > self.tail || head < self.head_seen {
                return Err("impossible position of the reader in the message ring");
            }
            self.head_seen = head;
            if self.tail - head + need > RING as u64 {
                return Ok(false);
            }
        }
        let header = u64::from(check_of(self.tail)) << 32 | message.len() as u64;
        channel
            .ring_word(side, self.tail)
            .store(header, Ordering::Relaxed);
        channel
            .ring_write(side, self.tail + 8, message)
            .map_err(|_| "message ring too small")?;
        self.tail += need;
        // SeqCst: the sleeping flag of the receiver is read after this becomes visible.
        channel.tail(side).store(self.tail, Ordering::SeqCst);
        Ok(true)
    }
}

impl Consumer {
    /// Whether there is anything to take out.
    #[inline]
    pub(super) fn pending(&self, channel: &Channel, side: Side) -> bool {
        channel.tail(side).load(Ordering::SeqCst) != self.head
    }

    /// Takes the next message of `side`'s ring out; its length in `into`.
    pub(super) fn pop(
        &mut self,
        channel: &Channel,
        side: Side,
        into: &mut [u8],
    ) -> Result<Option<usize>, Broken> {
        let tail = channel.tail(side).load(Ordering::SeqCst);
        let Some(filled) = tail.checked_sub(self.head) else {
            return Err("impossible position of the writer in the message ring");
        };
        if filled == 0 {
            return Ok(None);
        }
        if filled > RING as u64 || !filled.is_multiple_of(8) {
            return Err("impossible position of the writer in the message ring");
        }
        let header = channel.ring_word(side, self.head).load(Ordering::Relaxed);
        let len = (header & 0xffff_ffff) as usize;
        if (header >> 32) as u32 != check_of(self.head) || len > LIMITS.max_message.min(into.len()) {
            return Err("malformed record in the message ring");
        }
        if record_len(len) > filled {
            return Err("record cut short in the message ring");
        }
        channel
            .ring_read(side, self.head + 8, &mut into[..len])
            .map_err(|_| "message ring too small")?;
        self.head += record_len(len);
        channel.head(side).store(self.head, Ordering::SeqCst);
        Ok(Some(len))
    }

    /// Whether at least half of the ring is free: the producer's next message fits, whatever its length.
    pub(super) fn roomy(&self, channel: &Channel, side: Side) -> bool {
        channel.tail(side).load(Ordering::SeqCst).wrapping_sub(self.head) <= RING as u64 / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fifo_over_many_wraps() {
        let channel = Channel::create(None).unwrap();
        let (mut p, mut c) = (Producer::default(), Consumer::default());
        let mut into = vec![0; LIMITS.max_message];
        let (mut sent, mut got) = (0u64, 0u64);
        let len_of = |n: u64| (n * 7919 % 40_000) as usize;
        while got < 2000 {
            while sent < 2000
                && p.push(&channel, Side::Listening, &vec![sent as u8; len_of(sent)])
                    .unwrap()
            {
                sent += 1;
            }
            for _ in 0..1 + got % 5 {
                let Some(n) = c.pop(&channel, Side::Listening, &mut into).unwrap() else {
                    break;
                };
                assert_eq!(n, len_of(got));
                assert!(into[..n].iter().all(|b| *b == got as u8));
                got += 1;
            }
        }
        assert!(!c.pending(&channel, Side::Listening));
        assert!(c.roomy(&channel, Side::Listening));
    }

    #[test]
    fn nonsense_is_an_error() {
        let channel = Channel::create(None).unwrap();
        let mut into = vec![0; LIMITS.max_message];
        let side = Side::Connecting;
        for (tail, header) in [
            (7, 0),
            (RING as u64 + 8, 0),
            (8, 0xffff_ffff),
            (8, u64::MAX),
            (u64::MAX, 1),
        ] {
            channel.tail(side).store(tail, Ordering::SeqCst);
            channel.ring_word(side, 0).store(header, Ordering::SeqCst);
            assert!(
                Consumer::default().pop(&channel, side, &mut into).is_err(),
                "{tail} {header}"
            );
        }
        // A true header that promises more than was written.
        channel.tail(side).store(8, Ordering::SeqCst);
        channel
            .ring_word(side, 0)
            .store(u64::from(check_of(0)) << 32 | 64, Ordering::SeqCst);
        assert!(Consumer::default().pop(&channel, side, &mut into).is_err());
        channel.head(side).store(99, Ordering::SeqCst);
        let mut p = Producer {
            tail: RING as u64,
            head_seen: 0,
        };
        assert!(p.push(&channel, side, &[1]).is_err() || channel.head(side).load(Ordering::SeqCst) == 99);
    }
}
