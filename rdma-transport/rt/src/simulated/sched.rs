//! The scheduler: threads of the system, of which exactly one runs at a time; a seed says which is next.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;

use super::groups::Groups;
use super::report::{Failure, Report, Trace, who_waits};
use super::settings::Settings;
use super::task::{Baton, Killed, Outcome, Task, TaskId, Wait, Why};
use crate::chance::Chance;

/// What a point at which others may run takes.
const POINT: u64 = 40;
/// What it takes to give way.
const GIVE_WAY: u64 = 1_000;

pub(super) struct State {
    pub(super) chance: Chance,
    pub(super) entropy: Chance,
    pub(super) tasks: Vec<Task>,
    pub(super) groups: Groups,
    runnable: Vec<TaskId>,
    timers: BTreeSet<(u64, TaskId)>,
    waiting: HashMap<usize, Vec<TaskId>, BuildHasherDefault<DefaultHasher>>,
    pub(super) current: TaskId,
    pub(super) trace: Trace,
    pub(super) failure: Option<Failure>,
    pub(super) threads: Vec<std::thread::JoinHandle<()>>,
    living: Living,
}

/// Threads that have not ended, and who is told when there is none.
struct Living {
    count: usize,
    over: Option<std::sync::mpsc::Sender<()>>,
}

/// One simulation.
pub(super) struct Core {
    pub(super) settings: Settings,
    pub(super) state: Mutex<State>,
    /// Virtual nanoseconds since the beginning. These three are changed only by the thread that runs.
    now: AtomicU64,
    next_timer: AtomicU64,
    /// Points left before another thread gets its turn.
    patience: AtomicU32,
}

/// A thread of a simulation.
#[derive(Clone)]
pub(super) struct Me {
    pub(super) core: Arc<Core>,
    pub(super) id: TaskId,
    /// By how many parts of a million its clock is too fast.
    pub(super) rate: i64,
}

thread_local! {
    static ME: RefCell<Option<Me>> = const { RefCell::new(None) };
}

/// The calling thread, if it belongs to a simulation.
#[inline]
pub(super) fn me() -> Option<Me> {
    ME.try_with(|me| me.borrow().clone()).ok().flatten()
}

#[inline]
pub(super) fn simulated() -> bool {
    ME.try_with(|me| me.borrow().is_some()).unwrap_or(false)
}

fn with_core<R>(f: impl FnOnce(&Core, TaskId) -> R) -> Option<R> {
    ME.try_with(|me| me.borrow().as_ref().map(|me| f(&me.core, me.id)))
        .ok()
        .flatten()
}

pub(super) fn become_task(me: Option<Me>) {
    ME.with(|slot| *slot.borrow_mut() = me);
}

/// A point at which another thread may get its turn; false outside of simulations.
#[inline]
pub(super) fn point() -> bool {
    let Some(over) = with_core(|core, _| core.tick(POINT)) else {
        return false;
    };
    if over && let Some(me) = me() {
        me.yield_now();
    }
    true
}

/// As [`point`], and others are let run if there are any.
pub(super) fn give_way() -> bool {
    let Some(me) = me() else { return false };
    me.core.tick(GIVE_WAY);
    me.yield_now();
    true
}

/// Whoever waits at an address may look again: all of them, or one.
#[inline]
pub(super) fn wake(address: usize, all: bool) {
    with_core(|core, _| core.state.lock().wake(address, all));
}

/// Waits to be woken at one of the addresses; `None` outside of simulations. `released` is called when nothing can be
/// missed any more.
pub(super) fn block(
    why: Why,
    on: [usize; 2],
    until: Option<u64>,
    at: &'static Location<'static>,
    released: impl FnOnce(&mut State),
) -> Option<Outcome> {
    let me = me()?;
    let now = me.core.now();
    let next = {
        let mut state = me.core.state.lock();
        let dying = state.tasks[me.id].killed && std::thread::panicking();
        released(&mut state);
        if dying && why != Why::Lock {
            return Some(Outcome::TimedOut);
        }
        for address in on.into_iter().filter(|a| *a != 0) {
            state.waiting.entry(address).or_default().push(me.id);
        }
        let task = &mut state.tasks[me.id];
        task.wait = Some(Wait {
            why,
            on,
            at,
            since: now,
        });
        task.until = until;
        task.outcome = Outcome::Woken;
        if let Some(until) = until {
            state.timers.insert((until, me.id));
        }
        me.core.next(&mut state)
    };
    me.hand_over(next);
    let outcome = me.core.state.lock().tasks[me.id].outcome;
    Some(outcome)
}

