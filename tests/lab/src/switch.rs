//! The Ethernet switch between guests, with faults on demand.
//!
//! A guest's card is a stream of frames, each with its length before it. A hub made of another emulator would
//! do for the traffic; a switch of our own can also part single pairs, delay and drop per guest, and lets a
//! guest that was killed come back on its port.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{SendFlags, send};

use crate::error::{At, Result};
use crate::process::lock;

/// Bytes that wait for a guest that does not take them, before they are dropped as a switch drops them.
const QUEUE: usize = 8 << 20;
/// Bytes read at once.
const CHUNK: usize = 256 << 10;
/// Longest frame; what is longer is not Ethernet.
const MAX_FRAME: usize = 128 << 10;

/// What the switch does to frames. Ports have the numbers of their guests.
#[derive(Debug, Clone, Default)]
struct Rules {
    cut: BTreeSet<usize>,
    parted: BTreeSet<(usize, usize)>,
    delay: BTreeMap<usize, Duration>,
    loss: BTreeMap<usize, f64>,
}

impl Rules {
    fn passes(&self, from: usize, to: usize) -> bool {
        !self.cut.contains(&from) && !self.cut.contains(&to) && !self.parted.contains(&(from, to))
    }

    fn lost(&self, from: usize, to: usize) -> bool {
        [from, to]
            .iter()
            .filter_map(|port| self.loss.get(port))
            .any(|share| rand::random::<f64>() < *share)
    }

    fn delay(&self, from: usize, to: usize) -> Duration {
        [from, to].iter().filter_map(|port| self.delay.get(port)).sum()
    }
}

#[derive(Debug, Default)]
struct Queue {
    socket: Option<Arc<UnixStream>>,
    frames: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    /// A frame is being written that is not in `frames` any more.
    writing: bool,
    /// Counts the sockets that were attached.
    generation: u64,
}

#[derive(Debug, Default)]
struct Port {
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// Totals since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes that went in.
    pub bytes: u64,
    /// Frames that went in.
    pub frames: u64,
    /// Frames that were dropped for a rule or a full queue; a frame for several guests may count as often.
    pub dropped: u64,
}

#[derive(Debug, Default)]
struct Shared {
    ports: Mutex<BTreeMap<usize, Arc<Port>>>,
    places: Mutex<HashMap<[u8; 6], usize>>,
    rules: Mutex<Rules>,
    counters: Mutex<Counters>,
}

/// The switch.
#[derive(Debug, Clone, Default)]
pub struct Switch {
    shared: Arc<Shared>,
}

impl Switch {
    /// Connects a guest's card to a port; a card that was there before is unplugged.
    ///
    /// # Errors
    /// The socket cannot be shared.
    pub fn attach(&self, number: usize, socket: UnixStream) -> Result<()> {
        let mut input = socket.try_clone().at(|| "share a socket".into())?;
        let socket = Arc::new(socket);
        let port = Arc::clone(lock(&self.shared.ports).entry(number).or_default());
        let generation = {
            let mut queue = lock(&port.queue);
            let generation = queue.generation + 1;
            *queue = Queue {
                socket: Some(Arc::clone(&socket)),
                generation,
                ..Queue::default()
            };
            generation
        };
        port.changed.notify_all();
        let shared = Arc::clone(&self.shared);
        let reader_port = Arc::clone(&port);
        std::thread::spawn(move || {
            shared.read(number, &mut input);
            let mut queue = lock(&reader_port.queue);
            if queue.generation == generation {
                queue.socket = None;
                queue.frames.clear();
                queue.bytes = 0;
            }
            drop(queue);
            reader_port.changed.notify_all();
        });
        std::thread::spawn(move || write_queue(&port, generation, &socket));
        Ok(())
    }

    /// Drops all frames from and to a guest.
    pub fn cut(&self, guest: usize) {
        lock(&self.shared.rules).cut.insert(guest);
    }

    /// Ends [`Switch::cut`].
    pub fn restore(&self, guest: usize) {
        lock(&self.shared.rules).cut.remove(&guest);
    }

    /// Drops all frames from one guest to another, in this direction only.
    pub fn part(&self, from: usize, to: usize) {
        lock(&self.shared.rules).parted.insert((from, to));
    }

    /// Ends [`Switch::part`].
    pub fn join(&self, from: usize, to: usize) {
        lock(&self.shared.rules).parted.remove(&(from, to));
    }

    /// Delays all frames from and to a guest.
    pub fn delay(&self, guest: usize, delay: Duration) {
        lock(&self.shared.rules).delay.insert(guest, delay);
    }

    /// Drops this share of the frames from and to a guest.
    pub fn lose(&self, guest: usize, share: f64) {
        lock(&self.shared.rules).loss.insert(guest, share);
    }

