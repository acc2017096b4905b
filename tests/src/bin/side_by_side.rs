//! `side_by_side [--delay-ms N]`: how long cold reads of one file, and look-ups in one directory, take one after the other and by
//! several tasks at once, where servers are so far away.

use std::process::ExitCode;
use std::time::Duration;

use system_tests::cluster::Cluster;
use system_tests::side_by_side::{TASKS, look_up, open, options, prepare, read, with_tasks};

fn measure(delay: Duration) -> anyhow::Result<()> {
    let cluster = Cluster::start(options())?;
    prepare(&cluster, 3)?;
    let file = open(&cluster)?;
    look_up(&cluster, 0)?;
    cluster.proxies()?.all().for_each(|p| p.delay(delay));
    let (alone, together) = (1..1 + TASKS, 1 + TASKS..1 + 2 * TASKS);
    println!("{TASKS} of each, servers {delay:?} away each way");
    println!(
        "{:28} {:>12} {:>12} {:>7}",
        "",
        "one task",
        format!("{TASKS} tasks"),
        "ratio"
    );
    let row = |what: &str, one: Duration, all: Duration| {
        println!(
            "{what:28} {one:>12.1?} {all:>12.1?} {:>7.2}",
            one.as_secs_f64() / all.as_secs_f64()
        );
    };
    let reads = |tasks, places| with_tasks(tasks, places, |place| read(&file, place));
    row(
        "cold reads of one file",
        reads(1, alone.clone())?,
        reads(TASKS, together.clone())?,
    );
    let looks = |tasks, places| with_tasks(tasks, places, |n| look_up(&cluster, n));
    row(
        "look-ups in one directory",
        looks(1, alone)?,
        looks(TASKS, together)?,
    );
    drop(file);
    cluster.end_all()
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let mut delay = Some(5);
    while let Some(arg) = args.next() {
        delay = (arg == "--delay-ms").then(|| args.next()?.parse().ok()).flatten();
    }
    let Some(delay) = delay else {
        eprintln!("usage: side_by_side [--delay-ms N]");
        return ExitCode::from(2);
    };
    match measure(Duration::from_millis(delay)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("side_by_side: {error:#}");
            ExitCode::FAILURE
        }
    }
}
