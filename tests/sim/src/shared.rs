//! Tasks of all mounts on the same few files: whatever they see must be what one machine could have shown (linearizability).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use rt::sync::Mutex;
use system_tests::linear::{Event, check};

use crate::chance::{below, once_in, one_of, wait};
use crate::content::{CELL, Content};
use crate::model::{Directory, Op, State};
use crate::owned::Pace;
use crate::task::{File, Mounted, Sys, Task};

/// Names that the tasks use: few, so that they meet.
pub const NAMES: [&str; 3] = ["a", "b", "c"];
/// Cells at which writes begin: within a page, across pages, across blocks, far out.
const PLACES: [u64; 8] = [0, 3, 511, 512, 1020, 32_767, 32_768, 70_000];
/// How long writes are.
const LENGTHS: [u64; 5] = [1, 2, 8, 600, 5000];
/// No call may take longer.
const LONGEST: Duration = Duration::from_secs(60);

/// What the tasks of one phase share.
pub struct Shared {
    clock: AtomicU64,
    handles: AtomicU32,
    stamps: AtomicU64,
    seen: Mutex<Seen>,
    /// A change of names was given up that may still be made, under nobody's lease: what is known of names then counts for nothing.
    given_up: AtomicBool,
    /// What may come over the phase.
    bears: Bears,
    /// What there was when it began.
    start: State,
}

/// What is known of calls. A task that dies leaves its call in one of both, for which they are behind one mutex.
#[derive(Default)]
struct Seen {
    history: Vec<Event<Op>>,
    /// By task: what the call does that it is in. It may have been done though its mount died in it.
    under_way: BTreeMap<u32, Vec<Event<Op>>>,
}

/// What may come over a phase.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bears {
    /// A storage node dies, or does not answer: what is under way may be an I/O error.
    pub storage: bool,
    /// For so long somebody may be away whom calls wait for.
    pub away: Duration,
    /// That may be a server, for longer than a call waits for a lease.
    pub late: bool,
    /// A mount dies: what that has changed of names, and nobody else has seen, may come to nothing. It may not have told the metadata server
    /// yet; or the host of that dies with it.
    pub forgets: bool,
}

/// What a task is to do.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Its number.
    pub id: u32,
    /// Calls.
    pub calls: u32,
    /// Its mount dies, or may be declared dead: it changes nothing that goes with it.
    pub doomed: bool,
    /// How long it pauses.
    pub pace: Pace,
}

/// A task in its phase.
struct Player<'a> {
    task: Task,
    shared: &'a Shared,
    open: Vec<(u32, File)>,
    id: u32,
    doomed: bool,
}

fn cells(bytes: u64) -> u64 {
    bytes / CELL
}

