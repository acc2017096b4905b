//! Tasks with files of their own, which others only read: whatever was fsynced must be there after a power cut, and what was not is
//! as it was at some moment since, cell by cell.

use std::sync::Arc;
use std::time::Duration;

use rt::sync::Mutex;

use crate::chance::{below, once_in, one_of, wait};
use crate::content::{CELL, Content};
use crate::task::{File, Mounted, Sys, Task};

/// Names that each owner has.
const NAMES: usize = 3;
const PLACES: [u64; 7] = [0, 3, 511, 1020, 4096, 32_767, 40_000];
const LENGTHS: [u64; 5] = [1, 8, 600, 3000, 9000];
/// More than any file has.
const ALL: usize = 100_000;

/// What a file may have in it: as it was when it was last made durable, and after each change since.
#[derive(Debug, Clone)]
struct Past {
    states: Vec<Content>,
}

/// What names may name: the same.
type Names = [Option<usize>; NAMES];

/// What an owner has done.
#[derive(Debug)]
struct Log {
    files: Vec<Past>,
    names: Vec<Names>,
    stamp: u64,
}

/// How long tasks pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Hardly.
    Fast,
    /// So that servers do by themselves what they do every few seconds.
    Slow,
}

impl Pace {
    /// A pause.
    #[must_use]
    pub fn pause(self) -> Duration {
        match self {
            Self::Fast => Duration::from_millis(3),
            Self::Slow => Duration::from_millis(one_of(&[20, 200, 3000])),
        }
    }

    /// How long a phase is.
    #[must_use]
    pub fn phase(self) -> Duration {
        match self {
            Self::Fast => Duration::from_millis(40),
            Self::Slow => Duration::from_secs(8),
        }
    }
}

/// An owner of files.
pub struct Owner {
    id: u64,
    log: Mutex<Log>,
}

impl Past {
    fn now(&self) -> &Content {
        &self.states[self.states.len() - 1]
    }

    /// Could it have come to this?
    fn explains(&self, found: &Content) -> Result<(), String> {
        if !self.states.iter().any(|s| s.len() == found.len()) {
            let sizes: Vec<u64> = self.states.iter().map(Content::len).collect();
            return Err(format!("it has {} cells, and had {sizes:?}", found.len()));
        }
        // Where one of the states, or what was found, has another stamp.
        let mut edges = vec![0];
        for content in self.states.iter().chain([found]) {
            let mut at = 0;
            for run in content.runs() {
                at += run.cells;
                edges.push(at);
            }
        }
        edges.sort_unstable();
        edges.dedup();
        for at in edges.into_iter().filter(|at| *at < found.len()) {
            let stamp = |content: &Content| content.range(at, 1).runs().first().map_or(0, |run| run.stamp);
            let is = stamp(found);
            let might: Vec<u64> = self.states.iter().map(stamp).collect();
            if !might.contains(&is) {
                return Err(format!("cell {at} is {is:#x}, and was {might:x?}"));
            }
        }
        Ok(())
    }
}

impl Owner {
    /// One that has nothing yet.
    #[must_use]
    pub fn new(id: u64) -> Arc<Self> {
        Arc::new(Self {
            id,
            log: Mutex::new(Log {
                files: Vec::new(),
                names: vec![[None; NAMES]],
                stamp: 0,
            }),
        })
    }

    fn name(&self, n: usize) -> String {
        format!("own{}-{n}", self.id)
    }

    fn owns(&self, stamp: u64) -> bool {
        stamp == 0 || stamp >> 32 == self.id
    }

    fn stamp(&self) -> u64 {
        let mut log = self.log.lock();
        log.stamp += 1;
        (self.id << 32) | log.stamp
    }

    /// Does things with its files until `calls` are done, or one fails.
    pub fn play(&self, mount: &Mounted, all: &[Arc<Self>], calls: u32, pace: Pace) {
        let task = Task::new(mount, self.id as u32);
        for _ in 0..calls {
            if once_in(5) {
                wait(pace.pause());
            }
            let done = if once_in(6) {
                all[below(all.len() as u64) as usize].look(&task, pace)
            } else {
                self.act(&task, below(NAMES as u64) as usize)
            };
            if let Err(error) = done {
                rt::sim::note(&format!("owner {}: error {error}, it does no more", self.id));
                return;
            }
        }
    }

