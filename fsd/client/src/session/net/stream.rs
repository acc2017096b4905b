//! Lease messages between two mounts: in order and once, whatever becomes of the connections that carry them.
//!
//! Messages are numbered from 1, separately for each direction, between one life of this mount and one of the other. A message
//! is kept until the other has said that it got it, and goes again over each new connection; the other takes a number once.
//! The lease protocol needs that: its model loses no message, except the last question to a mount that has left.
//!
//! There are two carriers. Over each of them a number goes only behind the one before, or when the other is known to have that;
//! so the number that comes is the one that is due, or has come before, in whatever order the carriers bring theirs.

use std::collections::VecDeque;

/// A message is told to have come after so many at the latest, in a frame of its own if no message goes back anyhow.
const TELL: u32 = 16;
/// In a frame without a message: the other wants to know how far it has been heard.
const ASK: u8 = 1;
/// The answer to that, by the carrier that brought the question.
const TOLD: u8 = 2;
/// The other needs the connection no longer, and sends nothing more over it.
const BYE: u8 = 3;
/// Number, and the last number heard.
const HEAD: usize = 16;

/// Why a frame of the other mount cannot be taken. The carrier is to begin anew: everything comes again then.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum Broken {
    #[error("it is too short")]
    Short,
    #[error("message {got} came where {due} was due")]
    Gap { due: u64, got: u64 },
    #[error("it says that it has heard {heard} messages, of {sent}")]
    Unsent { heard: u64, sent: u64 },
}

/// What carries frames: in order, and each that is not the last to have come once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carrier {
    /// A connection between the two.
    Direct,
    /// The metadata server, one frame at a time.
    Relay,
}

/// What a frame has brought.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken<'a> {
    /// A message, for the first time.
    Message(&'a [u8]),
    /// An answer to a question: the carrier works in both directions.
    Answer,
    /// The connection is given up by the other.
    Bye,
    /// Nothing new.
    Nothing,
}

/// How far one carrier is.
#[derive(Debug, Default)]
struct Lane {
    /// Of the messages that are kept, so many have gone this way since it began.
    gone: usize,
    /// The other is to be asked how many it has heard.
    ask: bool,
    /// It has asked.
    tell: bool,
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
    lanes: [Lane; 2],
    /// Of those kept, so many have gone to this life, whichever way.
    gone_ever: usize,
    /// Messages that the other has sent.
    heard: u64,
    /// Of those, how many it has not been told of.
    untold: u32,
    /// Somebody waits until the other has heard so many messages.
    awaited: Option<u64>,
}

impl Stream {
    /// Takes in a message that is to be sent.
    pub(super) fn push(&mut self, message: &[u8]) {
        self.kept.push_back(message.into());
    }

    /// There is a connection to this life, over which nothing has gone: all that is kept goes again, but not to another life.
    pub(super) fn connected(&mut self, life: u64) {
        self.meet(life);
        self.restart(Carrier::Direct);
    }

    /// All that is kept goes this way again.
    pub(super) fn restart(&mut self, carrier: Carrier) {
        self.lanes[carrier as usize] = Lane {
            ask: self.awaited.is_some(),
            ..Lane::default()
        };
    }

    /// The life of the other mount, if one was met.
    pub(super) fn life(&self) -> Option<u64> {
        Some(self.life).filter(|life| *life != 0)
    }

    /// Is there a message that the other may not have?
    pub(super) fn keeps(&self) -> bool {
        !self.kept.is_empty()
    }

    /// Messages that the other is known to have.
    pub(super) fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// The other is to be asked how far it has heard, behind everything else that is to go this way.
    pub(super) fn ask(&mut self, carrier: Carrier) {
        self.lanes[carrier as usize].ask = true;
    }

    /// Waits until the other has heard what it was sent so far. False: it has.
    pub(super) fn await_heard(&mut self) -> bool {
        if !self.kept.is_empty() {
            self.awaited = Some(self.acknowledged + self.kept.len() as u64);
            self.lanes.iter_mut().for_each(|lane| lane.ask = true);
        }
        self.awaited.is_some()
    }

