//! Names that are made, moved and removed, in one directory that all use.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::SeqCst;

use rand::Rng;
use rustix::fs::AtFlags;

use super::NAMES_EACH;
use super::board::Count;
use super::life::{Step, Task};
use crate::sys;

/// The directory.
pub const DIR: &str = "names";
/// Bytes of a file.
const LEN: usize = 64;

/// Where a file is: the number of its contents, and under which of its two names, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// Which contents; each file that is made has its own.
    pub made: u64,
    /// The name.
    pub place: Option<usize>,
}

impl State {
    fn word(self) -> u64 {
        self.made << 2 | self.place.map_or(0, |p| p as u64 + 1)
    }

    fn of(word: u64) -> Self {
        let place = (word & 3) as usize;
        Self {
            made: word >> 2,
            place: place.checked_sub(1),
        }
    }
}

/// What a task knows of a name of its own, in all lives of its mount.
#[derive(Debug, Clone)]
pub struct Own {
    /// What it may be after a death: since it was last made durable.
    possible: Vec<State>,
    /// A call has failed, so it has to be looked at.
    unsure: bool,
}

impl Default for Own {
    fn default() -> Self {
        Self {
            possible: vec![State { made: 0, place: None }],
            unsure: true,
        }
    }
}

fn leaf(task: usize, name: usize, place: usize) -> String {
    format!("t{task}n{name}{}", ["a", "b"][place])
}

fn path(task: usize, name: usize, place: usize) -> String {
    format!("{DIR}/{}", leaf(task, name, place))
}

fn bytes(task: usize, name: usize, made: u64) -> Vec<u8> {
    let text = format!("task {task} name {name} made {made} ");
    text.bytes().cycle().take(LEN).collect()
}

/// The contents of whatever has the name.
fn look_at(task: &Task<'_>, of: usize, name: usize, place: usize) -> Step<Option<Vec<u8>>> {
    let path = path(of, name, place);
    let opened = task.call("open of a name", &[libc::ENOENT], || {
        task.life.open(&path, libc::O_RDONLY)
    })?;
    let Ok(file) = opened else {
        return Ok(None);
    };
    Ok(Some(task.must("read of a named file", || {
        sys::read_at(&file, 0, LEN + 1)
    })?))
}

/// Compares a name of any task with what that has acknowledged.
///
/// # Errors
/// A call fails.
pub fn look(task: &Task<'_>, of: usize, name: usize) -> Step<()> {
    let words = task.board.name(of, name);
    let (before, turn) = (task.board.safe(), words.turn.load(SeqCst));
    let state = State::of(words.state.load(SeqCst));
    let found = [look_at(task, of, name, 0)?, look_at(task, of, name, 1)?];
    let owner = of / super::TASKS_EACH;
    let same = turn.is_multiple_of(2) && words.turn.load(SeqCst) == turn;
    if !same || !task.still_safe(before).is_some_and(|safe| safe[owner]) {
        return Ok(());
    }
    for (place, found) in found.iter().enumerate() {
        let right = match found {
            Some(data) => state.place == Some(place) && *data == bytes(of, name, state.made),
            None => state.place != Some(place),
        };
        if !right {
            let text = found.as_deref().map(String::from_utf8_lossy);
            task.wrong(&format!(
                "{} shows {text:?}, but is {state:?}",
                leaf(of, name, place)
            ));
        }
    }
    task.board.add(Count::Looks, 1);
    Ok(())
}

/// Lists the directory, and compares with what has not changed meanwhile.
///
/// # Errors
/// A call fails.
pub fn list(task: &Task<'_>) -> Step<()> {
    let all = || (0..super::TASKS).flat_map(|t| (0..NAMES_EACH).map(move |n| (t, n)));
    let before = task.board.safe();
    let states = || -> Vec<(u64, u64)> {
        let words = all().map(|(t, n)| task.board.name(t, n));
        words
            .map(|w| (w.turn.load(SeqCst), w.state.load(SeqCst)))
            .collect()
    };
    let first = states();
    let listed = task.must("list", || {
        let dir = rustix::fs::Dir::read_from(task.life.open(DIR, libc::O_RDONLY | libc::O_DIRECTORY)?)?;
        let mut names = std::collections::BTreeSet::new();
        for entry in dir {
            names.insert(entry?.file_name().to_string_lossy().into_owned());
        }
        Ok(names)
    })?;
    let last = states();
    let Some(safe) = task.still_safe(before) else {
        return Ok(());
    };
    for (i, (of, name)) in all().enumerate() {
        let (turn, state) = first[i];
        if first[i] != last[i] || !turn.is_multiple_of(2) || !safe[of / super::TASKS_EACH] {
            continue;
        }
        let state = State::of(state);
        for place in 0..2 {
            let leaf = leaf(of, name, place);
            if listed.contains(&leaf) != (state.place == Some(place)) {
                task.wrong(&format!(
                    "a listing and {leaf}: {}, but it is {state:?}",
                    listed.contains(&leaf)
                ));
            }
        }
    }
    task.board.add(Count::Lists, 1);
    Ok(())
}

