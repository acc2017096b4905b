//! The gate under every interleaving of its atomic operations that the memory model allows.
#![allow(
    missing_docs,
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

/// Stands in for the crate's own module of this name, which the gate is built upon.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering};

    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }
        pub(crate) fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
            self.0.lock().unwrap()
        }
    }
}

#[path = "../src/gate.rs"]
mod gate;

use gate::Gate;
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use loom::thread;

/// A gate, and what operations inside it touch: the cell fails the model if anybody gets in while what
/// closed the gate believes it empty.
struct Fixture {
    gate: Gate,
    cell: UnsafeCell<u32>,
    drained: AtomicUsize,
}

// SAFETY: loom watches the cell, and fails the model on any access that is not exclusive where it must be;
// that is what these tests are about. Nothing is ever dereferenced.
unsafe impl Sync for Fixture {}

fn fixture() -> Arc<Fixture> {
    let f = Fixture {
        gate: Gate::new(),
        cell: UnsafeCell::new(0),
        drained: AtomicUsize::new(0),
    };
    f.gate.grant(1);
    Arc::new(f)
}

fn operation(f: &Fixture) -> bool {
    if !f.gate.enter(1) {
        return false;
    }
    f.cell.with(|_| ());
    if let Some(drained) = f.gate.leave() {
        drained();
    }
    true
}

fn close(f: &Arc<Fixture>) {
    let theirs = Arc::clone(f);
    let drained = Box::new(move || {
        theirs.cell.with_mut(|_| ());
        theirs.drained.fetch_add(1, SeqCst);
        assert!(theirs.gate.lower(0));
    });
    if let Some(drained) = f.gate.close(drained) {
        drained();
    }
}

#[test]
fn closing_drains_exactly_once() {
    loom::model(|| {
        let f = fixture();
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let f = Arc::clone(&f);
                thread::spawn(move || operation(&f))
            })
            .collect();
        close(&f);
        workers.into_iter().for_each(|w| {
            w.join().unwrap();
        });
        assert_eq!(f.drained.load(SeqCst), 1);
        assert!(!operation(&f) && f.gate.count() == 0);
    });
}

#[test]
fn closed_opened_closed_again() {
    loom::model(|| {
        let f = fixture();
        let worker = {
            let f = Arc::clone(&f);
            thread::spawn(move || {
                operation(&f);
                operation(&f);
            })
        };
        let early = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&early);
        if let Some(run) = f.gate.close(Box::new(move || {
            counted.fetch_add(1, SeqCst);
        })) {
            run();
        }
        f.gate.open();
        close(&f);
        worker.join().unwrap();
        // What the first close left behind ran at most once, and never for the second one.
        assert!(early.load(SeqCst) <= 1);
        assert_eq!(f.drained.load(SeqCst), 1);
    });
}

#[test]
fn what_the_grant_wrote_is_seen_inside() {
    loom::model(|| {
        let f = Arc::new(Fixture {
            gate: Gate::new(),
            cell: UnsafeCell::new(0),
            drained: AtomicUsize::new(0),
        });
        let worker = {
            let f = Arc::clone(&f);
            thread::spawn(move || operation(&f))
        };
        f.cell.with_mut(|_| ());
        f.gate.grant(2);
        worker.join().unwrap();
        assert!(operation(&f));
    });
}