    /// Is waited for the other to hear something?
    pub(super) fn is_awaited(&self) -> bool {
        self.awaited.is_some()
    }

    /// The next frame to go this way, if there is one.
    pub(super) fn next(&mut self, carrier: Carrier) -> Option<Vec<u8>> {
        let lane = &mut self.lanes[carrier as usize];
        if let Some(message) = self.kept.get(lane.gone) {
            lane.gone += 1;
            self.gone_ever = self.gone_ever.max(lane.gone);
            let number = self.acknowledged + lane.gone as u64;
            let frame = frame(number, self.heard, message);
            self.untold = 0;
            return Some(frame);
        }
        if let Some(frame) = self.next_without(carrier) {
            return Some(frame);
        }
        (self.untold >= TELL).then(|| self.without(&[]))
    }

    /// The next frame to go this way that is a question or an answer: where messages go the other way, they tell whether this works.
    pub(super) fn next_without(&mut self, carrier: Carrier) -> Option<Vec<u8>> {
        let lane = &mut self.lanes[carrier as usize];
        if std::mem::take(&mut lane.tell) {
            return Some(self.without(&[TOLD]));
        }
        std::mem::take(&mut lane.ask).then(|| self.without(&[ASK]))
    }

    /// A question for whichever life of the other mount there is: its answer makes that known.
    pub(super) fn question() -> Vec<u8> {
        frame(0, 0, &[ASK])
    }

    /// The connection is not needed any more.
    pub(super) fn bye(&mut self) -> Vec<u8> {
        self.without(&[BYE])
    }

    /// A frame that tells how far the other was heard.
    fn without(&mut self, message: &[u8]) -> Vec<u8> {
        self.untold = 0;
        frame(0, self.heard, message)
    }

