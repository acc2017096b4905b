//! What callers of the manager rely on, case by case. Operations on memory take effect at once, or when the
//! test lets them; messages wait until they are delivered.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod pair;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use common::{Memory, layout};
use lockmgr::{LeaseError, LeaseManager, ManagerConfig, Mode, NodeId, OwnerWord, RecordId, Relinquish};
use pair::{ID, SOON, bump, pair, pair_of, pair_with, payload};
use rdma_transport::AsyncOp;

#[test]
fn a_lease_is_kept_and_covers_weaker_modes() {
    let p = pair(Duration::ZERO);
    assert!(p.managers[0].try_enter(ID, Mode::Shared).is_none());
    let guard = p.managers[0].enter(ID, Mode::Exclusive, SOON).unwrap();
    assert_eq!(
        (guard.id(), guard.mode(), guard.version()),
        (ID, Mode::Exclusive, 0)
    );
    drop(guard);
    assert!(p.managers[0].try_enter(ID, Mode::Shared).is_some());
    assert!(
        p.managers[0]
            .handle(ID)
            .unwrap()
            .try_enter(Mode::Exclusive)
            .is_some()
    );
    assert_eq!(p.managers[0].held(ID), Some((Mode::Exclusive, 0)));
    let stats = p.managers[0].stats();
    assert_eq!(
        (
            stats.cached_hits,
            stats.acquires,
            stats.batches,
            stats.messages_sent
        ),
        (2, 1, 1, 0)
    );
}

#[test]
fn hand_over_carries_version_and_attributes() {
    let p = pair(Duration::ZERO);
    drop(p.managers[0].enter(ID, Mode::Exclusive, SOON).unwrap());
    let got = p.park(1, Mode::Exclusive);
    p.deliver();
    assert_eq!(p.sides[0].log.lock().revokes, [(Mode::Exclusive, None)]);
    // The gate is open until it is closed.
    let inside = p.managers[0].try_enter(ID, Mode::Exclusive).unwrap();
    let drained = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&drained);
    p.managers[0].close_gate(ID, Box::new(move || bump(&seen)));
    assert!(p.managers[0].try_enter(ID, Mode::Shared).is_none());
    assert_eq!(drained.load(SeqCst), 0);
    let early = p.managers[0].relinquished(ID, payload(b"x"));
    assert!(matches!(early, Err(LeaseError::Misuse { .. })), "{early:?}");
    // Served again, then for the last time.
    p.managers[0].open_gate(ID);
    drop(p.managers[0].try_enter(ID, Mode::Shared).unwrap());
    drop(inside);
    assert_eq!(drained.load(SeqCst), 0);
    assert_eq!(p.bring_down(0, payload(b"size=7")), 1);
    p.deliver();
    assert_eq!(got.lock().take().unwrap().unwrap().version(), 1);
    assert_eq!(
        p.sides[1].log.lock().grants,
        [(Mode::Exclusive, 1, Some(b"size=7".to_vec()))]
    );
    assert_eq!(p.managers[0].held(ID), None);
    assert_eq!(p.managers[0].stats().hand_overs, 1);
}

#[test]
fn a_writer_keeps_reading_when_only_readers_come() {
    let p = pair(Duration::ZERO);
    drop(p.managers[0].enter(ID, Mode::Exclusive, SOON).unwrap());
    let got = p.park(1, Mode::Shared);
    p.deliver();
    assert_eq!(
        p.sides[0].log.lock().revokes,
        [(Mode::Exclusive, Some(Mode::Shared))]
    );
    assert_eq!(p.bring_down(0, payload(b"a")), 1);
    let local = p.park(0, Mode::Shared);
    p.deliver();
    assert_eq!(got.lock().take().unwrap().unwrap().version(), 1);
    assert_eq!(local.lock().take().unwrap().unwrap().version(), 1);
    for m in &p.managers {
        assert_eq!(m.held(ID), Some((Mode::Shared, 1)));
    }
}

#[test]
fn a_free_record_waits_for_the_confirmation() {
    let p = pair(Duration::ZERO);
    drop(p.managers[0].enter(ID, Mode::Exclusive, SOON).unwrap());
    p.managers[0].release(ID);
    p.bring_down(
        0,
        Relinquish {
            modified: true,
            needs_confirm: true,
            payload: Vec::new(),
        },
    );
    assert_eq!(p.managers[0].snapshot()[0].state, "awaiting confirmation");
    assert_eq!(p.sides[0].log.lock().confirms, [1]);
    p.managers[0].confirmed(ID, 1);
    assert!(p.managers[0].snapshot().is_empty());
    p.memory.assert_all_free("confirmed");
}

