//! What the providers share: validation, counters, thread marks, random numbers.

use std::cell::Cell;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;

use crate::{AsyncOp, Limits, Op, RegionKey, RemoteAddr, TransportError};

/// The limits of the providers in this crate.
pub(crate) const LIMITS: Limits = Limits {
    max_message: 128 * 1024 + 64,
    max_batch: 64,
    max_transfer: 16 * 1024 * 1024,
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
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let timeout = timespec(left);
        match rustix::event::poll(&mut [PollFd::new(&fd, what)], Some(&timeout)) {
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

/// Checks what can be checked before anything is done; also the bytes moved.
pub(crate) fn check_ops(ops: &[Op<'_>]) -> Result<u64, TransportError> {
    if ops.len() > LIMITS.max_batch {
        return Err(TransportError::Invalid(format!(
            "a batch of {} operations, {} are possible",
            ops.len(),
            LIMITS.max_batch
        )));
    }
    let mut bytes = 0;
    for op in ops {
        let len = match op {
            Op::Read { into, .. } => into.len(),
            Op::Write { from, .. } => from.len(),
            Op::Cas { at, .. } | Op::Faa { at, .. } => {
                aligned(*at)?;
                8
            }
        };
        if len > LIMITS.max_transfer {
            return Err(TransportError::Invalid(format!(
                "a transfer of {len} bytes, {} are possible",
                LIMITS.max_transfer
            )));
        }
        bytes += len as u64;
    }
    Ok(bytes)
}

/// As [`check_ops`].
pub(crate) fn check_batch(batch: &[AsyncOp]) -> Result<u64, TransportError> {
    if batch.len() > LIMITS.max_batch {
        return Err(TransportError::Invalid(format!(
            "a batch of {} operations, {} are possible",
            batch.len(),
            LIMITS.max_batch
        )));
    }
    let mut bytes = 0;
    for op in batch {
        match op {
            AsyncOp::ReadWords { at, words } => {
                aligned(*at)?;
                if *words > MAX_WORDS {
                    return Err(TransportError::Invalid(format!(
                        "a read of {words} words, {MAX_WORDS} are possible"
                    )));
                }
                bytes += u64::from(*words) * 8;
            }
            AsyncOp::Cas { at, .. } | AsyncOp::Faa { at, .. } => {
                aligned(*at)?;
                bytes += 8;
            }
        }
    }
    Ok(bytes)
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

/// What an endpoint or a connection has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FabricStats {
    /// One-sided operations started from here.
    pub ops: u64,
    /// Bytes those moved.
    pub op_bytes: u64,
    /// Messages sent.
    pub messages_sent: u64,
    /// Bytes in them.
    pub message_bytes_sent: u64,
    /// Messages received.
    pub messages_received: u64,
    /// Bytes in them.
    pub message_bytes_received: u64,
    /// System calls made to wake a sleeping peer.
    pub doorbells: u64,
    /// Times the progress thread came out of its sleep (endpoints only).
    pub wakeups: u64,
    /// Connections set up, either way (endpoints only).
    pub connections: u64,
    /// Peers turned away because of their key (endpoints only).
    pub wrong_keys: u64,
    /// Other attempts to connect that came to nothing (endpoints only).
    pub failed_handshakes: u64,
}

impl FabricStats {
    /// The sum.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            ops: self.ops + other.ops,
            op_bytes: self.op_bytes + other.op_bytes,
            messages_sent: self.messages_sent + other.messages_sent,
            message_bytes_sent: self.message_bytes_sent + other.message_bytes_sent,
            messages_received: self.messages_received + other.messages_received,
            message_bytes_received: self.message_bytes_received + other.message_bytes_received,
            doorbells: self.doorbells + other.doorbells,
            wakeups: self.wakeups + other.wakeups,
            connections: self.connections + other.connections,
            wrong_keys: self.wrong_keys + other.wrong_keys,
            failed_handshakes: self.failed_handshakes + other.failed_handshakes,
        }
    }
}

/// The counters behind [`FabricStats`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) ops: AtomicU64,
    pub(crate) op_bytes: AtomicU64,
    pub(crate) messages_sent: AtomicU64,
    pub(crate) message_bytes_sent: AtomicU64,
    pub(crate) messages_received: AtomicU64,
    pub(crate) message_bytes_received: AtomicU64,
    pub(crate) doorbells: AtomicU64,
    pub(crate) wakeups: AtomicU64,
    pub(crate) connections: AtomicU64,
    pub(crate) wrong_keys: AtomicU64,
    pub(crate) failed_handshakes: AtomicU64,
}

pub(crate) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn did_ops(&self, ops: usize, bytes: u64) {
        count(&self.ops, ops as u64);
        count(&self.op_bytes, bytes);
    }

    pub(crate) fn sent(&self, bytes: usize) {
        count(&self.messages_sent, 1);
        count(&self.message_bytes_sent, bytes as u64);
    }

    pub(crate) fn received(&self, bytes: usize) {
        count(&self.messages_received, 1);
        count(&self.message_bytes_received, bytes as u64);
    }

    pub(crate) fn snapshot(&self) -> FabricStats {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        FabricStats {
            ops: get(&self.ops),
            op_bytes: get(&self.op_bytes),
            messages_sent: get(&self.messages_sent),
            message_bytes_sent: get(&self.message_bytes_sent),
            messages_received: get(&self.messages_received),
            message_bytes_received: get(&self.message_bytes_received),
            doorbells: get(&self.doorbells),
            wakeups: get(&self.wakeups),
            connections: get(&self.connections),
            wrong_keys: get(&self.wrong_keys),
            failed_handshakes: get(&self.failed_handshakes),
        }
    }

    /// Adds the counters of a connection that has ended.
    pub(crate) fn fold(&self, ended: &FabricStats) {
        count(&self.ops, ended.ops);
        count(&self.op_bytes, ended.op_bytes);
        count(&self.messages_sent, ended.messages_sent);
        count(&self.message_bytes_sent, ended.message_bytes_sent);
        count(&self.messages_received, ended.messages_received);
        count(&self.message_bytes_received, ended.message_bytes_received);
        count(&self.doorbells, ended.doorbells);
    }

    /// Counts a failed handshake and says so where an operator looks.
    pub(crate) fn handshake_failed(&self, error: &TransportError) {
        if matches!(error, TransportError::WrongKey { .. }) {
            count(&self.wrong_keys, 1);
        } else {
            count(&self.failed_handshakes, 1);
        }
        tracing::warn!("connection not accepted: {error}");
    }
}
