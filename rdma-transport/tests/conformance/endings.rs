//! How connections and regions end.

use std::sync::Arc;
use std::sync::mpsc;

use rdma_transport::mem::SharedMem;
use rdma_transport::{Access, AsyncOp, Op, RemoteAddr, TransportError};

use crate::world::{World, bad_key, cas, faa};

fn refused<T: std::fmt::Debug>(result: Result<T, TransportError>) {
    assert!(
        matches!(result, Err(TransportError::RemoteAccess { .. })),
        "{result:?}"
    );
}

fn gone<T: std::fmt::Debug>(result: Result<T, TransportError>) {
    assert!(
        matches!(result, Err(TransportError::Disconnected { .. })),
        "{result:?}"
    );
}

pub fn out_of_range(world: &World) {
    for offset in [4089, 4096, 1 << 40, u64::MAX - 7] {
        let (target, source, conn, _) = world.pair();
        let (_mem, at) = target.memory(4096);
        let mut into = [0; 8];
        refused(conn.execute(&mut [Op::Read {
            at: RemoteAddr { key: at.key, offset },
            into: &mut into,
        }]));
        assert!(!conn.is_alive());
        gone(conn.send(b"x"));
        gone(faa(&*conn, at, 1));
        world.assert_ended_once(&[&target, &source]);
    }
}

pub fn access_rights(world: &World) {
    let rights = [
        Access {
            read: false,
            ..Access::ALL
        },
        Access {
            write: false,
            ..Access::ALL
        },
        Access {
            atomic: false,
            ..Access::ALL
        },
    ];
    for (forbidden, access) in rights.into_iter().enumerate() {
        for op in 0..4 {
            let (target, source, conn, _) = world.pair();
            let mem = Arc::new(SharedMem::anonymous(4096).unwrap());
            let at = RemoteAddr {
                key: target.fabric.register(&mem, access).unwrap(),
                offset: 0,
            };
            let result = match op {
                0 => conn.execute(&mut [Op::Read { at, into: &mut [0] }]),
                1 => conn.execute(&mut [Op::Write { at, from: &[1] }]),
                2 => cas(&*conn, at, 0, 1).map(drop),
                _ => faa(&*conn, at, 1).map(drop),
            };
            if op.min(2) == forbidden {
                refused(result);
                let mut byte = [0];
                mem.read_at(0, &mut byte).unwrap();
                assert_eq!(byte, [0], "nothing has changed");
                world.assert_ended_once(&[&target, &source]);
            } else {
                result.unwrap();
            }
        }
    }
}

pub fn unknown_region(world: &World) {
    let (target, source, conn, _) = world.pair();
    refused(conn.execute(&mut [Op::Write {
        at: RemoteAddr {
            key: bad_key(),
            offset: 0,
        },
        from: &[1],
    }]));
    world.assert_ended_once(&[&target, &source]);
}

pub fn submitted_to_unknown_region(world: &World) {
    let (target, source, conn, _) = world.pair();
    let (_mem, at) = target.memory(4096);
    let bad = RemoteAddr {
        key: bad_key(),
        offset: 0,
    };
    let (tx, rx) = mpsc::channel();
    for batch in [
        vec![AsyncOp::Faa { at, add: 1 }],
        vec![AsyncOp::Faa { at, add: 1 }, AsyncOp::Faa { at: bad, add: 1 }],
        vec![AsyncOp::Faa { at, add: 1 }],
    ] {
        let tx = tx.clone();
        conn.submit(
            batch,
            Box::new(move |result| tx.send(result.map(drop).map_err(|e| e.why)).unwrap()),
        );
    }
    world.assert_ended_once(&[&target, &source]);
    rx.try_recv().unwrap().unwrap();
    refused(rx.try_recv().unwrap());
    gone(rx.try_recv().unwrap());
    assert!(rx.try_recv().is_err(), "each completion once");
}

pub fn region_disappears(world: &World) {
    let (target, source, conn, _) = world.pair();
    let (mem, at) = target.memory(4096);
    let (_other, still) = target.memory(4096);
    faa(&*conn, at, 1).unwrap();
    target.fabric.deregister(at.key).unwrap();
    assert!(matches!(
        target.fabric.deregister(at.key),
        Err(TransportError::Invalid(_))
    ));
    // Registered again it has another name; the old one stays dead, also if its slot is taken again.
    let again = RemoteAddr {
        key: target.fabric.register(&mem, Access::ALL).unwrap(),
        offset: 0,
    };
    assert_ne!(again.key, at.key);
    assert_eq!(faa(&*conn, again, 1).unwrap(), 1);
    faa(&*conn, still, 1).unwrap();
    refused(faa(&*conn, at, 1));
    assert_eq!(mem.word(0).unwrap().load(std::sync::atomic::Ordering::SeqCst), 2);
    world.assert_ended_once(&[&target, &source]);
}

