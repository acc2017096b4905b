//! What the simulation has found, each in its shortest form.

use std::sync::Arc;
use std::time::Duration;

use fsd_node::config::Config;
use fsd_node::fake_disk::Luck;
use fsd_sim::flaws::Flaws;
use fsd_sim::task::Task;
use fsd_sim::world::{Mount, Node, World};

fn simulate(body: impl FnOnce(&std::sync::Arc<World>) + Send + 'static) {
    simulate_with(|_| {}, body);
}

fn simulate_with(
    change: impl FnOnce(&mut Config) + Send + 'static,
    body: impl FnOnce(&std::sync::Arc<World>) + Send + 'static,
) {
    let report = rt::sim::run(rt::sim::Settings::new(1), move || {
        let world = World::with(1, 1, Flaws::default(), change);
        world.start();
        body(&world);
    });
    assert!(report.failure.is_none(), "{}", report.failure.unwrap());
}

/// The kernel renames nothing where both names are of one inode; another mount may have made it so just before.
#[test]
fn a_rename_onto_itself_loses_nothing() {
    simulate(|world| {
        let mount = world.mount("a");
        let task = Task::new(&mount.mounted, 1);
        let file = task.create("one").unwrap();
        task.write(&file, 0, b"hello", false).unwrap();
        task.rename("one", "one").unwrap();
        assert_eq!(task.fstat(&file), Ok((5, 1)));
        assert_eq!(task.read(&file, 0, 100), Ok(b"hello".to_vec()));
    });
}

/// A mount stores what it has written to a file whose last name is gone, when another one has already removed the file: not into
/// the frames of the next.
#[test]
fn what_is_stored_late_does_not_come_into_another_file() {
    simulate(|world| {
        let (a, b) = (world.mount("a"), world.mount("b"));
        let (one, two) = (Task::new(&a.mounted, 1), Task::new(&b.mounted, 2));
        // So that the metadata server has the blocks freed before what is written below is stored.
        rt::thread::sleep(Duration::from_millis(700));
        let file = one.create("one").unwrap();
        one.write(&file, 0, &[1; 200_000], false).unwrap();
        one.fsync(&file).unwrap();
        one.write(&file, 8192, &[2; 100_000], false).unwrap();
        one.close(file).unwrap();
        // Looked up here, it outlives its name for two seconds.
        assert_eq!(two.stat("one"), Ok(200_000));
        for wait in [0, 1950] {
            rt::thread::sleep(Duration::from_millis(wait));
            let file = one.open("one", libc::O_RDWR).unwrap();
            one.write(&file, 8192, &[3; 100_000], false).unwrap();
            if wait == 0 {
                one.fsync(&file).unwrap();
            }
            one.close(file).unwrap();
        }
        one.unlink("one").unwrap();
        for _ in 0..100 {
            rt::thread::sleep(Duration::from_millis(50));
            let next = two.create("two").unwrap();
            two.write(&next, 199_999, &[4], false).unwrap();
            two.fsync(&next).unwrap();
            rt::thread::sleep(Duration::from_millis(50));
            let read = two.read(&next, 0, 199_999).unwrap();
            assert!(read.iter().all(|byte| *byte == 0), "another file's data");
            two.close(next).unwrap();
            two.unlink("two").unwrap();
        }
    });
}

/// A removal that fails, while the storage node is away that would have to take back what had been marked: the file keeps its name,
/// and what was written to it.
#[test]
fn a_removal_that_failed_costs_nothing() {
    let soft = |config: &mut Config| config.mount.hard_ms = Some(15_000);
    simulate_with(soft, |world| {
        let mount = world.mount("a");
        let task = Task::new(&mount.mounted, 1);
        let file = task.create("one").unwrap();
        task.write(&file, 0, b"hello", false).unwrap();
        task.fsync(&file).unwrap();
        task.write(&file, 5, b" world", false).unwrap();
        // It waits for the metadata server until its patience ends: no more changes are taken in than are to be told to that.
        drop(task.create("two").unwrap());
        world.crash_meta(Luck::All);
        let other = Task::new(&mount.mounted, 2);
        let removal = rt::thread::spawn(move || {
            let (mut from, mut to) = ("two", "three");
            while other.rename(from, to).is_ok() {
                std::mem::swap(&mut from, &mut to);
            }
            other.unlink("one")
        });
        rt::thread::sleep(Duration::from_secs(5));
        world.crash_node(0, Luck::All);
        assert!(removal.join().unwrap().is_err());
        world.start();
        // Looked up a moment ago, it would be kept for that.
        rt::thread::sleep(Duration::from_secs(5));
        task.close(file).unwrap();
        rt::thread::sleep(Duration::from_secs(5));
        let again = task.open("one", libc::O_RDONLY).unwrap();
        assert_eq!(task.read(&again, 0, 100), Ok(b"hello world".to_vec()));
    });
}

