//! The sending half of a connection: what is queued, and what the adapter is at.
//!
//! Operations and messages are queued in the order of submission. Operations are posted while the send queue has
//! room and their regions are known, messages while the peer has given credits. A message never overtakes an
//! operation; operations may overtake messages that wait for credits.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::cells::{Cell, Cells};
use super::ffi::{Local, Post, Verb, Wc};
use super::receive::CREDITS;
use super::unit::{Owner, Request, Unit};
use super::wire::{self, HEADER, Kind, PAYLOAD, Place};
use crate::common;
use crate::{RemoteAddr, TransportError};

/// What is known of a peer's region.
#[derive(Debug, Clone, Copy)]
pub(super) enum Known {
    Asked,
    There(Place),
    Nowhere,
}

struct Message {
    order: u64,
    bytes: Vec<u8>,
    done: usize,
}

/// A work request that the adapter has.
struct Flight {
    id: u64,
    what: What,
}

enum What {
    /// The next request of the first unit.
    Request { fences: bool },
    /// A fragment, in this memory if it was not inline.
    Fragment { _cell: Option<Cell> },
}

/// An operation that the target's adapter has refused; the target is asked whether the region is still there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Suspect {
    pub(super) at: RemoteAddr,
    pub(super) len: u64,
}

/// What became of completions.
#[derive(Default)]
pub(super) struct Reaped {
    /// Units that are over, with what they failed with.
    pub(super) over: Vec<(Unit, Option<TransportError>)>,
    pub(super) broken: Option<Broken>,
}

/// Why nothing more can be sent.
pub(super) enum Broken {
    /// The first unit fails with this.
    Failed(TransportError),
    /// A completion with an error, and the reason in words.
    Lost(String),
    /// Whether the region is gone or its whole process is to be found out.
    Suspect(Suspect),
}

/// What is to be posted, and regions to ask for.
#[derive(Default)]
pub(super) struct Gathered {
    pub(super) posts: Vec<Post>,
    pub(super) bytes: Vec<u8>,
    pub(super) ask: Vec<u64>,
}

pub(super) struct Tx {
    units: VecDeque<Unit>,
    /// The first unit that is not wholly posted.
    posting: usize,
    messages: Messages,
    flights: VecDeque<Flight>,
    pub(super) regions: HashMap<u64, Known>,
    numbers: Numbers,
    /// Reads and atomics under way.
    fences: usize,
    credits: Credits,
    limits: Limits,
    /// A unit is refused: nothing behind it is posted any more.
    poisoned: bool,
    pub(super) end: End,
}

/// The last numbers given.
#[derive(Default)]
struct Numbers {
    /// In the order of submission, to a unit or a message.
    order: u64,
    /// To a work request.
    id: u64,
}

/// What the send queue takes.
struct Limits {
    /// Work requests at a time.
    depth: usize,
    /// Bytes that are copied into a work request.
    inline: usize,
}

/// Messages that wait, and how many there ever were.
#[derive(Default)]
struct Messages {
    waiting: VecDeque<Message>,
    queued: u64,
    sent: u64,
}

#[derive(Default)]
struct Credits {
    /// Fragments the peer takes.
    left: u32,
    /// Fragments of the peer that are dealt with and not yet told so.
    owed: u32,
}

/// How sending comes to its end.
#[derive(Default)]
pub(super) struct End {
    pub(super) closed: bool,
    pub(super) suspect: Option<Suspect>,
    /// What the first unit fails with, if it is the reason for the end.
    pub(super) guilty: Option<TransportError>,
}

impl Tx {
    pub(super) fn new(depth: usize, inline: usize) -> Self {
        Self {
            units: VecDeque::new(),
            posting: 0,
            messages: Messages::default(),
            flights: VecDeque::new(),
            regions: HashMap::new(),
            numbers: Numbers::default(),
            fences: 0,
            credits: Credits::default(),
            limits: Limits { depth, inline },
            poisoned: false,
            end: End::default(),
        }
    }

    pub(super) fn add_unit(&mut self, requests: Vec<Request>, owner: Owner) {
        let order = self.order();
        self.units.push_back(Unit {
            order,
            requests,
            posted: 0,
            done: 0,
            owner,
            poison: None,
        });
    }

