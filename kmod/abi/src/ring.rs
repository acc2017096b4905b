//! A ring with one producer and one consumer, of which either may sleep.
//!
//! Orders. The head is released after a slot is written and acquired before it is read; so is the tail the
//! other way round. A consumer that is about to sleep sets its flag and then looks at the head once more; a
//! producer moves the head and then looks at the flag; a full fence between the two on both sides makes sure
//! that one of them sees the other.

use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// Where the values are. Its length is a power of two; indices only grow.
pub trait Slots<T> {
    /// How many there are.
    fn len(&self) -> u64;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Writes one that the consumer does not read.
    fn put(&self, index: u64, value: T);
    /// Reads one that the producer does not write.
    fn take(&self, index: u64) -> T;
}

/// What the two sides share besides the slots.
#[derive(Debug, Clone, Copy)]
pub struct Ends<'a> {
    /// The next to be written.
    pub head: &'a AtomicU64,
    /// The next to be read.
    pub tail: &'a AtomicU64,
    /// The consumer sleeps, or is about to.
    pub sleeping: &'a AtomicU32,
}

impl Ends<'_> {
    /// Appends a value, unless the ring is full. Whether the consumer has to be woken: see [`Ends::ring`].
    pub fn push<T>(&self, slots: &impl Slots<T>, value: T) -> bool {
        let head = self.head.load(Ordering::Relaxed);
        let used = head.wrapping_sub(self.tail.load(Ordering::Acquire));
        if used >= slots.len() {
            return false;
        }
        slots.put(head, value);
        self.head.store(head.wrapping_add(1), Ordering::Release);
        true
    }

    /// After pushing: whether the consumer has to be woken.
    pub fn ring(&self) -> bool {
        fence(Ordering::SeqCst);
        self.sleeping.load(Ordering::Relaxed) != 0
    }

    /// Takes the oldest value.
    pub fn pop<T>(&self, slots: &impl Slots<T>) -> Option<T> {
        let tail = self.tail.load(Ordering::Relaxed);
        if self.head.load(Ordering::Acquire) == tail {
            return None;
        }
        let value = slots.take(tail);
        self.tail.store(tail.wrapping_add(1), Ordering::Release);
        Some(value)
    }

    /// Announces sleep. Whether the consumer may: if not, there is something to be read.
    pub fn sleep(&self) -> bool {
        self.sleeping.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let empty = self.head.load(Ordering::Acquire) == self.tail.load(Ordering::Relaxed);
        if !empty {
            self.awake();
        }
        empty
    }

    /// Ends it.
    pub fn awake(&self) {
        self.sleeping.store(0, Ordering::Relaxed);
    }
}
