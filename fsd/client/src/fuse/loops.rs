//! Holding the event loops of the FUSE library, which cannot be stopped.
//!
//! Each loop reads its requests from a descriptor of its own, and answers go over it. To hold a loop, a socket is put over the number of that
//! descriptor with a made-up request in it (a FORGET of an inode that does not exist), and a signal ends the read(2) that the
//! loop is in. It reads the made-up request, which tells that it is held, and then waits at the socket. What is answered meanwhile, by other
//! threads, comes out of the socket and is carried to the device. Held loops go on when the device is put back and another made-up
//! request wakes them; or they never do, and the device is another process's to read.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use rt::sync::Mutex;
use rt::time::Instant;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::descriptors::{devices, duplicate, loops, put_over, reads, wake};
use super::handshake::Handshake;
use super::made_up::{LONGEST, NOBODY, forget, pair};

/// How often is looked whether the loops are held.
const LOOK: Duration = Duration::from_micros(200);

/// What is known of the event loops of a mount.
#[derive(Debug, Default)]
pub struct Loops {
    /// How often they were held.
    round: AtomicU64,
    /// Loops that have read what was made up for them in this round.
    seen: AtomicUsize,
    /// All have ended, or are about to: there is nothing left to serve.
    pub(super) ended: AtomicBool,
    /// What the kernel said first, and was answered.
    pub handshake: std::sync::OnceLock<Handshake>,
}

impl Loops {
    /// Have all of them come to their end?
    #[must_use]
    pub fn have_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Is a FORGET made up? Then it is noted.
    pub(super) fn is_made_up(&self, inode: u64, count: u64) -> bool {
        if inode == NOBODY && count == self.round.load(Ordering::SeqCst) {
            self.seen.fetch_add(1, Ordering::SeqCst);
        }
        inode == NOBODY
    }

    /// Has the threads end their read(2), and waits until all of them have read what is made up.
    fn await_all(&self, count: usize, threads: &[i32], limit: Duration) -> io::Result<()> {
        let end = Instant::now() + limit;
        while self.seen.load(Ordering::SeqCst) < count {
            for thread in threads.iter().filter(|thread| reads(**thread)) {
                wake(*thread)?;
            }
            if Instant::now() > end {
                return Err(io::Error::other("a thread that reads requests is busy"));
            }
            rt::thread::sleep(LOOK);
        }
        Ok(())
    }
}

/// A loop that is held.
struct One {
    number: RawFd,
    device: OwnedFd,
    near: Arc<OwnedFd>,
}

impl One {
    fn hold(number: RawFd, round: u64) -> io::Result<Self> {
        let device = duplicate(number)?;
        let (near, far) = pair()?;
        send(&near, &forget(round), SendFlags::NOSIGNAL)?;
        let near = Arc::new(near);
        let (from, to) = (Arc::clone(&near), device.try_clone()?);
        let thread = rt::thread::Builder::new().name("fsd-carry".into());
        thread.spawn(move || carry(&from, &to))?;
        put_over(&far, number)?;
        Ok(Self { number, device, near })
    }

    fn go_on(&self) {
        let gone_on = put_over(&self.device, self.number).and_then(|()| {
            // It waits at the socket, if it has come there, and that goes when it has read once more.
            match send(&self.near, &forget(0), SendFlags::NOSIGNAL) {
                Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
                Err(error) => Err(error.into()),
            }
        });
        if let Err(error) = gone_on {
            tracing::error!("a thread that reads requests does not go on: {error}");
        }
    }
}

/// Carries answers on to the device, until no thread can send one any more.
fn carry(from: &OwnedFd, to: &OwnedFd) {
    let mut bytes = vec![0; LONGEST];
    loop {
        match recv(from, &mut bytes[..], RecvFlags::empty()) {
            Ok((0, _)) => return,
            Ok((len, _)) => {
                // A request that has been given up meanwhile needs no answer.
                if let Err(error) = rustix::io::write(to, &bytes[..len]) {
                    tracing::debug!("an answer of {len} bytes is not taken: {error}");
                }
            }
            // Closed with what was made up for a loop that had not come to it: what was sent before is still there.
            Err(Errno::INTR | Errno::CONNRESET) => {}
            Err(error) => return tracing::error!("answers cannot be carried on: {error}"),
        }
    }
}

/// The loops of a mount, held: until they are let go, or for good.
pub struct Held {
    all: Mutex<Option<Vec<One>>>,
}

impl Held {
    /// Holds all loops of this process, of which there must be `count`. `ours` are descriptors of the device that are none of theirs.
    ///
    /// # Errors
    /// The system refuses; a loop does not come to a read in time. Then none is held.
    pub fn hold(known: &Loops, count: usize, ours: &[RawFd], limit: Duration) -> io::Result<Arc<Self>> {
        let (numbers, threads) = (devices(ours)?, loops()?);
        if numbers.len() != count || threads.len() != count {
            let (found, of) = (numbers.len(), threads.len());
            let error = format!("{found} descriptors and {of} threads were found, and {count} expected");
            return Err(io::Error::other(error));
        }
        let round = known.round.fetch_add(1, Ordering::SeqCst) + 1;
        known.seen.store(0, Ordering::SeqCst);
        let mut all = Vec::with_capacity(count);
        let held = numbers.into_iter().try_for_each(|number| {
            // One that fails here was not touched.
            all.push(One::hold(number, round)?);
            Ok(())
        });
        let held = held.and_then(|()| known.await_all(count, &threads, limit));
        if let Err(error) = held {
            all.iter().for_each(One::go_on);
            return Err(error);
        }
        Ok(Arc::new(Self {
            all: Mutex::new(Some(all)),
        }))
    }

    /// Lets the loops go on, if they are held.
    pub fn let_go(&self) {
        if let Some(all) = self.all.lock().take() {
            all.iter().for_each(One::go_on);
        }
    }

    /// From now on nobody but the caller lets them go: with what it returns. None: they have been let go.
    #[must_use]
    pub fn keep(&self) -> Option<Kept> {
        self.all.lock().take().map(Kept)
    }
}

/// Loops that are held until they are told to go on.
pub struct Kept(Vec<One>);

impl Kept {
    /// They go on.
    pub fn let_go(&self) {
        self.0.iter().for_each(One::go_on);
    }
}

/// The descriptors that requests of this mount are read from, to be passed on.
///
/// # Errors
/// The system refuses.
pub fn duplicates(ours: &[RawFd]) -> io::Result<Vec<OwnedFd>> {
    devices(ours)?.into_iter().map(duplicate).collect()
}

/// Do all event loops of this process wait for requests?
#[must_use]
pub fn are_idle() -> bool {
    loops().is_ok_and(|threads| threads.iter().all(|thread| reads(*thread)))
}

/// Waits until all event loops of this process run; false: they do not in time, or `ended` says that they never will.
pub fn all_run(count: usize, limit: Duration, ended: impl Fn() -> bool) -> bool {
    let end = Instant::now() + limit;
    while !ended() && Instant::now() < end {
        if loops().is_ok_and(|threads| threads.len() == count) {
            return true;
        }
        rt::thread::sleep(LOOK);
    }
    false
}