/// Finds out what a name of this task's own is, after a death or a call that failed.
///
/// # Errors
/// A call fails.
pub fn resolve(task: &Task<'_>, name: usize, own: &mut Own) -> Step<()> {
    let words = task.board.name(task.number, name);
    let turn = words.turn.load(SeqCst) | 1;
    words.turn.store(turn, SeqCst);
    let found = [
        look_at(task, task.number, name, 0)?,
        look_at(task, task.number, name, 1)?,
    ];
    if found.iter().all(Option::is_some) {
        task.wrong(&format!("{} has both its names", leaf(task.number, name, 0)));
    }
    let place = found.iter().position(Option::is_some);
    let data = found.into_iter().flatten().next();
    let whole = |made| {
        data.as_ref()
            .is_none_or(|data| *data == bytes(task.number, name, made))
    };
    let fits = own.possible.iter().rev().filter(|s| s.place == place);
    let state = fits.clone().find(|s| whole(s.made)).copied();
    match state {
        Some(state) => words.state.store(state.word(), SeqCst),
        None => {
            // A file whose contents were not durable may have lost them.
            let (last, durable) = (fits.clone().next().copied(), own.possible[0]);
            let text = data.as_deref().map(String::from_utf8_lossy);
            let lost = data
                .as_ref()
                .is_some_and(|d| d.len() <= LEN && d.iter().all(|b| *b == 0));
            let may = lost && fits.clone().any(|s| s.made != durable.made);
            if last.is_none() || !may {
                task.wrong(&format!(
                    "{} at {place:?} shows {text:?}, which is none of {:?}",
                    leaf(task.number, name, 0),
                    own.possible
                ));
            }
            if let Some(place) = place {
                unlink(task, name, place)?;
            }
            let gone = State {
                made: words.issued.load(SeqCst),
                place: None,
            };
            own.possible.push(gone);
            words.state.store(gone.word(), SeqCst);
        }
    }
    words.turn.store(turn + 1, SeqCst);
    own.unsure = false;
    Ok(())
}

fn unlink(task: &Task<'_>, name: usize, place: usize) -> Step<()> {
    let path = path(task.number, name, place);
    task.must("unlink", || {
        Ok(rustix::fs::unlinkat(task.life.dir(), &path, AtFlags::empty())?)
    })
}

fn make(task: &Task<'_>, name: usize, made: u64) -> Step<File> {
    let path = path(task.number, name, 0);
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
    let file = task.must("create", || task.life.open(&path, flags))?;
    let data = bytes(task.number, name, made);
    task.must("write of a named file", || file.write_all_at(&data, 0))?;
    Ok(file)
}

/// Makes it, moves it, removes it, or makes it durable.
///
/// # Errors
/// A call fails: then it is unsure.
pub fn change(task: &mut Task<'_>, name: usize, own: &mut Own) -> Step<()> {
    if own.unsure {
        resolve(task, name, own)?;
    }
    let state = State::of(task.board.name(task.number, name).state.load(SeqCst));
    if task.rng.random_range(0..4) == 0 {
        return durable(task, name, state, own);
    }
    let next = match state.place {
        None => State {
            made: task.board.name(task.number, name).issued.fetch_add(1, SeqCst) + 1,
            place: Some(0),
        },
        Some(place) => State {
            place: (task.rng.random_range(0..3) != 0).then_some(1 - place),
            ..state
        },
    };
    let words = task.board.name(task.number, name);
    own.possible.push(next);
    own.unsure = true;
    let turn = words.turn.fetch_add(1, SeqCst) + 1;
    match (state.place, next.place) {
        (Some(from), Some(to)) => {
            let (from, to) = (path(task.number, name, from), path(task.number, name, to));
            let dir = task.life.dir();
            task.must("rename", || Ok(rustix::fs::renameat(dir, &from, dir, &to)?))?;
        }
        (Some(from), None) => unlink(task, name, from)?,
        _ => drop(make(task, name, next.made)?),
    }
    words.state.store(next.word(), SeqCst);
    words.turn.store(turn + 1, SeqCst);
    own.unsure = false;
    task.board.add(Count::Names, 1);
    Ok(())
}

fn durable(task: &Task<'_>, name: usize, state: State, own: &mut Own) -> Step<()> {
    if let Some(place) = state.place {
        let path = path(task.number, name, place);
        let file = task.must("open of a name", || task.life.open(&path, libc::O_RDWR))?;
        task.must("fsync of a named file", || file.sync_all())?;
    }
    let dir = task.must("open of the directory", || {
        task.life.open(DIR, libc::O_RDONLY | libc::O_DIRECTORY)
    })?;
    task.must("fsync of the directory", || dir.sync_all())?;
    own.possible = vec![state];
    task.board.add(Count::Fsyncs, 1);
    Ok(())
}
