//! The permission that a listening side gives, and the count of what is being executed with it, where they outlive its process.
//!
//! A process that executes its operations on our memory itself goes on with them when ours has ended: memory of an endpoint that
//! is kept (see [`crate::FabricConfig::keep`]) outlives it, too. So there the permission and the counts of each connection are in
//! a named file, a *seat*, which our next process finds. It withdraws the permission, looks at the counts, and knows of the
//! process that has the seat whether it is still there: that has the file mapped through the description that we have opened
//! and locked, so the kernel gives the lock back when that process has let go of the memory, however that happens, and not before.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::executor::{Executor, Trace};
use crate::error::TransportError;
use crate::handshake::MAX_IDENTITY;
use crate::mem::SharedMem;

/// Most regions of an endpoint; the slot is in the low bits of the region key.
pub(super) const SLOTS: usize = 4096;

const PAGE: usize = 4096;
const OPEN: usize = 0;
/// Who has the seat: for our next process only.
const PID: usize = 64;
const STARTED: usize = PID + 8;
const NAMES: usize = STARTED + 8;
const IDENTITY_LEN: usize = NAMES + 8;
const IDENTITY: usize = IDENTITY_LEN + 8;
const IN_FLIGHT: usize = PAGE;
const LEN: usize = IN_FLIGHT + SLOTS * 8;

/// A seat, on either side of its connection.
#[derive(Debug)]
pub(super) struct Seat {
    mem: SharedMem,
    /// Only where it was made, or found. Behind `mem`, whose end may be what the lock waits for.
    file: Option<SeatFile>,
}

/// Its file, which goes when nothing can be executed any more.
#[derive(Debug)]
struct SeatFile(PathBuf);

impl SeatFile {
    /// Has everybody let go of it? Only for who has not opened it, or has opened it anew.
    fn is_free(&self) -> bool {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        match rustix::fs::open(&self.0, flags, Mode::empty()) {
            Ok(file) => is_unlocked(&file),
            Err(error) => error == Errno::NOENT,
        }
    }

    fn remove(&self) {
        if let Err(error) = std::fs::remove_file(&self.0)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}

impl Drop for SeatFile {
    fn drop(&mut self) {
        // A process that has ended in the middle of something leaves its count as it was.
        if self.0.exists() && self.is_free() {
            self.remove();
        }
    }
}

fn is_unlocked(file: &OwnedFd) -> bool {
    rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).is_ok()
}

impl Seat {
    /// One for a peer of this identity, whose process may be known. `name` is not used twice.
    pub(super) fn make(
        name: PathBuf,
        identity: &[u8],
        executor: Option<&Executor>,
    ) -> Result<Self, TransportError> {
        let file = SeatFile(name);
        let mem = SharedMem::open_file(&file.0, LEN, true)?;
        rustix::fs::flock(mem.fd(), FlockOperation::NonBlockingLockExclusive)
            .map_err(|e| TransportError::os(format!("lock {}", file.0.display()), &e.into()))?;
        let trace = executor.and_then(Executor::trace).unwrap_or_default();
        let len = identity.len().min(MAX_IDENTITY);
        mem.write_at(IDENTITY, &identity[..len])?;
        for (at, value) in [
            (PID, trace.pid),
            (STARTED, trace.started),
            (NAMES, trace.names),
            (IDENTITY_LEN, len as u64),
            (OPEN, 1),
        ] {
            mem.own_word(at).store(value, Ordering::SeqCst);
        }
        Ok(Self {
            mem,
            file: Some(file),
        })
    }

    /// What a listening side has passed.
    pub(super) fn of_peer(fd: OwnedFd) -> Result<Self, TransportError> {
        let mem = SharedMem::from_fd(fd, LEN, "seat at a peer".to_owned())?;
        Ok(Self { mem, file: None })
    }

    /// One that a former process has made, and that nobody may use from now on. None: it came to nobody.
    pub(super) fn found(path: &Path) -> Result<Option<Self>, TransportError> {
        let file = SeatFile(path.to_owned());
        if std::fs::metadata(path).is_ok_and(|m| m.len() < LEN as u64) {
            return Ok(None);
        }
        let seat = Self {
            mem: SharedMem::open_file(path, LEN, false)?,
            file: Some(file),
        };
        seat.open().store(0, Ordering::SeqCst);
        Ok(Some(seat))
    }

