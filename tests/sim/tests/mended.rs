//! What the simulation has found, each in its shortest form.

use fsd_sim::flaws::Flaws;
use fsd_sim::task::Task;
use fsd_sim::world::World;

fn simulate(body: impl FnOnce(&std::sync::Arc<World>) + Send + 'static) {
    let report = rt::sim::run(rt::sim::Settings::new(1), move || {
        let world = World::new(1, 1, Flaws::default());
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