impl Shared {
    /// A phase that begins with these files.
    #[must_use]
    pub fn new(files: &[(usize, Content)], first_stamp: u64, bears: Bears) -> Arc<Self> {
        Arc::new(Self {
            bears,
            clock: AtomicU64::new(0),
            handles: AtomicU32::new(1),
            stamps: AtomicU64::new(first_stamp),
            seen: Mutex::default(),
            given_up: AtomicBool::new(false),
            start: State::with(files),
        })
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    /// The next stamp.
    #[must_use]
    pub fn stamp(&self) -> u64 {
        self.stamps.fetch_add(1, Ordering::Relaxed)
    }

    /// Calls so far.
    #[must_use]
    pub fn calls(&self) -> usize {
        self.seen.lock().history.len()
    }

    /// Plays a task's part, until its mount's life ends.
    pub fn play(&self, mount: &Mounted, part: Part) {
        let mut player = Player::new(self, mount, part.id);
        player.doomed = part.doomed;
        for _ in 0..part.calls {
            match part.pace {
                Pace::Fast if once_in(8) => wait(Duration::from_millis(2)),
                Pace::Slow if once_in(2) => wait(part.pace.pause()),
                _ => {}
            }
            player.call();
            if player.task.is_over() {
                return;
            }
        }
        while let Some((number, file)) = player.open.pop() {
            player.close(number, file);
            if player.task.is_over() {
                return;
            }
        }
    }

    /// What there is, when nobody changes anything.
    #[must_use]
    pub fn look(mount: &Mounted) -> Vec<(usize, Content)> {
        let shared = Self::new(&[], 0, Bears::default());
        let files = shared.files(mount);
        shared.seen.lock().history.clear();
        files
    }

    fn files(&self, mount: &Mounted) -> Vec<(usize, Content)> {
        let mut player = Player::new(self, mount, 99);
        let mut files = Vec::new();
        for name in player.list() {
            player.open(name, false);
            if let Some((number, file)) = player.open.pop() {
                let content = player.read(number, &file, 0, 200_000);
                player.close(number, file);
                files.push((name, content));
            }
        }
        files
    }

    /// Was a change of names given up that may still be made?
    #[must_use]
    pub fn has_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    /// Looks at everything, when nobody changes anything, and checks what all have seen. What there is now.
    pub fn settle(&self, mount: &Mounted) -> Vec<(usize, Content)> {
        let files = self.files(mount);
        // A mount that dies in the next phase must not be the only one to know what the metadata server's host has forgotten in this.
        if let Err(error) = Task::new(mount, 99).fsync_dir() {
            rt::sim::fail(format!("names cannot be made durable: error {error}"));
        }
        let Seen {
            mut history,
            under_way,
        } = std::mem::take(&mut *self.seen.lock());
        history.extend(under_way.into_values().flatten());
        if let Err(index) = check(&Directory(self.start.clone()), &history) {
            rt::sim::fail(format!(
                "no single machine could have shown this; stuck at {:?}\nfrom {:?}\n{}",
                history.get(index),
                self.start,
                tell(&history)
            ));
        }
        files
    }
}

fn changes_names(op: &Op) -> bool {
    matches!(op, Op::Create(..) | Op::Unlink(..) | Op::Rename(..))
}

/// A history, a line for each call.
fn tell(history: &[Event<Op>]) -> String {
    let mut order: Vec<&Event<Op>> = history.iter().collect();
    order.sort_by_key(|e| e.called);
    let line = |e: &&Event<Op>| {
        format!(
            "  {:>4} - {:>4} {:?}\n",
            e.called,
            e.returned.unwrap_or(9999),
            e.op
        )
    };
    order.iter().map(line).collect()
}

impl<'a> Player<'a> {
    fn new(shared: &'a Shared, mount: &Mounted, id: u32) -> Self {
        Self {
            task: Task::new(mount, id),
            shared,
            open: Vec::new(),
            id,
            doomed: false,
        }
    }

    /// Does something and writes down what came of it, as what happened at some moments within the call; what must not be ends
    /// the simulation. `unknown` is what a call does that ends with an I/O error because a storage node died in the middle of it:
    /// perhaps it took effect, perhaps not, or later.
    fn record_all<T>(
        &self,
        call: impl FnOnce(&Task) -> Sys<T>,
        unknown: Vec<Op>,
        ops: impl FnOnce(&Sys<T>) -> Vec<Op>,
    ) -> Sys<T> {
        let (called, began) = (self.shared.tick(), rt::sim::elapsed());
        let may_be = unknown.iter().map(|op| Event {
            op: op.clone(),
            called,
            returned: None,
        });
        let may_be = may_be.collect();
        self.shared.seen.lock().under_way.insert(self.id, may_be);
        let result = call(&self.task);
        let mut seen = self.shared.seen.lock();
        seen.under_way.remove(&self.id);
        let took = rt::sim::elapsed() - began;
        let mut returned = Some(self.shared.tick());
        let mut ops = ops(&result);
        if result.as_ref().is_err_and(|error| self.may_fail(*error)) {
            returned = None;
            ops = unknown;
            let late = matches!(result, Err(libc::ETIMEDOUT)) && !self.task.is_over();
            if late && ops.iter().any(changes_names) {
                self.shared.given_up.store(true, Ordering::Relaxed);
            }
        } else if ops.is_empty() {
            rt::sim::fail(format!("task {}: error {:?}", self.id, result.as_ref().err()));
        }
        rt::sim::note(&format!("task {} {called} - {returned:?}: {ops:?}", self.id));
        if took > LONGEST + self.shared.bears.away {
            rt::sim::fail(format!("task {}: a call took {took:?}: {ops:?}", self.id));
        }
        if self.doomed && self.shared.bears.forgets {
            // What it sees is its own, and may go with it.
            ops.retain(|op| changes_names(op) && result.is_ok());
            returned = None;
        }
        let events = ops.into_iter().map(|op| Event { op, called, returned });
        seen.history.extend(events);
        result
    }

