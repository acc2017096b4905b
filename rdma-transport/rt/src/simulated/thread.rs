//! Threads.

use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::groups::{shown, when};
use super::report::Failure;
use super::sched::{self, Me, become_task};
use super::task::{Killed, TaskId, Why};

/// What a thread returned, when it has.
type Slot<T> = Arc<Mutex<Option<std::thread::Result<T>>>>;

enum Of<T> {
    Real(std::thread::JoinHandle<T>),
    Simulated(Me, TaskId, Slot<T>),
}

/// A thread that was started.
pub struct JoinHandle<T>(Of<T>);

impl<T> std::fmt::Debug for JoinHandle<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JoinHandle")
    }
}

fn join_address<T>(slot: &Slot<T>) -> usize {
    Arc::as_ptr(slot) as usize
}

/// A thread has panicked, or was killed: the simulation fails, or goes on.
fn panicked(me: &Me, payload: &(dyn std::any::Any + Send)) {
    if payload.is::<Killed>() {
        return;
    }
    let what = payload
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| payload.downcast_ref::<&str>().map(|s| (*s).to_owned()))
        .unwrap_or_else(|| "with something that is no text".into());
    let mut state = me.core.state.lock();
    let name = state.tasks[me.id].name.clone();
    state.fail(Failure::Panic(name, what));
}

/// Starts a thread of a simulation.
pub(super) fn start<T: Send + 'static>(
    me: &Me,
    name: String,
    group: u32,
    stack: Option<usize>,
    body: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<(TaskId, Slot<T>)> {
    let slot: Slot<T> = Arc::new(Mutex::new(None));
    let core = Arc::clone(&me.core);
    let (id, baton, rate) = {
        let mut state = core.state.lock();
        let (id, baton) = state.add(name.clone(), group);
        (id, baton, state.groups.rate(group))
    };
    let (theirs, result) = (Me { core, id, rate }, Arc::clone(&slot));
    let mut builder = std::thread::Builder::new().name(name);
    if let Some(stack) = stack {
        builder = builder.stack_size(stack);
    }
    let thread = builder.spawn(move || {
        become_task(Some(theirs.clone()));
        baton.take();
        let ran = catch_unwind(AssertUnwindSafe(|| {
            theirs.end_if_killed();
            body()
        }));
        let ran = ran.inspect_err(|payload| panicked(&theirs, payload.as_ref()));
        let address = join_address(&result);
        *result.lock() = Some(ran);
        // What it returned may be the last that refers to something whose end takes part in the simulation.
        drop(result);
        theirs.finish(address);
    })?;
    let mut state = me.core.state.lock();
    state.tasks[id].thread = Some(thread.thread().clone());
    state.threads.push(thread);
    if me.id != usize::MAX {
        state.ready(id);
    }
    Ok((id, slot))
}

impl<T: Send + 'static> JoinHandle<T> {
    pub(super) fn in_group(group: u32, name: &str, body: impl FnOnce() -> T + Send + 'static) -> Self {
        let me = sched::me().unwrap_or_else(|| panic!("not in a simulation"));
        let (id, slot) = start(&me, name.into(), group, None, body).unwrap_or_else(|e| panic!("{e}"));
        Self(Of::Simulated(me, id, slot))
    }

    /// Waits for the thread to end.
    ///
    /// # Errors
    /// It panicked.
    #[track_caller]
    pub fn join(self) -> std::thread::Result<T> {
        let at = Location::caller();
        match self.0 {
            Of::Real(handle) => handle.join(),
            Of::Simulated(me, id, slot) => loop {
                if me.core.state.lock().tasks[id].done {
                    let ended = slot.lock().take();
                    return ended.unwrap_or_else(|| Err(Box::new("it has been joined already")));
                }
                if sched::block(Why::Join, [join_address(&slot), 0], None, at, |_| {}).is_none() {
                    return Err(Box::new("the simulation is over"));
                }
                if std::thread::panicking() {
                    return Err(Box::new("not waited for"));
                }
            },
        }
    }
}

impl<T> JoinHandle<T> {
    /// Has it ended?
    #[must_use]
    pub fn is_finished(&self) -> bool {
        match &self.0 {
            Of::Real(handle) => handle.is_finished(),
            Of::Simulated(me, id, _) => me.core.state.lock().tasks[*id].done,
        }
    }
}

/// How a thread is started.
#[derive(Debug, Default)]
pub struct Builder {
    name: Option<String>,
    stack: Option<usize>,
}

impl Builder {
    /// Without a name.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With this name.
    #[must_use]
    pub fn name(mut self, name: String) -> Self {
        self.name = Some(name);
        self
    }

    /// With so many bytes of stack.
    #[must_use]
    pub fn stack_size(mut self, size: usize) -> Self {
        self.stack = Some(size);
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// The system has no threads left.
    pub fn spawn<T: Send + 'static>(
        self,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> std::io::Result<JoinHandle<T>> {
        if let Some(me) = sched::me() {
            let group = me.core.state.lock().tasks[me.id].group;
            let name = self.name.unwrap_or_else(|| "thread".into());
            let (id, slot) = start(&me, name, group, self.stack, body)?;
            sched::point();
            return Ok(JoinHandle(Of::Simulated(me, id, slot)));
        }
        let mut real = std::thread::Builder::new();
        if let Some(name) = self.name {
            real = real.name(name);
        }
        if let Some(stack) = self.stack {
            real = real.stack_size(stack);
        }
        real.spawn(body).map(|handle| JoinHandle(Of::Real(handle)))
    }
}

/// Starts a thread.
///
/// # Panics
/// The system has no threads left.
pub fn spawn<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    Builder::new()
        .spawn(body)
        .unwrap_or_else(|e| panic!("no threads: {e}"))
}

/// Lets time pass.
#[track_caller]
pub fn sleep(time: Duration) {
    let Some(me) = sched::me() else {
        return std::thread::sleep(time);
    };
    let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let until = when(shown(me.core.now(), me.rate).saturating_add(time), me.rate);
    sched::block(Why::Sleep, [0, 0], Some(until), Location::caller(), |_| {});
}

/// Lets others run.
pub fn yield_now() {
    if !sched::give_way() {
        std::thread::yield_now();
    }
}
