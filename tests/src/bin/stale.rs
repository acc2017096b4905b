//! `stale KIND FILE BOARD`: looks for old contents of a file until it is killed (see `system_tests::stale`).

use std::path::Path;
use std::process::ExitCode;

use system_tests::stale;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kind, file, board] = args.as_slice() else {
        eprintln!("usage: stale {} FILE BOARD", stale::KINDS.join("|"));
        return ExitCode::from(2);
    };
    match stale::look(kind, Path::new(file), Path::new(board)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stale: {error:#}");
            ExitCode::FAILURE
        }
    }
}