    /// May a call end so because of what has come over the phase?
    fn may_fail(&self, error: i32) -> bool {
        let bears = &self.shared.bears;
        let cut_off = self.doomed && !bears.away.is_zero();
        self.task.is_over()
            || (bears.storage && error == libc::EIO)
            || ((bears.late || cut_off) && error == libc::ETIMEDOUT)
            // It is dead, and hears that from a storage node first.
            || (cut_off && error == libc::EIO)
    }

    fn record<T>(
        &self,
        call: impl FnOnce(&Task) -> Sys<T>,
        op: impl FnOnce(&Sys<T>) -> Option<Op>,
    ) -> Sys<T> {
        self.record_all(call, Vec::new(), |result| op(result).into_iter().collect())
    }

    /// A change that is made, or not made.
    fn change<T>(
        &self,
        call: impl FnOnce(&Task) -> Sys<T>,
        op: Op,
        done: impl FnOnce(&Sys<T>) -> Option<Op>,
    ) -> Sys<T> {
        self.record_all(call, vec![op], |result| done(result).into_iter().collect())
    }

    /// Does a storage node not answer for so long that calls fail?
    fn fails(&self) -> bool {
        self.shared.bears.storage && self.shared.bears.late
    }

    /// Does it leave names alone, because they might go with its mount? All that it sees is checked then.
    fn keeps_names(&self) -> bool {
        self.doomed && !self.shared.bears.forgets
    }

    fn call(&mut self) {
        let name = below(NAMES.len() as u64) as usize;
        if self.open.is_empty() || (self.open.len() < 3 && once_in(4)) {
            return match below(3) {
                0 if !self.keeps_names() => self.create(name),
                _ => self.open(name, once_in(6) && !self.doomed && !self.fails()),
            };
        }
        let slot = below(self.open.len() as u64) as usize;
        match below(20) {
            0..=6 | 12 if self.doomed => drop(self.list()),
            // A truncation that fails may have cut off a part of what it should.
            12 if self.fails() => drop(self.list()),
            0..=4 => self.write(slot),
            5..=6 => self.append(slot),
            7..=11 => {
                let (number, file) = &self.open[slot];
                let _ = self.read(*number, file, one_of(&PLACES), one_of(&LENGTHS));
            }
            12 => self.truncate(slot),
            13 => self.fstat(slot),
            14 => self.stat(name),
            15 | 16 if self.keeps_names() => drop(self.list()),
            15 => self.unlink(name),
            16 => self.rename(name, below(NAMES.len() as u64) as usize),
            // What is durable nobody forgets.
            17 if self.shared.bears.forgets => drop(self.list()),
            17 => self.fsync(slot),
            18 => drop(self.list()),
            _ => {
                let (number, file) = self.open.swap_remove(slot);
                self.close(number, file);
            }
        }
    }

    fn handle(&self) -> u32 {
        self.shared.handles.fetch_add(1, Ordering::Relaxed)
    }

    fn opened(&mut self, number: u32, file: Sys<File>) {
        if let Ok(file) = file {
            self.open.push((number, file));
        }
    }

    fn create(&mut self, name: usize) {
        let number = self.handle();
        let op = |r: &Sys<File>| Op::Create(name, r.as_ref().map(|_| number).map_err(|e| *e));
        let made = self.change(
            |t| t.create(NAMES[name]),
            Op::Create(name, Ok(number)),
            |r| Some(op(r)),
        );
        self.opened(number, made);
    }

    fn open(&mut self, name: usize, truncates: bool) {
        let number = self.handle();
        // It may have been cut off before the call came to nothing.
        let cut = vec![Op::Open(name, Ok(number)), Op::Truncate(number, 0)];
        let flags = libc::O_RDWR | if truncates { libc::O_TRUNC } else { 0 };
        let found = self.record_all(
            |t| t.open(NAMES[name], flags),
            if truncates { cut } else { Vec::new() },
            |r| {
                let mut ops = vec![Op::Open(name, r.as_ref().map(|_| number).map_err(|e| *e))];
                if truncates && r.is_ok() {
                    // The name is looked up first, and what it named then is cut off.
                    ops.push(Op::Truncate(number, 0));
                }
                ops
            },
        );
        self.opened(number, found);
    }

