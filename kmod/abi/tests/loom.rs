//! Word and rings under every interleaving of their atomic operations that the memory model allows.
#![allow(
    missing_docs,
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

/// Stands in for the crate's own module of this name.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
}

#[path = "../src/ring.rs"]
mod ring;
#[path = "../src/word.rs"]
mod word;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use loom::thread;
use ring::{Ends, Slots};
use word::{DIRTY, Mode, Pending, Revoked, Word};

/// An entry, and what is touched under its lease: the cell fails the model if a revocation believes that
/// everybody has left and somebody is inside.
struct Leased {
    word: AtomicU64,
    contents: UnsafeCell<u32>,
    drained: AtomicUsize,
}

// SAFETY: loom watches the cell, and fails the model on any access that is not exclusive where it must be;
// that is what these tests are about. Nothing is ever dereferenced.
unsafe impl Sync for Leased {}

fn leased(mode: Mode) -> Arc<Leased> {
    let word = AtomicU64::new(0);
    assert!(word::grant(&word, mode).is_some());
    Arc::new(Leased {
        word,
        contents: UnsafeCell::new(0),
        drained: AtomicUsize::new(0),
    })
}

fn read(l: &Leased) -> bool {
    if !word::enter(&l.word, Mode::Shared, 0) {
        return false;
    }
    l.contents.with(|_| ());
    if word::leave(&l.word) {
        l.drained.fetch_add(1, SeqCst);
    }
    true
}

fn touch(l: &Leased) {
    l.contents.with_mut(|_| ());
}

#[test]
fn nobody_is_inside_after_a_revocation_and_the_last_one_says_so() {
    loom::model(|| {
        let l = leased(Mode::Shared);
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let l = Arc::clone(&l);
                thread::spawn(move || {
                    read(&l);
                })
            })
            .collect();
        let revoked = word::revoke(&l.word, Mode::None, true);
        if matches!(revoked, Revoked::Done { .. }) {
            touch(&l);
        }
        for reader in readers {
            reader.join().unwrap();
        }
        if matches!(revoked, Revoked::Pending(_)) {
            // Whoever was inside has told of its leaving: without that the daemon would wait for ever.
            assert_eq!(l.drained.load(SeqCst), 1);
            assert_eq!(word::finish(&l.word, Mode::None), Revoked::Done { wake: false });
            touch(&l);
        }
        assert!(!word::enter(&l.word, Mode::Shared, 0));
    });
}

#[test]
fn what_was_written_before_a_grant_is_seen_inside() {
    loom::model(|| {
        let l = Arc::new(Leased {
            word: AtomicU64::new(0),
            contents: UnsafeCell::new(0),
            drained: AtomicUsize::new(0),
        });
        let reader = {
            let l = Arc::clone(&l);
            thread::spawn(move || read(&l))
        };
        touch(&l);
        assert!(word::grant(&l.word, Mode::Shared).is_some());
        reader.join().unwrap();
    });
}

#[test]
fn a_writer_before_the_revocation_is_found_dirty() {
    loom::model(|| {
        let l = leased(Mode::Exclusive);
        let writer = {
            let l = Arc::clone(&l);
            thread::spawn(move || {
                let inside = word::enter(&l.word, Mode::Exclusive, DIRTY);
                if inside {
                    touch(&l);
                    word::leave(&l.word);
                }
                inside
            })
        };
        let revoked = word::revoke(&l.word, Mode::Shared, true);
        let wrote = writer.join().unwrap();
        match revoked {
            // It came too late, then, and was not let in.
            Revoked::Done { .. } => assert!(!wrote),
            Revoked::Pending(Pending { dirty, .. }) => assert!(dirty && wrote),
            Revoked::Unused => panic!("forced"),
        }
    });
}

