//! Deaths of mounts: what the server does, in which order, and what becomes of it where somebody is away or dies meanwhile.

pub mod stage;
mod table_tests;

use std::sync::Arc;
use std::time::Duration;

use rdma_transport::{ConnId, Connection, TransportError};

use crate::crash_tests::world::{NODES, join};
use crate::journal::records::{encode, key};
use crate::nodes::mounts::Done;
use fsd_node::fake_conn::FakeConn;
use fsd_node::store::Store;
use fsd_proto::ino;
use fsd_proto::rpc::{Errno, RpcError};
use fsd_proto::wire::{Hello, MetaReply, MetaRequest, PeerState, Role, StorageRequest, View};
use stage::{Cluster, OWNED, dead, lock, set};

#[test]
fn what_a_dead_mount_had_is_taken_back_behind_the_fence_and_the_answers() {
    let mut cluster = Cluster::new(2);
    let (alive, gone) = (cluster.conn(0), cluster.conn(1));
    let evicting = cluster.evict(1);
    cluster.advance();
    let view = View {
        epoch: 1,
        dead: vec![dead(1)],
    };
    assert_eq!(cluster.view(), view);
    assert_eq!(cluster.store.get(&key::view()).unwrap(), Some(encode(&view)));
    assert!(!gone.is_alive() && alive.is_alive());
    assert_eq!(cluster.storage.fenced(), [0, 1]);
    assert_eq!(cluster.mounts.last(&alive), Some(view));
    assert!(cluster.mounts.last(&gone).is_none());
    assert!(
        cluster
            .waits()
            .contains("recovery of mount 1 (mount 2) waits for mount 0")
    );
    // Nothing is freed, and nobody new comes in, before the other mount has got there.
    let newcomer = FakeConn::new(3);
    for _ in 0..3 {
        cluster.advance();
        assert!(cluster.storage.freed.lock().is_empty());
        let refused = cluster.ask(&newcomer, &join(None, 3));
        assert_eq!(refused, Some(Err(Errno(libc::EAGAIN))));
        assert!(cluster.tool.taken::<MetaReply>(evicting).is_none());
    }
    assert_eq!(
        cluster.mounts.told.lock().len(),
        1,
        "it is told once on a connection"
    );
    cluster.mounts.answer(&Ok(()));
    cluster.advance();
    assert_eq!(cluster.storage.freed.lock().len(), NODES);
    // The file that it owned is cut before its record is free, and no other.
    let asked = cluster.storage.asked.lock().clone();
    let first = |what: fn(&StorageRequest) -> bool| asked.iter().position(|(_, r)| what(r));
    let cut = first(|r| matches!(r, StorageRequest::Cut { .. }));
    assert!(cut.is_some() && cut < first(|r| matches!(r, StorageRequest::Recover { .. })));
    let ends = vec![(ino::compose(0, 0, OWNED), None)];
    assert_eq!(asked[cut.unwrap()].1, StorageRequest::Cut { ends });
    let after = View {
        epoch: 1,
        dead: Vec::new(),
    };
    assert_eq!(cluster.mounts.last(&alive), Some(after));
    assert_eq!(
        cluster.tool.taken::<MetaReply>(evicting),
        Some(Ok(MetaReply::Done))
    );
    assert!(cluster.waits().is_empty());
    // Its number is free, for the next incarnation.
    match cluster.ask(&newcomer, &join(None, 3)) {
        Some(Ok(MetaReply::Joined(joined))) => {
            assert_eq!((joined.node, joined.incarnation, joined.epoch), (1, 2, 1));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn evictions_that_make_no_sense_are_refused() {
    let mut cluster = Cluster::new(2);
    let none = cluster.evict(7);
    let first = cluster.evict(1);
    cluster.advance();
    let second = cluster.evict(1);
    cluster.advance();
    let tool = Arc::clone(&cluster.tool);
    let taken = |number| tool.taken::<MetaReply>(number);
    assert_eq!(taken(none), Some(Err(Errno(libc::ENOENT))));
    assert_eq!(taken(second), Some(Err(Errno(libc::EALREADY))));
    assert_eq!(taken(first), None);
    let conn = cluster.conn(0);
    let mount = cluster.ask(&conn, &MetaRequest::Evict { node: 0 });
    assert_eq!(mount, Some(Err(Errno(libc::EPERM))));
}

/// Case 30, and 12: whoever was declared dead is told so, whatever it asks and however it comes.
#[test]
fn the_dead_are_told_that_they_are() {
    let mut cluster = Cluster::new(2);
    let (alive, gone) = (cluster.conn(0), cluster.conn(1));
    assert_eq!(
        cluster.ask(&gone, &MetaRequest::Heartbeat),
        Some(Ok(MetaReply::Done))
    );
    cluster.evict(1);
    for _ in 0..2 {
        cluster.advance();
        for request in [
            MetaRequest::Heartbeat,
            MetaRequest::GetAttr { ino: ino::ROOT },
            MetaRequest::Leave,
            join(Some((1, 1)), 2),
        ] {
            assert_eq!(cluster.ask(&gone, &request), Some(Err(Errno(libc::ESTALE))));
        }
        assert_eq!(
            cluster.ask(&alive, &MetaRequest::Heartbeat),
            Some(Ok(MetaReply::Done))
        );
        cluster.finish();
    }
    let unknown = FakeConn::new(9);
    assert_eq!(
        cluster.ask(&unknown, &MetaRequest::Heartbeat),
        Some(Err(Errno(libc::ESTALE)))
    );
}

/// Case 24: another mount dies while the first one's things are taken back.
#[test]
fn a_second_death_begins_the_recovery_again() {
    let mut cluster = Cluster::new(3);
    let alive = cluster.conn(0);
    cluster.evict(1);
    cluster.advance();
    // One has answered, the other dies instead.
    let first: Vec<Done> = {
        let mut told = cluster.mounts.told.lock();
        let theirs = told.iter_mut().filter(|(id, ..)| *id == alive.id());
        theirs.filter_map(|(.., done)| done.take()).collect()
    };
    first.into_iter().for_each(|done| done(Ok(())));
    cluster.advance();
    assert!(cluster.storage.freed.lock().is_empty());
    cluster.evict(2);
    cluster.advance();
    assert_eq!((cluster.view().epoch, cluster.view().dead.len()), (2, 2));
    assert_eq!(cluster.mounts.last(&alive), Some(cluster.view()));
    assert!(
        cluster.storage.freed.lock().is_empty(),
        "the answer was to the epoch before"
    );
    cluster.finish();
    assert_eq!(cluster.storage.freed.lock().len(), NODES);
    assert_eq!(cluster.state(1), None);
    assert_eq!(cluster.state(2), None);
    assert_eq!(cluster.view().epoch, 2);
}

/// Cases 15 and 18: locks of the dead are others' only when it is shut out everywhere.
#[test]
fn a_storage_node_that_is_away_is_waited_for_and_locks_stay_until_then() {
    let mut cluster = Cluster::new(2);
    let (alive, gone) = (cluster.conn(0), cluster.conn(1));
    assert_eq!(cluster.ask(&gone, &set(1)), Some(Ok(MetaReply::Done)));
    let hello = Hello::new("test", Role::Client(None), 1);
    let waiting = cluster.send_as(&hello, &alive, &set(0));
    cluster.storage.away.lock().insert(1);
    cluster.evict(1);
    for _ in 0..3 {
        cluster.advance();
        cluster.mounts.answer(&Ok(()));
    }
    // Nobody has to stop for it.
    assert!(cluster.mounts.last(&alive).is_none_or(|view| view.epoch == 0));
    assert!(
        cluster
            .waits()
            .contains("recovery of mount 1 (mount 2) waits for storage node 1")
    );
    assert!(cluster.storage.freed.lock().is_empty());
    assert_eq!(alive.taken::<MetaReply>(waiting), None);
    cluster.storage.away.lock().clear();
    cluster.advance();
    assert_eq!(alive.taken::<MetaReply>(waiting), Some(Ok(MetaReply::Done)));
    assert_eq!(cluster.mounts.last(&alive), Some(cluster.view()));
    cluster.finish();
}

/// Case 27: the server dies after each request to a storage node; the next life goes on with what is not finished, and ends the same.
#[test]
fn a_server_that_dies_in_the_middle_finishes_in_its_next_life() {
    for fuel in 0..40 {
        let mut cluster = Cluster::new(2);
        *cluster.storage.fuel.lock() = Some(fuel);
        cluster.evict(1);
        for _ in 0..4 {
            cluster.advance();
            cluster.mounts.answer(&Ok(()));
        }
        if cluster.view().dead.is_empty() {
            assert!(fuel > 5, "only {fuel} places to die at");
            return;
        }
        *cluster.storage.fuel.lock() = None;
        cluster.restart(&[0]);
        assert_eq!(cluster.view().dead, [dead(1)], "it is durable");
        cluster.finish();
        assert_eq!((cluster.view().epoch, cluster.state(1)), (1, None));
        let asked = cluster.storage.asked.lock().clone();
        let cuts = |(_, r): &&(u16, StorageRequest)| matches!(r, StorageRequest::Cut { .. });
        assert!(
            asked.iter().filter(cuts).count() >= NODES,
            "the file was not cut: {asked:?}"
        );
        assert_eq!(cluster.storage.freed.lock().len(), NODES);
    }
    panic!("it never finishes");
}

#[test]
fn a_mount_that_reconnects_is_told_again_and_one_that_is_not_ready_too() {
    let mut cluster = Cluster::new(2);
    cluster.evict(1);
    cluster.advance();
    // It had not even begun to listen.
    cluster.mounts.answer(&Err(RpcError::Errno(Errno(libc::EAGAIN))));
    cluster.advance();
    assert_eq!(cluster.mounts.told.lock().len(), 1, "not at once");
    rt::thread::sleep(Duration::from_millis(250));
    cluster.advance();
    assert_eq!(cluster.mounts.told.lock().len(), 2);
    // Its connection breaks, and it comes back.
    let members = Arc::clone(&cluster.service.membership.members);
    members.disconnected(ConnId(1));
    cluster.mounts.answer(&Err(TransportError::Shutdown.into()));
    let conn = FakeConn::new(101);
    assert!(matches!(
        cluster.ask(&conn, &join(Some((0, 1)), 1)),
        Some(Ok(MetaReply::Joined(_)))
    ));
    cluster.advance();
    assert_eq!(cluster.mounts.last(&conn), Some(cluster.view()));
    cluster.finish();
}

/// Cases 7, 15 and 16: the term counts, connected or not; and what the server was not there for does not.
#[test]
fn who_is_silent_dies_at_the_end_of_its_term_and_not_before() {
    let cluster = Cluster::new(3);
    let gone = cluster.conn(1);
    let terms = cluster.service.membership.members.terms;
    let term = Duration::from_millis(terms.term_ms + terms.margin_ms);
    cluster.silent(1, term - Duration::from_secs(1));
    cluster.service.judge();
    assert_eq!(cluster.state(1), Some(PeerState::Late));
    assert_eq!(cluster.state(2), Some(PeerState::Up));
    cluster.silent(1, Duration::from_secs(1));
    cluster.service.judge();
    assert_eq!(cluster.state(1), Some(PeerState::Dead));
    assert!(!gone.is_alive());
    // The server was stopped for long: the others are not silent for that.
    let members = &cluster.service.membership.members;
    members.judge(rt::time::Instant::now() + term * 3);
    assert_eq!(cluster.view().dead.len(), 1);
}

#[test]
fn when_all_mounts_are_dead_everything_is_reset() {
    let mut cluster = Cluster::new(2);
    cluster.evict(0);
    cluster.evict(1);
    cluster.finish();
    let resets = cluster.storage.asked(|r| *r == StorageRequest::ResetLeases);
    assert_eq!(resets, [0, 1]);
    assert!(cluster.storage.freed.lock().is_empty());
}

/// Case 19: after a restart nobody gets a lock that another mount may have, whether that comes back or is dead.
#[test]
fn locks_survive_a_restart_and_nobody_else_gets_them_meanwhile() {
    let mut cluster = Cluster::new(3);
    let hello = Hello::new("test", Role::Client(None), 1);
    cluster.restart(&[0]);
    let conn = cluster.conn(0);
    let asking = cluster.send_as(&hello, &conn, &set(0));
    let testing = cluster.send_as(&hello, &conn, &MetaRequest::GetLock { lock: lock(0) });
    assert_eq!(conn.taken::<MetaReply>(asking), None);
    // One comes back, and has the lock; the other is dead.
    let back = FakeConn::new(102);
    let mut again = join(Some((1, 1)), 2);
    if let MetaRequest::Join { locks, .. } = &mut again {
        locks.push(lock(1));
    }
    let joined = cluster.ask(&back, &again);
    assert!(matches!(joined, Some(Ok(MetaReply::Joined(_)))), "{joined:?}");
    assert_eq!(conn.taken::<MetaReply>(testing), None);
    cluster.evict(2);
    cluster.advance();
    assert_eq!(
        conn.taken::<MetaReply>(testing),
        Some(Ok(MetaReply::Lock(Some(lock(1)))))
    );
    assert_eq!(conn.taken::<MetaReply>(asking), None, "the other has it");
    let mut unlock = lock(1);
    unlock.kind = None;
    let unlocking = MetaRequest::SetLock {
        lock: unlock,
        wait: false,
    };
    assert_eq!(cluster.ask(&back, &unlocking), Some(Ok(MetaReply::Done)));
    assert_eq!(conn.taken::<MetaReply>(asking), Some(Ok(MetaReply::Done)));
}

#[test]
fn a_lock_that_waits_for_the_others_can_be_given_up() {
    let mut cluster = Cluster::new(2);
    let hello = Hello::new("test", Role::Client(None), 1);
    cluster.restart(&[0]);
    let conn = cluster.conn(0);
    let asking = cluster.send_as(&hello, &conn, &set(0));
    let cancel = MetaRequest::CancelLock { lock: lock(0) };
    assert_eq!(cluster.ask(&conn, &cancel), Some(Ok(MetaReply::Done)));
    assert_eq!(conn.taken::<MetaReply>(asking), Some(Err(Errno(libc::EINTR))));
}

#[test]
fn frames_are_passed_on_between_mounts() {
    let mut cluster = Cluster::new(2);
    let (from, to) = (cluster.conn(0), cluster.conn(1));
    let relay = |to| MetaRequest::Relay { to, frame: vec![7] };
    assert_eq!(cluster.ask(&from, &relay(1)), Some(Ok(MetaReply::Done)));
    assert_eq!(*cluster.mounts.relayed.lock(), [(to.id(), 0, vec![7])]);
    assert_eq!(cluster.ask(&from, &relay(5)), Some(Err(Errno(libc::ENOENT))));
    cluster.service.membership.members.disconnected(to.id());
    assert_eq!(
        cluster.ask(&from, &relay(1)),
        Some(Err(Errno(libc::EHOSTUNREACH)))
    );
}
