//! What comes from a peer: control frames on the stream, and messages in fragments.

use std::sync::Arc;
use std::time::Instant;

use super::adapter::Adapter;
use super::conn::VerbsConn;
use super::control::Read;
use super::tx::Known;
use super::wire::{self, Control, Kind};
use crate::common::{self, LIMITS};
use crate::fabric::{Connection, Handler};

/// Fragments of one connection that are dealt with in a turn.
const TURN: usize = 64;

pub(super) struct Incoming {
    message: Assembly,
    /// The peer has hung up: what it said before may still arrive.
    hung_up: bool,
    /// When something came last.
    last: Instant,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Self {
            message: Assembly::default(),
            hung_up: false,
            last: Instant::now(),
        }
    }

    /// When something came last, if the peer has hung up.
    pub(super) fn hung_up(&self) -> Option<Instant> {
        self.hung_up.then_some(self.last)
    }

    /// Reads the stream until it is empty.
    pub(super) fn read_stream(&mut self, conn: &VerbsConn, adapter: &Adapter) {
        loop {
            match conn.stream.read() {
                Read::Frames(frames) => frames.iter().for_each(|frame| act(conn, adapter, frame)),
                Read::Nothing => return,
                Read::Ended(reason) => {
                    self.hung_up = conn.alive();
                    self.last = Instant::now();
                    return conn.fail(common::disconnected(&conn.base.addr, &reason));
                }
                Read::Malformed => return conn.fail(conn.base.protocol("a malformed control frame")),
            }
        }
    }

    /// Gives the application the messages that have arrived; false if there are none.
    pub(super) fn deliver(
        &mut self,
        conn: &VerbsConn,
        dynamic: &Arc<dyn Connection>,
        handler: &dyn Handler,
    ) -> bool {
        let mut worked = false;
        for _ in 0..TURN {
            if !conn.alive() && !self.hung_up {
                return worked;
            }
            let fragment = conn.inbox.lock().pop_front();
            let Some(fragment) = fragment else { break };
            worked = true;
            self.last = Instant::now();
            match self.message.add(&fragment) {
                Ok(Some(message)) => {
                    conn.base.counters.received(message.len());
                    handler.message(dynamic, &message);
                }
                Ok(None) => {}
                Err(detail) => {
                    self.hung_up = false;
                    conn.fail(conn.base.protocol(detail));
                }
            }
            conn.dealt();
        }
        worked
    }
}

fn act(conn: &VerbsConn, adapter: &Adapter, frame: &Control) {
    match *frame {
        Control::Where(key) => {
            if let Err(e) = conn.stream.send(&adapter.find(key)) {
                conn.fail(conn.lost(&e));
            }
        }
        Control::There(key, place) => conn.on_place(key, Known::There(place)),
        Control::Nowhere(key) => conn.on_place(key, Known::Nowhere),
    }
}

/// Puts messages together out of fragments.
#[derive(Default)]
pub(super) struct Assembly {
    bytes: Vec<u8>,
    /// Length of the message that is coming in.
    wanted: Option<usize>,
}

impl Assembly {
    /// Adds a fragment; the message if that is complete.
    pub(super) fn add(&mut self, fragment: &[u8]) -> Result<Option<Vec<u8>>, &'static str> {
        let (kind, _, body) = wire::parse(fragment).ok_or("a malformed fragment")?;
        let wanted = match (kind, self.wanted) {
            (Kind::First(len), None) if len as usize <= LIMITS.max_message => {
                self.bytes = Vec::with_capacity(len as usize);
                *self.wanted.insert(len as usize)
            }
            (Kind::First(_), None) => return Err("a message longer than possible"),
            (Kind::First(_), Some(_)) => return Err("a message within another"),
            (Kind::More, Some(wanted)) => wanted,
            _ => return Err("a piece of no message"),
        };
        if self.bytes.len() + body.len() > wanted {
            return Err("a message longer than announced");
        }
        self.bytes.extend_from_slice(body);
        if self.bytes.len() < wanted {
            return Ok(None);
        }
        self.wanted = None;
        Ok(Some(std::mem::take(&mut self.bytes)))
    }
}