    pub(super) fn mem(&self) -> &SharedMem {
        &self.mem
    }

    /// 1 while operations are permitted.
    #[inline]
    pub(super) fn open(&self) -> &AtomicU64 {
        self.mem.own_word(OPEN)
    }

    /// Operations that are being executed on the region in `slot`.
    #[inline]
    pub(super) fn in_flight(&self, slot: usize) -> &AtomicU64 {
        self.mem.own_word(IN_FLIGHT + slot * 8)
    }

    /// Whether any operation is being executed.
    pub(super) fn busy(&self) -> bool {
        (0..SLOTS).any(|slot| self.in_flight(slot).load(Ordering::SeqCst) != 0)
    }

    /// Has its process let go of it? Only for a seat that was [`Seat::found`].
    pub(super) fn is_deserted(&self) -> bool {
        self.file.as_ref().is_some_and(SeatFile::is_free)
    }

    /// Where the process that has it is to be found.
    pub(super) fn trace(&self) -> Trace {
        let word = |at| self.mem.own_word(at).load(Ordering::SeqCst);
        Trace {
            pid: word(PID),
            started: word(STARTED),
            names: word(NAMES),
        }
    }

    /// What the peer has said it is.
    pub(super) fn identity(&self) -> Result<Vec<u8>, TransportError> {
        let len = self.mem.own_word(IDENTITY_LEN).load(Ordering::SeqCst);
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(MAX_IDENTITY);
        let mut identity = vec![0; len];
        self.mem.read_at(IDENTITY, &mut identity)?;
        Ok(identity)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            self.open().store(0, Ordering::SeqCst);
            if !self.busy() {
                file.remove();
            }
        }
    }
}

/// All seats that former processes of an endpoint have made and not removed.
pub(super) fn left_behind(keep: &Path) -> Result<Vec<Seat>, TransportError> {
    let os = |e: &std::io::Error| TransportError::os(format!("look for {}.*", keep.display()), e);
    let (Some(dir), Some(stem)) = (keep.parent(), keep.file_name().and_then(|n| n.to_str())) else {
        return Ok(Vec::new());
    };
    let mut seats = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| os(&e))? {
        let entry = entry.map_err(|e| os(&e))?;
        let name = entry.file_name();
        let number = name
            .to_str()
            .and_then(|n| n.strip_prefix(stem)?.strip_prefix('.'));
        if number.is_some() {
            seats.extend(Seat::found(&entry.path())?);
        }
    }
    Ok(seats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seat_stays_as_long_as_something_may_be_executed() {
        let dir = tempfile::tempdir().unwrap();
        let keep = dir.path().join("seats");
        let seat = Seat::make(dir.path().join("seats.1"), b"me", None).unwrap();
        // The peer maps it through the same description, as one that it was passed.
        let peers = Seat::of_peer(seat.mem().fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!(peers.open().load(Ordering::SeqCst), 1);
        peers.in_flight(7).fetch_add(1, Ordering::SeqCst);
        drop(seat);
        let found = left_behind(&keep).unwrap().pop().unwrap();
        assert_eq!(found.identity().unwrap(), b"me");
        assert!(found.busy() && !found.is_deserted());
        assert_eq!(peers.open().load(Ordering::SeqCst), 0);
        // It stays for the process after that.
        drop(found);
        let found = left_behind(&keep).unwrap().pop().unwrap();
        drop(peers);
        assert!(found.busy() && found.is_deserted());
        drop(found);
        assert!(left_behind(&keep).unwrap().is_empty());
    }

    #[test]
    fn what_is_cut_short_or_garbage_is_nobodys() {
        let dir = tempfile::tempdir().unwrap();
        let keep = dir.path().join("seats");
        std::fs::write(dir.path().join("seats.1"), [1; LEN - 1]).unwrap();
        std::fs::write(dir.path().join("seats.2"), [255; LEN + 1]).unwrap();
        std::fs::write(dir.path().join("other.1"), [1; LEN]).unwrap();
        let found = left_behind(&keep).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].identity().unwrap().len(), MAX_IDENTITY);
        assert!(found[0].is_deserted() && Executor::again(found[0].trace()).is_err());
        drop(found);
        assert!(left_behind(&keep).unwrap().is_empty() && dir.path().join("other.1").exists());
    }
}
