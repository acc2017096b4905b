//! What the providers share: validation, counters, thread marks, random numbers.

use std::cell::Cell;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;

use crate::error::TransportError;
use crate::fabric::Limits;
use crate::ops::{AsyncOp, Op, RegionKey, RemoteAddr};

/// The limits of the providers in this crate.
pub(crate) const LIMITS: Limits = Limits {
    max_message: 128 * 1024 + 64,
    max_batch: 64,
    max_transfer: 16 * 1024 * 1024,
    max_batch_bytes: 64 * 1024 * 1024,
};

/// Most words of one [`AsyncOp::ReadWords`].
pub(crate) const MAX_WORDS: u32 = 64;

thread_local! {
    static PROGRESS: Cell<bool> = const { Cell::new(false) };
}

/// Marks the calling thread as one that must never block on the fabric.
pub(crate) fn mark_progress_thread() {
    PROGRESS.with(|p| p.set(true));
}

/// Whether the calling thread must never block on the fabric.
pub(crate) fn on_progress_thread() -> bool {
    PROGRESS.with(Cell::get)
}

/// Waits until `fd` is ready for `what`; false at the deadline.
pub(crate) fn wait(fd: BorrowedFd<'_>, what: PollFlags, deadline: Instant) -> Result<bool, Errno> {
    poll_until(&mut [PollFd::new(&fd, what)], deadline)
}

/// As [`wait`], for any of several; which one.
pub(crate) fn wait_any(fds: &[OwnedFd], what: PollFlags, deadline: Instant) -> Result<Option<usize>, Errno> {
    let mut polled: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(fd, what)).collect();
    let ready = poll_until(&mut polled, deadline)?;
    let first = || polled.iter().position(|fd| !fd.revents().is_empty());
    Ok(ready.then(first).flatten())
}

/// Waits until one of them is ready; false at the deadline.
fn poll_until(polled: &mut [PollFd<'_>], deadline: Instant) -> Result<bool, Errno> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        match rustix::event::poll(polled, Some(&timespec(left))) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(e) => return Err(e),
        }
    }
}

pub(crate) fn timespec(d: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(d.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(d.subsec_nanos()),
    }
}

pub(crate) fn timed_out(addr: &str, after: Duration) -> TransportError {
    let millis = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
    TransportError::Timeout {
        addr: addr.to_owned(),
        millis,
    }
}

/// Random bytes of the kernel, good enough for nonces.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], TransportError> {
    let mut bytes = [0u8; N];
    let mut filled = 0;
    while filled < N {
        match rustix::rand::getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(TransportError::os("draw random numbers", &e.into())),
        }
    }
    Ok(bytes)
}

/// A key not used before: random above, the slot (12 bits) below.
pub(crate) fn region_key(slot: usize) -> Result<RegionKey, TransportError> {
    let random = u64::from_ne_bytes(random::<8>()?);
    Ok(RegionKey((random << 12) | (1 << 63) | (slot as u64 & 0xfff)))
}

pub(crate) fn remote_access(at: RemoteAddr, len: u64, reason: &str) -> TransportError {
    TransportError::RemoteAccess {
        key: at.key.0,
        offset: at.offset,
        len,
        reason: reason.to_owned(),
    }
}

pub(crate) fn disconnected(addr: &str, reason: &str) -> TransportError {
    TransportError::Disconnected {
        addr: addr.to_owned(),
        reason: reason.to_owned(),
    }
}

/// The reason of a connection's end as those see it whose operations fail because of it.
pub(crate) fn ended(addr: &str, why: &TransportError) -> TransportError {
    match why {
        TransportError::Disconnected { .. } | TransportError::Shutdown => why.clone(),
        other => disconnected(addr, &other.to_string()),
    }
}

fn aligned(at: RemoteAddr) -> Result<(), TransportError> {
    if at.offset.is_multiple_of(8) {
        return Ok(());
    }
    Err(TransportError::Invalid(format!(
        "word at offset {} is not 8-byte aligned",
        at.offset
    )))
}

/// Bytes that a batch moves.
#[derive(Default)]
struct Size(usize);

#[cold]
fn too_many(ops: usize) -> TransportError {
    TransportError::Invalid(format!(
        "a batch of {ops} operations, {} are possible",
        LIMITS.max_batch
    ))
}

impl Size {
    #[inline]
    fn add(&mut self, len: usize) -> Result<(), TransportError> {
        self.0 += len;
        if len <= LIMITS.max_transfer && self.0 <= LIMITS.max_batch_bytes {
            return Ok(());
        }
        Err(self.too_much(len))
    }

    #[cold]
    fn too_much(&self, len: usize) -> TransportError {
        TransportError::Invalid(format!(
            "a transfer of {len} bytes in a batch of {}: {} and {} are possible",
            self.0, LIMITS.max_transfer, LIMITS.max_batch_bytes
        ))
    }

    #[inline]
    fn add_words(&mut self, at: RemoteAddr, words: u32) -> Result<(), TransportError> {
        aligned(at)?;
        if words > MAX_WORDS {
            return Err(TransportError::Invalid(format!(
                "a read of {words} words, {MAX_WORDS} are possible"
            )));
        }
        self.add(words as usize * 8)
    }
}

/// Checks what can be checked before anything is done; also the bytes moved.
#[inline]
pub(crate) fn check_ops(ops: &[Op<'_>]) -> Result<u64, TransportError> {
    if ops.len() > LIMITS.max_batch {
        return Err(too_many(ops.len()));
    }
    let mut size = Size::default();
    for op in ops {
        match op {
            Op::Read { into, .. } => size.add(into.len())?,
            Op::Write { from, .. } => size.add(from.len())?,
            Op::Cas { at, .. } | Op::Faa { at, .. } => size.add_words(*at, 1)?,
        }
    }
    Ok(size.0 as u64)
}

/// As [`check_ops`].
pub(crate) fn check_batch(batch: &[AsyncOp]) -> Result<u64, TransportError> {
    if batch.len() > LIMITS.max_batch {
        return Err(too_many(batch.len()));
    }
    let mut size = Size::default();
    for op in batch {
        match op {
            AsyncOp::Read { into: buffer, .. } | AsyncOp::Write { from: buffer, .. } => {
                size.add(buffer.len())?;
            }
            AsyncOp::ReadWords { at, words } => size.add_words(*at, *words)?,
            AsyncOp::Cas { at, .. } | AsyncOp::Faa { at, .. } => size.add_words(*at, 1)?,
        }
    }
    Ok(size.0 as u64)
}

pub(crate) fn check_message(message: &[u8]) -> Result<(), TransportError> {
    if message.len() <= LIMITS.max_message {
        return Ok(());
    }
    Err(TransportError::Invalid(format!(
        "a message of {} bytes, {} are possible",
        message.len(),
        LIMITS.max_message
    )))
}