    /// Queues a message; its number, for [`Tx::is_sent`].
    pub(super) fn add_message(&mut self, message: &[u8]) -> u64 {
        let order = self.order();
        self.messages.waiting.push_back(Message {
            order,
            bytes: message.to_vec(),
            done: 0,
        });
        self.messages.queued += 1;
        self.messages.queued
    }

    pub(super) fn is_sent(&self, message: u64) -> bool {
        self.messages.sent >= message
    }

    pub(super) fn all_sent(&self) -> bool {
        self.messages.waiting.is_empty()
    }

    fn order(&mut self) -> u64 {
        self.numbers.order += 1;
        self.numbers.order
    }

    /// The peer takes so many fragments more. False if that is more than it can have given.
    pub(super) fn add_credits(&mut self, credits: u32) -> bool {
        self.credits.left = self.credits.left.saturating_add(credits);
        self.credits.left <= 1 << 16
    }

    /// A fragment of the peer has been dealt with.
    pub(super) fn owe(&mut self) {
        self.credits.owed += 1;
    }

    /// The peer has used all its credits but so many, if this many fragments of it wait here.
    pub(super) fn within_credits(&self, waiting: usize) -> bool {
        waiting + self.credits.owed as usize <= CREDITS as usize
    }

    /// How much the adapter is at.
    pub(super) fn under_way(&self) -> usize {
        self.flights.len()
    }

    /// Whether somebody waits for what comes next.
    pub(super) fn awaited(&self) -> bool {
        !self.units.is_empty() || !self.messages.waiting.is_empty()
    }

    /// Takes from the queues what can be posted now.
    pub(super) fn gather(&mut self, cells: &Arc<Cells>) -> Result<Gathered, TransportError> {
        let mut out = Gathered::default();
        if self.end.closed {
            return Ok(out);
        }
        if self.credits.owed >= CREDITS / 2 && self.flights.len() < self.limits.depth {
            let head = wire::header(Kind::Credit, std::mem::take(&mut self.credits.owed));
            self.fragment(&head, &[], cells, &mut out)?;
        }
        while self.flights.len() < self.limits.depth {
            while self
                .units
                .get(self.posting)
                .is_some_and(|u| u.posted == u.requests.len())
            {
                self.posting += 1;
            }
            let request = self.units.get(self.posting).map(|u| u.order);
            let message = self.messages.waiting.front().map(|m| m.order);
            let message_first = match (message, request) {
                (Some(m), Some(r)) => m < r,
                (Some(_), None) => !self.poisoned,
                (None, _) => false,
            };
            if message_first && self.credits.left > 0 {
                self.post_fragment(cells, &mut out)?;
            } else if request.is_none() || self.poisoned || !self.post_request(&mut out) {
                break;
            }
        }
        if let Some(last) = out.posts.last_mut() {
            last.signal = true;
        }
        Ok(out)
    }

    /// False if the next request cannot be posted now.
    fn post_request(&mut self, out: &mut Gathered) -> bool {
        let Some(unit) = self.units.get_mut(self.posting) else {
            return false;
        };
        let Some(request) = unit.requests.get(unit.posted) else {
            return false;
        };
        let key = request.at.key.0;
        let refusal = match self.regions.get(&key) {
            Some(Known::There(place)) => match request.refusal(place) {
                None => {
                    self.numbers.id += 1;
                    let fences = request.needs_fence();
                    out.posts.push(Post {
                        id: self.numbers.id,
                        signal: false,
                        fence: !fences && self.fences > 0,
                        local: request.local(&mut out.bytes),
                        verb: request.verb(place),
                    });
                    self.flights.push_back(Flight {
                        id: self.numbers.id,
                        what: What::Request { fences },
                    });
                    self.fences += usize::from(fences);
                    unit.posted += 1;
                    return true;
                }
                Some(reason) => reason,
            },
            Some(Known::Nowhere) => "no such region",
            Some(Known::Asked) => return false,
            None => {
                self.regions.insert(key, Known::Asked);
                out.ask.push(key);
                return false;
            }
        };
        unit.poison = Some(common::remote_access(request.at, u64::from(request.len), refusal));
        self.poisoned = true;
        false
    }