impl State {
    pub(super) fn report(&mut self, now: u64) -> Report {
        Report {
            failure: self.failure.take(),
            hash: self.trace.hash(),
            switches: self.trace.switches(),
            time: Duration::from_nanos(now),
            notes: self.trace.take_notes(),
        }
    }

    fn new(settings: &Settings, over: std::sync::mpsc::Sender<()>) -> Self {
        Self {
            chance: Chance::new(settings.seed),
            entropy: Chance::new(settings.seed ^ 0x5eed_5eed_5eed_5eed),
            tasks: Vec::new(),
            groups: Groups::default(),
            runnable: Vec::new(),
            timers: BTreeSet::new(),
            waiting: HashMap::default(),
            current: 0,
            trace: Trace::default(),
            failure: None,
            threads: Vec::new(),
            living: Living {
                count: 0,
                over: Some(over),
            },
        }
    }

    pub(super) fn add(&mut self, name: String, group: u32) -> (TaskId, Arc<Baton>) {
        let baton = Baton::new();
        self.tasks.push(Task {
            name,
            group,
            wait: None,
            until: None,
            outcome: Outcome::Woken,
            killed: false,
            done: false,
            baton: Arc::clone(&baton),
            thread: None,
        });
        self.living.count += 1;
        (self.tasks.len() - 1, baton)
    }

    pub(super) fn ready(&mut self, id: TaskId) {
        if self.groups.admits(id, &self.tasks[id]) {
            self.runnable.push(id);
        }
    }

    /// Threads of a group do not run any more; not for the caller's.
    pub(super) fn stop(&mut self, group: u32) {
        self.groups.stop(group);
        for id in std::mem::take(&mut self.runnable) {
            self.ready(id);
        }
    }

    /// They go on.
    pub(super) fn go_on(&mut self, group: u32) {
        self.groups.go_on(group);
        self.unpark();
    }

    fn unpark(&mut self) {
        let free = self.groups.released(&self.tasks);
        self.runnable.extend(free);
    }

    /// Ends a task's wait.
    fn release(&mut self, id: TaskId, outcome: Outcome) {
        let task = &mut self.tasks[id];
        let Some(wait) = task.wait.take() else { return };
        task.outcome = outcome;
        if let Some(until) = task.until.take() {
            self.timers.remove(&(until, id));
        }
        for address in wait.on.into_iter().filter(|a| *a != 0) {
            if let Some(all) = self.waiting.get_mut(&address) {
                all.retain(|other| *other != id);
                if all.is_empty() {
                    self.waiting.remove(&address);
                }
            }
        }
        self.ready(id);
    }

    pub(super) fn wake(&mut self, address: usize, all: bool) {
        while let Some(waiting) = self.waiting.get(&address) {
            let n = waiting.len();
            let id = waiting[self.chance.one_of(n)];
            // One that is stopped does nothing about it: others may have to.
            let enough = !all && !self.groups.is_stopped(&self.tasks[id]);
            self.release(id, Outcome::Woken);
            if enough {
                return;
            }
        }
    }

    /// Has tasks end where they are.
    pub(super) fn kill(&mut self, which: impl Fn(&Task) -> bool) {
        for id in 0..self.tasks.len() {
            let task = &mut self.tasks[id];
            if !task.done && !task.killed && which(task) {
                task.killed = true;
                self.release(id, Outcome::TimedOut);
            }
        }
        self.unpark();
    }

