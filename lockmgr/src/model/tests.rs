use super::*;
use crate::fsm::Flaw;

fn run(options: &Options) -> Report {
    explore(options, |_, _| {})
}

#[track_caller]
fn passes(options: &Options) {
    let report = run(options);
    if let Some(found) = report.found {
        panic!(
            "{:?} after {} states\n{}",
            found.problem,
            report.states,
            found.trace.join("\n")
        );
    }
    println!(
        "{options:?}: {} states, {} steps, depth {}",
        report.states, report.edges, report.depth
    );
}

#[track_caller]
fn finds(flaw: Flaw, options: &Options) -> Problem {
    let report = run(&Options {
        flaws: 1 << flaw as u32,
        ..*options
    });
    let found = report
        .found
        .unwrap_or_else(|| panic!("{flaw:?} not found in {} states", report.states));
    assert_ne!(found.problem, Problem::Limit, "{flaw:?}");
    println!("{flaw:?}: {:?} after {} steps", found.problem, found.trace.len());
    found.problem
}
