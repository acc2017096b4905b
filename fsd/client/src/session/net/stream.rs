//! Lease messages between two mounts: in order and once, whatever becomes of the connections that carry them.
//!
//! Messages are numbered from 1, separately for each direction, between one life of this mount and one of the other. A message
//! is kept until the other has said that it got it, and goes again over each new connection; the other takes a number once.
//! The lease protocol needs that: its model loses no message, except the last question to a mount that has left.

use std::collections::VecDeque;

/// A message is told to have come after so many at the latest, in a frame of its own if no message goes back anyhow.
const TELL: u32 = 16;
/// In a frame without a message: the other wants to know how far it has been heard.
const ASK: u8 = 1;
/// Number, and the last number heard.
const HEAD: usize = 16;

/// Why a frame of the other mount cannot be taken. The connection is to be closed: over the next one everything comes again.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum Broken {
    #[error("it is too short")]
    Short,
    #[error("message {got} came where {due} was due")]
    Gap { due: u64, got: u64 },
    #[error("it says that it has heard {heard} messages, of {sent}")]
    Unsent { heard: u64, sent: u64 },
}

/// The messages to and from another mount.
#[derive(Debug, Default)]
pub(super) struct Stream {
    /// Names the life of the other mount; 0: none was met.
    life: u64,
    /// The one before: what still comes of it is not for now.
    former: u64,
    /// Messages that the other may not have, the oldest first.
    kept: VecDeque<Box<[u8]>>,
    /// Messages that the other is known to have.
    acknowledged: u64,
    /// Of those kept: how many have gone over the connection of now, and over any to this life.
    gone: usize,
    gone_ever: usize,
    /// Messages that the other has sent.
    heard: u64,
    /// Of those, how many it has not been told of.
    untold: u32,
    /// Somebody waits until the other has heard so many messages.
    awaited: Option<u64>,
    /// It has been asked, over the connection of now, how many it has heard.
    asked: bool,
}

impl Stream {
    /// Takes in a message that is to be sent.
    pub(super) fn push(&mut self, message: &[u8]) {
        self.kept.push_back(message.into());
    }

    /// There is a connection to this life, over which nothing has gone: all that is kept goes again, but not to another life.
    pub(super) fn connected(&mut self, life: u64) {
        self.meet(life);
        self.gone = 0;
        self.asked = false;
    }

    /// Waits until the other has heard what it was sent so far. False: it has.
    pub(super) fn await_heard(&mut self) -> bool {
        if !self.kept.is_empty() {
            self.awaited = Some(self.acknowledged + self.kept.len() as u64);
            self.asked = false;
        }
        self.awaited.is_some()
    }

    /// Is waited for the other to hear something?
    pub(super) fn is_awaited(&self) -> bool {
        self.awaited.is_some()
    }

    /// The next frame to go over the connection, if there is one.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        if let Some(message) = self.kept.get(self.gone) {
            self.gone += 1;
            self.gone_ever = self.gone_ever.max(self.gone);
            let number = self.acknowledged + self.gone as u64;
            let frame = frame(number, self.heard, message);
            self.untold = 0;
            return Some(frame);
        }
        if self.awaited.is_some() && !std::mem::replace(&mut self.asked, true) {
            self.untold = 0;
            return Some(frame(0, self.heard, &[ASK]));
        }
        (self.untold >= TELL).then(|| {
            self.untold = 0;
            frame(0, self.heard, &[])
        })
    }

    /// A frame that a life of the other mount has sent; what it brings, if that is new.
    pub(super) fn take<'a>(&mut self, life: u64, frame: &'a [u8]) -> Result<Option<&'a [u8]>, Broken> {
        let (head, message) = frame.split_first_chunk::<HEAD>().ok_or(Broken::Short)?;
        let [number, heard] = [0, 8].map(|at| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&head[at..at + 8]);
            u64::from_le_bytes(bytes)
        });
        if life == self.former {
            return Ok(None);
        }
        self.meet(life);
        let sent = self.acknowledged + self.gone_ever as u64;
        if heard > sent {
            return Err(Broken::Unsent { heard, sent });
        }
        let confirmed = heard.saturating_sub(self.acknowledged) as usize;
        self.kept.drain(..confirmed);
        self.acknowledged += confirmed as u64;
        self.gone = self.gone.saturating_sub(confirmed);
        self.gone_ever -= confirmed;
        let acknowledged = self.acknowledged;
        self.awaited.take_if(|awaited| *awaited <= acknowledged);
        let due = self.heard + 1;
        match number {
            0 => {
                if !message.is_empty() {
                    // The other wants to know.
                    self.untold = TELL;
                }
                Ok(None)
            }
            got if got > due => Err(Broken::Gap { due, got }),
            got => {
                // One that came before is told of again: the other does not know.
                self.untold += 1;
                Ok((got == due).then(|| {
                    self.heard = due;
                    message
                }))
            }
        }
    }

    /// The other mount has ended, or left: nothing that is kept can reach it.
    pub(super) fn end(&mut self) {
        *self = Self {
            former: self.life,
            ..Self::default()
        };
    }

    fn meet(&mut self, life: u64) {
        if self.life == life {
            return;
        }
        // What has gone to another life may have been done there, and is nothing to this one.
        let mut kept = std::mem::take(&mut self.kept);
        kept.drain(..self.gone_ever);
        *self = Self {
            life,
            former: self.life,
            awaited: self.awaited.and(Some(kept.len() as u64)).filter(|n| *n > 0),
            kept,
            ..Self::default()
        };
    }
}

