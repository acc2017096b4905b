//! Explores the lease protocol exhaustively.
//!
//! ```text
//! cargo run --release -p lockmgr --example model -- --budget 2,2,1 --unmodified --confirm --losses 1
//! ```

use std::process::ExitCode;
use std::time::Instant;

use lockmgr::model::{Options, explore};

const USAGE: &str = "options: --budget N,N,N  --no-keep  --no-keep-word  --no-ask-first  --near N  --unmodified  --no-voluntary  --confirm  --leave  \
                     --losses N  --crashes N  --restarts N  --no-symmetry  --depth-first  --max-states N";

fn options() -> Result<Options, String> {
    let mut options = Options::default();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value; {USAGE}"));
        let number = |v: &str| v.parse::<usize>().map_err(|e| format!("{v}: {e}; {USAGE}"));
        match arg.as_str() {
            "--budget" => {
                let value = value()?;
                let parts = value.split(',').map(number).collect::<Result<Vec<_>, _>>()?;
                let [a, b, c] = parts[..] else {
                    return Err(format!("three budgets are needed; {USAGE}"));
                };
                options.budget = [a as u8, b as u8, c as u8];
            }
            "--no-keep" => options.keep_shared = false,
            "--no-keep-word" => options.keep_word = false,
            "--no-ask-first" => options.ask_first = false,
            "--near" => options.near = number(&value()?)? as u8,
            "--unmodified" => options.unmodified = true,
            "--no-voluntary" => options.voluntary = false,
            "--confirm" => options.confirm = true,
            "--leave" => options.leave = true,
            "--losses" => options.losses = number(&value()?)? as u8,
            "--crashes" => options.crashes = number(&value()?)? as u8,
            "--restarts" => options.restarts = number(&value()?)? as u8,
            "--depth-first" => options.depth_first = true,
            "--no-symmetry" => options.symmetry = false,
            "--max-states" => options.max_states = number(&value()?)?,
            _ => return Err(format!("unknown option {arg}; {USAGE}")),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::FAILURE;
        }
    };
    println!("{options:?}");
    let start = Instant::now();
    let report = explore(&options, |states, depth| {
        println!(
            "{states} states, depth {depth}, {:.0} s",
            start.elapsed().as_secs_f64()
        );
    });
    println!(
        "{} states, {} steps, {} quiescent, depth {}, {:.0} s",
        report.states,
        report.edges,
        report.quiescent,
        report.depth,
        start.elapsed().as_secs_f64()
    );
    match report.found {
        None => {
            println!("no problem; every execution ends");
            ExitCode::SUCCESS
        }
        Some(found) => {
            println!("PROBLEM {:?}", found.problem);
            found.trace.iter().for_each(|line| println!("  {line}"));
            ExitCode::FAILURE
        }
    }
}
