//! Cross-mount checks: whatever a system call on one mount has returned, every later call on any mount sees.
//!
//! Each check does something through one directory and looks through another; both lead to one file system.

mod attributes;
mod content;
mod locks;
mod names;
mod ranges;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::ensure;

/// One check: directory of the actor, directory of the observer, number of the round.
type Check = fn(&Pair, usize) -> anyhow::Result<()>;

/// Two ways to one folder.
#[derive(Debug)]
pub struct Pair {
    a: PathBuf,
    b: PathBuf,
}

impl Pair {
    /// A name as the actor sees it and as the observer does.
    fn both(&self, name: &str) -> (PathBuf, PathBuf) {
        (self.a.join(name), self.b.join(name))
    }

    fn flipped(&self) -> Self {
        Self {
            a: self.b.clone(),
            b: self.a.clone(),
        }
    }
}

/// All checks: name, check, and how many rounds of it stand for one of the others.
const KINDS: &[(&str, Check, usize)] = &[
    ("overwrite", content::overwrite, 1),
    ("overwrite, both ways", content::ping_pong, 1),
    ("append", content::append, 1),
    ("O_APPEND from both", content::append_both, 2),
    ("truncate, shrink", content::shrink, 1),
    ("truncate, grow", content::grow, 1),
    ("O_TRUNC", content::open_truncates, 1),
    ("size", content::size, 1),
    ("times", content::times, 1),
    ("mode and owner", content::mode_owner, 1),
    ("each attribute", attributes::each, 10),
    ("xattrs", content::xattrs, 1),
    ("mmap, fresh", content::map_fresh, 1),
    ("mmap, held", content::map_held, 1),
    ("create and unlink", names::create_unlink, 1),
    ("O_EXCL race", names::exclusive_race, 1),
    ("mkdir race", names::mkdir_race, 1),
    ("rename over", names::rename_over, 1),
    ("rename of directories", names::rename_directory, 1),
    ("readdir", names::readdir, 1),
    ("readdir, many", names::readdir_many, 10),
    ("symbolic links", names::symlinks, 1),
    ("hard links", names::hard_links, 1),
    ("unlinked, open", names::unlinked_open, 1),
    ("replaced, open", names::replaced_open, 1),
    ("fcntl locks", locks::ranges, 1),
    ("fcntl locks, waiting", locks::ranges_wait, 2),
    ("flock", locks::whole, 1),
    ("flock, waiting", locks::whole_wait, 2),
    ("lock protects counter", locks::counter, 5),
    ("fallocate, punch", ranges::punch, 1),
    ("fallocate, zero", ranges::zero, 1),
    ("fallocate, extend", ranges::extend, 1),
    ("copy_file_range", ranges::copy, 1),
    ("SEEK_DATA, SEEK_HOLE", ranges::seek, 1),
    ("sparse terabyte", ranges::terabyte, 1),
    ("large overwrite", ranges::large, 5),
];

/// Those that a stock kernel does not pass: its mappings show what others have written only after msync, munmap or
/// close.
const WITH_EXTENSION: &[(&str, Check, usize)] = &[
    ("mmap, written", content::map_written, 1),
    ("mmap, written in turns", content::map_in_turns, 1),
    ("mmap beside write", content::map_beside_write, 1),
];

/// The result of one kind of check.
#[derive(Debug)]
pub struct Outcome {
    /// What was checked.
    pub kind: &'static str,
    /// How often.
    pub rounds: usize,
    /// What was seen that must not be.
    pub violations: Vec<String>,
    /// How long it took.
    pub time: Duration,
}

/// What is checked.
#[derive(Debug, Clone, Copy, Default)]
pub struct Choice<'a> {
    /// Only kinds with this in their names.
    pub only: Option<&'a str>,
    /// Also what takes the kernel extension.
    pub extension: bool,
}

/// Runs every check, `rounds` times each (dear ones less often), the directories taking turns as the actor.
///
/// # Errors
/// The folder for the checks cannot be made. Violations are no errors here.
pub fn run(dir0: &Path, dir1: &Path, rounds: usize, choice: Choice<'_>) -> anyhow::Result<Vec<Outcome>> {
    let name = format!("coherence-{:08x}", rand::random::<u32>());
    let pair = Pair {
        a: dir0.join(&name),
        b: dir1.join(&name),
    };
    std::fs::create_dir(&pair.a)?;
    ensure!(
        pair.b.is_dir(),
        "{} is not seen at {}: not one file system?",
        pair.a.display(),
        pair.b.display()
    );
    let mut outcomes = Vec::new();
    let more = if choice.extension { WITH_EXTENSION } else { &[] };
    for (kind, check, price) in KINDS
        .iter()
        .chain(more)
        .filter(|(kind, ..)| choice.only.is_none_or(|o| kind.contains(o)))
    {
        let start = Instant::now();
        let rounds = rounds.div_ceil(*price).max(2);
        let mut violations = Vec::new();
        for round in 0..rounds {
            let (way, arrow) = if round % 2 == 0 {
                (pair.flipped().flipped(), "0→1")
            } else {
                (pair.flipped(), "1→0")
            };
            if let Err(error) = check(&way, round) {
                violations.push(format!("round {round} ({arrow}): {error:#}"));
            }
            clear(&pair.a);
        }
        outcomes.push(Outcome {
            kind,
            rounds,
            violations,
            time: start.elapsed(),
        });
    }
    // A violation may have left something that cannot be removed.
    let _ = std::fs::remove_dir_all(&pair.a);
    Ok(outcomes)
}

fn clear(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.symlink_metadata().is_ok_and(|m| m.is_dir()) {
            let _ = std::fs::remove_dir_all(path);
        } else {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The table that people read; returns the number of violations.
pub fn print(outcomes: &[Outcome]) -> usize {
    println!(
        "{:<24} {:>7} {:>11} {:>9}",
        "kind", "rounds", "violations", "ms/round"
    );
    for o in outcomes {
        let ms = o.time.as_secs_f64() * 1e3 / o.rounds as f64;
        println!(
            "{:<24} {:>7} {:>11} {ms:>9.2}",
            o.kind,
            o.rounds,
            o.violations.len()
        );
    }
    let all = outcomes.iter().map(|o| o.violations.len()).sum();
    for o in outcomes.iter().filter(|o| !o.violations.is_empty()) {
        o.violations
            .iter()
            .take(3)
            .for_each(|v| println!("{}: {v}", o.kind));
    }
    println!(
        "{} rounds, {all} violations",
        outcomes.iter().map(|o| o.rounds).sum::<usize>()
    );
    all
}

/// Content that tells rounds apart at every byte offset.
fn pattern(round: usize, salt: usize, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| ((i * 7 + round * 31 + salt * 131 + (i >> 8)) % 251 + 1) as u8)
        .collect()
}

/// Compares contents; the message says where they differ, not the megabytes.
fn same(what: &str, got: &[u8], want: &[u8]) -> anyhow::Result<()> {
    ensure!(
        got.len() == want.len(),
        "{what}: {} bytes instead of {}",
        got.len(),
        want.len()
    );
    if let Some(i) = got.iter().zip(want).position(|(g, w)| g != w) {
        let wrong = got.iter().zip(want).filter(|(g, w)| g != w).count();
        anyhow::bail!(
            "{what}: byte {i} is {} instead of {} ({wrong} wrong bytes)",
            got[i],
            want[i]
        );
    }
    Ok(())
}