    fn close(&self, number: u32, file: File) {
        let closed = Op::Close(number);
        let _ = self.change(|t| t.close(file), closed.clone(), |r| r.is_ok().then_some(closed));
    }

    fn write(&self, slot: usize) {
        let (number, file) = &self.open[slot];
        let (from, n, stamp) = (one_of(&PLACES), one_of(&LENGTHS), self.shared.stamp());
        let op = Op::Write(*number, from, n, stamp);
        let _ = self.change(
            |t| t.write(file, from * CELL, &Content::bytes(n, stamp), false),
            op.clone(),
            |r| (*r == Ok((n * CELL) as u32)).then_some(op),
        );
    }

    fn append(&self, slot: usize) {
        let (number, file) = &self.open[slot];
        let (n, stamp) = (one_of(&LENGTHS), self.shared.stamp());
        let op = Op::Append(*number, n, stamp);
        let _ = self.change(
            |t| t.write(file, 0, &Content::bytes(n, stamp), true),
            op.clone(),
            |r| (*r == Ok((n * CELL) as u32)).then_some(op),
        );
    }

    fn read(&self, number: u32, file: &File, from: u64, n: u64) -> Content {
        let mut content = Content::default();
        let _ = self.record(
            |t| t.read(file, from * CELL, (n * CELL) as usize),
            |r| {
                content = Content::parse(r.as_ref().ok()?).ok()?;
                Some(Op::Read(number, from, n, content.clone()))
            },
        );
        content
    }

    fn truncate(&self, slot: usize) {
        let (number, file) = &self.open[slot];
        let to = one_of(&PLACES);
        let op = Op::Truncate(*number, to);
        let _ = self.change(
            |t| t.truncate(file, to * CELL),
            op.clone(),
            |r| r.is_ok().then_some(op),
        );
    }

    fn fstat(&self, slot: usize) {
        let (number, file) = &self.open[slot];
        let _ = self.record(
            |t| t.fstat(file),
            |r| {
                r.as_ref()
                    .ok()
                    .map(|(size, links)| Op::Fstat(*number, cells(*size), *links))
            },
        );
    }

    fn stat(&self, name: usize) {
        let number = self.handle();
        let _ = self.record_all(
            |t| t.stat(NAMES[name]),
            Vec::new(),
            |r| match r {
                // The name is looked up first, and then the attributes of what it named.
                Ok(size) => vec![
                    Op::Open(name, Ok(number)),
                    Op::Size(number, cells(*size)),
                    Op::Close(number),
                ],
                Err(e) => vec![Op::Stat(name, *e)],
            },
        );
    }

    fn unlink(&self, name: usize) {
        let op = |r: &Sys<()>| Op::Unlink(name, *r);
        let _ = self.change(|t| t.unlink(NAMES[name]), op(&Ok(())), |r| Some(op(r)));
    }

    fn rename(&self, from: usize, to: usize) {
        let op = |r: &Sys<()>| Op::Rename(from, to, *r);
        let _ = self.change(|t| t.rename(NAMES[from], NAMES[to]), op(&Ok(())), |r| Some(op(r)));
    }

    fn fsync(&self, slot: usize) {
        let (_, file) = &self.open[slot];
        // It changes nothing that anybody sees.
        let done = self.task.fsync(file);
        if let Err(error) = done
            && !self.may_fail(error)
        {
            rt::sim::fail(format!("task {}: fsync: error {error}", self.id));
        }
    }

    fn list(&self) -> Vec<usize> {
        let mut names = Vec::new();
        let _ = self.record_all(Task::names, Vec::new(), |r| {
            let Ok(listed) = r else { return Vec::new() };
            let there = |name: usize| listed.iter().any(|n| n == NAMES[name]);
            names = (0..NAMES.len()).filter(|name| there(*name)).collect();
            (0..NAMES.len()).map(|name| Op::Has(name, there(name))).collect()
        });
        names
    }
}
