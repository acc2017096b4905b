//! `storm MOUNT POINT BOARD SEED`: the tasks of one mount in a storm of faults (see `system_tests::storm`).

use std::path::Path;
use std::process::ExitCode;

use system_tests::storm::worker;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let numbers = |mount: &str, seed: &str| Some((mount.parse().ok()?, seed.parse().ok()?));
    let parsed = match args.as_slice() {
        [mount, point, board, seed] => numbers(mount, seed).map(|n| (n, point, board)),
        _ => None,
    };
    let Some(((mount, seed), point, board)) = parsed else {
        eprintln!("usage: storm MOUNT POINT BOARD SEED");
        return ExitCode::from(2);
    };
    match worker::run(mount, Path::new(point), Path::new(board), seed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("storm: {error:#}");
            ExitCode::FAILURE
        }
    }
}
