mod deaths;

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

/// The flaw is found wherever the holder bits are; what it leads to where they are as `options` say.
#[track_caller]
fn finds(flaw: Flaw, options: &Options) -> Problem {
    finds_as_is(flaw, &Options { near: 0, ..*options });
    finds_as_is(flaw, options)
}

#[track_caller]
fn finds_as_is(flaw: Flaw, options: &Options) -> Problem {
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

/// What a small exploration needs to find a flaw.
const SMALL: Options = Options {
    budget: [2, 1, 1],
    keep_shared: true,
    keep_word: true,
    ask_first: true,
    near: 3,
    unmodified: false,
    voluntary: true,
    confirm: false,
    leave: false,
    losses: 0,
    crashes: 0,
    restarts: 0,
    flaws: 0,
    symmetry: true,
    depth_first: false,
    max_states: 3_000_000,
};

#[test]
fn one_lease_each_with_everything() {
    passes(&Options {
        budget: [1, 1, 1],
        unmodified: true,
        confirm: true,
        leave: true,
        ..SMALL
    });
}

#[test]
fn one_lease_each_with_two_lost_batches() {
    passes(&Options {
        budget: [1, 1, 0],
        unmodified: true,
        confirm: true,
        losses: 2,
        ..SMALL
    });
    passes(&Options {
        budget: [1, 1, 1],
        losses: 1,
        ..SMALL
    });
}

#[test]
fn upgrades_and_downgrades() {
    passes(&SMALL);
}

#[test]
fn some_or_all_nodes_are_far() {
    for near in 0..3 {
        passes(&Options { near, ..SMALL });
        passes(&Options {
            budget: [1, 1, 1],
            near,
            losses: 1,
            ..SMALL
        });
    }
}

#[test]
fn without_keeping_the_word_or_shared() {
    for keep_shared in [true, false] {
        passes(&Options {
            keep_shared,
            keep_word: false,
            ..SMALL
        });
    }
}

#[test]
fn two_nodes_three_leases() {
    passes(&Options {
        budget: [3, 2, 0],
        unmodified: true,
        confirm: true,
        ..SMALL
    });
}

#[test]
fn symmetry_reduction_hides_nothing() {
    // All nodes alike, and one that is not: at most so many states are one.
    for (near, alike) in [(3, 6), (2, 2)] {
        let options = Options {
            budget: [1, 1, 1],
            near,
            ..SMALL
        };
        let all = run(&Options {
            symmetry: false,
            ..options
        });
        let some = run(&options);
        assert!(all.found.is_none() && some.found.is_none());
        assert!(some.states * alike * 2 < all.states * 3 && some.states * alike >= all.states);
        assert_eq!(all.depth, some.depth);
    }
}

#[test]
fn the_order_of_the_search_does_not_matter() {
    let deep = run(&Options {
        budget: [1, 1, 1],
        depth_first: true,
        ..SMALL
    });
    let broad = run(&Options {
        budget: [1, 1, 1],
        ..SMALL
    });
    assert!(deep.found.is_none() && broad.found.is_none());
    assert_eq!(
        (deep.states, deep.edges, deep.quiescent),
        (broad.states, broad.edges, broad.quiescent)
    );
}

#[test]
fn finds_done_while_acquiring() {
    assert_eq!(finds(Flaw::DoneWhileAcquiring, &SMALL), Problem::MutualExclusion);
}

#[test]
fn finds_done_while_freeing() {
    assert_eq!(finds(Flaw::DoneWhileFreeing, &SMALL), Problem::MutualExclusion);
}

#[test]
fn finds_done_before_invalidated() {
    assert_eq!(
        finds(Flaw::DoneBeforeInvalidated, &SMALL),
        Problem::MutualExclusion
    );
}

#[test]
fn finds_endless_retries() {
    // Who asks the next owner at once does not come back to the one that is still handing over.
    let looking = Options {
        ask_first: false,
        ..SMALL
    };
    for flaw in [
        Flaw::RetryWhileAcquiring,
        Flaw::RetryWhileWaiting,
        Flaw::RetryWhileReleasing,
    ] {
        assert_eq!(finds(flaw, &looking), Problem::Cycle, "{flaw:?}");
    }
}

#[test]
fn finds_bit_left_on() {
    finds(Flaw::BitLeftOn, &SMALL);
}

#[test]
fn finds_version_from_word() {
    finds(Flaw::VersionFromWord, &SMALL);
}

#[test]
fn finds_forgotten_readers() {
    assert_eq!(finds(Flaw::GrantedForgotten, &SMALL), Problem::MutualExclusion);
}

#[test]
fn finds_free_before_acks() {
    finds(Flaw::FreeBeforeAcks, &SMALL);
}

#[test]
fn finds_version_not_moved() {
    finds(Flaw::VersionNotMoved, &SMALL);
}

#[test]
fn finds_hand_over_with_caches() {
    assert_eq!(finds(Flaw::HandOverWithCaches, &SMALL), Problem::MutualExclusion);
}

#[test]
fn finds_unconfirmed_free() {
    assert_eq!(
        finds(
            Flaw::FreeUnconfirmed,
            &Options {
                confirm: true,
                ..SMALL
            }
        ),
        Problem::Unconfirmed
    );
}

#[test]
fn finds_reposted_batch() {
    finds(Flaw::RepostAll, &Options { losses: 1, ..SMALL });
}

#[test]
fn finds_exclusive_beside_readers_of_a_kept_word() {
    assert_eq!(finds(Flaw::KeptWithoutRevoking, &SMALL), Problem::MutualExclusion);
}

#[test]
fn finds_confirmation_of_an_earlier_version() {
    assert_eq!(
        finds(
            Flaw::AnyConfirmation,
            &Options {
                confirm: true,
                ..SMALL
            }
        ),
        Problem::Unconfirmed
    );
}

#[test]
fn finds_holders_overlooked_in_the_word() {
    assert_eq!(finds_as_is(Flaw::NearForgotten, &SMALL), Problem::MutualExclusion);
}

#[test]
fn finds_holders_overlooked_in_the_map() {
    for (flaw, near) in [
        (Flaw::FarUnsaid, 0),
        (Flaw::FarUnsaid, 2),
        (Flaw::FarForgotten, 0),
        (Flaw::FarForgotten, 2),
    ] {
        let found = finds_as_is(flaw, &Options { near, ..SMALL });
        assert_eq!(found, Problem::MutualExclusion, "{flaw:?} {near}");
    }
}

#[test]
fn without_asking_first() {
    passes(&Options {
        ask_first: false,
        ..SMALL
    });
}

#[test]
fn finds_loser_that_keeps_shared() {
    finds(Flaw::LoserKeepsShared, &SMALL);
}
