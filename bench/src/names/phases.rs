//! What is done to names, as mdtest does it: each of some tasks, one a mount, does the same to its files.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};

use serde::{Deserialize, Serialize};

use crate::progress::check;

/// What is written to a file, and read from it.
pub const LEN: usize = 4096;

/// Where the tasks' files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In a directory of its own each.
    Own,
    /// All in one directory.
    Shared,
}

impl Place {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Own, Self::Shared];

    /// As rows say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Own => "own directory",
            Self::Shared => "shared directory",
        }
    }
}

/// One thing that all tasks do to all of their files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Makes a file, writes 4 KiB to it, closes it.
    Create,
    /// Its attributes, by path.
    Stat,
    /// Opens it, reads it, closes it.
    Read,
    /// The attributes of the files that the next task has made.
    StatNext,
    /// Reads those.
    ReadNext,
    /// Gives it another name in the same directory.
    Rename,
    /// Removes it.
    Remove,
    /// Makes a directory.
    Mkdir,
    /// Removes that.
    Rmdir,
}

impl Phase {
    /// What a task does to its own files, in this order.
    pub const OWN: [Self; 7] = [
        Self::Create,
        Self::Stat,
        Self::Read,
        Self::Rename,
        Self::Remove,
        Self::Mkdir,
        Self::Rmdir,
    ];
    /// What it does to those of the next, where there is one: to files that were made for that, so that what is measured of its own
    /// is not what taking them back costs.
    pub const OTHERS: [Self; 2] = [Self::StatNext, Self::ReadNext];

    /// As rows say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "create, write 4 KiB",
            Self::Stat => "stat",
            Self::Read => "open, read 4 KiB",
            Self::StatNext => "stat what the next has made",
            Self::ReadNext => "open, read what the next has made",
            Self::Rename => "rename",
            Self::Remove => "remove",
            Self::Mkdir => "mkdir",
            Self::Rmdir => "rmdir",
        }
    }

    /// Whether it is done to the files of the next one.
    pub fn is_of_others(self) -> bool {
        Self::OTHERS.contains(&self)
    }
}

/// Tasks and their directories.
pub struct Tasks {
    /// Of each task: its directory as it sees it, and that of the next one as it sees that.
    dirs: Vec<(PathBuf, PathBuf)>,
    /// Files of each.
    files: usize,
    place: Place,
    /// What they are in, or all of them.
    base: PathBuf,
}

impl Tasks {
    /// Makes the directories: below `name` in mounts of one file system, one a task; or of a floor that is mounted once.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn new(
        mounts: &[PathBuf],
        tasks: usize,
        place: Place,
        name: &str,
        files: usize,
    ) -> anyhow::Result<Self> {
        let root = |task: usize| mounts[task % mounts.len()].join(name);
        let base = root(0);
        fs::create_dir(&base).with_context(|| base.display().to_string())?;
        let below = |seen_by: usize, of: usize| match place {
            Place::Own => root(seen_by).join(format!("task{of}")),
            Place::Shared => root(seen_by),
        };
        if place == Place::Own {
            (0..tasks).try_for_each(|task| fs::create_dir(below(task, task)))?;
        }
        let dirs = (0..tasks).map(|task| (below(task, task), below(task, (task + 1) % tasks)));
        Ok(Self {
            dirs: dirs.collect(),
            files,
            place,
            base,
        })
    }

    /// Does something on all tasks at once; how long it was from the first one's start to the last one's end.
    ///
    /// # Errors
    /// A call fails, or something is not what it must be.
    pub fn run(&self, phase: Phase) -> anyhow::Result<Duration> {
        let barrier = Barrier::new(self.dirs.len());
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.dirs.len())
                .map(|task| {
                    let barrier = &barrier;
                    scope.spawn(move || {
                        barrier.wait();
                        let start = Instant::now();
                        self.one(phase, task)?;
                        Ok((start, Instant::now()))
                    })
                })
                .collect();
            // All are waited for, whatever came of the first.
            let ended: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
            let died = |_| Err(anyhow!("a task died"));
            let times = ended
                .into_iter()
                .map(|result| result.unwrap_or_else(died))
                .collect::<anyhow::Result<Vec<(Instant, Instant)>>>()?;
            let first = times.iter().map(|(start, _)| *start).min();
            let last = times.iter().map(|(_, end)| *end).max();
            let took = first.zip(last).map(|(first, last)| last - first);
            took.context("no tasks")
        })
    }

    fn one(&self, phase: Phase, task: usize) -> anyhow::Result<()> {
        let next = (task + 1) % self.dirs.len();
        let (dir, whose) = if phase.is_of_others() {
            (&self.dirs[task].1, next)
        } else {
            (&self.dirs[task].0, task)
        };
        (0..self.files).try_for_each(|n| {
            // A file system that hangs is not to be waited for after Ctrl-C.
            if n % 64 == 0 {
                check()?;
            }
            call(phase, dir, whose, n).with_context(|| format!("{}, task {task}, file {n}", phase.name()))
        })
    }

    /// Takes the directories away, and makes sure that nothing is left.
    ///
    /// # Errors
    /// Something is.
    pub fn end(self) -> anyhow::Result<()> {
        if self.place == Place::Own {
            self.dirs.iter().try_for_each(|(dir, _)| fs::remove_dir(dir))?;
        }
        fs::remove_dir(&self.base).with_context(|| self.base.display().to_string())
    }

    /// The directories, each as its task sees it.
    pub fn dirs(&self) -> impl Iterator<Item = &Path> {
        self.dirs.iter().map(|(dir, _)| dir.as_path())
    }

    /// Files of all tasks.
    pub fn count(&self) -> usize {
        self.files * self.dirs.len()
    }
}

