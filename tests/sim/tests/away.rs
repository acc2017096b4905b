//! Mounts that are stopped or cut off for longer than their term, and clocks at different rates.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fsd_sim::flaws::{ClusterFlaw, Flaws};
use fsd_sim::strain::TERM;
use fsd_sim::task::Task;
use fsd_sim::world::{Mount, Node, World};

fn simulate(flaws: Flaws, body: impl FnOnce(&Arc<World>) + Send + 'static) {
    let report = rt::sim::run(rt::sim::Settings::new(1), move || {
        body(&World::new(1, 1, flaws));
    });
    assert!(report.failure.is_none(), "{}", report.failure.unwrap());
}

fn all(mounts: &[&Mount]) -> Vec<(String, u32)> {
    mounts.iter().map(|m| (m.addr(), m.group())).collect()
}

/// A mount that is cut off from all but the storage node reads a file again and again, which another one writes as soon as it can: does
/// it see the old contents when the new ones have been written? The clocks of the metadata server and of the mount are too fast by so
/// many parts of a million.
fn sees_what_is_old(flaws: Flaws, [server, mount]: [i64; 2]) -> bool {
    let stale = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stale);
    simulate(flaws, move |world| {
        world.next_clock(server);
        world.start_meta();
        world.start_node(0);
        world.next_clock(mount);
        let (a, b) = (world.mount("a"), world.mount("b"));
        a.run(|mounted| {
            let task = Task::new(mounted, 1);
            let file = task.create("one").unwrap();
            task.write(&file, 0, b"old", false).unwrap();
            task.fsync(&file).unwrap();
            task.close(file).unwrap();
        });
        let (written, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let reading = {
            let (mounted, written, done) = (a.mounted.clone(), Arc::clone(&written), Arc::clone(&done));
            rt::sim::spawn_in(a.group(), "reader", move || {
                let task = Task::new(&mounted, 1);
                let file = task.open("one", libc::O_RDONLY).unwrap();
                while !done.load(Ordering::SeqCst) {
                    let late = written.load(Ordering::SeqCst);
                    match task.read(&file, 0, 3) {
                        Ok(read) if late && read == b"old" => return seen.store(true, Ordering::SeqCst),
                        Ok(_) => rt::thread::sleep(Duration::from_millis(20)),
                        Err(_) => return,
                    }
                }
            })
        };
        rt::thread::sleep(Duration::from_secs(3));
        let (one, other) = (a.addr(), b.addr());
        world.separate([&one, "meta:1"]);
        world.separate([&one, &other]);
        b.run(move |mounted| {
            let task = Task::new(mounted, 2);
            let file = task.open("one", libc::O_RDWR).unwrap();
            task.write(&file, 0, b"new", false).unwrap();
            task.fsync(&file).unwrap();
            written.store(true, Ordering::SeqCst);
        });
        rt::thread::sleep(2 * TERM);
        done.store(true, Ordering::SeqCst);
        world.join([&one, "meta:1"]);
        reading.join().unwrap();
        // It reaches the metadata server again, and learns what has become of it.
        for _ in 0..100 {
            rt::thread::sleep(Duration::from_millis(200));
        }
        assert!(a.is_over(), "it was away for longer than its term");
    });
    stale.load(Ordering::SeqCst)
}

/// The margin of a fifth of the term is there for clocks that differ by 1 %, and holds for those that differ by 20 %, because a mount
/// freezes a heartbeat and a half before its term ends. Without either it does not hold.
#[test]
fn margins_cover_clocks_that_differ() {
    let without = |cluster| Flaws {
        cluster: Some(cluster),
        ..Flaws::default()
    };
    assert!(!sees_what_is_old(Flaws::default(), [5_000, -5_000]));
    assert!(!sees_what_is_old(Flaws::default(), [100_000, -100_000]));
    assert!(sees_what_is_old(
        without(ClusterFlaw::NoMargin),
        [100_000, -100_000]
    ));
    assert!(sees_what_is_old(Flaws::default(), [500_000, -500_000]));
    assert!(sees_what_is_old(
        without(ClusterFlaw::AnsweredLate),
        [5_000, -5_000]
    ));
}

/// A mount is stopped with data that it has not stored; others get its file, remove it, and use the frames. When it goes on it changes
/// nothing of theirs, and learns that its life is over.
#[test]
fn a_mount_that_was_stopped_writes_nothing() {
    for deaf in [false, true] {
        simulate(Flaws::default(), move |world| {
            world.start();
            let (a, b) = (world.mount("a"), world.mount("b"));
            a.run(|mounted| {
                let task = Task::new(mounted, 1);
                let file = task.create("one").unwrap();
                task.write(&file, 0, &[1; 300_000], false).unwrap();
                task.fsync(&file).unwrap();
                task.write(&file, 0, &[2; 200_000], false).unwrap();
            });
            let mounts = all(&[&a, &b]);
            let stopped = world.stop_node(Node::Mount(0), &mounts, deaf).unwrap();
            b.run(|mounted| {
                let task = Task::new(mounted, 2);
                let file = task.open("one", libc::O_RDWR).unwrap();
                let read = task.read(&file, 0, 300_000).unwrap();
                assert!(read.iter().all(|byte| *byte == 1), "what was fsynced is there");
                task.close(file).unwrap();
                task.unlink("one").unwrap();
            });
            assert!(rt::sim::elapsed() < TERM * 2, "a term and a margin is enough");
            let next = b.run(|mounted| {
                let task = Task::new(mounted, 2);
                // When the blocks have been freed.
                rt::thread::sleep(Duration::from_secs(5));
                let file = task.create("two").unwrap();
                task.write(&file, 0, &[3; 300_000], false).unwrap();
                task.fsync(&file).unwrap();
                file
            });
            world.go_on(stopped);
            let failed = a.run(|mounted| {
                let task = Task::new(mounted, 1);
                rt::thread::sleep(Duration::from_secs(5));
                task.stat("two").is_err()
            });
            assert!(failed && a.is_over());
            b.run(move |mounted| {
                let task = Task::new(mounted, 2);
                let read = task.read(&next, 0, 300_000).unwrap();
                assert!(read.iter().all(|byte| *byte == 3), "a dead mount has written");
            });
        });
    }
}

/// Servers that are stopped for three terms: nobody has died, and all goes on with what it had.
#[test]
fn nobody_dies_because_a_server_was_stopped() {
    for (node, deaf) in [
        (Node::Meta, false),
        (Node::Meta, true),
        (Node::Storage(0), false),
        (Node::Storage(0), true),
    ] {
        simulate(Flaws::default(), move |world| {
            world.start();
            let a = world.mount("a");
            let file = a.run(|mounted| {
                let task = Task::new(mounted, 1);
                let file = task.create("one").unwrap();
                task.write(&file, 0, b"hello", false).unwrap();
                file
            });
            let stopped = world.stop_node(node, &all(&[&a]), deaf).unwrap();
            rt::thread::sleep(3 * TERM);
            world.go_on(stopped);
            a.run(move |mounted| {
                let task = Task::new(mounted, 1);
                assert_eq!(task.read(&file, 0, 100), Ok(b"hello".to_vec()));
                task.fsync(&file).unwrap();
            });
            rt::thread::sleep(2 * TERM);
            assert!(!a.is_over());
        });
    }
}