#[test]
fn an_owner_that_let_readers_in_writes_again_without_the_storage_node() {
    let p = pair_of(|cfg| cfg.keep_word = Duration::from_secs(100));
    let (writer, reader) = (&p.managers[0], &p.managers[1]);
    drop(writer.enter(ID, Mode::Exclusive, SOON).unwrap());
    let modified = |attrs: &[u8]| Relinquish {
        needs_confirm: true,
        ..payload(attrs)
    };
    for round in 1..=3 {
        let reads = p.park(1, Mode::Shared);
        p.deliver();
        assert_eq!(p.bring_down(0, modified(b"a")), round);
        p.deliver();
        assert_eq!(reads.lock().take().unwrap().unwrap().version(), round);
        assert_eq!(writer.snapshot()[0].state, "sharing");
        // The owner reads on, and writes again: one message there, one back.
        let batches = writer.stats().batches;
        assert_eq!(writer.try_enter(ID, Mode::Shared).unwrap().version(), round);
        let writes = p.park(0, Mode::Exclusive);
        p.deliver();
        p.bring_down(1, Relinquish::default());
        p.deliver();
        assert_eq!(writes.lock().take().unwrap().unwrap().version(), round);
        assert_eq!(writer.stats().batches, batches);
        assert_eq!(reader.held(ID), None);
    }
    // Given up for good: what changed last is confirmed, once, then the record is free.
    writer.downgrade(ID);
    assert_eq!(p.bring_down(0, modified(b"b")), 4);
    assert_eq!(p.sides[0].log.lock().confirms, []);
    writer.expire(writer.next_deadline().unwrap() + Duration::from_secs(1));
    assert_eq!(p.sides[0].log.lock().confirms, [4]);
    // A late word about an earlier version says nothing about this one.
    writer.confirmed(ID, 3);
    assert_eq!(writer.snapshot()[0].state, "awaiting confirmation");
    writer.confirmed(ID, 4);
    assert_eq!(writer.snapshot()[0].state, "rest");
    assert_eq!(writer.held(ID), Some((Mode::Shared, 4)));
    assert_eq!(p.word(), OwnerWord::free(4).read_by(1, false));
    assert_eq!(writer.next_deadline(), None);
}

#[test]
fn nodes_that_take_turns_ask_each_other_first() {
    let p = pair(Duration::ZERO);
    drop(p.managers[0].enter(ID, Mode::Exclusive, SOON).unwrap());
    for turn in 1..=4 {
        let (taker, holder) = (turn % 2, (turn + 1) % 2);
        let before = p.managers[taker].stats().batches;
        let waits = p.park(taker, Mode::Exclusive);
        p.deliver();
        assert_eq!(p.bring_down(holder, payload(b"")), turn as u64);
        p.deliver();
        drop(waits.lock().take().unwrap().unwrap());
        // The first one cannot know whom to ask. The others leave the record to who hands over.
        let looked = p.managers[taker].stats().batches - before;
        assert_eq!(looked, u64::from(turn == 1));
    }
    // Who is remembered may own the word no more: then the record is looked at.
    p.managers[0].release(ID);
    p.bring_down(0, payload(b""));
    let waits = p.park(1, Mode::Exclusive);
    assert!(waits.lock().is_none());
    p.deliver();
    assert_eq!(waits.lock().take().unwrap().unwrap().version(), 5);
}

#[test]
fn a_node_that_is_gone_is_not_waited_for_on_a_guess() {
    let p = pair(Duration::ZERO);
    drop(p.managers[0].enter(ID, Mode::Exclusive, SOON).unwrap());
    let waits = p.park(1, Mode::Exclusive);
    p.deliver();
    p.bring_down(0, payload(b""));
    p.deliver();
    drop(waits.lock().take().unwrap().unwrap());
    p.managers[1].release(ID);
    p.bring_down(1, payload(b""));
    // Asked, and closes its connections without having read it.
    let waits = p.park(0, Mode::Exclusive);
    assert!(waits.lock().is_none());
    p.wire.lock().clear();
    p.managers[0].peer_gone(NodeId(1));
    drop(waits.lock().take().unwrap().unwrap());
    assert_eq!(p.word().writer, Some(NodeId(0)));
}

