//! `contended DIR… [--tasks N] [--steps N] [--rounds N] [--seed N] [--extension]`: several tasks of each mount at the same files.
//!
//! Prints what each round did; exit status 1 where something was lost, torn or stale.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use system_tests::contended::{Plan, prove};

const USAGE: &str =
    "usage: contended DIR… [--tasks N] [--steps N] [--rounds N] [--seed N] [--extension] [--sync]";

fn main() -> ExitCode {
    let mut plan = Plan {
        tasks: 3,
        steps: 200,
        seed: rand::random(),
        extension: false,
    };
    let (mut rounds, mut dirs, mut sync) = (1, Vec::new(), false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|n| n.parse::<u64>().ok());
        let known = match arg.as_str() {
            "--tasks" => number().map(|n| plan.tasks = n as usize),
            "--steps" => number().map(|n| plan.steps = n as usize),
            "--rounds" => number().map(|n| rounds = n),
            "--seed" => number().map(|n| plan.seed = n),
            "--extension" => {
                plan.extension = true;
                Some(())
            }
            "--sync" => {
                sync = true;
                Some(())
            }
            dir if !dir.starts_with('-') => {
                dirs.push(PathBuf::from(dir));
                Some(())
            }
            _ => None,
        };
        if known.is_none() {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    }
    if sync {
        for dir in &dirs {
            if let Err(error) = File::open(dir).and_then(|dir| Ok(rustix::fs::syncfs(dir)?)) {
                println!("{}: {error}", dir.display());
                return ExitCode::FAILURE;
            }
        }
        return ExitCode::SUCCESS;
    }
    let dirs: Vec<&Path> = dirs.iter().map(PathBuf::as_path).collect();
    let mut failed = 0;
    for round in 0..rounds {
        match prove(&dirs, &plan) {
            Ok(done) => println!(
                "round {round}: {} records, {} writes, {} places read: right",
                done.appended, done.writes, done.reads
            ),
            Err(error) => {
                failed += 1;
                println!("round {round}: {error:#}");
            }
        }
        plan.seed = plan.seed.wrapping_add(1);
    }
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
