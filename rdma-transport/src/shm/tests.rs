//! A peer that holds the key and then misbehaves.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::conn::ShmConn;
use super::control::{self, Notice};
use super::endpoint::{ShmFabric, start};
use super::setup;
use crate::mem::SharedMem;
use crate::test_util::{Counting, Junk, config, until};
use crate::{Access, Connection, Fabric, FabricConfig, Op, RegionKey, RemoteAddr, TransportError};

fn victim(dir: &tempfile::TempDir) -> (ShmFabric, Arc<Counting>) {
    let seen = Arc::new(Counting::default());
    let path = dir.path().join("victim").display().to_string();
    (
        start(config(&path, "victim"), Arc::clone(&seen) as _).unwrap(),
        seen,
    )
}

/// Every misdeed ends its connection with a protocol error, and nothing else.
fn survives(misdeed: impl Fn(&Arc<ShmConn>, u64)) {
    let dir = tempfile::tempdir().unwrap();
    let (fabric, seen) = victim(&dir);
    let path = dir.path().join("rogue").display().to_string();
    let rogue = start(config(&path, "rogue"), Arc::new(Counting::default())).unwrap();
    for n in 0..20u64 {
        let conn = setup::connect(&rogue.core, &fabric.local_addr()).unwrap();
        conn.send(b"hello").unwrap();
        until("hello", || seen.messages.load(Ordering::SeqCst) > n);
        misdeed(&conn, n);
        until("end", || seen.ended.lock().len() as u64 == n + 1);
        let why = seen.ended.lock().last().unwrap().clone();
        assert!(matches!(why, TransportError::Protocol { .. }), "{why:?}");
        until("our end", || !conn.is_alive());
    }
    let mem = Arc::new(SharedMem::anonymous(4096).unwrap());
    let at = RemoteAddr {
        key: fabric.register(&mem, Access::ALL).unwrap(),
        offset: 0,
    };
    let conn = rogue.connect(&fabric.local_addr()).unwrap();
    conn.execute(&mut [Op::Faa { at, add: 1, old: 0 }]).unwrap();
}

fn packet(conn: &ShmConn, bytes: &[u8], mem: Option<&SharedMem>) {
    let fds: Vec<_> = mem.iter().map(|m| m.fd()).collect();
    control::send(
        conn.sock.as_fd(),
        bytes,
        &fds,
        Instant::now() + Duration::from_secs(1),
    )
    .unwrap();
}

#[test]
fn garbage_in_the_ring() {
    survives(|conn, n| {
        let mut junk = Junk(n);
        let at = conn.channel.tail(conn.side).load(Ordering::SeqCst);
        match n % 3 {
            0 => conn
                .channel
                .tail(conn.side)
                .store(junk.next() | 1, Ordering::SeqCst),
            1 => conn
                .channel
                .tail(conn.side)
                .store(at.wrapping_sub(8), Ordering::SeqCst),
            _ => {
                conn.channel
                    .ring_word(conn.side, at)
                    .store(junk.next(), Ordering::SeqCst);
                conn.channel.tail(conn.side).store(at + 64, Ordering::SeqCst);
            }
        }
        let (host, bell) = conn.bells_for_tests();
        host.wake();
        // Whatever the sleeping flag says.
        let _full = rustix::io::write(bell, &1u64.to_ne_bytes());
    });
}

#[test]
fn garbage_on_the_control_socket() {
    survives(|conn, n| {
        let mut junk = Junk(n);
        let region = Notice::Region {
            key: 1 << 63,
            len: 1 << 20,
            access: Access::ALL,
        };
        match n % 4 {
            0 => packet(conn, &junk.bytes(1 + n as usize * 100), None),
            // Without memory; with memory shorter than announced.
            1 => packet(conn, &region.encode(), None),
            2 => packet(conn, &region.encode(), Some(&SharedMem::anonymous(4096).unwrap())),
            _ => packet(conn, &[9; 24], None),
        }
    });
}

/// An operation of a peer that is stopped in the middle of it is not over, and nobody may believe that it is.
#[test]
fn a_peer_in_the_middle_of_an_operation_is_not_expelled() {
    let dir = tempfile::tempdir().unwrap();
    let (fabric, seen) = victim(&dir);
    let path = dir.path().join("other").display().to_string();
    let other = start(config(&path, "other"), Arc::new(Counting::default())).unwrap();
    let conn = setup::connect(&other.core, &fabric.local_addr()).unwrap();
    assert!(!conn.settled());
    let in_flight = conn.channel.in_flight(conn.side.other(), 5);
    in_flight.fetch_add(1, Ordering::SeqCst);
    let refused = conn.expel().unwrap_err();
    assert!(matches!(refused, TransportError::Timeout { .. }), "{refused:?}");
    assert!(!conn.is_alive() && !conn.settled());
    in_flight.fetch_sub(1, Ordering::SeqCst);
    conn.expel().unwrap();
    assert!(conn.settled());
    until("end", || seen.ended.lock().len() == 1);
}

