//! Callers that look for the completions of what they submit themselves: no thread has to be woken for them.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use super::unit::Due;

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
    /// What the thread attends to: a connection, by its address, and where its completions go.
    static CURRENT: RefCell<Option<(usize, Arc<Attended>)>> = const { RefCell::new(None) };
}

/// Where completions of this thread's batches on a connection go, if it attends to them.
pub(super) fn current(conn: usize) -> Option<Arc<Attended>> {
    CURRENT.with_borrow(|current| match current {
        Some((attended, queue)) if *attended == conn => Some(Arc::clone(queue)),
        _ => None,
    })
}

/// As long as it lives the thread attends to a connection.
pub(super) struct Attendance(Arc<Attended>);

impl Attendance {
    /// None if the thread attends to some connection already.
    pub(super) fn begin(conn: usize) -> Option<Self> {
        CURRENT.with_borrow_mut(|current| {
            if current.is_some() {
                return None;
            }
            let attended = Arc::new(Attended(Mutex::new(Some(VecDeque::new()))));
            *current = Some((conn, Arc::clone(&attended)));
            Some(Self(attended))
        })
    }

    /// Calls the completions that have come; false if there are none.
    pub(super) fn call(&self) -> bool {
        let mut called = false;
        while let Some(due) = self.0.next() {
            due.call();
            called = true;
        }
        called
    }
}

impl Drop for Attendance {
    fn drop(&mut self) {
        CURRENT.set(None);
        let rest = self.0.0.lock().take();
        for due in rest.into_iter().flatten() {
            due.call();
        }
    }
}