    /// Somebody reads one of its files: nothing but its own may be there.
    fn look(&self, task: &Task, pace: Pace) -> Sys<()> {
        let name = self.name(below(NAMES as u64) as usize);
        let file = match task.open(&name, libc::O_RDONLY) {
            Err(libc::ENOENT) => return Ok(()),
            other => other?,
        };
        self.belongs(&name, task.read(&file, 0, ALL * CELL as usize)?);
        if once_in(3) {
            // It may lose its name meanwhile, and lives while it is open.
            wait(pace.pause() * 3);
            match task.read(&file, 0, ALL * CELL as usize) {
                Err(error @ (libc::ESTALE | libc::ENOENT)) => {
                    rt::sim::fail(format!("{name} is open, and gone: error {error}"));
                }
                bytes => self.belongs(&name, bytes?),
            }
        }
        task.close(file)
    }

    /// It is what one of its names has named.
    fn belongs(&self, name: &str, bytes: Vec<u8>) {
        match Content::parse(&bytes) {
            Ok(content) if content.runs().iter().all(|run| self.owns(run.stamp)) => {}
            other => rt::sim::fail(format!("{name} has what is not its owner's: {other:x?}")),
        }
    }

    fn act(&self, task: &Task, n: usize) -> Sys<()> {
        let names = *self.log.lock().names.last().expect("there is always one");
        let Some(number) = names[n] else {
            return self.create(task, n, names);
        };
        match below(16) {
            0 => self.unlink(task, n, names),
            1 => self.rename(task, n, below(NAMES as u64) as usize, names),
            2 => {
                task.fsync_dir()?;
                rt::sim::note(&format!("owner {}: names durable {names:?}", self.id));
                self.log.lock().names = vec![names];
                Ok(())
            }
            _ => {
                let file = task.open(&self.name(n), libc::O_RDWR)?;
                let done = if once_in(5) {
                    self.compare(task, &file, number)
                } else {
                    self.change(task, &file, number)
                };
                task.close(file)?;
                done
            }
        }
    }

    /// Nobody else changes it: it has what was written, and nothing else.
    fn compare(&self, task: &Task, file: &File, number: usize) -> Sys<()> {
        let bytes = task.read(file, 0, ALL * CELL as usize)?;
        let should = self.log.lock().files[number].now().clone();
        match Content::parse(&bytes) {
            Ok(found) if found == should => {}
            found => rt::sim::fail(format!(
                "file {number} of owner {} has {found:x?}, and should have {should:x?}",
                self.id
            )),
        }
        Ok(())
    }

    fn create(&self, task: &Task, n: usize, mut names: Names) -> Sys<()> {
        {
            let mut log = self.log.lock();
            names[n] = Some(log.files.len());
            log.files.push(Past {
                states: vec![Content::default()],
            });
            log.names.push(names);
        }
        rt::sim::note(&format!("owner {}: create {n}: {:?}", self.id, names[n]));
        task.close(task.create(&self.name(n))?)
    }

    fn unlink(&self, task: &Task, n: usize, mut names: Names) -> Sys<()> {
        names[n] = None;
        self.log.lock().names.push(names);
        rt::sim::note(&format!("owner {}: unlink {n}", self.id));
        task.unlink(&self.name(n))
    }

    fn rename(&self, task: &Task, from: usize, to: usize, mut names: Names) -> Sys<()> {
        if from != to {
            names[to] = names[from].take();
            self.log.lock().names.push(names);
        }
        rt::sim::note(&format!("owner {}: rename {from} {to}", self.id));
        task.rename(&self.name(from), &self.name(to))
    }

