//! Readers that look for old contents: each a program of its own, for what it has mapped may end it.
//!
//! A writer counts up in a file, and says on a board which number it has been told is stored. What a reader begins to look at after that
//! must be of this number or a later one.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use crate::sys;

/// How they look.
pub const KINDS: [&str; 4] = ["read", "names", "stat", "map"];
/// Bytes of the file, to which its number is added.
const BASE: u64 = 16384;
/// Where its number is, beside at the beginning.
const LAST: u64 = 12288;
/// What a reader has on the board, in bytes.
const PART: usize = 64;
/// Pause between two looks, so that one processor is enough for all; and after one that failed.
const PAUSE: Duration = Duration::from_millis(1);
const LATER: Duration = Duration::from_millis(50);

/// What writer and readers tell each other.
pub struct Board(sys::Map);

/// What a reader has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Looks that brought something.
    pub looks: u64,
    /// Of those, what was too old.
    pub stale: u64,
    /// Looks that failed.
    pub failed: u64,
}

impl Board {
    /// Opens one, or makes it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = sys::open(path, libc::O_RDWR | libc::O_CREAT)?;
        let len = PART * (KINDS.len() + 1);
        file.set_len(len as u64)?;
        Ok(Self(sys::Map::writable(&file, len)?))
    }

    fn stored(&self) -> &AtomicU64 {
        self.0.word(0)
    }

    fn part(&self, kind: usize, word: usize) -> &AtomicU64 {
        self.0.word(PART * (kind + 1) + 8 * word)
    }

    /// What a reader has seen.
    #[must_use]
    pub fn seen(&self, kind: usize) -> Seen {
        Seen {
            looks: self.part(kind, 0).load(SeqCst),
            stale: self.part(kind, 1).load(SeqCst),
            failed: self.part(kind, 2).load(SeqCst),
        }
    }
}

/// Counts up.
pub struct Writer {
    file: File,
    board: Board,
    number: u64,
}

impl Writer {
    /// Makes the file, with a number.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn new(path: &Path, board: &Path) -> anyhow::Result<Self> {
        let mut writer = Self {
            file: sys::open(path, libc::O_RDWR | libc::O_CREAT)?,
            board: Board::open(board)?,
            number: 0,
        };
        writer.step()?;
        Ok(writer)
    }

    /// One further, and stored.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn step(&mut self) -> anyhow::Result<()> {
        self.number += 1;
        self.file.set_len(BASE + self.number)?;
        self.file.write_all_at(&self.number.to_le_bytes(), 0)?;
        self.file.write_all_at(&self.number.to_le_bytes(), LAST)?;
        self.file.sync_all()?;
        self.board.stored().store(self.number, SeqCst);
        Ok(())
    }
}

fn number_of(bytes: &[u8]) -> anyhow::Result<u64> {
    Ok(u64::from_le_bytes(bytes.try_into()?))
}

/// What is kept open between two looks.
enum Open {
    Nothing,
    File(File),
    Map(sys::Map),
}

impl Open {
    fn of(kind: &str, path: &Path) -> anyhow::Result<Self> {
        Ok(match kind {
            "read" => Self::File(File::open(path)?),
            "map" => Self::Map(sys::Map::new(&File::open(path)?, BASE as usize)?),
            "names" | "stat" => Self::Nothing,
            other => bail!("{other}?"),
        })
    }

    fn look(&self, kind: &str, path: &Path, turn: u64) -> anyhow::Result<u64> {
        let at = if turn.is_multiple_of(2) { 0 } else { LAST };
        let read = |file: &File| -> anyhow::Result<u64> {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, at)?;
            number_of(&bytes)
        };
        match self {
            Self::File(file) => read(file),
            Self::Map(map) => number_of(&map.read(at as usize, 8)),
            Self::Nothing if kind == "stat" => {
                let len = fs::metadata(path)?.len();
                len.checked_sub(BASE).context("shorter than ever")
            }
            Self::Nothing => read(&File::open(path)?),
        }
    }
}

/// Looks until it is killed.
///
/// # Errors
/// The board cannot be opened, or there is no such kind.
pub fn look(kind: &str, path: &Path, board: &Path) -> anyhow::Result<()> {
    let number = KINDS.iter().position(|k| *k == kind).context("no such kind")?;
    let board = Board::open(board)?;
    let mut open: Option<Open> = None;
    for turn in 0.. {
        let stored = board.stored().load(SeqCst);
        let looked = match open.take() {
            Some(open) => Ok(open),
            None => Open::of(kind, path),
        };
        let looked = looked.and_then(|now| Ok((now.look(kind, path, turn)?, now)));
        match looked {
            Ok((seen, now)) => {
                if seen < stored {
                    board.part(number, 1).fetch_add(1, SeqCst);
                }
                board.part(number, 0).fetch_add(1, SeqCst);
                open = Some(now);
                std::thread::sleep(PAUSE);
            }
            Err(_) => {
                board.part(number, 2).fetch_add(1, SeqCst);
                std::thread::sleep(LATER);
            }
        }
    }
    Ok(())
}

/// The readers of a file, of all kinds; killed when dropped.
pub struct Readers {
    path: PathBuf,
    file: PathBuf,
    board: Board,
    children: Vec<Child>,
}

impl Readers {
    /// Starts them.
    ///
    /// # Errors
    /// The program is not there.
    pub fn start(file: &Path, board: &Path) -> anyhow::Result<Self> {
        let mut readers = Self {
            path: board.to_owned(),
            file: file.to_owned(),
            board: Board::open(board)?,
            children: Vec::new(),
        };
        for kind in KINDS {
            let child = readers.spawn(kind)?;
            readers.children.push(child);
        }
        Ok(readers)
    }

    fn spawn(&self, kind: &str) -> anyhow::Result<Child> {
        let me = std::env::current_exe()?;
        let program = me.ancestors().skip(1).map(|dir| dir.join("stale"));
        let program = program.into_iter().find(|path| path.is_file());
        Command::new(program.context("not built: cargo build --release -p system-tests")?)
            .args([Path::new(kind), &self.file, &self.path])
            .spawn()
            .context("cannot start a reader")
    }

    /// What each has seen, by kind. One that a mapping has ended is started again.
    ///
    /// # Errors
    /// One has ended for another reason.
    pub fn seen(&mut self) -> anyhow::Result<Vec<Seen>> {
        for (n, kind) in KINDS.into_iter().enumerate() {
            let Some(status) = self.children[n].try_wait()? else {
                continue;
            };
            ensure!(
                kind == "map" && status.signal() == Some(libc::SIGBUS),
                "the reader {kind}: {status}"
            );
            self.board.part(n, 2).fetch_add(1, SeqCst);
            self.children[n] = self.spawn(kind)?;
        }
        Ok((0..KINDS.len()).map(|kind| self.board.seen(kind)).collect())
    }

    /// Waits until each has looked so many times more.
    ///
    /// # Errors
    /// They do not.
    pub fn wait_for_looks(&mut self, more: u64, limit: Duration) -> anyhow::Result<()> {
        let (before, end) = (self.seen()?, Instant::now() + limit);
        loop {
            let now = self.seen()?;
            if before.iter().zip(&now).all(|(b, n)| n.looks >= b.looks + more) {
                return Ok(());
            }
            ensure!(
                Instant::now() < end,
                "readers stand still for {limit:?}: {before:?}, then {now:?}"
            );
            std::thread::sleep(LATER);
        }
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        for child in &mut self.children {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
