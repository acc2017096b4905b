//! Tests of the kernel extension alone. Needs root, and the module `distfuse` loaded: the lab's scenario
//! `kmod` runs it in guests.

mod asking;
mod checks;
mod control;
mod fixture;
mod manager;
mod memory;
mod server;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        ["serve", point, control, number] => number
            .parse()
            .context("a number")
            .and_then(|number| server::serve(Path::new(point), Path::new(control), number)),
        ["touch", kind, path] => checks::touch(kind, Path::new(path)),
        ["bench", rest @ ..] => checks::bench::run(rest.first().copied()),
        ["hold"] => checks::hold(),
        ["list"] => {
            for (name, _) in checks::ALL {
                println!("{name}");
            }
            Ok(())
        }
        names => return checks(names),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kmod-check: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs all checks whose name has one of these in it.
fn checks(names: &[&str]) -> ExitCode {
    let (mut passed, mut failed) = (0, 0);
    for (name, check) in checks::ALL {
        if !names.is_empty() && !names.iter().any(|wanted| name.contains(wanted)) {
            continue;
        }
        let start = Instant::now();
        let done: Result<()> = check();
        let time = start.elapsed().as_secs_f64();
        match done {
            Ok(()) => {
                passed += 1;
                println!("ok      {name} ({time:.1} s)");
            }
            Err(error) => {
                failed += 1;
                println!("FAILED  {name} ({time:.1} s): {error:#}");
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    if failed == 0 && passed > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
