//! Simulations: how they are run, and what those who are in one can do besides.

use std::fmt::Display;
use std::time::Duration;

use super::report::Failure as Why;
use super::sched::{self, Core, Me};
use super::thread::{JoinHandle, start};

pub use super::report::{Failure, Report};
pub use super::settings::Settings;

/// Runs `root` and all threads it starts as a simulation; those that are left when it returns are ended.
///
/// # Panics
/// The system has no threads left.
pub fn run(settings: Settings, root: impl FnOnce() + Send + 'static) -> Report {
    let _one = super::affinity::one_processor();
    let (over, ended) = std::sync::mpsc::channel();
    let core = Core::new(settings, over);
    let starter = Me {
        core: core.clone(),
        id: usize::MAX,
        rate: 0,
    };
    let body = move || {
        root();
        if let Some(me) = sched::me() {
            me.core.state.lock().kill(|task| task.group != u32::MAX);
        }
    };
    let (id, _) = start(&starter, "root".into(), 0, None, body).unwrap_or_else(|e| panic!("no threads: {e}"));
    {
        let state = core.state.lock();
        let task = &state.tasks[id];
        if let Some(thread) = &task.thread {
            task.baton.pass(thread);
        }
    }
    let _ = ended.recv();
    let threads = std::mem::take(&mut core.state.lock().threads);
    for thread in threads {
        let _ = thread.join();
    }
    core.state.lock().report(core.now())
}

/// Is the calling thread in a simulation?
#[must_use]
pub fn simulated() -> bool {
    sched::simulated()
}

/// Starts a thread of another group: a simulated process, for example. Threads started by it belong to the same.
///
/// # Panics
/// The system has no threads left; or the caller is in no simulation.
pub fn spawn_in<T: Send + 'static>(
    group: u32,
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    JoinHandle::in_group(group, name, body)
}

/// Ends all threads of a group where they are, as the death of a process does, and waits until they have ended: not for a
/// thread of that group.
///
/// # Panics
/// The caller is in no simulation.
pub fn kill(group: u32) {
    let me = sched::me().unwrap_or_else(|| panic!("not in a simulation"));
    me.core.state.lock().kill(|task| task.group == group);
    while me
        .core
        .state
        .lock()
        .tasks
        .iter()
        .any(|t| t.group == group && !t.done)
    {
        sched::give_way();
    }
}

/// None of a group's threads runs any more, as SIGSTOP does it to a process, until [`go_on`]. What others wait for one of them to
/// unlock they wait for until then.
///
/// # Panics
/// The caller is in no simulation, or belongs to the group.
pub fn stop(group: u32) {
    let me = sched::me().unwrap_or_else(|| panic!("not in a simulation"));
    let mut state = me.core.state.lock();
    assert!(state.tasks[me.id].group != group, "a group does not stop itself");
    state.stop(group);
}

/// Ends [`stop`].
pub fn go_on(group: u32) {
    if let Some(me) = sched::me() {
        me.core.state.lock().go_on(group);
    }
}

/// From now on the clocks of a group's threads that are still to be started gain so many parts of a million, or lose them. Clocks
/// on the wall do not.
pub fn set_clock_rate(group: u32, parts_of_a_million: i64) {
    if let Some(me) = sched::me() {
        me.core.state.lock().groups.set_rate(group, parts_of_a_million);
    }
}

/// Adds a note to the trace.
pub fn note(text: &impl Display) {
    if let Some(me) = sched::me() {
        let text = text.to_string();
        let mut state = me.core.state.lock();
        let name = state.tasks[me.id].name.clone();
        state.trace.note(me.core.now(), &name, &text);
    }
}

/// The simulation has found what must not be; it ends.
pub fn fail(what: String) {
    if let Some(me) = sched::me() {
        let mut state = me.core.state.lock();
        let waits = super::report::who_waits(&state.tasks, me.core.now());
        state.fail(Why::Wrong(format!("{what}\nwaiting then:\n{waits}")));
        drop(state);
        me.end_if_killed();
    }
}

/// A random number that the seed says.
#[must_use]
pub fn chance() -> u64 {
    match sched::me() {
        Some(me) => me.core.state.lock().entropy.next(),
        None => rand::random(),
    }
}

/// Virtual time since the beginning.
#[must_use]
pub fn elapsed() -> Duration {
    Duration::from_nanos(sched::me().map_or(0, |me| me.core.now()))
}

/// A point at which another thread may get its turn.
pub fn point() {
    sched::point();
}
