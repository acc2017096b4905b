//! Programs at work on a mount whose daemon is replaced, and on another one that looks at what they do. None of them may see an error, and
//! nothing that was acknowledged may be lost.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rand::Rng;

use crate::sys;

const PAGE: u64 = 4096;
const PAGES: u64 = 16;
/// Bytes of a record that is appended: who, and its number.
const RECORD: usize = 16;
/// Names that a directory has all the time.
const NAMES: usize = 150;

/// What one task has done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Done {
    /// How often.
    pub rounds: u64,
    /// The longest time that one round took.
    pub longest: Duration,
}

/// What programs share.
#[derive(Debug, Default)]
struct Board {
    over: AtomicBool,
    /// The last number that was acknowledged, by page: of the file that is written here, and of the one that is written there.
    pages: [[AtomicU64; PAGES as usize]; 2],
    /// How many records each has appended.
    appended: [AtomicU64; 2],
    /// How often the counter was increased.
    counted: AtomicU64,
}

impl Board {
    /// Does something again and again until it is over.
    fn repeat(&self, mut round: impl FnMut(u64) -> anyhow::Result<()>) -> anyhow::Result<Done> {
        let mut done = Done::default();
        while !self.over.load(SeqCst) {
            let begun = Instant::now();
            round(done.rounds)?;
            done.longest = done.longest.max(begun.elapsed());
            done.rounds += 1;
        }
        Ok(done)
    }
}

fn open(path: &Path, flags: i32) -> anyhow::Result<File> {
    sys::open(path, flags).with_context(|| path.display().to_string())
}

const MAKE: i32 = libc::O_RDWR | libc::O_CREAT;

/// Overwrites pages through one open file, and reads them back.
fn overwrite(board: &Board, dir: &Path, who: usize) -> anyhow::Result<Done> {
    let file = open(&dir.join(format!("pages{who}")), libc::O_RDWR)?;
    board.repeat(|round| {
        let page = rand::rng().random_range(0..PAGES);
        let number = round + 1;
        file.write_all_at(&number.to_le_bytes().repeat(512), page * PAGE)?;
        board.pages[who][page as usize].store(number, SeqCst);
        let back = sys::read_at(&file, page * PAGE, 8)?;
        ensure!(back == number.to_le_bytes(), "{number} is read as {back:?}");
        Ok(())
    })
}

/// Reads those pages, elsewhere or here: never older than what was acknowledged.
fn look(board: &Board, dir: &Path, who: usize) -> anyhow::Result<Done> {
    let file = open(&dir.join(format!("pages{who}")), libc::O_RDONLY)?;
    board.repeat(|_| {
        let page = rand::rng().random_range(0..PAGES);
        let due = board.pages[who][page as usize].load(SeqCst);
        let bytes = sys::read_at(&file, page * PAGE, 8)?;
        let seen = u64::from_le_bytes(bytes.try_into().ok().context("a short read")?);
        ensure!(seen >= due, "page {page}: {due} was acknowledged, {seen} is read");
        Ok(())
    })
}

/// Appends records to a file that both append to.
fn append(board: &Board, dir: &Path, who: usize) -> anyhow::Result<Done> {
    let file = open(&dir.join("records"), libc::O_WRONLY | libc::O_APPEND)?;
    board.repeat(|round| {
        let mut record = [0; RECORD];
        record[0] = who as u8;
        record[8..].copy_from_slice(&round.to_le_bytes());
        ensure!(sys::append(&file, &record)? == RECORD, "a short append");
        board.appended[who].store(round + 1, SeqCst);
        std::thread::sleep(Duration::from_micros(300));
        Ok(())
    })
}

/// Makes, renames, looks at and removes names.
fn rename(board: &Board, dir: &Path, who: usize) -> anyhow::Result<Done> {
    let (made, moved) = (dir.join(format!("made{who}")), dir.join(format!("moved{who}")));
    board.repeat(|round| {
        let text = format!("{who} {round}");
        fs::write(&made, &text)?;
        fs::rename(&made, &moved)?;
        ensure!(!made.exists(), "a name that was moved is there");
        ensure!(fs::read_to_string(&moved)? == text, "what was renamed");
        if round % 3 == 0 {
            fs::remove_file(&moved)?;
            ensure!(!moved.exists(), "a name that was removed is there");
        }
        Ok(())
    })
}

