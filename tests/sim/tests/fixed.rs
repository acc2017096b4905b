//! The seeds that every run of the tests goes through, and what the simulation promises of itself. `make sim SEEDS=…` has any others.

use fsd_sim::flaws::Flaws;
use fsd_sim::scenario::{Size, run};

#[test]
fn nothing_is_wrong() {
    let mut failed = Vec::new();
    for seed in 1..=250 {
        let report = run(seed, Size::default(), Flaws::default());
        if let Some(failure) = report.failure {
            let last = report.notes.len().saturating_sub(40);
            report.notes[last..].iter().for_each(|note| println!("{note}"));
            println!("seed {seed} failed after {:?}: {failure}", report.time);
            failed.push(seed);
        }
    }
    assert!(
        failed.is_empty(),
        "seeds {failed:?}: fsd-sim --seeds N --verbose tells all"
    );
}

#[test]
fn a_seed_says_everything() {
    for seed in [2, 3, 5, 8] {
        let reports = [(); 2].map(|()| run(seed, Size::default(), Flaws::default()));
        let [first, second] = reports.map(|r| (r.hash, r.time, r.switches));
        assert_eq!(first, second, "seed {seed}");
    }
}

/// What is left out of the product is found, each within so many seeds.
#[test]
fn what_is_left_out_is_found() {
    for (name, most) in [
        ("MoveForgets", 100),
        ("InPlace", 100),
        ("IndexFirst", 100),
        ("MarkedEarly", 100),
        ("NumbersEarly", 100),
        ("ReplayedAnyhow", 100),
        ("LeftEarly", 100),
        ("WindowForgotten", 100),
        ("EndsNotCut", 100),
        ("VersionFromWord", 100),
        ("VersionNotMoved", 100),
        ("HandOverWithCaches", 100),
        ("LoserKeepsShared", 100),
        ("KeptWithoutRevoking", 100),
        ("BitLeftOn", 100),
    ] {
        let flaws: Flaws = name.parse().expect("a flaw");
        let found = (1..=most).any(|seed| run(seed, Size::default(), flaws).failure.is_some());
        assert!(found, "{name} is not found in {most} seeds");
    }
}