    /// A frame that a life of the other mount has sent; what it brings.
    pub(super) fn take<'a>(
        &mut self,
        life: u64,
        carrier: Carrier,
        frame: &'a [u8],
    ) -> Result<Taken<'a>, Broken> {
        let (head, message) = frame.split_first_chunk::<HEAD>().ok_or(Broken::Short)?;
        let [number, heard] = [0, 8].map(|at| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&head[at..at + 8]);
            u64::from_le_bytes(bytes)
        });
        if life == self.former {
            return Ok(Taken::Nothing);
        }
        self.meet(life);
        self.confirm(heard)?;
        let due = self.heard + 1;
        match number {
            0 => Ok(match message {
                [ASK] => {
                    self.lanes[carrier as usize].tell = true;
                    Taken::Nothing
                }
                [TOLD] => Taken::Answer,
                [BYE] => Taken::Bye,
                _ => Taken::Nothing,
            }),
            got if got > due => Err(Broken::Gap { due, got }),
            got => {
                // One that came before is told of again: the other does not know.
                self.untold += 1;
                if got < due {
                    return Ok(Taken::Nothing);
                }
                self.heard = due;
                Ok(Taken::Message(message))
            }
        }
    }

    /// The other has heard so many messages: they are kept no longer.
    fn confirm(&mut self, heard: u64) -> Result<(), Broken> {
        let sent = self.acknowledged + self.gone_ever as u64;
        if heard > sent {
            return Err(Broken::Unsent { heard, sent });
        }
        let confirmed = heard.saturating_sub(self.acknowledged) as usize;
        self.kept.drain(..confirmed);
        self.acknowledged += confirmed as u64;
        for lane in &mut self.lanes {
            lane.gone = lane.gone.saturating_sub(confirmed);
        }
        self.gone_ever -= confirmed;
        let acknowledged = self.acknowledged;
        self.awaited.take_if(|awaited| *awaited <= acknowledged);
        Ok(())
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
        let awaited = self.awaited.and(Some(kept.len() as u64)).filter(|n| *n > 0);
        let lane = || Lane {
            ask: awaited.is_some(),
            ..Lane::default()
        };
        *self = Self {
            life,
            former: self.life,
            awaited,
            kept,
            lanes: [lane(), lane()],
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
        /// Do messages go by the relay?
        relayed: [bool; 2],
        /// One at a time.
        relay: [Option<Vec<u8>>; 2],
        /// Given up by who sent them, and still under way.
        strays: [Vec<Vec<u8>>; 2],
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
            let stream = &mut self.ends[end];
            if !self.relayed[end] {
                while let Some(frame) = stream.next(Carrier::Direct) {
                    self.lanes[end].push_back(frame);
                }
                return;
            }
            while let Some(frame) = stream.next_without(Carrier::Direct) {
                self.lanes[end].push_back(frame);
            }
            if self.relay[end].is_none() {
                self.relay[end] = stream.next(Carrier::Relay);
            }
        }

        fn take(&mut self, from: usize, carrier: Carrier, frame: &[u8]) {
            let to = &mut self.ends[1 - from];
            if let Taken::Message(message) = to.take(LIVES[from], carrier, frame).unwrap() {
                self.got[1 - from].extend(message);
            }
            self.flush(1 - from);
        }

        fn deliver(&mut self, from: usize) {
            if let Some(frame) = self.lanes[from].pop_front() {
                self.take(from, Carrier::Direct, &frame);
            }
        }

        fn deliver_relayed(&mut self, from: usize) {
            if let Some(frame) = self.relay[from].take() {
                self.take(from, Carrier::Relay, &frame);
                self.flush(from);
            }
        }

        /// Nothing is heard of the frame under way, which comes all the same: at once, at some time, or both.
        fn give_up(&mut self, from: usize, n: usize) {
            if let Some(frame) = self.relay[from].take() {
                if n != 1 {
                    self.take(from, Carrier::Relay, &frame);
                }
                if n != 0 {
                    self.strays[from].push(frame);
                }
                self.ends[from].restart(Carrier::Relay);
                self.flush(from);
            }
        }

        fn deliver_stray(&mut self, from: usize, n: usize) {
            if n < self.strays[from].len() {
                let frame = self.strays[from].swap_remove(n);
                self.take(from, Carrier::Relay, &frame);
            }
        }

        /// Messages go the other way from now on.
        fn turn(&mut self, end: usize) {
            self.relayed[end] = !self.relayed[end];
            if self.relayed[end] {
                self.strays[end].extend(self.relay[end].take());
                self.ends[end].restart(Carrier::Relay);
            }
            self.flush(end);
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
        fn every_message_comes_once_and_in_order(
            steps in prop::collection::vec((0..15u8, 0..4usize), 0..300)
        ) {
            let mut pair = Pair::default();
            pair.reconnect(0);
            for (what, n) in steps {
                match what {
                    0..3 => pair.push(n % 2),
                    3..7 => pair.deliver(n % 2),
                    7 => pair.reconnect(n),
                    8 => pair.turn(n % 2),
                    9..12 => pair.deliver_relayed(n % 2),
                    12 => pair.give_up(n % 2, n / 2),
                    13 => pair.give_up(n % 2, 2),
                    _ => pair.deliver_stray(n % 2, n / 2),
                }
            }
            pair.relayed = [false; 2];
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
            stream.next(Carrier::Direct);
            for frame in frames {
                let _ = stream.take(7, Carrier::Direct, &frame);
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
        assert!(early.is_awaited() && early.next(Carrier::Direct).is_some());
        assert_eq!(
            early.take(7, Carrier::Direct, &frame(0, 1, &[])),
            Ok(Taken::Nothing)
        );
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
        let old = stream.next(Carrier::Direct).unwrap();
        stream.push(b"new");
        stream.connected(9);
        let new = stream.next(Carrier::Direct).unwrap();
        assert_eq!(old[..8], new[..8], "both are the first of their lives");
        assert_eq!(&new[HEAD..], b"new");
        assert_eq!(stream.next(Carrier::Direct), None);
        // What the former life had sent comes late.
        assert_eq!(
            stream.take(7, Carrier::Direct, &frame(1, 1, b"late")),
            Ok(Taken::Nothing)
        );
        assert_eq!(
            stream.take(9, Carrier::Direct, &frame(1, 1, b"now")),
            Ok(Taken::Message(&b"now"[..]))
        );
        assert!(stream.kept.is_empty());
    }
}
