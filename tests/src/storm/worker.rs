//! The tasks of a mount, through all its lives.

use std::fs::File;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use anyhow::{Context, anyhow};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::board::{Board, Count, Phase};
use super::life::{Life, Step, Stop, Task, device_at, wrong};
use super::locks::{self, Shared};
use super::{CELLS, FILES, FILES_EACH, LOGS, NAMES_EACH, TASKS, TASKS_EACH, cells, logs, names};

/// Pause while something is awaited.
const PAUSE: Duration = Duration::from_millis(10);

/// What a task keeps through all lives of its mount.
#[derive(Debug)]
struct Kept {
    names: Vec<names::Own>,
    rng: StdRng,
}

/// What a task has opened in a life.
struct Opened {
    own: Vec<File>,
    logs: Vec<File>,
    /// Of others, to read.
    read: Vec<Option<File>>,
}

/// Why a life is not worked in any more.
enum End {
    Dead,
    Over,
}

/// The tasks of one mount.
struct Worker<'a> {
    mount: usize,
    point: &'a Path,
    board: &'a Board,
    kept: Vec<Mutex<Kept>>,
}

/// Works on a mount until the storm is over.
///
/// # Errors
/// The board cannot be opened.
pub fn run(mount: usize, point: &Path, board: &Path, seed: u64) -> anyhow::Result<()> {
    let board = Board::open(board).context("the board")?;
    let kept = (0..TASKS_EACH).map(|t| {
        Mutex::new(Kept {
            names: vec![names::Own::default(); NAMES_EACH],
            rng: StdRng::seed_from_u64(seed ^ (mount * TASKS_EACH + t) as u64),
        })
    });
    let worker = Worker {
        mount,
        point,
        board: &board,
        kept: kept.collect(),
    };
    // Kept open, or its device's number could be given to the next.
    let mut before: Option<Life> = None;
    loop {
        let fault = worker.fault_over();
        let Some(life) = Life::begin(point, before.as_ref()) else {
            std::thread::sleep(PAUSE);
            continue;
        };
        match worker.live(&life, fault)? {
            End::Dead => before = Some(life),
            End::Over => return Ok(()),
        }
    }
}

