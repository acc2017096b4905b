//! Processes for which this mount waits, and which do so no longer.
//!
//! A task whose request is with the file system's process stays until that is answered, also when it has been killed. The kernel says so in
//! a request of its own (INTERRUPT), which the FUSE library keeps to itself. So while requests wait, one thread looks in `/proc` at the
//! processes behind them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rt::sync::Mutex;
use rt::time::Instant;

use crate::session::caller::Caller;
use crate::session::workers::Workers;

/// How often those are looked through who wait …
const POLL: Duration = Duration::from_millis(50);
/// … and less often when there are many: so much time is left between two looks at one.
const POLL_EACH: Duration = Duration::from_micros(500);
/// What is waited for usually comes sooner: before that nobody is looked at.
const SOON: Duration = Duration::from_millis(40);

/// One that is ending waits for what it closes so long: its file locks should be gone when it is.
const LAST: Duration = Duration::from_secs(1);

/// What ends the wait of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// A signal that it handles, or its end.
    Signal,
    /// Its end: it has been killed.
    Death,
}

struct Waiter {
    caller: Caller,
    until: Until,
    since: Instant,
    give_up: Box<dyn FnOnce() + Send>,
}

/// Those who wait.
pub struct Waiting {
    all: Mutex<HashMap<u64, Waiter>>,
    next: AtomicU64,
    watched: AtomicBool,
    /// One thread, while anybody waits.
    watcher: Workers,
}

impl Default for Waiting {
    fn default() -> Self {
        Self {
            all: Mutex::default(),
            next: AtomicU64::new(0),
            watched: AtomicBool::new(false),
            watcher: Workers::new("fsd-waiting", 1),
        }
    }
}

/// A process waits; until this is dropped.
pub struct Waits {
    waiting: Arc<Waiting>,
    id: u64,
}

impl Drop for Waits {
    fn drop(&mut self) {
        // The other thread takes the waiter out before it gives up, without the lock.
        let _waiter = self.waiting.all.lock().remove(&self.id);
    }
}

impl Waiting {
    /// A process waits. If that ends before it has what it waits for, `give_up` is called, once and on another thread.
    #[must_use]
    pub fn begin(
        self: &Arc<Self>,
        caller: Caller,
        until: Until,
        give_up: impl FnOnce() + Send + 'static,
    ) -> Waits {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let waiter = Waiter {
            caller,
            until,
            since: Instant::now(),
            give_up: Box::new(give_up),
        };
        self.all.lock().insert(id, waiter);
        if !self.watched.swap(true, Ordering::SeqCst) {
            let me = Arc::clone(self);
            self.watcher.run(move || me.watch());
        }
        Waits {
            waiting: Arc::clone(self),
            id,
        }
    }

    fn watch(&self) {
        loop {
            let waiting = self.all.lock().len();
            if waiting == 0 {
                self.watched.store(false, Ordering::SeqCst);
                // Who came before that has not started another.
                if self.all.lock().is_empty() || self.watched.swap(true, Ordering::SeqCst) {
                    return;
                }
            }
            rt::thread::sleep(POLL.max(POLL_EACH * waiting as u32));
            self.look();
        }
    }

    fn look(&self) {
        let waiting: Vec<(u64, Caller, Until, Duration)> = {
            let all = self.all.lock();
            let waited = all
                .iter()
                .map(|(&id, w)| (id, w.caller, w.until, w.since.elapsed()));
            waited.filter(|(.., waited)| *waited >= SOON).collect()
        };
        for (id, caller, until, waited) in waiting {
            let over = match until {
                Until::Signal => caller.has_signal(),
                Until::Death => caller.is_killed() || (waited >= LAST && caller.is_ending()),
            };
            let waiter = over.then(|| self.all.lock().remove(&id)).flatten();
            if let Some(waiter) = waiter {
                (waiter.give_up)();
            }
        }
    }

    /// Nobody is watched any more.
    pub fn close(&self, limit: Duration) {
        self.all.lock().clear();
        self.watcher.close(limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_that_is_killed_waits_no_longer() {
        let mut child = Command::new("sleep")
            .arg("1000")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let waiting = Arc::new(Waiting::default());
        let (tx, rx) = rt::channel::bounded(2);
        let begin = |pid, name: &'static str| {
            let tx = tx.clone();
            waiting.begin(Caller { pid, uid: 0 }, Until::Death, move || {
                let _ = tx.try_send(name);
            })
        };
        let _mine = begin(std::process::id(), "this process");
        let _theirs = begin(child.id(), "the child");
        drop(begin(child.id(), "one that has been answered"));
        child.kill().unwrap();
        // It stays as a zombie until it is waited for, as one does whose request is not answered.
        assert_eq!(rx.recv_timeout(Duration::from_secs(20)).unwrap(), "the child");
        child.wait().unwrap();
        assert!(rx.recv_timeout(POLL * 3).is_err());
        waiting.close(Duration::from_secs(20));
    }
}