#[test]
fn a_kept_word_does_not_fall_behind_too_far() {
    let p = pair_of(|cfg| cfg.keep_word = Duration::from_secs(1000));
    drop(p.managers[0].enter(ID, Mode::Exclusive, SOON).unwrap());
    for version in 1..=OwnerWord::MOST_AHEAD + 10 {
        let reads = p.park(1, Mode::Shared);
        p.deliver();
        assert_eq!(p.bring_down(0, payload(b"a")), version);
        p.deliver();
        assert_eq!(reads.lock().take().unwrap().unwrap().version(), version);
        // Whoever buries this owner finds a version that nobody has seen.
        let word = p.word();
        assert!(
            word.version == version || word.freed_after_death().version > version,
            "{word:?}"
        );
        let writes = p.park(0, Mode::Exclusive);
        p.deliver();
        p.bring_down(1, Relinquish::default());
        p.deliver();
        assert!(writes.lock().take().unwrap().is_ok());
    }
    assert!(p.word().version > 0);
}

#[test]
fn minimum_hold_time() {
    let hold = Duration::from_secs(5);
    let p = pair(hold);
    drop(p.managers[0].enter(ID, Mode::Exclusive, SOON).unwrap());
    let _wants = p.park(1, Mode::Exclusive);
    p.deliver();
    assert!(p.sides[0].log.lock().revokes.is_empty());
    let until = p.managers[0].next_deadline().unwrap();
    p.managers[0].expire(until - Duration::from_secs(1));
    assert!(p.sides[0].log.lock().revokes.is_empty());
    p.managers[0].expire(until);
    assert_eq!(p.sides[0].log.lock().revokes.len(), 1);
}

/// Its owner says how long, and says it again when that is over.
#[test]
fn a_lease_is_kept_as_long_as_its_owner_likes() {
    let p = pair(Duration::ZERO);
    let keep = Duration::from_secs(5);
    p.sides[0].keeps.lock().extend([keep, keep]);
    drop(p.managers[0].enter(ID, Mode::Exclusive, SOON).unwrap());
    let _wants = p.park(1, Mode::Exclusive);
    p.deliver();
    let mut until = None;
    for _ in 0..2 {
        let next = p.managers[0].next_deadline();
        assert!(next > until, "asked again later");
        until = next;
        assert!(p.sides[0].log.lock().revokes.is_empty());
        p.managers[0].expire(until.unwrap());
    }
    assert_eq!(p.sides[0].log.lock().revokes.len(), 1);
    assert_eq!(p.sides[0].keeps.lock().len(), 0);
}

#[test]
fn waiting_ends_with_the_reason() {
    let p = pair(Duration::ZERO);
    drop(p.managers[0].enter(ID, Mode::Exclusive, SOON).unwrap());
    let error = p.managers[1].enter(ID, Mode::Shared, SOON).unwrap_err();
    assert!(
        matches!(
            error,
            LeaseError::Timeout {
                mode: Mode::Shared,
                ..
            }
        ),
        "{error}"
    );
    p.managers[1].peer_gone(NodeId(0));
    let error = p.managers[1].enter(ID, Mode::Shared, SOON).unwrap_err();
    assert_eq!(
        error,
        LeaseError::Unreachable {
            record: ID,
            node: NodeId(0)
        }
    );
    // The protocol goes on without the operations that gave up.
    p.deliver();
    p.bring_down(0, payload(b""));
    p.deliver();
    assert_eq!(p.managers[1].held(ID), Some((Mode::Shared, 1)));
}

#[test]
fn storage_away_and_back() {
    let p = pair(Duration::ZERO);
    *p.down.lock() = true;
    let error = p.managers[0].enter(ID, Mode::Shared, SOON).unwrap_err();
    assert!(
        matches!(error, LeaseError::StorageLost { shard: 0, .. }),
        "{error}"
    );
    let got = p.park(0, Mode::Shared);
    *p.down.lock() = false;
    p.managers[0].storage_reconnected(0);
    assert!(got.lock().take().unwrap().is_ok());
    // Lost while taking it back.
    p.managers[0].release(ID);
    *p.down.lock() = true;
    p.bring_down(0, Relinquish::default());
    *p.down.lock() = false;
    p.managers[0].storage_reconnected(0);
    p.memory.assert_all_free("released");
}

#[test]
fn leaving() {
    let p = pair(Duration::ZERO);
    drop(p.managers[0].enter(ID, Mode::Exclusive, SOON).unwrap());
    let left = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&left);
    p.managers[0].leave(Box::new(move || bump(&seen)));
    assert_eq!(
        p.managers[0].enter(RecordId(1), Mode::Shared, SOON).unwrap_err(),
        LeaseError::Leaving
    );
    assert_eq!(left.load(SeqCst), 0);
    p.bring_down(0, payload(b"last"));
    assert_eq!(left.load(SeqCst), 1);
    p.memory.assert_all_free("left");
}