/// No two files have the same contents.
fn contents(whose: usize, n: usize) -> [u8; LEN] {
    let mut page = [0x5a; LEN];
    page[..8].copy_from_slice(&(whose as u64).to_le_bytes());
    page[LEN - 8..].copy_from_slice(&(n as u64).to_le_bytes());
    page
}

/// Does something to one file of somebody's in a directory.
///
/// # Errors
/// It fails, or finds what must not be.
pub fn call(phase: Phase, dir: &Path, whose: usize, n: usize) -> anyhow::Result<()> {
    let path = |kind: &str| dir.join(format!("{kind}{whose}-{n}"));
    match phase {
        Phase::Create => Ok(File::create_new(path("f"))?.write_all(&contents(whose, n))?),
        Phase::Stat | Phase::StatNext => {
            let len = fs::metadata(path("f"))?.len();
            ensure!(len == LEN as u64, "{len} bytes");
            Ok(())
        }
        Phase::Read | Phase::ReadNext => {
            let mut page = [0; LEN];
            File::open(path("f"))?.read_exact(&mut page)?;
            ensure!(page == contents(whose, n), "the contents are not those written");
            Ok(())
        }
        Phase::Rename => Ok(fs::rename(path("f"), path("g"))?),
        Phase::Remove => Ok(fs::remove_file(path("g"))?),
        Phase::Mkdir => Ok(fs::create_dir(path("d"))?),
        Phase::Rmdir => Ok(fs::remove_dir(path("d"))?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tasks(dir: &Path, place: Place) -> Tasks {
        Tasks::new(&[dir.to_owned(), dir.to_owned()], 3, place, "t", 5).unwrap()
    }

    #[test]
    fn all_phases_on_a_plain_directory() {
        for place in Place::ALL {
            let dir = tempfile::tempdir().unwrap();
            let tasks = tasks(dir.path(), place);
            assert_eq!((tasks.count(), tasks.dirs().count()), (15, 3));
            let there = || {
                tasks
                    .dirs()
                    .map(|d| fs::read_dir(d).unwrap().count())
                    .sum::<usize>()
            };
            let others = [
                Phase::Create,
                Phase::StatNext,
                Phase::ReadNext,
                Phase::Rename,
                Phase::Remove,
            ];
            for phase in Phase::OWN.into_iter().chain(others) {
                tasks.run(phase).unwrap();
                let empty = matches!(phase, Phase::Remove | Phase::Rmdir);
                assert_eq!(there() == 0, empty, "{phase:?}");
            }
            tasks.end().unwrap();
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn what_is_wrong_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let tasks = tasks(dir.path(), Place::Shared);
        tasks.run(Phase::Create).unwrap();
        fs::write(dir.path().join("t/f1-4"), [0x5a; LEN]).unwrap();
        tasks.run(Phase::StatNext).unwrap();
        let wrong = tasks.run(Phase::ReadNext).unwrap_err();
        let said = format!("{wrong:#}");
        assert!(
            said.contains("task 0, file 4") && said.contains("not those written"),
            "{said}"
        );
        fs::write(dir.path().join("t/f2-0"), "short").unwrap();
        assert!(tasks.run(Phase::Stat).is_err());
        assert!(tasks.end().is_err(), "something is left");
    }
}
