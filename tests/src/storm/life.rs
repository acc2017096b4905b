//! A life of a mount as its tasks know it, and the calls that they make in it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use rand::rngs::StdRng;
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};

use super::board::{Board, Count};
use super::{MOUNTS, TASKS_EACH, now};
use crate::guard::patience;

/// How long after a storage node is there again calls may still fail that had to do with it.
const OUTAGE_MS: u64 = 3000;
/// The call that may be done by another mount.
pub const WRITE: &str = "write of cells";
/// Pause after a call that failed.
const PAUSE: Duration = Duration::from_millis(20);

/// Why a task does not go on with what it was doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The mount's life is over.
    Over,
    /// A call failed, as it may.
    Failed(i32),
}

/// What came of a step of a task.
pub type Step<T> = Result<T, Stop>;

/// One life of a mount: what is opened in it is no use in the next.
#[derive(Debug)]
pub struct Life {
    point: PathBuf,
    device: (u32, u32),
    dir: OwnedFd,
    over: AtomicBool,
}

/// The device of what is mounted at a place; asks nobody but the kernel.
#[must_use]
pub fn device_at(point: &Path) -> Option<(u32, u32)> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let of = |line: &str| {
        let mut fields = line.split(' ').skip(2);
        let device = fields.next()?;
        let (_root, at) = (fields.next()?, fields.next()?);
        let (major, minor) = device.split_once(':')?;
        (Path::new(at) == point).then_some((major.parse().ok()?, minor.parse().ok()?))
    };
    text.lines().rev().find_map(of)
}

impl Life {
    /// The one that is mounted there, if it is another than `before`.
    #[must_use]
    pub fn begin(point: &Path, before: Option<&Self>) -> Option<Self> {
        let device = device_at(point)?;
        if before.is_some_and(|life| life.device == device) {
            return None;
        }
        let dir = rustix::fs::open(point, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        // It may have been unmounted meanwhile, and this be the folder below.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = rustix::fs::statx(&dir, "", flags, StatxFlags::BASIC_STATS).ok()?;
        ((stat.stx_dev_major, stat.stx_dev_minor) == device).then(|| Self {
            point: point.to_owned(),
            device,
            dir,
            over: AtomicBool::new(false),
        })
    }

    /// Opens a file of it.
    ///
    /// # Errors
    /// Those of openat(2).
    pub fn open(&self, name: &str, flags: i32) -> io::Result<File> {
        let flags = OFlags::from_bits_retain(flags as u32) | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o644);
        Ok(File::from(rustix::fs::openat(&self.dir, name, flags, mode)?))
    }

    /// Its root.
    #[must_use]
    pub fn dir(&self) -> &OwnedFd {
        &self.dir
    }

    /// Something else is mounted there, or nothing.
    #[must_use]
    pub fn replaced(&self) -> bool {
        device_at(&self.point) != Some(self.device)
    }

    /// It was seen to have ended.
    #[must_use]
    pub fn over(&self) -> bool {
        self.over.load(SeqCst)
    }
}

/// A task in a life of its mount.
pub struct Task<'a> {
    /// What all know.
    pub board: &'a Board,
    /// The life.
    pub life: &'a Life,
    /// Its number among all.
    pub number: usize,
    /// Chance.
    pub rng: StdRng,
}

