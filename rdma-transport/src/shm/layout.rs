//! Layout of the memory that two endpoints share besides the regions.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::SealFlags;

use super::seat::{SLOTS, Seat};
use crate::TransportError;
use crate::mem::SharedMem;

/// Cache line; words written by different sides are this far apart.
const LINE: usize = 64;
const PAGE: usize = 4096;

const DIR_SLEEPING: usize = LINE;
const DIR_LEN: usize = PAGE + SLOTS * LINE;

/// Bytes of one message ring; a power of two, several times the longest message.
pub(super) const RING: usize = 512 * 1024;
const OPEN: usize = 0;
const TAIL: usize = LINE;
const HEAD: usize = 2 * LINE;
const WANT_ROOM: usize = 3 * LINE;
const IN_FLIGHT: usize = PAGE;
const RING_AT: usize = IN_FLIGHT + SLOTS * 8;
const SIDE_LEN: usize = RING_AT + RING;

pub(super) fn slot_of(key: u64) -> usize {
    (key & (SLOTS as u64 - 1)) as usize
}

/// Maps what a peer has passed if it cannot be made shorter behind our back.
fn sealed(fd: OwnedFd, len: usize, name: &str) -> Result<SharedMem, TransportError> {
    let seals = rustix::fs::fcntl_get_seals(&fd)
        .map_err(|e| TransportError::os(format!("examine {name}"), &e.into()))?;
    if !seals.contains(SealFlags::SHRINK) {
        return Err(TransportError::Invalid(format!("{name} can be made shorter")));
    }
    SharedMem::from_fd(fd, len, name.to_owned())
}

/// Which of an endpoint's regions are valid, and whether its progress thread sleeps.
#[derive(Debug)]
pub(super) struct Directory(SharedMem);

impl Directory {
    pub(super) fn create() -> Result<Self, TransportError> {
        SharedMem::anonymous(DIR_LEN).map(Self)
    }

    pub(super) fn of_peer(fd: OwnedFd) -> Result<Self, TransportError> {
        sealed(fd, DIR_LEN, "region directory of a peer").map(Self)
    }

    pub(super) fn mem(&self) -> &SharedMem {
        &self.0
    }

    /// Not 0: a doorbell is needed.
    #[inline]
    pub(super) fn sleeping(&self) -> &AtomicU64 {
        self.0.own_word(DIR_SLEEPING)
    }

    /// The key that is valid in a slot; 0: none.
    #[inline]
    pub(super) fn key(&self, slot: usize) -> &AtomicU64 {
        self.0.own_word(PAGE + slot * LINE)
    }
}

/// One of the two sides of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Connecting = 0,
    Listening = 1,
}

impl Side {
    pub(super) fn other(self) -> Self {
        match self {
            Self::Connecting => Self::Listening,
            Self::Listening => Self::Connecting,
        }
    }
}

/// What the two sides of one connection share.
#[derive(Debug)]
pub(super) struct Channel {
    mem: SharedMem,
    /// Has the listening side's permission, and what the connecting one executes with it, if they are to outlive a process.
    seat: Option<Seat>,
}

impl Channel {
    /// A channel both sides of which are open.
    pub(super) fn create(seat: Option<Seat>) -> Result<Self, TransportError> {
        let mem = SharedMem::anonymous(2 * SIDE_LEN)?;
        // A seat may have been closed again by now.
        mem.own_word(Side::Listening as usize * SIDE_LEN + OPEN)
            .store(1, Ordering::SeqCst);
        let channel = Self { mem, seat };
        channel.open(Side::Connecting).store(1, Ordering::SeqCst);
        Ok(channel)
    }

    pub(super) fn of_peer(fd: OwnedFd, seat: Option<Seat>) -> Result<Self, TransportError> {
        let mem = sealed(fd, 2 * SIDE_LEN, "channel of a connection")?;
        Ok(Self { mem, seat })
    }

    pub(super) fn mem(&self) -> &SharedMem {
        &self.mem
    }

    #[inline]
    fn word(&self, side: Side, off: usize) -> &AtomicU64 {
        self.mem.own_word(side as usize * SIDE_LEN + off)
    }

    /// 1 while `side` lets the other one operate on its regions.
    #[inline]
    pub(super) fn open(&self, side: Side) -> &AtomicU64 {
        match &self.seat {
            Some(seat) if side == Side::Listening => seat.open(),
            _ => self.word(side, OPEN),
        }
    }

    /// Bytes `side` has ever put into its sending ring.
    #[inline]
    pub(super) fn tail(&self, side: Side) -> &AtomicU64 {
        self.word(side, TAIL)
    }

    /// Bytes the other side has ever taken out of `side`'s sending ring.
    #[inline]
    pub(super) fn head(&self, side: Side) -> &AtomicU64 {
        self.word(side, HEAD)
    }

    /// Not 0: `side` waits for room in its sending ring.
    #[inline]
    pub(super) fn want_room(&self, side: Side) -> &AtomicU64 {
        self.word(side, WANT_ROOM)
    }

    /// Operations `side` is executing on the other side's region in `slot`.
    #[inline]
    pub(super) fn in_flight(&self, side: Side, slot: usize) -> &AtomicU64 {
        match &self.seat {
            Some(seat) if side == Side::Connecting => seat.in_flight(slot),
            _ => self.word(side, IN_FLIGHT + slot * 8),
        }
    }

    /// Whether `side` is executing any operation.
    pub(super) fn busy(&self, side: Side) -> bool {
        (0..SLOTS).any(|slot| self.in_flight(side, slot).load(Ordering::SeqCst) != 0)
    }

    /// The word of the ring at a position.
    #[inline]
    pub(super) fn ring_word(&self, side: Side, pos: u64) -> &AtomicU64 {
        self.word(side, RING_AT + index(pos))
    }

    /// Copies into `side`'s ring, around its end if need be.
    pub(super) fn ring_write(&self, side: Side, pos: u64, bytes: &[u8]) -> Result<(), TransportError> {
        let base = side as usize * SIDE_LEN + RING_AT;
        let (first, rest) = bytes.split_at(bytes.len().min(RING - index(pos)));
        self.mem.write_at(base + index(pos), first)?;
        if rest.is_empty() {
            Ok(())
        } else {
            self.mem.write_at(base, rest)
        }
    }

    /// Copies out of `side`'s ring.
    pub(super) fn ring_read(&self, side: Side, pos: u64, into: &mut [u8]) -> Result<(), TransportError> {
        let base = side as usize * SIDE_LEN + RING_AT;
        let (first, rest) = into.split_at_mut(into.len().min(RING - index(pos)));
        self.mem.read_at(base + index(pos), first)?;
        if rest.is_empty() {
            Ok(())
        } else {
            self.mem.read_at(base, rest)
        }
    }
}

fn index(pos: u64) -> usize {
    (pos & (RING as u64 - 1)) as usize
}
