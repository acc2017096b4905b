//! What simulations promise: the same run for the same seed, time that passes only when all wait, ends that are noticed.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rt::channel::{bounded, recv_either, unbounded};
use rt::sim::{Failure, Report, Settings, run};
use rt::sync::{Condvar, Mutex, RwLock};
use rt::time::Instant;

fn settings(seed: u64) -> Settings {
    Settings {
        points_between: 2,
        ..Settings::new(seed)
    }
}

/// A little of everything.
fn busy(seed: u64) -> Report {
    run(settings(seed), || {
        let (tx, rx) = bounded::<u64>(2);
        let shared = Arc::new((Mutex::new(0u64), Condvar::new(), RwLock::new(0u64)));
        let mut threads = Vec::new();
        for n in 0..4u64 {
            let (shared, tx) = (Arc::clone(&shared), tx.clone());
            threads.push(rt::thread::spawn(move || {
                let mut table = HashMap::new();
                for i in 0..50u64 {
                    table.insert(i, n);
                    let before = *shared.0.lock();
                    *shared.0.lock() += 1;
                    assert!(*shared.0.lock() > before);
                    shared.1.notify_all();
                    *shared.2.write() += 1;
                    let _ = tx.send(i);
                    rt::thread::sleep(Duration::from_micros(rt::random::<u8>().into()));
                }
                // In whatever order a table is gone through.
                rt::sim::note(&format!("{:?}", table.keys().collect::<Vec<_>>()));
            }));
        }
        drop(tx);
        let mut sum = 0;
        while let Ok(n) = rx.recv() {
            sum += n;
        }
        assert_eq!(sum, 4 * (0..50).sum::<u64>());
        for thread in threads {
            assert!(thread.join().is_ok());
        }
        assert_eq!((*shared.0.lock(), *shared.2.read()), (200, 200));
    })
}

#[test]
fn a_seed_says_everything() {
    let first = busy(7);
    assert_eq!(first.failure, None);
    for _ in 0..10 {
        let again = busy(7);
        assert_eq!(
            (again.hash, again.time, &again.notes),
            (first.hash, first.time, &first.notes)
        );
    }
    assert_ne!(busy(8).hash, first.hash);
}

#[test]
fn races_are_found() {
    // Two that read, and write one more: with some seed one of them is lost.
    let lost = AtomicU64::new(0);
    for seed in 0..50 {
        let report = run(settings(seed), || {
            let value = Arc::new(Mutex::new(0));
            let adds = (0..2).map(|_| {
                let value = Arc::clone(&value);
                rt::thread::spawn(move || {
                    let seen = *value.lock();
                    *value.lock() = seen + 1;
                })
            });
            for thread in adds.collect::<Vec<_>>() {
                thread.join().unwrap();
            }
            assert_eq!(*value.lock(), 2);
        });
        if let Some(Failure::Panic(thread, _)) = report.failure {
            assert_eq!(thread, "root");
            lost.fetch_add(1, Ordering::Relaxed);
        }
    }
    assert!((1..50).contains(&lost.load(Ordering::Relaxed)), "{lost:?}");
}

#[test]
fn time_passes_when_all_wait() {
    let began = std::time::Instant::now();
    let report = run(settings(1), || {
        let (start, pair) = (Instant::now(), Arc::new((Mutex::new(()), Condvar::new())));
        let (_tx, rx) = unbounded::<()>();
        let (_other, second) = unbounded::<()>();
        assert!(rx.recv_timeout(Duration::from_secs(1000)).is_err());
        let _ = recv_either(&rx, &second, Duration::from_secs(1000));
        let mut guard = pair.0.lock();
        assert!(pair.1.wait_for(&mut guard, Duration::from_secs(1000)).timed_out());
        rt::thread::sleep(Duration::from_secs(100));
        let passed = start.elapsed().as_secs();
        assert!((3100..3101).contains(&passed), "{passed}");
        // Who looks at the clock again and again sees it move.
        let end = Instant::now() + Duration::from_millis(1);
        while Instant::now() < end {
            rt::hint::spin_loop();
        }
    });
    assert_eq!(report.failure, None);
    assert!(began.elapsed() < Duration::from_secs(60));
}

