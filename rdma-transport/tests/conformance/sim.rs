//! What only the simulator has: the same run for the same seed, and crashes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rdma_transport::AsyncOp;

use crate::world::World;

/// What happened in a run of some traffic, as text.
fn run(seed: u64, crash_after: Option<usize>) -> (String, u64) {
    let world = World::sim(seed);
    let net = world.net.clone().unwrap();
    let target = world.endpoint("target");
    let (mem, at) = target.memory(4096);
    let sources: Vec<_> = (0..3).map(|n| world.endpoint(&format!("source{n}"))).collect();
    let log = Arc::new(Mutex::new(String::new()));
    let finished = Arc::new(AtomicU64::new(0));
    for source in &sources {
        let conn = source.fabric.connect("target").unwrap();
        for n in 0..20u8 {
            let (log, finished) = (Arc::clone(&log), Arc::clone(&finished));
            conn.submit(
                vec![AsyncOp::Faa { at, add: 1 }],
                Box::new(move |result| {
                    finished.fetch_add(1, Ordering::SeqCst);
                    log.lock()
                        .push_str(&format!("{:?} ", result.map_err(|e| e.to_string())));
                }),
            );
            conn.send(&[n]).unwrap();
        }
    }
    if let Some(steps) = crash_after {
        for _ in 0..steps {
            net.step();
        }
        net.crash("source1");
        net.crash("no such endpoint");
    }
    net.run_until_idle();
    let live = if crash_after.is_some() { 40 } else { 60 };
    assert!(
        finished.load(Ordering::SeqCst) >= live,
        "completions of endpoints that live all come"
    );
    if crash_after.is_some() {
        assert_eq!(target.seen.ended.lock().len(), 1, "exactly one end");
        assert!(sources[1].seen.ended.lock().is_empty(), "the dead are not told");
    }
    let sum = mem.word(0).unwrap().load(Ordering::SeqCst);
    assert!((live..=60).contains(&sum));
    let log = log.lock().clone();
    (
        format!("{log} {:?} {:?}", target.seen.messages.lock(), net.now()),
        sum,
    )
}

#[test]
fn same_seed_same_run() {
    assert_eq!(run(1, None), run(1, None));
    assert_eq!(run(2, Some(30)), run(2, Some(30)));
    assert_ne!(run(1, None), run(2, None));
}

#[test]
fn crashes() {
    let sums: Vec<u64> = (0..200)
        .map(|seed| run(seed, Some(seed as usize % 90)).1)
        .collect();
    assert!(
        sums.iter().any(|s| *s > 40) && sums.iter().any(|s| *s < 60),
        "cut at different points"
    );
}

#[test]
fn crashed_target_fails_what_is_under_way() {
    for steps in 0..60 {
        let world = World::sim(steps);
        let net = world.net.clone().unwrap();
        let target = world.endpoint("target");
        let source = world.endpoint("source");
        let (_mem, at) = target.memory(4096);
        let conn = source.fabric.connect("target").unwrap();
        let done = Arc::new(AtomicU64::new(0));
        for _ in 0..20 {
            let done = Arc::clone(&done);
            conn.submit(
                vec![AsyncOp::Faa { at, add: 1 }],
                Box::new(move |_| {
                    done.fetch_add(1, Ordering::SeqCst);
                }),
            );
        }
        for _ in 0..steps {
            net.step();
        }
        net.crash("target");
        net.run_until_idle();
        assert_eq!(done.load(Ordering::SeqCst), 20, "every completion once");
        assert_eq!(source.seen.ended.lock().len(), 1);
        assert!(!conn.is_alive());
        // The name is free again.
        let again = world.endpoint("target");
        source.fabric.connect(&again.fabric.local_addr()).unwrap();
    }
}

#[test]
fn timers() {
    let world = World::sim(5);
    let net = world.net.clone().unwrap();
    let order = Arc::new(Mutex::new(Vec::new()));
    for millis in [30u64, 10, 20] {
        let order = Arc::clone(&order);
        net.after(Duration::from_millis(millis), move || order.lock().push(millis));
    }
    net.run_until_idle();
    assert_eq!(*order.lock(), [10, 20, 30]);
    assert_eq!(net.now(), Duration::from_millis(30));
    assert!(!net.step());
}