    /// Ends all faults.
    pub fn heal(&self) {
        *lock(&self.shared.rules) = Rules::default();
    }

    /// What went through.
    pub fn counters(&self) -> Counters {
        *lock(&self.shared.counters)
    }
}

impl Shared {
    /// Reads what a card sends, to its end, and passes it on.
    fn read(&self, from: usize, input: &mut UnixStream) {
        let mut buffer = vec![0; CHUNK];
        let mut filled = 0;
        loop {
            match input.read(buffer.get_mut(filled..).unwrap_or_default()) {
                Ok(0) | Err(_) => return,
                Ok(count) => filled += count,
            }
            let Some(data) = buffer.get(..filled) else { return };
            let Some(used) = self.pass_on(from, data) else {
                return;
            };
            buffer.copy_within(used..filled, 0);
            filled -= used;
        }
    }

    /// Passes on all whole frames of `data`; returns their length, or none if this is no stream of frames.
    fn pass_on(&self, from: usize, data: &[u8]) -> Option<usize> {
        let rules = lock(&self.rules).clone();
        let ports: Vec<(usize, Arc<Port>)> = lock(&self.ports)
            .iter()
            .filter(|(number, _)| **number != from)
            .map(|(number, port)| (*number, Arc::clone(port)))
            .collect();
        // What goes to the same guest goes in one piece: a system call for each frame is what would take time.
        let mut batches: Vec<Vec<u8>> = vec![Vec::new(); ports.len()];
        let mut counters = Counters::default();
        let mut used = 0;
        while let Some(frame) = next_frame(data.get(used..)?)? {
            used += frame.len();
            counters.frames += 1;
            counters.bytes += frame.len() as u64;
            let to = self.destination(from, frame);
            for ((number, _), batch) in ports.iter().zip(&mut batches) {
                if to.is_some_and(|to| to != *number) {
                    continue;
                }
                if rules.passes(from, *number) && !rules.lost(from, *number) {
                    batch.extend_from_slice(frame);
                } else {
                    counters.dropped += 1;
                }
            }
        }
        for ((number, port), batch) in ports.iter().zip(batches) {
            if !batch.is_empty() && !port.deliver(batch, rules.delay(from, *number)) {
                counters.dropped += 1;
            }
        }
        let mut total = lock(&self.counters);
        total.bytes += counters.bytes;
        total.frames += counters.frames;
        total.dropped += counters.dropped;
        Some(used)
    }

    /// The port that a frame goes to; none for all. Learns where its sender is.
    fn destination(&self, from: usize, frame: &[u8]) -> Option<usize> {
        let address = |at: usize| {
            frame
                .get(at..at + 6)
                .and_then(|bytes| <[u8; 6]>::try_from(bytes).ok())
        };
        let (to, sender) = (address(4)?, address(10)?);
        let mut places = lock(&self.places);
        places.insert(sender, from);
        places.get(&to).copied()
    }
}

/// The first frame of a stream, with its length before it; none if it is not whole; nothing if it is no frame.
#[expect(
    clippy::option_option,
    reason = "not yet whole and never whole are different things"
)]
fn next_frame(data: &[u8]) -> Option<Option<&[u8]>> {
    let Some(head) = data.get(..4).and_then(|head| <[u8; 4]>::try_from(head).ok()) else {
        return Some(None);
    };
    let length = usize::try_from(u32::from_be_bytes(head))
        .ok()
        .filter(|length| *length <= MAX_FRAME)?;
    Some(data.get(..4 + length))
}

impl Port {
    /// Sends frames at once where that can be done without waiting, else queues them. False if dropped.
    fn deliver(&self, mut batch: Vec<u8>, delay: Duration) -> bool {
        let mut queue = lock(&self.queue);
        let Some(socket) = &queue.socket else { return false };
        if delay.is_zero() && queue.frames.is_empty() && !queue.writing {
            match send(socket, &batch, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) if count == batch.len() => return true,
                Ok(count) => drop(batch.drain(..count)),
                Err(rustix::io::Errno::AGAIN) => {}
                Err(_) => return false,
            }
        }
        if queue.bytes + batch.len() > QUEUE {
            return false;
        }
        queue.bytes += batch.len();
        queue.frames.push_back((Instant::now() + delay, batch));
        drop(queue);
        self.changed.notify_all();
        true
    }
}