#[test]
fn who_waits_for_ever_is_told() {
    let report = run(settings(3), || {
        let (a, b) = (Arc::new(Mutex::new(())), Arc::new(Mutex::new(())));
        let (c, d) = (Arc::clone(&a), Arc::clone(&b));
        let other = rt::thread::spawn(move || {
            let _b = d.lock();
            rt::thread::sleep(Duration::from_millis(1));
            let _a = c.lock();
        });
        let _a = a.lock();
        rt::thread::sleep(Duration::from_millis(1));
        let _b = b.lock();
        other.join().unwrap();
    });
    match report.failure {
        Some(Failure::Stuck(who)) => assert_eq!(who.matches("Lock at").count(), 2, "{who}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_group_ends_where_it_is() {
    let report = run(settings(5), || {
        let (held, gone) = (Arc::new(Mutex::new(())), Arc::new(AtomicU64::new(0)));
        struct Counts(Arc<AtomicU64>);
        impl Drop for Counts {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        for n in 0..3 {
            let (held, counts) = (Arc::clone(&held), Counts(Arc::clone(&gone)));
            rt::sim::spawn_in(7, "victim", move || {
                let _counts = counts;
                let _held = (n == 0).then(|| held.lock());
                let (_tx, rx) = unbounded::<()>();
                let pair = (Mutex::new(()), Condvar::new());
                let mut guard = pair.0.lock();
                match n {
                    0 => rt::thread::sleep(Duration::from_secs(1_000_000)),
                    1 => pair.1.wait(&mut guard),
                    _ => drop(rx.recv()),
                }
                panic!("it went on");
            });
        }
        rt::thread::sleep(Duration::from_secs(1));
        rt::sim::kill(7);
        assert_eq!(gone.load(Ordering::Relaxed), 3);
        drop(held.lock());
    });
    assert_eq!(report.failure, None);
}

#[test]
fn outside_of_simulations_all_is_real() {
    let (tx, rx) = bounded::<u8>(1);
    let thread = rt::thread::spawn(move || tx.send(rt::random()).is_ok());
    let pair = (Mutex::new(()), Condvar::new());
    let mut guard = pair.0.lock();
    let start = Instant::now();
    assert!(pair.1.wait_for(&mut guard, Duration::from_millis(5)).timed_out());
    assert!(start.elapsed() >= Duration::from_millis(5));
    assert!(rx.recv_timeout(Duration::from_secs(10)).is_ok() && thread.join().unwrap());
}

#[test]
fn a_group_that_is_stopped_does_nothing_until_it_goes_on() {
    let report = run(settings(1), || {
        let (count, shared) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(())));
        let (theirs, lock) = (Arc::clone(&count), Arc::clone(&shared));
        let busy = rt::sim::spawn_in(7, "busy", move || {
            loop {
                drop(lock.lock());
                theirs.fetch_add(1, Ordering::Relaxed);
                rt::thread::sleep(Duration::from_millis(1));
            }
        });
        rt::thread::sleep(Duration::from_millis(50));
        {
            // While nobody of the group has it.
            let _lock = shared.lock();
            rt::sim::stop(7);
        }
        let before = count.load(Ordering::Relaxed);
        assert!(before > 30);
        rt::thread::sleep(Duration::from_secs(5));
        drop(shared.lock());
        assert_eq!(count.load(Ordering::Relaxed), before);
        rt::sim::go_on(7);
        rt::thread::sleep(Duration::from_millis(50));
        assert!(count.load(Ordering::Relaxed) > before + 30);
        // One that is stopped can be killed as well.
        let lock = shared.lock();
        rt::sim::stop(7);
        drop(lock);
        rt::sim::kill(7);
        assert!(busy.is_finished());
    });
    assert!(report.failure.is_none(), "{}", report.failure.unwrap());
}

#[test]
fn clocks_of_groups_go_at_their_rates() {
    let report = run(settings(1), || {
        rt::sim::set_clock_rate(1, 100_000);
        rt::sim::set_clock_rate(2, -500_000);
        for (group, sleeps) in [(0, 1000), (1, 909), (2, 2000)] {
            let began = rt::sim::elapsed();
            let shown = rt::sim::spawn_in(group, "sleeper", || {
                let start = Instant::now();
                rt::thread::sleep(Duration::from_secs(1));
                start.elapsed()
            });
            let shown = shown.join().unwrap();
            assert_eq!(shown.as_millis(), 1000, "group {group}");
            assert_eq!((rt::sim::elapsed() - began).as_millis(), sleeps, "group {group}");
        }
    });
    assert!(report.failure.is_none(), "{}", report.failure.unwrap());
}
