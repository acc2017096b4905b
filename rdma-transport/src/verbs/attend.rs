//! Callers that look for the completions of what they submit themselves: no thread has to be woken for them.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::ops::{Completion, Outcome};

/// A completion that is to be called: by the caller that attends to it, else on the progress thread.
pub(super) struct Due {
    pub(super) done: Completion,
    pub(super) outcome: Outcome,
    pub(super) attended: Option<Arc<Attended>>,
}

impl Due {
    pub(super) fn call(self) {
        (self.done)(self.outcome);
    }

    /// Gives it to who attends to it; returns it if nobody does.
    pub(super) fn offer(mut self) -> Option<Self> {
        match self.attended.take() {
            Some(attended) => attended.put(self),
            None => Some(self),
        }
    }
}

/// Where the completions of one attending caller are put.
pub(super) struct Attended(Mutex<Option<VecDeque<Due>>>);

impl Attended {
    /// Takes a completion; gives it back if the caller looks no more.
    pub(super) fn put(&self, due: Due) -> Option<Due> {
        match &mut *self.0.lock() {
            Some(queue) => {
                queue.push_back(due);
                None
            }
            None => Some(due),
        }
    }

    fn next(&self) -> Option<Due> {
        self.0.lock().as_mut()?.pop_front()
    }
}

thread_local! {
    /// What the thread attends to: connections, by their addresses, and where their completions go.
    static CURRENT: RefCell<Vec<(usize, Arc<Attended>)>> = const { RefCell::new(Vec::new()) };
}

/// Where completions of this thread's batches on a connection go, if it attends to them.
pub(super) fn current(conn: usize) -> Option<Arc<Attended>> {
    CURRENT.with_borrow(|current| {
        let (_, queue) = current.iter().find(|(attended, _)| *attended == conn)?;
        Some(Arc::clone(queue))
    })
}

/// As long as it lives the thread attends to a connection.
pub(super) struct Attendance {
    conn: usize,
    queue: Arc<Attended>,
}

impl Attendance {
    /// None if the thread attends to it already.
    pub(super) fn begin(conn: usize) -> Option<Self> {
        CURRENT.with_borrow_mut(|current| {
            if current.iter().any(|(attended, _)| *attended == conn) {
                return None;
            }
            let queue = Arc::new(Attended(Mutex::new(Some(VecDeque::new()))));
            current.push((conn, Arc::clone(&queue)));
            Some(Self { conn, queue })
        })
    }

    /// Calls the completions that have come; false if there are none.
    pub(super) fn call(&self) -> bool {
        let mut called = false;
        while let Some(due) = self.queue.next() {
            due.call();
            called = true;
        }
        called
    }
}

impl Drop for Attendance {
    fn drop(&mut self) {
        CURRENT.with_borrow_mut(|current| current.retain(|(conn, _)| *conn != self.conn));
        let rest = self.queue.0.lock().take();
        for due in rest.into_iter().flatten() {
            due.call();
        }
    }
}