/// Writes what waits for a card, until the card is gone.
fn write_queue(port: &Port, generation: u64, mut socket: &UnixStream) {
    loop {
        let batch = {
            let mut queue = lock(&port.queue);
            loop {
                if queue.generation != generation || queue.socket.is_none() {
                    return;
                }
                let now = Instant::now();
                let due = queue.frames.front().map(|(due, _)| *due);
                match due {
                    Some(due) if due <= now => {
                        let Some((_, batch)) = queue.frames.pop_front() else {
                            continue;
                        };
                        queue.bytes -= batch.len();
                        queue.writing = true;
                        break batch;
                    }
                    due => {
                        let wait = due.map_or(Duration::from_secs(3600), |due| due.duration_since(now));
                        queue = port
                            .changed
                            .wait_timeout(queue, wait)
                            .unwrap_or_else(PoisonError::into_inner)
                            .0;
                    }
                }
            }
        };
        // The reader's thread sees the end of the card, too.
        let _ = socket.write_all(&batch);
        let mut queue = lock(&port.queue);
        if queue.generation == generation {
            queue.writing = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [u8; 6] = [255; 6];

    fn mac(number: u8) -> [u8; 6] {
        [2, 0, 0, 0, 0, number]
    }

    fn frame(to: [u8; 6], from: [u8; 6], text: &str) -> Vec<u8> {
        let body = [&to[..], &from[..], text.as_bytes()].concat();
        [&(body.len() as u32).to_be_bytes()[..], &body].concat()
    }

    /// Cards of guests 1 to 3, which know each other.
    fn cards(switch: &Switch) -> Vec<UnixStream> {
        let mut cards = Vec::new();
        for number in 1..=3 {
            let (ours, theirs) = UnixStream::pair().unwrap();
            switch.attach(number, theirs).unwrap();
            ours.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            cards.push(ours);
        }
        for number in 1..=3u8 {
            let hello = frame(ALL, mac(number), "hello");
            cards[usize::from(number) - 1].write_all(&hello).unwrap();
            for other in (0..3).filter(|other| *other != usize::from(number) - 1) {
                assert_eq!(received(&mut cards[other]), Some(hello.clone()));
            }
        }
        cards
    }

    fn received(card: &mut UnixStream) -> Option<Vec<u8>> {
        let mut head = [0; 4];
        card.read_exact(&mut head).ok()?;
        let mut body = vec![0; u32::from_be_bytes(head) as usize];
        card.read_exact(&mut body).unwrap();
        Some([&head[..], &body].concat())
    }

    #[test]
    fn frames_go_where_they_are_addressed() {
        let switch = Switch::default();
        let mut cards = cards(&switch);
        let (first, second) = (frame(mac(2), mac(1), "one"), frame(mac(2), mac(1), "two"));
        // A frame in pieces, and two in one.
        cards[0].write_all(&first[..7]).unwrap();
        cards[0].write_all(&[&first[7..], &second[..]].concat()).unwrap();
        assert_eq!(received(&mut cards[1]), Some(first));
        assert_eq!(received(&mut cards[1]), Some(second));
        assert_eq!(received(&mut cards[2]), None);
    }

    #[test]
    fn faults_are_as_asked_for() {
        let switch = Switch::default();
        let mut cards = cards(&switch);
        let (forth, back) = (frame(mac(2), mac(1), "forth"), frame(mac(1), mac(2), "back"));
        switch.part(1, 2);
        cards[0].write_all(&forth).unwrap();
        cards[1].write_all(&back).unwrap();
        assert_eq!(received(&mut cards[0]), Some(back.clone()));
        assert_eq!(received(&mut cards[1]), None);
        switch.join(1, 2);
        switch.cut(1);
        cards[1].write_all(&back).unwrap();
        assert_eq!(received(&mut cards[0]), None);
        switch.restore(1);
        switch.delay(2, Duration::from_millis(80));
        let start = Instant::now();
        cards[0].write_all(&forth).unwrap();
        assert_eq!(received(&mut cards[1]), Some(forth.clone()));
        assert!(start.elapsed() >= Duration::from_millis(80));
        switch.lose(2, 1.0);
        cards[0].write_all(&forth).unwrap();
        assert_eq!(received(&mut cards[1]), None);
        switch.heal();
        cards[0].write_all(&forth).unwrap();
        assert_eq!(received(&mut cards[1]), Some(forth));
        assert_eq!(switch.counters().dropped, 3);
    }

    #[test]
    fn a_guest_that_takes_nothing_stops_nobody_and_may_come_back() {
        let switch = Switch::default();
        let mut cards = cards(&switch);
        let big = frame(mac(2), mac(1), &"x".repeat(60_000));
        for _ in 0..300 {
            cards[0].write_all(&big).unwrap();
        }
        let other = frame(mac(3), mac(1), "past it");
        cards[0].write_all(&other).unwrap();
        assert_eq!(received(&mut cards[2]), Some(other));
        let (mut again, theirs) = UnixStream::pair().unwrap();
        again.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        switch.attach(2, theirs).unwrap();
        let forth = frame(mac(2), mac(1), "forth");
        cards[0].write_all(&forth).unwrap();
        assert_eq!(received(&mut again), Some(forth));
    }
}
