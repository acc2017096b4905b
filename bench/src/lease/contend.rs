//! Nodes that want the same lock.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::anyhow;

use crate::stats::Latency;

/// An exclusive lock that every node can take.
pub trait Lock: Sync {
    /// Takes it for `node`, runs `inside`, gives it back (or keeps it until somebody asks).
    ///
    /// # Errors
    /// It cannot be had.
    fn with(&self, node: usize, inside: &mut dyn FnMut()) -> anyhow::Result<()>;
}

/// What came out.
pub struct Outcome {
    /// All nodes together.
    pub per_second: f64,
    /// From asking to having.
    pub latency: Latency,
    /// Least share of a node by the largest.
    pub fairness: f64,
}

fn outcome(each: Vec<anyhow::Result<(u64, Latency)>>, took: Duration) -> anyhow::Result<Outcome> {
    let mut latency = Latency::new()?;
    let mut counts = Vec::new();
    for one in each {
        let (n, l) = one?;
        counts.push(n);
        latency.merge(&l);
    }
    let total: u64 = counts.iter().sum();
    let (least, most) = (
        counts.iter().min().copied().unwrap_or(0),
        counts.iter().max().copied().unwrap_or(0),
    );
    Ok(Outcome {
        per_second: total as f64 / took.as_secs_f64(),
        latency,
        fairness: least as f64 / most.max(1) as f64,
    })
}

/// Runs one thread a node and checks that never two are inside.
fn run_all(
    lock: &dyn Lock,
    nodes: usize,
    run: Duration,
    before: &(dyn Fn(usize, &AtomicBool) -> bool + Sync),
    after: &(dyn Fn(usize) + Sync),
) -> anyhow::Result<Outcome> {
    let (stop, inside, broken) = (AtomicBool::new(false), AtomicU64::new(0), AtomicBool::new(false));
    let start = Instant::now();
    let each = std::thread::scope(|scope| {
        let (stop, inside, broken) = (&stop, &inside, &broken);
        let threads: Vec<_> = (0..nodes)
            .map(|node| {
                scope.spawn(move || {
                    let (mut n, mut latency) = (0, Latency::new()?);
                    while !stop.load(Ordering::Relaxed) {
                        if !before(node, stop) {
                            break;
                        }
                        let asked = Instant::now();
                        lock.with(node, &mut || {
                            latency.add(asked.elapsed());
                            if inside.fetch_add(1, Ordering::SeqCst) != 0 {
                                broken.store(true, Ordering::SeqCst);
                            }
                            inside.fetch_sub(1, Ordering::SeqCst);
                        })?;
                        after(node);
                        n += 1;
                    }
                    Ok((n, latency))
                })
            })
            .collect();
        std::thread::sleep(run);
        stop.store(true, Ordering::Relaxed);
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| Err(anyhow!("a thread died"))))
            .collect::<Vec<_>>()
    });
    anyhow::ensure!(
        !broken.load(Ordering::SeqCst),
        "two nodes were inside the lock at once"
    );
    outcome(each, start.elapsed())
}

/// The nodes take the lock one after the other, round and round.
///
/// # Errors
/// The lock fails.
pub fn in_turn(lock: &dyn Lock, nodes: usize, run: Duration) -> anyhow::Result<Outcome> {
    let turn = AtomicUsize::new(0);
    let before = |node: usize, stop: &AtomicBool| {
        while turn.load(Ordering::Acquire) != node {
            if stop.load(Ordering::Relaxed) {
                return false;
            }
            std::thread::yield_now();
        }
        true
    };
    let after = |node: usize| turn.store((node + 1) % nodes, Ordering::Release);
    run_all(lock, nodes, run, &before, &after)
}

/// Two nodes take the lock alternately, `turns` times in all, and nobody else does anything: from asking to having.
///
/// # Errors
/// The lock fails.
pub fn to_and_fro(lock: &dyn Lock, turns: u64) -> anyhow::Result<Latency> {
    let mut latency = Latency::new()?;
    for turn in 0..turns {
        let asked = Instant::now();
        lock.with((turn % 2) as usize, &mut || latency.add(asked.elapsed()))?;
    }
    Ok(latency)
}

/// Everybody takes it as often as possible.
///
/// # Errors
/// The lock fails.
pub fn free_for_all(lock: &dyn Lock, nodes: usize, run: Duration) -> anyhow::Result<Outcome> {
    run_all(lock, nodes, run, &|_, _| true, &|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Plain(parking_lot::Mutex<()>);
    impl Lock for Plain {
        fn with(&self, _: usize, inside: &mut dyn FnMut()) -> anyhow::Result<()> {
            let _guard = self.0.lock();
            inside();
            Ok(())
        }
    }
    struct Broken;
    impl Lock for Broken {
        fn with(&self, _: usize, inside: &mut dyn FnMut()) -> anyhow::Result<()> {
            inside();
            Ok(())
        }
    }

    #[test]
    fn turns_are_fair() {
        let out = in_turn(&Plain(parking_lot::Mutex::new(())), 3, Duration::from_millis(50)).unwrap();
        assert!(
            out.per_second > 100.0 && out.fairness > 0.5,
            "{} {}",
            out.per_second,
            out.fairness
        );
        assert!(out.latency.count() > 5);
    }

    #[test]
    fn a_lock_that_excludes_nobody_is_noticed() {
        let caught = (0..50).any(|_| free_for_all(&Broken, 4, Duration::from_millis(20)).is_err());
        assert!(caught);
    }
}
