//! Nodes that die at any step, one or two, and that come back.

use super::*;

/// A death, and what a small exploration needs to find a flaw.
const DEATH: Options = Options {
    budget: [1, 1, 1],
    crashes: 1,
    ..SMALL
};

#[test]
fn one_dies_with_everything_to_confirm() {
    passes(&Options {
        confirm: true,
        ..DEATH
    });
}

#[test]
fn one_dies_and_some_or_all_are_far() {
    for near in 0..3 {
        passes(&Options {
            near,
            voluntary: false,
            ..DEATH
        });
    }
}

#[test]
fn two_die() {
    passes(&Options {
        crashes: 2,
        confirm: true,
        ..DEATH
    });
}

#[test]
fn one_dies_and_comes_back() {
    passes(&Options {
        budget: [1, 1, 0],
        restarts: 1,
        confirm: true,
        ..DEATH
    });
}

#[test]
fn one_comes_back_and_dies_again() {
    passes(&Options {
        budget: [1, 1, 0],
        crashes: 2,
        restarts: 1,
        ..DEATH
    });
}

#[test]
fn one_dies_while_a_batch_is_lost() {
    passes(&Options {
        budget: [1, 1, 0],
        losses: 1,
        unmodified: true,
        ..DEATH
    });
}

/// Where the flaw shows, if it does in any of these.
#[track_caller]
fn finds_in_any(flaw: Flaw, all: &[Options]) {
    let flaws = 1 << flaw as u32;
    let found = all
        .iter()
        .find_map(|options| run(&Options { flaws, ..*options }).found);
    let found = found.unwrap_or_else(|| panic!("{flaw:?} not found"));
    assert_ne!(found.problem, Problem::Limit, "{flaw:?}");
    println!("{flaw:?}: {:?} after {} steps", found.problem, found.trace.len());
}

/// Leaves one flaw after the other in, and finds what it does.
#[test]
fn finds_what_is_left_out_when_one_dies() {
    let comes_back = Options { restarts: 1, ..DEATH };
    for flaw in [
        Flaw::QueueOutlivesEpoch,
        Flaw::OldRequestTaken,
        Flaw::AcquiredWhileRecovering,
        Flaw::BatchOutlivesEpoch,
        Flaw::DeadHeard,
        Flaw::NotAskedAgain,
        Flaw::GrantOfDeadKept,
    ] {
        finds_in_any(flaw, &[DEATH, comes_back]);
    }
}