#[test]
fn an_entry_given_to_another_inode_lets_nobody_in_for_the_first() {
    loom::model(|| {
        // The kernel's order: the word, the owner, then the compare-and-swap on that word.
        let word = Arc::new(AtomicU64::new(0));
        let owner = Arc::new(AtomicU64::new(1));
        assert!(word::grant(&word, Mode::Shared).is_some());
        let kernel = {
            let (word, owner) = (Arc::clone(&word), Arc::clone(&owner));
            thread::spawn(move || {
                let seen = word.load(loom::sync::atomic::Ordering::Acquire);
                word::admits(Word(seen), Mode::Shared)
                    && owner.load(Relaxed) == 1
                    && word
                        .compare_exchange(seen, seen + 1, SeqCst, Relaxed)
                        .is_ok_and(|_| owner.load(Relaxed) != 1)
            })
        };
        if word::revoke(&word, Mode::None, true) == (Revoked::Done { wake: false }) {
            owner.store(2, Relaxed);
            assert!(word::grant(&word, Mode::Shared).is_some());
        }
        assert!(!kernel.join().unwrap(), "entered another inode's lease");
    });
}

#[test]
fn a_waiter_is_woken_or_finds_the_lease() {
    loom::model(|| {
        let word = Arc::new(AtomicU64::new(0));
        let waiter = {
            let word = Arc::clone(&word);
            thread::spawn(move || {
                word.fetch_or(word::WAITERS, SeqCst);
                word::enter(&word, Mode::Shared, 0)
            })
        };
        let wake = word::grant(&word, Mode::Shared).unwrap().has(word::WAITERS);
        assert!(waiter.join().unwrap() || wake);
    });
}

/// A ring of two.
struct Ring {
    head: AtomicU64,
    tail: AtomicU64,
    sleeping: AtomicU32,
    slots: [UnsafeCell<u32>; 2],
}

// SAFETY: as above: loom watches the cells.
unsafe impl Sync for Ring {}

impl Slots<u32> for Ring {
    fn len(&self) -> u64 {
        2
    }
    fn put(&self, index: u64, value: u32) {
        // SAFETY: the producer's alone; loom fails the model if not.
        self.slots[index as usize & 1].with_mut(|slot| unsafe { *slot = value });
    }
    fn take(&self, index: u64) -> u32 {
        // SAFETY: not written meanwhile; loom fails the model if it is.
        self.slots[index as usize & 1].with(|slot| unsafe { *slot })
    }
}

impl Ring {
    fn ends(&self) -> Ends<'_> {
        Ends {
            head: &self.head,
            tail: &self.tail,
            sleeping: &self.sleeping,
        }
    }
}

fn empty() -> Arc<Ring> {
    Arc::new(Ring {
        head: AtomicU64::new(0),
        tail: AtomicU64::new(0),
        sleeping: AtomicU32::new(0),
        slots: [UnsafeCell::new(0), UnsafeCell::new(0)],
    })
}

#[test]
fn values_come_in_order_and_slots_are_not_reused_too_soon() {
    loom::model(|| {
        let ring = empty();
        let producer = {
            let ring = Arc::clone(&ring);
            thread::spawn(move || (1..=3).take_while(|n| ring.ends().push(&*ring, *n)).count())
        };
        let mut got = Vec::new();
        for _ in 0..2 {
            got.extend(ring.ends().pop::<u32>(&*ring));
        }
        let pushed = producer.join().unwrap();
        while let Some(value) = ring.ends().pop::<u32>(&*ring) {
            got.push(value);
        }
        assert_eq!(got.len(), pushed);
        assert!(got.iter().zip(1..).all(|(got, want)| *got == want));
    });
}

#[test]
fn a_sleeping_consumer_is_woken() {
    loom::model(|| {
        let ring = empty();
        let producer = {
            let ring = Arc::clone(&ring);
            thread::spawn(move || {
                assert!(ring.ends().push(&*ring, 1));
                ring.ends().ring()
            })
        };
        let slept = ring.ends().sleep();
        let rang = producer.join().unwrap();
        assert!(rang || !slept, "asleep, and nobody rings");
    });
}