impl Worker<'_> {
    /// Waits until nothing is being done to the mount; how many faults there were.
    fn fault_over(&self) -> u64 {
        loop {
            let begun = self.board.begun(self.mount).load(SeqCst);
            if self.board.done(self.mount).load(SeqCst) >= begun {
                return begun;
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn task<'a>(&'a self, life: &'a Life, n: usize, rng: StdRng) -> Task<'a> {
        Task {
            board: self.board,
            life,
            number: self.mount * TASKS_EACH + n,
            rng,
        }
    }

    /// Works in a life until it has ended.
    fn live(&self, life: &Life, fault: u64) -> anyhow::Result<End> {
        let Some((opened, shared)) = self.begin(life) else {
            return Ok(End::Dead);
        };
        self.board.reborn(self.mount).store(fault, SeqCst);
        self.board.settled(self.mount).store(fault, SeqCst);
        self.board.add(Count::Lives, 1);
        let opened: Vec<Mutex<Opened>> = opened.into_iter().map(Mutex::new).collect();
        loop {
            self.work(life, &opened, &shared)?;
            while self.board.wrong().load(SeqCst) > 0 {
                std::thread::sleep(PAUSE);
            }
            if self.board.phase() != Phase::Work {
                self.finish(life);
                return Ok(End::Over);
            }
            let settled = self.board.settled(self.mount).load(SeqCst);
            let fault = self.fault_over();
            if fault == settled {
                // It has ended, and this was told already: a life begins anew, and its tasks are in danger until then.
                let own = self.board.begin(self.mount, true);
                self.board.done(self.mount).fetch_max(own, SeqCst);
                return Ok(End::Dead);
            }
            if life.over() || self.board.deadly(self.mount).load(SeqCst) > settled || !self.lives_on(life) {
                return Ok(End::Dead);
            }
            self.board.settled(self.mount).store(fault, SeqCst);
        }
    }

    /// Looks at what the former life has left, for all tasks, one after the other; again where a call fails.
    fn begin(&self, life: &Life) -> Option<(Vec<Opened>, Shared)> {
        loop {
            let mut all = Vec::new();
            let mut shared = None;
            let mut stop = None;
            for n in 0..TASKS_EACH {
                let mut kept = self.kept[n].lock().ok()?;
                let task = self.task(life, n, kept.rng.clone());
                match self.begin_task(&task, &mut kept) {
                    Ok(opened) => all.push(opened),
                    Err(why) => stop = Some(why),
                }
                if stop.is_none() && shared.is_none() {
                    match Shared::open(&task) {
                        Ok(opened) => shared = Some(opened),
                        Err(why) => stop = Some(why),
                    }
                }
            }
            match (stop, shared) {
                (None, Some(shared)) => return Some((all, shared)),
                (Some(Stop::Over), _) => return None,
                // It is another one by now, or it ends.
                _ if life.replaced() => return None,
                _ => std::thread::sleep(PAUSE),
            }
        }
    }

    fn begin_task(&self, task: &Task<'_>, kept: &mut Kept) -> Step<Opened> {
        task.call("mkdir", &[libc::EEXIST], || {
            let mode = rustix::fs::Mode::from_raw_mode(0o755);
            Ok(rustix::fs::mkdirat(task.life.dir(), names::DIR, mode)?)
        })
        .map(drop)?;
        let mut opened = Opened {
            own: Vec::new(),
            logs: Vec::new(),
            read: (0..FILES).map(|_| None).collect(),
        };
        for file in 0..FILES_EACH {
            opened
                .own
                .push(cells::recover(task, task.number * FILES_EACH + file)?);
        }
        for log in 0..LOGS {
            opened.logs.push(logs::recover(task, log)?);
        }
        for (n, own) in kept.names.iter_mut().enumerate() {
            names::resolve(task, n, own)?;
        }
        task.must("fsync of the root", || {
            task.life
                .open(".", libc::O_RDONLY | libc::O_DIRECTORY)?
                .sync_all()
        })?;
        Ok(opened)
    }

    /// Whether a life has outlived what was done to it: a durable change is accepted of who is alive only.
    fn lives_on(&self, life: &Life) -> bool {
        loop {
            let task = self.task(life, 0, StdRng::seed_from_u64(0));
            let name = format!("alive{}", self.mount);
            let proof = || -> std::io::Result<()> {
                let file = life.open(&name, libc::O_RDWR | libc::O_CREAT)?;
                rustix::io::pwrite(&file, &super::now().to_le_bytes(), 0)?;
                file.sync_all()?;
                drop(file);
                Ok(rustix::fs::unlinkat(
                    life.dir(),
                    &name,
                    rustix::fs::AtFlags::empty(),
                )?)
            };
            match task.must("proof of life", proof) {
                Ok(()) => return true,
                Err(Stop::Over) => return false,
                Err(Stop::Failed(_)) if life.replaced() => return false,
                Err(Stop::Failed(_)) => {}
            }
        }
    }

    /// All tasks at once, until they are to pause.
    fn work(&self, life: &Life, opened: &[Mutex<Opened>], shared: &Shared) -> anyhow::Result<()> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..TASKS_EACH)
                .map(|n| {
                    scope.spawn(move || {
                        let (Ok(mut kept), Ok(mut opened)) = (self.kept[n].lock(), opened[n].lock()) else {
                            return;
                        };
                        let mut task = self.task(life, n, kept.rng.clone());
                        while !task.to_pause() {
                            // What failed is told, or may fail; the task goes on, or pauses.
                            let _ = step(&mut task, &mut kept.names, &mut opened, shared);
                        }
                        kept.rng = task.rng;
                    })
                })
                .collect();
            // All are waited for, whatever came of the first.
            let ended: Vec<_> = threads.into_iter().map(|t| t.join()).collect();
            let panicked = ended.iter().any(Result::is_err);
            if panicked {
                Err(anyhow!("a task has panicked"))
            } else {
                Ok(())
            }
        })
    }

    /// When all have stopped each mount looks at everything.
    fn finish(&self, life: &Life) {
        self.board.looked().fetch_add(1, SeqCst);
        while self.board.phase() < Phase::Look {
            std::thread::sleep(PAUSE);
        }
        let task = self.task(life, 0, StdRng::seed_from_u64(0));
        match look_at_all(&task) {
            Ok(digest) => self.board.digest(self.mount).store(digest, SeqCst),
            Err(stop) => wrong(
                self.board,
                &format!("mount {} cannot be looked at: {stop:?}", self.mount),
            ),
        }
        self.board.looked().fetch_add(1, SeqCst);
        while self.board.phase() < Phase::End && device_at(self.point).is_some() {
            std::thread::sleep(PAUSE);
        }
    }
}