fn closed(world: &World, by_connector: bool) {
    let (target, source, conn, back) = world.pair();
    let (mem, at) = target.memory(4096);
    let (closer, other) = if by_connector {
        (&conn, &back)
    } else {
        (&back, &conn)
    };
    closer.close();
    assert!(!closer.is_alive());
    gone(closer.send(b"late"));
    world.assert_ended_once(&[&target, &source]);
    assert!(!other.is_alive());
    gone(other.send(b"late"));
    gone(faa(&*conn, at, 1));
    closer.close();
    let (tx, rx) = mpsc::channel();
    conn.submit(
        vec![AsyncOp::Faa { at, add: 1 }],
        Box::new(move |r| tx.send(r.map(drop).map_err(|e| e.why)).unwrap()),
    );
    gone(rx.recv().unwrap());
    assert_eq!(mem.word(0).unwrap().load(std::sync::atomic::Ordering::SeqCst), 0);
    // And there can be a new one.
    let again = source.fabric.connect(&target.fabric.local_addr()).unwrap();
    assert_ne!(again.id(), conn.id());
    faa(&*again, at, 1).unwrap();
}

pub fn closed_by_connector(world: &World) {
    closed(world, true);
}

pub fn closed_by_listener(world: &World) {
    closed(world, false);
}

pub fn shutdown_ends_connections(world: &World) {
    let (target, source, conn, _) = world.pair();
    target.fabric.shutdown();
    target.fabric.shutdown();
    world.assert_ended_once(&[&target, &source]);
    assert!(!conn.is_alive());
    let mem = Arc::new(SharedMem::anonymous(4096).unwrap());
    assert!(matches!(
        target.fabric.register(&mem, Access::ALL),
        Err(TransportError::Shutdown)
    ));
    let addr = source.fabric.local_addr();
    assert!(matches!(
        target.fabric.connect(&addr),
        Err(TransportError::Shutdown)
    ));
    assert!(source.fabric.connect(&target.fabric.local_addr()).is_err());
}

pub fn newer_connection_replaces_older(world: &World) {
    let target = world.endpoint("target");
    let addr = target.fabric.local_addr();
    let identified = |name: &str| {
        let config = rdma_transport::FabricConfig {
            identity: b"node 7".to_vec(),
            ..world.config(name)
        };
        world.try_open(config).unwrap()
    };
    let (old, new) = (identified("old"), identified("new"));
    let (_mem, at) = target.memory(4096);
    let first = old.fabric.connect(&addr).unwrap();
    // A second one of the same life is no replacement.
    let second = old.fabric.connect(&addr).unwrap();
    faa(&*first, at, 1).unwrap();
    faa(&*second, at, 1).unwrap();
    world.until("both", || target.seen.connected.lock().len() == 2);
    assert!(target.seen.ended.lock().is_empty());
    let third = new.fabric.connect(&addr).unwrap();
    world.until("old ones end", || {
        target.seen.ended.lock().len() == 2 && old.seen.ended.lock().len() == 2
    });
    world.until("new one comes", || target.seen.connected.lock().len() == 3);
    if world.net.is_none() {
        let log = target.seen.log.lock().clone();
        assert!(
            log[2].starts_with("disconnected") && log[3].starts_with("disconnected"),
            "{log:?}"
        );
        assert!(log[4].starts_with("connected"), "{log:?}");
    }
    faa(&*third, at, 1).unwrap();
    gone(faa(&*first, at, 1));
    gone(faa(&*second, at, 1));
}

pub fn newest_connection_stays(world: &World) {
    // Lives of one node that connect at the same time: whatever the order, one connection is left of them.
    for round in 0..5 {
        let target = world.endpoint(&format!("target{round}"));
        let addr = target.fabric.local_addr();
        let lives: Vec<_> = (0..6)
            .map(|n| {
                let config = rdma_transport::FabricConfig {
                    identity: b"node 7".to_vec(),
                    ..world.config(&format!("life{round}{n}"))
                };
                world.try_open(config).unwrap()
            })
            .collect();
        std::thread::scope(|scope| {
            for life in &lives {
                // Whose connection is replaced in the middle of its beginning is told so.
                scope.spawn(|| drop(life.fabric.connect(&addr)));
            }
        });
        let left = || {
            let alive = |c: &&std::sync::Arc<dyn rdma_transport::Connection>| c.is_alive();
            target.seen.connected.lock().iter().filter(alive).count()
        };
        world.until("one is left", || left() == 1);
        // A connection is dead a moment before its end is told.
        let told = || {
            let (begun, ended) = (target.seen.connected.lock().len(), target.seen.ended.lock().len());
            begun == ended + 1
        };
        world.until("the ends of all others are told", told);
        world.settle();
        assert_eq!(left(), 1);
        assert!(told(), "{:?}", target.seen.log.lock());
    }
}