/// A mount has left while the link to it was cut. Whoever asks it because it was the last that owned a file is told by the metadata
/// server that nobody has its number any more, and looks at the file's record.
#[test]
fn who_asks_a_mount_that_has_left_looks_elsewhere() {
    simulate(|world| {
        let (a, b) = (world.mount("a"), world.mount("b"));
        a.run(|mounted| {
            let task = Task::new(mounted, 1);
            let file = task.create("one").unwrap();
            task.write(&file, 0, b"hello", false).unwrap();
            task.close(file).unwrap();
        });
        b.run(|mounted| {
            let task = Task::new(mounted, 2);
            let file = task.open("one", libc::O_RDWR).unwrap();
            task.write(&file, 0, b"world", false).unwrap();
            task.fsync(&file).unwrap();
            task.close(file).unwrap();
        });
        world.separate([&a.addr(), &b.addr()]);
        b.stop();
        let took = a.run(|mounted| {
            let (task, began) = (Task::new(mounted, 1), rt::sim::elapsed());
            let file = task.open("one", libc::O_RDWR).unwrap();
            assert_eq!(task.read(&file, 0, 100), Ok(b"world".to_vec()));
            task.close(file).unwrap();
            rt::sim::elapsed() - began
        });
        assert!(took < Duration::from_secs(5), "it waited for {took:?}");
    });
}

/// As a mount does that has lost its leases: it ends.
fn end_when_over(world: &Arc<World>, mount: Mount) -> rt::thread::JoinHandle<()> {
    let world = Arc::clone(world);
    rt::thread::spawn(move || {
        while !mount.is_over() {
            rt::thread::sleep(Duration::from_millis(10));
        }
        world.kill_mount(mount);
    })
}

/// A storage node's host was restarted, and one mount has not found out: nobody else uses the new lease table before it has.
#[test]
fn a_new_lease_table_is_used_when_nobody_trusts_the_old_one() {
    for silent in [false, true] {
        simulate(move |world| {
            let (a, b) = (world.mount("a"), world.mount("b"));
            let (one, two) = (Task::new(&a.mounted, 1), Task::new(&b.mounted, 2));
            let file = one.create("one").unwrap();
            one.write(&file, 0, &[1; 100], false).unwrap();
            one.fsync(&file).unwrap();
            let theirs = two.open("one", libc::O_RDONLY).unwrap();
            assert_eq!(two.read(&theirs, 0, 100), Ok(vec![1; 100]));
            assert_eq!(one.read(&file, 0, 100), Ok(vec![1; 100]));
            let node = world.whereabouts(Node::Storage(0), &[]).unwrap().0;
            let away = a.addr();
            if silent {
                world.silence([&node, &away]);
                world.silence([&away, &node]);
            }
            world.crash_node(0, Luck::None);
            world.start_node(0);
            while !b.is_over() {
                rt::thread::sleep(Duration::from_millis(10));
            }
            world.kill_mount(b);
            let old = a.mounted.clone();
            let ending = end_when_over(world, a);
            let began = rt::sim::elapsed();
            let c = world.mount("c");
            assert!(
                rt::sim::elapsed() - began < Duration::from_secs(5),
                "nobody tells it"
            );
            let three = Task::new(&c.mounted, 3);
            let ours = three.open("one", libc::O_RDWR).unwrap();
            three.write(&ours, 0, &[2; 100], false).unwrap();
            if old.answers() {
                assert_eq!(one.read(&file, 0, 100), Ok(vec![2; 100]));
            }
            assert_eq!(three.read(&ours, 0, 100), Ok(vec![2; 100]));
            three.close(ours).unwrap();
            ending.join().unwrap();
            c.stop();
        });
    }
}

/// A mount dies together with the storage node's host, which has no record any more of what the mount had; another one lives.
fn written_beyond_the_end(flaws: Flaws) -> Result<(), String> {
    let report = rt::sim::run(rt::sim::Settings::new(1), move || {
        let world = World::with(1, 1, flaws, |_| {});
        world.start();
        let (a, b) = (world.mount("a"), world.mount("b"));
        let task = Task::new(&a.mounted, 1);
        let file = task.create("one").unwrap();
        task.fsync(&file).unwrap();
        task.fsync_dir().unwrap();
        task.write(&file, 0, &[7; 200_000], false).unwrap();
        // The storage node has it durably, and the metadata server does not know how long the file is.
        world.stop_node(Node::Mount(0), &[(a.addr(), a.group())], false);
        rt::thread::sleep(Duration::from_secs(6));
        let node = world.whereabouts(Node::Storage(0), &[]).unwrap().0;
        world.separate([&node, &b.addr()]);
        world.crash_node(0, Luck::None);
        world.kill_mount(a);
        world.start_node(0);
        let ending = end_when_over(&world, b);
        let c = world.mount("c");
        let task = Task::new(&c.mounted, 3);
        let file = task.open("one", libc::O_RDWR).unwrap();
        assert_eq!(task.fstat(&file).unwrap().0, 0);
        task.truncate(&file, 200_000).unwrap();
        let read = task.read(&file, 0, 200_000).unwrap();
        assert!(
            read.iter().all(|byte| *byte == 0),
            "old bytes where zeros are right"
        );
        task.close(file).unwrap();
        ending.join().unwrap();
        c.stop();
    });
    report.failure.map_or(Ok(()), |failure| Err(failure.to_string()))
}

#[test]
fn what_a_lost_lease_covered_is_cut() {
    written_beyond_the_end(Flaws::default()).unwrap();
    let flaws: Flaws = "EraNotCleared".parse().unwrap();
    let found = written_beyond_the_end(flaws).unwrap_err();
    assert!(found.contains("old bytes"), "{found}");
}

/// Servers that have nothing to do end when they are told to, and not up to a second later.
#[test]
fn idle_servers_end_at_once() {
    simulate(|world| {
        for _ in 0..5 {
            rt::thread::sleep(Duration::from_millis(730));
            let begun = rt::sim::elapsed();
            world.stop();
            let took = rt::sim::elapsed() - begun;
            assert!(took < Duration::from_millis(300), "{took:?}");
            world.start();
        }
    });
}
