//! A pool of threads that grows with the work and shrinks when idle.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use rt::sync::{Condvar, Mutex};

/// Something to be done.
pub type Job = Box<dyn FnOnce() + Send>;

const IDLE: Duration = Duration::from_secs(10);

struct State {
    jobs: VecDeque<Job>,
    idle: usize,
    threads: usize,
    closed: bool,
}

struct Shared {
    name: &'static str,
    most: usize,
    state: Mutex<State>,
    changed: Condvar,
}

/// The pool.
#[derive(Clone)]
pub struct Workers(Arc<Shared>);

impl Workers {
    /// A pool of at most `most` threads; none is started before there is work.
    #[must_use]
    pub fn new(name: &'static str, most: usize) -> Self {
        let state = State {
            jobs: VecDeque::new(),
            idle: 0,
            threads: 0,
            closed: false,
        };
        Self(Arc::new(Shared {
            name,
            most,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }))
    }

    /// Does something, soon, on some thread. After [`Workers::close`] the job is dropped.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.0.state.lock();
        if state.closed {
            return;
        }
        state.jobs.push_back(Box::new(job));
        if state.idle >= state.jobs.len() {
            drop(state);
            self.0.changed.notify_one();
        } else if state.threads < self.0.most {
            state.threads += 1;
            drop(state);
            let shared = Arc::clone(&self.0);
            let started = rt::thread::Builder::new()
                .name(self.0.name.into())
                .stack_size(512 << 10)
                .spawn(move || work(&shared));
            if let Err(error) = started {
                tracing::error!("cannot start a {} thread: {error}", self.0.name);
                self.0.state.lock().threads -= 1;
            }
        }
    }

    /// No more jobs; waits until the running ones have ended, at most `limit`.
    pub fn close(&self, limit: Duration) {
        let mut state = self.0.state.lock();
        state.closed = true;
        self.0.changed.notify_all();
        let deadline = rt::time::Instant::now() + limit;
        while state.threads > 0 {
            if self.0.changed.wait_until(&mut state, deadline).timed_out() {
                return;
            }
        }
    }
}

fn work(shared: &Shared) {
    let mut state = shared.state.lock();
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            job();
            state = shared.state.lock();
            continue;
        }
        if state.closed {
            break;
        }
        state.idle += 1;
        let timed_out = shared.changed.wait_for(&mut state, IDLE).timed_out();
        state.idle -= 1;
        if timed_out && state.jobs.is_empty() {
            break;
        }
    }
    state.threads -= 1;
    // Nobody else waits for the end of a thread, and those that wait for work would be woken for nothing.
    if state.closed {
        drop(state);
        shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn jobs_that_wait_for_each_other_get_threads() {
        let workers = Workers::new("test", 8);
        let barrier = Arc::new(std::sync::Barrier::new(4));
        let done = Arc::new(AtomicUsize::new(0));
        for _ in 0..4 {
            let (barrier, done) = (Arc::clone(&barrier), Arc::clone(&done));
            workers.run(move || {
                barrier.wait();
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        workers.close(Duration::from_secs(10));
        assert_eq!(done.load(Ordering::SeqCst), 4);
    }
}
