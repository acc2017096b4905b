//! What a mount was shown of others' names is so after any failure.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fsd_node::fake_disk::Luck;
use fsd_sim::flaws::Flaws;
use fsd_sim::task::Task;
use fsd_sim::world::World;

/// One mount makes a name, another one reads the directory ahead and is shown that name; then the host of the metadata server and the first
/// mount die together. Is the name still there?
fn is_there_still(flaws: Flaws) -> bool {
    let there = Arc::new(AtomicBool::new(false));
    let answer = Arc::clone(&there);
    let report = rt::sim::run(rt::sim::Settings::new(1), move || {
        let world = World::with(1, 1, flaws, |_| ());
        world.start();
        let (a, b) = (world.mount("a"), world.mount("b"));
        let (one, two) = (Task::new(&a.mounted, 1), Task::new(&b.mounted, 2));
        one.close(one.create("made").unwrap()).unwrap();
        // The second name that is asked for has all others read.
        for absent in ["this", "that"] {
            assert!(two.stat(absent).is_err());
        }
        assert_eq!(two.stat("made"), Ok(0));
        world.crash_meta(Luck::None);
        world.kill_mount(a);
        world.start_meta();
        rt::thread::sleep(Duration::from_secs(30));
        answer.store(two.stat("made") == Ok(0), Ordering::SeqCst);
        drop(two);
        b.stop();
        world.stop();
    });
    assert!(report.failure.is_none(), "{}", report.failure.unwrap());
    there.load(Ordering::SeqCst)
}

#[test]
fn what_is_read_ahead_is_durable_or_left_out() {
    assert!(is_there_still(Flaws::default()));
    assert!(!is_there_still("ReadEarly".parse().unwrap()));
}
