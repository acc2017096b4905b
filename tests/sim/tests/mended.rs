//! What the simulation has found, each in its shortest form.

use std::time::Duration;

use fsd_node::config::Config;
use fsd_node::fake_disk::Luck;
use fsd_sim::flaws::Flaws;
use fsd_sim::task::Task;
use fsd_sim::world::World;

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
        // It waits for the metadata server until its patience ends.
        world.crash_meta(Luck::All);
        let other = Task::new(&mount.mounted, 2);
        let removal = rt::thread::spawn(move || other.unlink("one"));
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