fn step(task: &mut Task<'_>, own: &mut [names::Own], opened: &mut Opened, shared: &Shared) -> Step<()> {
    let n = task.rng.random_range(0..FILES_EACH);
    let file = task.number * FILES_EACH + n;
    let log = task.rng.random_range(0..LOGS);
    match task.rng.random_range(0..100) {
        0..25 => {
            let range = cells::some(task, file);
            let durable = task.rng.random_range(0..10) == 0;
            let number = cells::next(task.board, file);
            cells::write(task, &opened.own[n], file, range, number, durable)
        }
        25..32 => cells::sync(task, &opened.own[n], file),
        32..35 => {
            let name = cells::name(file);
            opened.own[n] = task.must("open of cells", || task.life.open(&name, libc::O_RDWR))?;
            Ok(())
        }
        35..60 => read_one(task, opened),
        60..72 => {
            let name = task.rng.random_range(0..NAMES_EACH);
            names::change(task, name, &mut own[name])
        }
        72..80 => {
            let (of, name) = (
                task.rng.random_range(0..TASKS),
                task.rng.random_range(0..NAMES_EACH),
            );
            names::look(task, of, name)
        }
        80..82 => names::list(task),
        82..88 => logs::append(task, &mut opened.logs[log], log),
        88..90 => logs::sync(task, &opened.logs[log], log),
        90..91 => logs::look(task, log),
        _ => locks::turn(task, shared),
    }
}

/// Reads some cells of any file.
fn read_one(task: &mut Task<'_>, opened: &mut Opened) -> Step<()> {
    let file = task.rng.random_range(0..FILES);
    // It may not have been made yet.
    if cells::owner(file).is_some_and(|m| task.board.settled(m).load(SeqCst) == 0) {
        return Ok(());
    }
    let range = cells::some(task, file);
    if opened.read[file].is_none() || task.rng.random_range(0..3) == 0 {
        let name = cells::name(file);
        opened.read[file] = Some(task.must("open of cells", || task.life.open(&name, libc::O_RDONLY))?);
    }
    if let Some(handle) = &opened.read[file] {
        cells::look(task, handle, file, range)?;
    }
    Ok(())
}

/// Everything, compared with what was acknowledged; a number that is the same for all who see the same.
fn look_at_all(task: &Task<'_>) -> Step<u64> {
    let mut digest = 0u64;
    let mut take = |n: u64| digest = (digest ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17);
    for file in 0..FILES {
        let name = cells::name(file);
        let handle = task.must("open of cells", || task.life.open(&name, libc::O_RDONLY))?;
        let all = cells::count(file);
        for half in [0..all / 2, all / 2..all] {
            cells::look(task, &handle, file, half)?
                .into_iter()
                .for_each(&mut take);
        }
        take(task.must("fstat", || handle.metadata())?.len());
    }
    debug_assert!(CELLS.is_multiple_of(2), "halves");
    for log in 0..LOGS {
        logs::look(task, log)?;
        let name = logs::name(log);
        let handle = task.must("open of a log", || task.life.open(&name, libc::O_RDONLY))?;
        take(task.must("fstat", || handle.metadata())?.len());
    }
    for (of, name) in (0..TASKS).flat_map(|t| (0..NAMES_EACH).map(move |n| (t, n))) {
        names::look(task, of, name)?;
    }
    names::list(task)?;
    Ok(digest.max(1))
}