#[test]
fn what_is_refused() {
    let p = pair(Duration::ZERO);
    let nowhere = RecordId::new(9, 1);
    let error = p.managers[0].enter(nowhere, Mode::Shared, SOON).unwrap_err();
    assert_eq!(error, LeaseError::NoSuchRecord { record: nowhere });
    assert!(matches!(
        p.managers[0].message(NodeId(1), b"junk"),
        Err(LeaseError::BadMessage { .. })
    ));
    let done = lockmgr::msg::LeaseMsg {
        record: ID,
        epoch: 0,
        incarnation: 1,
        body: lockmgr::msg::Body::Done,
    };
    let error = p.managers[0].message(NodeId(1), &done.encode()).unwrap_err();
    assert!(matches!(error, LeaseError::Violation { .. }), "{error}");
    assert!(matches!(
        p.managers[0].message(NodeId(0), &done.encode()),
        Err(LeaseError::BadMessage { .. })
    ));
    let long = Relinquish {
        payload: vec![0; 513],
        ..Relinquish::default()
    };
    assert!(matches!(
        p.managers[0].relinquished(ID, long),
        Err(LeaseError::PayloadTooLong { bytes: 513, .. })
    ));
    assert!(matches!(
        p.managers[0].relinquished(ID, Relinquish::default()),
        Err(LeaseError::Misuse { .. })
    ));
    let side = Arc::clone(&p.sides[0]);
    let cfg = ManagerConfig::new(NodeId(128), 1, layout());
    let error = LeaseManager::new(cfg, Arc::clone(&side) as _, side)
        .err()
        .unwrap();
    assert_eq!(
        error,
        LeaseError::NodeTooLarge {
            node: NodeId(128),
            max_nodes: 128
        }
    );
    assert!(p.managers[0].snapshot().is_empty());
}

#[test]
fn a_corrupt_record_is_left_alone() {
    let p = pair(Duration::ZERO);
    drop(p.managers[0].enter(ID, Mode::Exclusive, SOON).unwrap());
    // Somebody else writes the word of an owner.
    let word = OwnerWord::owned(NodeId(0), 1, 0).encode();
    p.memory.run(&AsyncOp::Cas {
        at: Memory::at(ID),
        expect: word,
        new: 99,
    });
    p.managers[0].release(ID);
    p.bring_down(0, payload(b""));
    let error = p.managers[0].enter(ID, Mode::Shared, SOON).unwrap_err();
    assert!(matches!(error, LeaseError::Violation { .. }), "{error}");
    assert_eq!(p.managers[0].stats().violations, 1);
    assert_eq!(p.managers[0].snapshot()[0].state, "broken");
}

#[test]
fn leases_got_ahead_are_asked_for_together() {
    let p = pair(Duration::ZERO);
    let ids = || (0..4).map(RecordId);
    let held = |i: usize| ids().filter(|id| p.managers[i].held(*id).is_some()).count();
    drop(p.managers[1].enter(ID, Mode::Exclusive, SOON).unwrap());
    let deadline = Instant::now() + Duration::from_secs(60);
    p.managers[0].acquire_ahead(ids(), Mode::Exclusive, deadline);
    assert_eq!((p.managers[0].stats().batches, held(0)), (1, 3));
    // The one that another has comes as any other.
    p.deliver();
    p.bring_down(1, Relinquish::default());
    p.deliver();
    assert_eq!((held(0), held(1)), (4, 0));
    let entered = |id| p.managers[0].try_enter(id, Mode::Exclusive).is_some();
    assert!(ids().all(entered));
}

#[test]
fn leases_got_ahead_survive_a_lost_connection() {
    let p = pair(Duration::ZERO);
    let ids = || (0..4).map(RecordId);
    *p.down.lock() = true;
    let deadline = Instant::now() + Duration::from_secs(60);
    p.managers[0].acquire_ahead(ids(), Mode::Exclusive, deadline);
    assert!(ids().all(|id| p.managers[0].held(id).is_none()));
    *p.down.lock() = false;
    p.managers[0].storage_lost(0);
    p.managers[0].storage_reconnected(0);
    assert!(ids().all(|id| p.managers[0].held(id).is_some()));
}

#[test]
fn more_leases_than_a_batch_holds_come_in_several() {
    let p = pair_with(100, |_| ());
    let ids = || (0..100).map(RecordId);
    let deadline = Instant::now() + Duration::from_secs(60);
    p.managers[0].acquire_ahead(ids(), Mode::Exclusive, deadline);
    assert!(ids().all(|id| p.managers[0].held(id).is_some()));
    let batches = p.managers[0].stats().batches;
    assert!((2..10).contains(&batches), "{batches}");
}
