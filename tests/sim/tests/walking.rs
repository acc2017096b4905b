//! The shortest way through everything.

use fsd_sim::flaws::Flaws;
use fsd_sim::task::Task;
use fsd_sim::world::World;

#[test]
fn one_file_goes_through_everything() {
    if std::env::var("RUST_LOG").is_ok() {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .init();
    }
    let start = std::time::Instant::now();
    let report = rt::sim::run(rt::sim::Settings::new(1), || {
        let world = World::new(1, 1, Flaws::default());
        world.start();
        let mount = world.mount("a");
        let task = Task::new(&mount.mounted, 1);
        let file = task.create("one").unwrap();
        assert_eq!(task.write(&file, 5, b"hello", false), Ok(5));
        assert_eq!(task.read(&file, 4, 100), Ok(b"\0hello".to_vec()));
        task.fsync(&file).unwrap();
        task.close(file).unwrap();
        assert_eq!(task.names().unwrap(), ["one"]);
        mount.stop();
    });
    println!(
        "{:?} {} switches, {:?}",
        report.time,
        report.switches,
        start.elapsed()
    );
    assert!(report.failure.is_none(), "{}", report.failure.unwrap());
}
