//! What the seed says.

use std::time::Duration;

/// One of so many numbers, counted from zero.
#[must_use]
pub fn below(n: u64) -> u64 {
    if n < 2 { 0 } else { rt::sim::chance() % n }
}

/// One of these.
pub fn one_of<T: Copy>(all: &[T]) -> T {
    all[below(all.len() as u64) as usize]
}

/// True once in so many times.
#[must_use]
pub fn once_in(n: u64) -> bool {
    below(n) == 0
}

/// Waits a random time.
pub fn wait(most: Duration) {
    rt::thread::sleep(Duration::from_nanos(below(most.as_nanos() as u64)));
}