impl Task<'_> {
    /// Its mount.
    #[must_use]
    pub fn mount(&self) -> usize {
        self.number / TASKS_EACH
    }

    /// Says that something is wrong.
    pub fn wrong(&self, what: &str) {
        wrong(self.board, &format!("task {}: {what}", self.number));
    }

    /// What it has done, where `FSD_STORM_TRACE` is set: for who looks for the cause of something.
    pub fn trace(&self, what: impl FnOnce() -> String) {
        static TRACED: OnceLock<bool> = OnceLock::new();
        if *TRACED.get_or_init(|| std::env::var_os("FSD_STORM_TRACE").is_some()) {
            eprintln!("{} task {}: {}", now(), self.number, what());
        }
    }

    fn outage(&self) -> bool {
        let ended = self.board.outage_ended().load(SeqCst);
        let lately = ended != 0 && now() < ended + OUTAGE_MS * u64::from(patience()) * 1_000_000;
        self.board.outages().load(SeqCst) > 0 || lately
    }

    /// Whether another mount may have been doing what this one was asked to do, and have died: then nobody knows whether it was done.
    fn may_have_been_forwarded(&self, before: [Option<u64>; MOUNTS]) -> bool {
        let after = self.board.safe();
        let dying = |m: usize| before[m].is_none() || before[m] != after[m];
        self.board.forwards() && (0..MOUNTS).any(|m| m != self.mount() && dying(m))
    }

    /// Makes a call, with what is told of it where it fails or hangs. `expected` are errors that the caller looks at.
    ///
    /// # Errors
    /// [`Stop`]. Where the call must not fail this is told.
    pub fn call<T>(
        &self,
        what: &str,
        expected: &[i32],
        call: impl FnOnce() -> io::Result<T>,
    ) -> Step<Result<T, i32>> {
        let (since, name) = self.board.call(self.number);
        let start = now();
        let (all_safe, outage) = (self.board.safe(), self.outage());
        let safe = all_safe[self.mount()];
        let mut letters = [0; 8];
        letters
            .iter_mut()
            .zip(what.bytes())
            .for_each(|(to, from)| *to = from);
        name.store(u64::from_le_bytes(letters), SeqCst);
        since.store(start, SeqCst);
        let result = call();
        since.store(0, SeqCst);
        let error = match result {
            Ok(value) => return Ok(Ok(value)),
            Err(error) => error,
        };
        let number = error.raw_os_error().unwrap_or(-1);
        if expected.contains(&number) {
            return Ok(Err(number));
        }
        let endangered = safe.is_none() || self.board.safe()[self.mount()] != safe;
        let took = Duration::from_nanos(now() - start);
        if matches!(number, libc::ENOTCONN | libc::ECONNABORTED | libc::ENODEV) {
            if !endangered {
                self.wrong(&format!(
                    "{what}: the mount has died though nothing was done to it ({error})"
                ));
            }
            self.life.over.store(true, SeqCst);
            return Err(Stop::Over);
        }
        if endangered {
            self.board.add(Count::Dying, 1);
        } else if number == libc::EIO && (outage || self.outage()) {
            eprintln!(
                "{} task {}: {what}: {error} after {took:?}, beside a storage node's fault",
                now(),
                self.number
            );
            self.board.add(Count::Outage, 1);
        } else if number == libc::EIO && what == WRITE && self.may_have_been_forwarded(all_safe) {
            eprintln!(
                "{} task {}: {what}: {error} after {took:?}, beside another mount's fault",
                now(),
                self.number
            );
            self.board.add(Count::Forwarded, 1);
        } else {
            self.wrong(&format!("{what} has failed: {error}, after {took:?}"));
        }
        std::thread::sleep(PAUSE);
        Err(Stop::Failed(number))
    }

    /// A call of which no error is expected.
    ///
    /// # Errors
    /// As [`Task::call`].
    pub fn must<T>(&self, what: &str, call: impl FnOnce() -> io::Result<T>) -> Step<T> {
        self.call(what, &[], call)?.map_err(Stop::Failed)
    }

    /// What is safe throughout: mounts that are as they were `before`. Nothing is where this task's own mount is being shut out, as what it
    /// shows may be old.
    #[must_use]
    pub fn still_safe(&self, before: [Option<u64>; MOUNTS]) -> Option<[bool; MOUNTS]> {
        let after = self.board.safe();
        let safe: [bool; MOUNTS] = std::array::from_fn(|m| before[m].is_some() && before[m] == after[m]);
        (safe[self.mount()] || self.board.honest(self.mount())).then_some(safe)
    }

    /// Tasks are to stop, or to find out what came of a fault.
    #[must_use]
    pub fn to_pause(&self) -> bool {
        let (board, mount) = (self.board, self.mount());
        let begun = board.begun(mount).load(SeqCst);
        // Where something is wrong all stays as it is, to be looked at.
        self.life.over()
            || board.wrong().load(SeqCst) > 0
            || (board.settled(mount).load(SeqCst) != begun && board.done(mount).load(SeqCst) == begun)
            || board.phase() != super::board::Phase::Work
    }
}

/// Says that something is wrong: on standard error, and on the board.
pub fn wrong(board: &Board, what: &str) {
    eprintln!("{} WRONG {what}", now());
    board.wrong().fetch_add(1, SeqCst);
}
