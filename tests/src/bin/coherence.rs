//! `coherence DIR0 DIR1 [--rounds N] [--only PART]`: cross-mount checks on two mounts of one file system.
//!
//! Prints kind, rounds and violations; exit status 1 on a violation.

use std::path::Path;
use std::process::ExitCode;

use system_tests::coherence;

const USAGE: &str = "usage: coherence DIR0 DIR1 [--rounds N] [--only PART-OF-A-KIND] [--extension]";

fn main() -> ExitCode {
    let mut dirs = Vec::new();
    let (mut rounds, mut only, mut extension) = (20, None, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match (arg.as_str(), dirs.len()) {
            ("--rounds", _) => match args.next().and_then(|n| n.parse().ok()) {
                Some(n) => rounds = n,
                None => return usage(),
            },
            ("--only", _) => only = args.next(),
            ("--extension", _) => extension = true,
            (dir, 0 | 1) if !dir.starts_with('-') => dirs.push(arg),
            _ => return usage(),
        }
    }
    let [dir0, dir1] = dirs.as_slice() else {
        return usage();
    };
    let choice = coherence::Choice {
        only: only.as_deref(),
        extension,
    };
    match coherence::run(Path::new(dir0), Path::new(dir1), rounds, choice) {
        Ok(outcomes) if coherence::print(&outcomes) == 0 => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("coherence: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}