/// Ends an operation a little later.
fn end_soon(conn: &Arc<ShmConn>, slot: usize) -> std::thread::JoinHandle<()> {
    let conn = Arc::clone(conn);
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        conn.channel
            .in_flight(conn.side, slot)
            .fetch_sub(1, Ordering::SeqCst);
    })
}

/// Nor may one that its operation was permitted by a process which has ended since.
#[test]
fn a_peer_of_a_former_process_is_shut_out_or_known() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let keep = dir.path().join("seats");
    let kept = || {
        let config = FabricConfig {
            keep: Some(keep.clone()),
            ..config(&path("kept"), "kept")
        };
        start(config, Arc::new(Counting::default())).unwrap()
    };
    let seats = || {
        let names = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name());
        names
            .filter(|n| n.to_string_lossy().starts_with("seats."))
            .count()
    };
    let first = kept();
    assert!(first.left_behind().is_empty());
    let mem = Arc::new(SharedMem::anonymous(4096).unwrap());
    let at = RemoteAddr {
        key: first.register(&mem, Access::ALL).unwrap(),
        offset: 0,
    };
    let others =
        ["idle", "busy"].map(|name| start(config(&path(name), name), Arc::new(Counting::default())).unwrap());
    let [idle, busy] = others.each_ref().map(|other| {
        let conn = setup::connect(&other.core, &first.local_addr()).unwrap();
        conn.execute(&mut [Op::Faa { at, add: 1, old: 0 }]).unwrap();
        conn
    });
    let in_flight = busy.channel.in_flight(busy.side, 5);
    in_flight.fetch_add(1, Ordering::SeqCst);
    assert_eq!(seats(), 2);
    drop(first);
    let second = kept();
    let former = second.left_behind();
    assert!(second.left_behind().is_empty());
    let [former] = &former[..] else {
        panic!("{} of them are still executing something", former.len())
    };
    assert_eq!(former.peer_identity(), b"busy");
    assert!(!former.is_alive() && !former.settled());
    for conn in [&idle, &busy] {
        assert!(conn.execute(&mut [Op::Faa { at, add: 1, old: 0 }]).is_err());
    }
    assert_eq!(mem.word(0).unwrap().load(Ordering::SeqCst), 2);
    // What it has begun is over before it is let in again.
    let slow = end_soon(&busy, 5);
    let again = setup::connect(&others[1].core, &second.local_addr()).unwrap();
    assert!(former.settled());
    slow.join().unwrap();
    drop(again);
    in_flight.fetch_add(1, Ordering::SeqCst);
    // It is in this process, which is not ended.
    let refused = former.expel().unwrap_err();
    assert!(matches!(refused, TransportError::Os { .. }), "{refused:?}");
    in_flight.fetch_sub(1, Ordering::SeqCst);
    former.expel().unwrap();
    assert!(former.settled());
    drop(second.left_behind());
}

#[test]
fn rights_are_checked_at_every_use() {
    // The rogue believes it may write; the region's own rights travel with it, and its key ends with it.
    let dir = tempfile::tempdir().unwrap();
    let (fabric, _seen) = victim(&dir);
    let mem = Arc::new(SharedMem::anonymous(4096).unwrap());
    let key = fabric.register(&mem, Access::READ).unwrap();
    let conn = setup::connect(&fabric.core, &fabric.local_addr()).unwrap();
    let at = RemoteAddr { key, offset: 0 };
    conn.execute(&mut [Op::Read {
        at,
        into: &mut [0; 8],
    }])
    .unwrap();
    let error = conn.execute(&mut [Op::Write { at, from: &[1; 8] }]).unwrap_err();
    assert!(matches!(error, TransportError::RemoteAccess { .. }));
    let unknown = RemoteAddr {
        key: RegionKey(key.0 ^ (1 << 40)),
        offset: 0,
    };
    let conn = setup::connect(&fabric.core, &fabric.local_addr()).unwrap();
    assert!(
        conn.execute(&mut [Op::Read {
            at: unknown,
            into: &mut [0; 8]
        }])
        .is_err()
    );
}