fn frame(number: u64, heard: u64, message: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEAD + message.len());
    frame.extend_from_slice(&number.to_le_bytes());
    frame.extend_from_slice(&heard.to_le_bytes());
    frame.extend_from_slice(message);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIVES: [u64; 2] = [7, 8];

    /// Two ends, and the frames under way in each direction.
    #[derive(Default)]
    struct Pair {
        ends: [Stream; 2],
        lanes: [VecDeque<Vec<u8>>; 2],
        sent: [Vec<u8>; 2],
        got: [Vec<u8>; 2],
    }

    impl Pair {
        fn push(&mut self, end: usize) {
            let message = self.sent[end].len() as u8;
            self.sent[end].push(message);
            self.ends[end].push(&[message]);
            self.flush(end);
        }

        fn flush(&mut self, end: usize) {
            while let Some(frame) = self.ends[end].next() {
                self.lanes[end].push_back(frame);
            }
        }

        fn deliver(&mut self, from: usize) {
            let Some(frame) = self.lanes[from].pop_front() else {
                return;
            };
            if let Some(message) = self.ends[1 - from].take(LIVES[from], &frame).unwrap() {
                self.got[1 - from].extend(message);
            }
            self.flush(1 - from);
        }

        /// Of what is under way `kept` frames still arrive; then there is a new connection.
        fn reconnect(&mut self, kept: usize) {
            for from in 0..2 {
                let arrive = kept.min(self.lanes[from].len());
                (0..arrive).for_each(|_| self.deliver(from));
            }
            self.lanes = Default::default();
            for end in 0..2 {
                self.ends[end].connected(LIVES[1 - end]);
                self.flush(end);
            }
        }
    }

    proptest! {
        #[test]
        fn every_message_comes_once_and_in_order(steps in prop::collection::vec((0..8u8, 0..4usize), 0..300)) {
            let mut pair = Pair::default();
            pair.reconnect(0);
            for (what, n) in steps {
                match what {
                    0..3 => pair.push(n % 2),
                    3..7 => pair.deliver(n % 2),
                    _ => pair.reconnect(n),
                }
            }
            pair.reconnect(0);
            while pair.lanes.iter().any(|lane| !lane.is_empty()) {
                pair.deliver(0);
                pair.deliver(1);
            }
            prop_assert_eq!(&pair.got[1], &pair.sent[0]);
            prop_assert_eq!(&pair.got[0], &pair.sent[1]);
            // Nobody keeps more than what the other need not have told of.
            prop_assert!(pair.ends.iter().all(|end| end.kept.len() < TELL as usize));
        }

        #[test]
        fn garbage_is_no_panic(frames in prop::collection::vec(prop::collection::vec(0..3u8, 0..40), 0..20)) {
            let mut stream = Stream::default();
            stream.push(b"a");
            stream.connected(7);
            stream.next();
            for frame in frames {
                let _ = stream.take(7, &frame);
            }
        }
    }

    #[test]
    fn who_asks_is_told_that_everything_was_heard() {
        let mut pair = Pair::default();
        pair.reconnect(0);
        pair.push(0);
        assert!(pair.ends[0].await_heard());
        pair.flush(0);
        // One that is asked for before the other was ever met is waited for as well.
        let mut early = Stream::default();
        early.push(b"early");
        assert!(early.await_heard());
        early.connected(7);
        assert!(early.is_awaited() && early.next().is_some());
        assert_eq!(early.take(7, &frame(0, 1, &[])), Ok(None));
        assert!(!early.is_awaited());
        // The question is lost with the connection, and asked again over the next.
        pair.reconnect(0);
        while pair.lanes.iter().any(|lane| !lane.is_empty()) {
            assert!(pair.ends[0].is_awaited());
            pair.deliver(0);
            pair.deliver(1);
        }
        assert!(!pair.ends[0].is_awaited() && pair.got[1] == [0]);
        assert!(!pair.ends[0].await_heard());
    }

    #[test]
    fn another_life_gets_only_what_has_gone_nowhere() {
        let mut stream = Stream::default();
        stream.push(b"old");
        stream.connected(7);
        let old = stream.next().unwrap();
        stream.push(b"new");
        stream.connected(9);
        let new = stream.next().unwrap();
        assert_eq!(old[..8], new[..8], "both are the first of their lives");
        assert_eq!(&new[HEAD..], b"new");
        assert_eq!(stream.next(), None);
        // What the former life had sent comes late.
        assert_eq!(stream.take(7, &frame(1, 1, b"late")), Ok(None));
        assert_eq!(stream.take(9, &frame(1, 1, b"now")), Ok(Some(&b"now"[..])));
        assert!(stream.kept.is_empty());
    }
}