/// Counts under a lock of all of a file, which both take in turn.
fn count(board: &Board, dir: &Path) -> anyhow::Result<Done> {
    let file = open(&dir.join("counter"), libc::O_RDWR)?;
    board.repeat(|_| {
        sys::flock(&file, libc::LOCK_EX)?;
        let number = u64::from_le_bytes(sys::read_at(&file, 0, 8)?.try_into().ok().context("a counter")?);
        file.write_all_at(&(number + 1).to_le_bytes(), 0)?;
        board.counted.fetch_add(1, SeqCst);
        sys::flock(&file, libc::LOCK_UN)?;
        std::thread::sleep(Duration::from_micros(200));
        Ok(())
    })
}

/// Has a file open that has no name, and writes and reads it.
fn nameless(board: &Board, dir: &Path) -> anyhow::Result<Done> {
    let path = dir.join("nameless");
    let file = open(&path, MAKE)?;
    fs::remove_file(&path)?;
    board.repeat(|round| {
        let text = round.to_le_bytes().repeat(1000);
        file.write_all_at(&text, 100)?;
        ensure!(
            sys::read_at(&file, 100, text.len())? == text,
            "of a file without a name"
        );
        ensure!(file.metadata()?.len() == 8100, "its size");
        std::thread::sleep(Duration::from_micros(300));
        Ok(())
    })
}

/// Lists a directory whose names do not change.
fn list(board: &Board, dir: &Path) -> anyhow::Result<Done> {
    board.repeat(|_| {
        let names: BTreeSet<_> = fs::read_dir(dir.join("names"))?
            .map(|entry| entry.map(|e| e.file_name()))
            .collect::<Result<_, _>>()?;
        ensure!(names.len() == NAMES, "{} names", names.len());
        std::thread::sleep(Duration::from_millis(1));
        Ok(())
    })
}

/// Opens, reads and closes a file that nobody changes, and makes large reads of it past the page cache.
fn read(board: &Board, dir: &Path) -> anyhow::Result<Done> {
    board.repeat(|round| {
        let direct = if round % 2 == 0 { libc::O_DIRECT } else { 0 };
        let file = open(&dir.join("large"), libc::O_RDONLY | direct)?;
        let bytes = sys::read_at(&file, 0, LARGE)?;
        ensure!(
            bytes.len() == LARGE && bytes.iter().all(|b| *b == 7),
            "a file that nobody changes"
        );
        std::thread::sleep(Duration::from_millis(1));
        Ok(())
    })
}

const LARGE: usize = 3 << 20;

/// What is locked here all the time is never to be had there.
fn guarded(board: &Board, dir: &Path) -> anyhow::Result<Done> {
    let file = open(&dir.join("locked"), libc::O_RDWR)?;
    board.repeat(|_| {
        ensure!(
            sys::errno(&sys::lock(&file, libc::F_WRLCK, 0, 10, false)) == libc::EAGAIN,
            "a lock is lost"
        );
        let flocked = sys::flock(&file, libc::LOCK_EX | libc::LOCK_NB);
        ensure!(
            sys::errno(&flocked) == libc::EAGAIN,
            "a lock of all of a file is lost"
        );
        std::thread::sleep(Duration::from_millis(1));
        Ok(())
    })
}