    /// Posts the next fragment of the first message.
    fn post_fragment(&mut self, cells: &Arc<Cells>, out: &mut Gathered) -> Result<(), TransportError> {
        let Some(mut message) = self.messages.waiting.pop_front() else {
            return Ok(());
        };
        let body = &message.bytes[message.done..];
        let body = &body[..body.len().min(PAYLOAD)];
        let kind = if message.done == 0 {
            Kind::First(u32::try_from(message.bytes.len()).unwrap_or(u32::MAX))
        } else {
            Kind::More
        };
        self.credits.left -= 1;
        let head = wire::header(kind, std::mem::take(&mut self.credits.owed));
        self.fragment(&head, body, cells, out)?;
        message.done += body.len();
        if message.done < message.bytes.len() {
            self.messages.waiting.push_front(message);
        } else {
            self.messages.sent += 1;
        }
        Ok(())
    }

    fn fragment(
        &mut self,
        head: &[u8; HEADER],
        body: &[u8],
        cells: &Arc<Cells>,
        out: &mut Gathered,
    ) -> Result<(), TransportError> {
        let len = HEADER + body.len();
        let (local, cell) = if len <= self.limits.inline {
            let off = out.bytes.len();
            out.bytes.extend_from_slice(head);
            out.bytes.extend_from_slice(body);
            (Local::Inline { off, len }, None)
        } else {
            let cell = cells.take(len)?;
            cell.fill(0, head)?;
            cell.fill(HEADER, body)?;
            let local = Local::Mem {
                addr: cell.address(),
                len: u32::try_from(len).unwrap_or(0),
                lkey: cell.lkey(),
            };
            (local, Some(cell))
        };
        self.numbers.id += 1;
        out.posts.push(Post {
            id: self.numbers.id,
            signal: false,
            fence: self.fences > 0,
            local,
            verb: Verb::Send,
        });
        self.flights.push_back(Flight {
            id: self.numbers.id,
            what: What::Fragment { _cell: cell },
        });
        Ok(())
    }

    /// Takes completions into account.
    pub(super) fn reap(&mut self, completions: &[Wc]) -> Reaped {
        let mut reaped = Reaped::default();
        for wc in completions {
            let upto = if wc.ok() { wc.id } else { wc.id.saturating_sub(1) };
            while self.flights.front().is_some_and(|f| f.id <= upto) {
                if let Some(flight) = self.flights.pop_front() {
                    self.landed(&flight);
                }
            }
            self.advance(&mut reaped);
            if reaped.broken.is_some() {
                break;
            }
            if !wc.ok() && !self.end.closed {
                reaped.broken = Some(self.broke(wc));
                break;
            }
        }
        reaped
    }

    fn landed(&mut self, flight: &Flight) {
        if let What::Request { fences } = flight.what {
            self.fences -= usize::from(fences);
            if let Some(unit) = self.units.iter_mut().find(|u| u.done < u.posted) {
                unit.done += 1;
            }
        }
    }

    /// Takes out the units that are over.
    pub(super) fn advance(&mut self, reaped: &mut Reaped) {
        while reaped.broken.is_none() && self.units.front().is_some_and(Unit::over) {
            let Some(unit) = self.units.pop_front() else {
                return;
            };
            self.posting = self.posting.saturating_sub(1);
            match unit.poison.clone() {
                None => reaped.over.push((unit, None)),
                Some(why) => {
                    reaped.broken = Some(Broken::Failed(why.clone()));
                    reaped.over.push((unit, Some(why)));
                }
            }
        }
    }

    fn broke(&self, wc: &Wc) -> Broken {
        let request = self
            .flights
            .front()
            .is_some_and(|f| matches!(f.what, What::Request { .. }));
        let first = self.units.iter().find(|u| u.done < u.posted);
        match first.and_then(|u| u.requests.get(u.done)) {
            Some(r) if request && wc.access_refused() => Broken::Suspect(Suspect {
                at: r.at,
                len: u64::from(r.len),
            }),
            _ => Broken::Lost(wc.reason()),
        }
    }

    /// Everything that is left, when the adapter is at none of it any more.
    pub(super) fn take_all(&mut self) -> Vec<Unit> {
        self.end.closed = true;
        self.messages.waiting.clear();
        self.flights.clear();
        self.posting = 0;
        std::mem::take(&mut self.units).into()
    }
}