    /// Changes a file a few times, and makes it durable or not.
    fn change(&self, task: &Task, file: &File, number: usize) -> Sys<()> {
        for _ in 0..1 + below(3) {
            let mut next = self.log.lock().files[number].now().clone();
            if once_in(8) {
                let cells = one_of(&PLACES);
                next.truncate(cells);
                self.log.lock().files[number].states.push(next);
                rt::sim::note(&format!("owner {}: truncate #{number} {cells}", self.id));
                task.truncate(file, cells * CELL)?;
                continue;
            }
            let (stamp, cells, append) = (self.stamp(), one_of(&LENGTHS), once_in(4) && next.len() < 50_000);
            let from = if append { next.len() } else { one_of(&PLACES) };
            next.write(from, cells, stamp);
            self.log.lock().files[number].states.push(next);
            rt::sim::note(&format!(
                "owner {}: write #{number} {from} {cells} {stamp:#x}",
                self.id
            ));
            task.write(file, from * CELL, &Content::bytes(cells, stamp), append)?;
        }
        if once_in(2) {
            task.fsync(file)?;
            self.settle_file(number);
            rt::sim::note(&format!("owner {}: #{number} durable", self.id));
        }
        Ok(())
    }

    fn settle_file(&self, number: usize) {
        let past = &mut self.log.lock().files[number];
        past.states = vec![past.now().clone()];
    }

    /// Its mount has left in order: what it has done to names is durable.
    pub fn settle_names(&self) {
        let mut log = self.log.lock();
        log.names = vec![*log.names.last().expect("there is always one")];
    }

    /// The servers have stopped in order as well.
    pub fn settle(&self) {
        self.settle_names();
        for past in &mut self.log.lock().files {
            past.states = vec![past.now().clone()];
        }
    }

    /// Looks at what is there now, which is what everything goes on from. `durable`: it has come from disks.
    pub fn check(&self, task: &Task, durable: bool) {
        let mut found: Names = [None; NAMES];
        let first = if durable { 0 } else { self.log.lock().files.len() };
        let mut files: Vec<Past> = Vec::new();
        for n in 0..NAMES {
            let Some(content) = self.found(task, n) else {
                if let Some(lost) = self.always(n) {
                    rt::sim::fail(format!("{} is gone: it was file {lost}", self.name(n)));
                }
                continue;
            };
            let log = self.log.lock();
            let mut why = Vec::new();
            let (mut explained, mut states) = (false, Vec::new());
            for names in &log.names {
                let Some(number) = names[n] else { continue };
                match log.files[number].explains(&content) {
                    Ok(()) => {
                        explained = true;
                        states.extend(log.files[number].states.iter().cloned());
                    }
                    Err(because) => why.push(format!("file {number}: {because}")),
                }
            }
            drop(log);
            if !explained {
                why.dedup();
                rt::sim::fail(format!("{} has lost something: {why:#?}", self.name(n)));
            }
            found[n] = Some(first + files.len());
            // What is in memory only may go back to what it was before.
            states.dedup();
            states.retain(|_| !durable);
            states.push(content);
            files.push(Past { states });
        }
        let mut log = self.log.lock();
        if durable {
            log.files.clear();
            log.names.clear();
        }
        log.files.extend(files);
        log.names.push(found);
    }

    /// The file that a name has had all the time since it was made durable.
    fn always(&self, n: usize) -> Option<usize> {
        let log = self.log.lock();
        let first = log.names[0][n]?;
        log.names.iter().all(|names| names[n].is_some()).then_some(first)
    }

    /// What its names name, when nobody changes anything.
    pub fn contents(&self, task: &Task) -> Vec<Option<Content>> {
        (0..NAMES).map(|n| self.found(task, n)).collect()
    }

    fn found(&self, task: &Task, n: usize) -> Option<Content> {
        let name = self.name(n);
        let open = task.open(&name, libc::O_RDONLY);
        let file = match open {
            Err(libc::ENOENT) => return None,
            Err(error) => {
                rt::sim::fail(format!("{name} cannot be opened: error {error}"));
                return None;
            }
            Ok(file) => file,
        };
        let content = task
            .read(&file, 0, ALL * CELL as usize)
            .map_err(|error| format!("error {error}"))
            .and_then(|bytes| Content::parse(&bytes));
        let _ = task.close(file);
        content
            .inspect_err(|why| rt::sim::fail(format!("{name} cannot be read: {why}")))
            .ok()
    }
}