/// Runs programs on the mount at `here`, and on the one at `there`, while `meanwhile` does something to the first one. What each has done.
///
/// # Errors
/// One of them saw an error, or something that is not as it was left.
pub fn work(
    here: &Path,
    there: &Path,
    meanwhile: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Vec<(&'static str, Done)>> {
    for who in 0..2 {
        fs::write(here.join(format!("pages{who}")), vec![0; (PAGES * PAGE) as usize])?;
    }
    fs::write(here.join("counter"), 0u64.to_le_bytes())?;
    fs::write(here.join("large"), vec![7; LARGE])?;
    fs::create_dir(here.join("names"))?;
    for n in 0..NAMES {
        File::create(here.join("names").join(format!("n{n}")))?;
    }
    for name in ["records", "locked", "waited"] {
        File::create(here.join(name))?;
    }
    let locked = open(&here.join("locked"), libc::O_RDWR)?;
    sys::lock(&locked, libc::F_WRLCK, 0, 10, false)?;
    sys::flock(&locked, libc::LOCK_EX)?;
    // Somebody waits here for what is locked there.
    let holder = open(&there.join("waited"), libc::O_RDWR)?;
    sys::lock(&holder, libc::F_WRLCK, 0, 0, false)?;
    sys::flock(&holder, libc::LOCK_EX)?;
    let board = Board::default();
    let board = &board;
    let (waits, flock_waits) = (AtomicBool::new(true), AtomicBool::new(true));
    let results = std::thread::scope(|scope| {
        type Task<'a> = Box<dyn FnOnce() -> anyhow::Result<Done> + Send + 'a>;
        let tasks: Vec<(&'static str, Task<'_>)> = vec![
            ("overwrite", Box::new(|| overwrite(board, here, 0))),
            ("overwrite there", Box::new(|| overwrite(board, there, 1))),
            ("look there", Box::new(|| look(board, there, 0))),
            ("look here", Box::new(|| look(board, here, 0))),
            ("look here at theirs", Box::new(|| look(board, here, 1))),
            ("append", Box::new(|| append(board, here, 0))),
            ("append there", Box::new(|| append(board, there, 1))),
            ("rename", Box::new(|| rename(board, here, 0))),
            ("rename there", Box::new(|| rename(board, there, 1))),
            ("count", Box::new(|| count(board, here))),
            ("count there", Box::new(|| count(board, there))),
            ("nameless", Box::new(|| nameless(board, here))),
            ("list", Box::new(|| list(board, here))),
            ("read", Box::new(|| read(board, here))),
            ("guarded there", Box::new(|| guarded(board, there))),
        ];
        let running: Vec<_> = tasks
            .into_iter()
            .map(|(name, task)| (name, scope.spawn(task)))
            .collect();
        let waiter = scope.spawn(|| -> anyhow::Result<()> {
            let file = open(&here.join("waited"), libc::O_RDWR)?;
            sys::lock(&file, libc::F_WRLCK, 0, 0, true).context("a lock that was waited for")?;
            waits.store(false, SeqCst);
            Ok(())
        });
        let flock_waiter = scope.spawn(|| -> anyhow::Result<File> {
            let file = open(&here.join("waited"), libc::O_RDWR)?;
            sys::flock(&file, libc::LOCK_EX).context("a lock of all of a file that was waited for")?;
            flock_waits.store(false, SeqCst);
            Ok(file)
        });
        let happened = meanwhile();
        let early = !waits.load(SeqCst) || !flock_waits.load(SeqCst);
        let freed =
            sys::lock(&holder, libc::F_UNLCK, 0, 0, false).and_then(|()| sys::flock(&holder, libc::LOCK_UN));
        let waited = waiter.join().map_err(|_| anyhow::anyhow!("panic"))?;
        let flocked = flock_waiter.join().map_err(|_| anyhow::anyhow!("panic"))?;
        board.over.store(true, SeqCst);
        let mut results = Vec::new();
        for (name, task) in running {
            let done = task.join().map_err(|_| anyhow::anyhow!("panic"))?;
            results.push((name, done.with_context(|| name)));
        }
        // The first that went wrong tells more than what followed from it.
        let results = results.into_iter().map(|(name, done)| Ok((name, done?)));
        let results: anyhow::Result<Vec<(&'static str, Done)>> = results.collect();
        let results = results?;
        happened?;
        freed?;
        ensure!(!early, "a lock was given that was taken");
        waited?;
        let flocked = flocked?;
        ensure!(
            sys::errno(&sys::flock(&holder, libc::LOCK_EX | libc::LOCK_NB)) == libc::EAGAIN,
            "a lock that was waited for is not held"
        );
        drop(flocked);
        anyhow::Ok(results)
    })?;
    check(board, here)?;
    check(board, there)?;
    Ok(results)
}

/// All that was acknowledged is there.
fn check(board: &Board, dir: &Path) -> anyhow::Result<()> {
    for (who, all) in board.pages.iter().enumerate() {
        let pages = fs::read(dir.join(format!("pages{who}")))?;
        for (page, due) in (0..).zip(all) {
            let bytes = &pages[page * PAGE as usize..][..PAGE as usize];
            ensure!(
                *bytes == due.load(SeqCst).to_le_bytes().repeat(512),
                "page {page} of {who}"
            );
        }
    }
    let counter = fs::read(dir.join("counter"))?;
    ensure!(
        counter == board.counted.load(SeqCst).to_le_bytes(),
        "the counter is {counter:?}"
    );
    let mut next = [0; 2];
    let records = fs::read(dir.join("records"))?;
    ensure!(
        records.len().is_multiple_of(RECORD),
        "{} bytes of records",
        records.len()
    );
    for record in records.chunks_exact(RECORD) {
        let who = usize::from(record[0]);
        let number = u64::from_le_bytes(record[8..].try_into()?);
        let due = next.get_mut(who).context("a record of nobody")?;
        ensure!(
            number == *due,
            "record {number} of {who} comes where {due} is due"
        );
        *due += 1;
    }
    let appended = [0, 1].map(|who: usize| board.appended[who].load(SeqCst));
    ensure!(next == appended, "records: {next:?}, {appended:?} acknowledged");
    Ok(())
}