    pub(super) fn fail(&mut self, failure: Failure) {
        if self.failure.is_none() {
            self.failure = Some(failure);
            self.kill(|_| true);
        }
    }
}

impl Core {
    pub(super) fn new(settings: Settings, over: std::sync::mpsc::Sender<()>) -> Arc<Self> {
        let state = State::new(&settings, over);
        Arc::new(Self {
            settings,
            state: Mutex::new(state),
            now: AtomicU64::new(0),
            next_timer: AtomicU64::new(u64::MAX),
            patience: AtomicU32::new(1),
        })
    }

    #[inline]
    pub(super) fn now(&self) -> u64 {
        self.now.load(Relaxed)
    }

    /// Time passes; true if somebody else should get a turn.
    #[inline]
    pub(super) fn tick(&self, by: u64) -> bool {
        let now = self.now() + by;
        self.now.store(now, Relaxed);
        let left = self.patience.load(Relaxed).saturating_sub(1);
        self.patience.store(left, Relaxed);
        left == 0 || self.next_timer.load(Relaxed) <= now
    }

    /// Timers that are over.
    fn fire(&self, state: &mut State) {
        while let Some(&(at, id)) = state.timers.first()
            && at <= self.now()
        {
            state.release(id, Outcome::TimedOut);
        }
    }

    /// Who runs next.
    fn next(&self, state: &mut State) -> TaskId {
        self.fire(state);
        while state.runnable.is_empty() {
            let Some(&(at, _)) = state.timers.first() else {
                if state.failure.is_some() {
                    // Ends that wait for each other: there is nothing to be learned from them.
                    std::process::abort();
                }
                let stuck = Failure::Stuck(who_waits(&state.tasks, self.now()));
                state.fail(stuck);
                continue;
            };
            self.now.store(at.max(self.now()), Relaxed);
            self.fire(state);
        }
        if self.now() > self.settings.longest && state.failure.is_none() {
            let late = Failure::TooLong(who_waits(&state.tasks, self.now()));
            state.fail(late);
        }
        let n = state.runnable.len();
        let chosen = state.chance.one_of(n);
        let next = state.runnable.swap_remove(chosen);
        let often = self.settings.points_between.max(1) as usize;
        let patience = 1 + state.chance.one_of(2 * often) as u32;
        self.patience.store(patience, Relaxed);
        let timer = state.timers.first().map_or(u64::MAX, |(at, _)| *at);
        self.next_timer.store(timer, Relaxed);
        state.current = next;
        state.trace.switched(next, self.now());
        next
    }
}

impl Me {
    fn yield_now(&self) {
        let next = {
            let mut state = self.core.state.lock();
            state.ready(self.id);
            self.core.next(&mut state)
        };
        self.hand_over(next);
    }

    /// The other one runs, and this one when its turn has come.
    fn hand_over(&self, next: TaskId) {
        if next != self.id {
            let mine = self.pass(next);
            mine.take();
        }
        self.end_if_killed();
    }

    /// The baton of this thread, after the other one has got its own.
    fn pass(&self, next: TaskId) -> Arc<Baton> {
        let state = self.core.state.lock();
        let mine = Arc::clone(&state.tasks[self.id].baton);
        let task = &state.tasks[next];
        let (baton, thread) = (Arc::clone(&task.baton), task.thread.clone());
        drop(state);
        if let Some(thread) = thread {
            baton.pass(&thread);
        }
        mine
    }

    pub(super) fn end_if_killed(&self) {
        if !std::thread::panicking() && self.core.state.lock().tasks[self.id].killed {
            std::panic::resume_unwind(Box::new(Killed));
        }
    }

    /// This thread has ended; others go on.
    pub(super) fn finish(self, join_address: usize) {
        become_task(None);
        let next = {
            let mut state = self.core.state.lock();
            state.tasks[self.id].done = true;
            state.living.count -= 1;
            state.wake(join_address, true);
            if state.living.count == 0 {
                if let Some(over) = state.living.over.take() {
                    let _ = over.send(());
                }
                return;
            }
            self.core.next(&mut state)
        };
        self.pass(next);
    }
}
