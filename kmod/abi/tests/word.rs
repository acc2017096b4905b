//! The protocol of the word, one step after the other.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::{AtomicU64, Ordering};

use distfuse_abi::word::*;

fn held(mode: Mode) -> AtomicU64 {
    let word = AtomicU64::new(0);
    assert!(grant(&word, mode).is_some());
    word
}

fn now(word: &AtomicU64) -> Word {
    Word(word.load(Ordering::Relaxed))
}

#[test]
fn a_clean_lease_goes_in_one_step() {
    let word = held(Mode::Shared);
    assert_eq!(revoke(&word, Mode::None, false), Revoked::Unused);
    assert!(enter(&word, Mode::Shared, 0) && !leave(&word));
    assert_eq!(revoke(&word, Mode::None, false), Revoked::Done { wake: false });
    assert_eq!(now(&word).mode(), Mode::None);
    let before = now(&word).generation();
    assert!(grant(&word, Mode::Shared).is_some());
    assert_ne!(now(&word).generation(), before);
}

#[test]
fn a_dirty_lease_waits_for_its_flush() {
    let word = held(Mode::Exclusive);
    assert!(enter(&word, Mode::Exclusive, DIRTY | MAPPED));
    let Revoked::Pending(pending) = revoke(&word, Mode::Shared, false) else {
        unreachable!()
    };
    assert!(pending.needs_flush(Mode::Shared) && pending.inside == 1);
    assert!(!enter(&word, Mode::Shared, 0));
    assert!(leave(&word));
    assert!(matches!(finish(&word, Mode::Shared), Revoked::Pending(_)));
    word.fetch_and(!DIRTY, Ordering::Relaxed);
    word.fetch_or(WAITERS, Ordering::Relaxed);
    assert_eq!(finish(&word, Mode::Shared), Revoked::Done { wake: true });
    assert!(enter(&word, Mode::Shared, 0) && !enter(&word, Mode::Exclusive, 0));
}

#[test]
fn more_of_a_lease_keeps_its_generation_and_those_inside() {
    let word = held(Mode::Shared);
    assert!(enter(&word, Mode::Shared, 0));
    let before = now(&word);
    assert!(grant(&word, Mode::Exclusive).is_some());
    assert_eq!(now(&word).generation(), before.generation());
    assert_eq!(now(&word).count(), 1);
    assert!(grant(&word, Mode::Shared).is_none());
}

#[test]
fn generations_skip_zero() {
    let word = AtomicU64::new(u64::from(u32::MAX) << GENERATION_SHIFT);
    assert!(grant(&word, Mode::Shared).is_some());
    assert_eq!(now(&word).generation(), 1);
}

#[test]
fn a_revocation_can_be_called_off() {
    let word = held(Mode::Exclusive);
    assert!(enter(&word, Mode::Exclusive, DIRTY));
    assert!(matches!(revoke(&word, Mode::None, true), Revoked::Pending(_)));
    assert!(!cancel(&word));
    assert!(enter(&word, Mode::Exclusive, 0));
    assert!(!leave(&word) && !leave(&word));
}
