//! What each operation does, up to the limits.

use std::sync::Arc;
use std::sync::mpsc;

use rdma_transport::{AsyncOp, Op, OpResult, TransportError};

use crate::world::{World, cas, faa, read_u64};

pub fn operations(world: &World) {
    let (target, _source, conn, _) = world.pair();
    let (mem, at) = target.memory(4096);
    conn.execute(&mut [Op::Write {
        at: at.plus(100),
        from: b"hello",
    }])
    .unwrap();
    let mut local = [0; 5];
    mem.read_at(100, &mut local).unwrap();
    assert_eq!(&local, b"hello");
    mem.write_at(200, b"world").unwrap();
    conn.execute(&mut [Op::Read {
        at: at.plus(200),
        into: &mut local,
    }])
    .unwrap();
    assert_eq!(&local, b"world");

    assert_eq!(faa(&*conn, at, 5).unwrap(), 0);
    assert_eq!(faa(&*conn, at, 0u64.wrapping_sub(2)).unwrap(), 5);
    assert_eq!(read_u64(&*conn, at), 3);
    assert_eq!(cas(&*conn, at, 4, 9).unwrap(), 3, "not swapped");
    assert_eq!(cas(&*conn, at, 3, 9).unwrap(), 3, "swapped");
    assert_eq!(read_u64(&*conn, at), 9);
    conn.execute(&mut []).unwrap();
}

pub fn submitted_operations(world: &World) {
    let (target, _source, conn, _) = world.pair();
    let (_mem, at) = target.memory(4096);
    let (tx, rx) = mpsc::channel();
    let batch = vec![
        AsyncOp::Faa { at, add: 7 },
        AsyncOp::Cas {
            at,
            expect: 7,
            new: 8,
        },
        AsyncOp::ReadWords { at, words: 2 },
        AsyncOp::ReadWords { at, words: 0 },
    ];
    conn.submit(batch, Box::new(move |result| tx.send(result).unwrap()));
    let got = std::cell::RefCell::new(None);
    world.until("completion", || {
        if let Ok(result) = rx.try_recv() {
            *got.borrow_mut() = Some(result);
        }
        got.borrow().is_some()
    });
    let results = got.into_inner().unwrap().unwrap();
    let expected = [
        OpResult::Old(0),
        OpResult::Old(7),
        OpResult::Words(vec![8, 0]),
        OpResult::Words(Vec::new()),
    ];
    assert_eq!(results, expected);
    let (tx, rx) = mpsc::channel();
    conn.submit(Vec::new(), Box::new(move |result| tx.send(result).unwrap()));
    world.settle();
    assert_eq!(rx.recv().unwrap().unwrap(), Vec::new());
}

pub fn boundaries(world: &World) {
    let (target, source, conn, back) = world.pair();
    let (mem, at) = target.memory(4096);
    let limits = source.fabric.limits();
    // Nothing at all, also at the very end.
    conn.execute(&mut [Op::Write {
        at: at.plus(4096),
        from: &[],
    }])
    .unwrap();
    conn.execute(&mut [Op::Read { at, into: &mut [] }]).unwrap();
    // The last byte, the last word.
    conn.execute(&mut [Op::Write {
        at: at.plus(4095),
        from: &[7],
    }])
    .unwrap();
    let mut last = [0];
    mem.read_at(4095, &mut last).unwrap();
    assert_eq!(last, [7]);
    faa(&*conn, at.plus(4088), 1).unwrap();
    // A full batch.
    let mut ops: Vec<Op<'_>> = (0..limits.max_batch)
        .map(|_| Op::Faa { at, add: 1, old: 0 })
        .collect();
    conn.execute(&mut ops).unwrap();
    assert_eq!(read_u64(&*conn, at), limits.max_batch as u64);
    // Messages of every awkward length, both ways.
    let lens = [0, 1, 7, 8, 9, 4096, 128 * 1024, limits.max_message];
    for len in lens {
        conn.send(&vec![len as u8; len]).unwrap();
        back.send(&vec![len as u8; len]).unwrap();
    }
    for end in [&target, &source] {
        world.until("messages", || end.seen.count() == lens.len() as u64);
        for (message, len) in end.seen.messages.lock().iter().zip(lens) {
            assert_eq!(message.len(), len);
            assert!(message.iter().all(|b| *b == len as u8));
        }
    }
}

pub fn limits_are_enforced(world: &World) {
    let (target, source, conn, _) = world.pair();
    let (_mem, at) = target.memory(4096);
    let limits = source.fabric.limits();
    assert!(limits.max_message >= 128 * 1024 && limits.max_batch >= 64 && limits.max_transfer >= 16 << 20);
    let invalid =
        |r: Result<(), TransportError>| assert!(matches!(r, Err(TransportError::Invalid(_))), "{r:?}");
    invalid(conn.send(&vec![0; limits.max_message + 1]));
    invalid(faa(&*conn, at.plus(4), 1).map(drop));
    invalid(cas(&*conn, at.plus(1), 0, 1).map(drop));
    let long = vec![0; limits.max_transfer + 1];
    invalid(conn.execute(&mut [Op::Faa { at, add: 1, old: 0 }, Op::Write { at, from: &long }]));
    let mut many: Vec<Op<'_>> = (0..=limits.max_batch)
        .map(|_| Op::Faa { at, add: 1, old: 0 })
        .collect();
    invalid(conn.execute(&mut many));
    for bad in [
        vec![AsyncOp::ReadWords { at, words: 65 }],
        vec![AsyncOp::ReadWords {
            at: at.plus(4),
            words: 1,
        }],
        vec![AsyncOp::Faa { at, add: 1 }; limits.max_batch + 1],
    ] {
        let (tx, rx) = mpsc::channel();
        conn.submit(
            bad,
            Box::new(move |result| tx.send(result.map(drop).map_err(|e| e.why)).unwrap()),
        );
        world.settle();
        invalid(rx.recv().unwrap());
    }
    // Nothing was done, and the connection is as before.
    assert!(conn.is_alive());
    assert_eq!(read_u64(&*conn, at), 0);
}

pub fn self_connection(world: &World) {
    let end = world.endpoint("narcissus");
    let (_mem, at) = end.memory(4096);
    let conn = end.fabric.connect(&end.fabric.local_addr()).unwrap();
    assert_eq!(conn.peer_identity(), b"narcissus");
    assert_eq!(faa(&*conn, at, 3).unwrap(), 0);
    assert_eq!(read_u64(&*conn, at), 3);
    conn.send(b"me").unwrap();
    world.until("message", || end.seen.count() == 1);
    world.until("connected", || end.seen.connected.lock().len() == 1);
    conn.close();
    world.until("both ends", || end.seen.ended.lock().len() == 2);
    world.settle();
    assert_eq!(end.seen.ended.lock().len(), 2);
}

pub fn large_transfers(world: &World) {
    let (target, _source, conn, _) = world.pair();
    let len = 16 << 20;
    let (mem, at) = target.memory(2 * len + 4096);
    let pattern = |seed: u32| -> Vec<u8> {
        (0..len as u32)
            .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 24) as u8)
            .collect()
    };
    let rounds = if world.net.is_some() { 1 } else { 3 };
    for round in 0..rounds {
        let (a, b) = (pattern(round), pattern(round + 77));
        // Misaligned on purpose.
        let mut ops = [
            Op::Write {
                at: at.plus(3),
                from: &a,
            },
            Op::Write {
                at: at.plus(len as u64 + 3),
                from: &b,
            },
        ];
        conn.execute(&mut ops).unwrap();
        let mut local = vec![0; len];
        mem.read_at(3, &mut local).unwrap();
        assert!(local == a);
        let (mut x, mut y) = (vec![0; len], vec![0; len]);
        let mut ops = [
            Op::Faa {
                at: at.plus(2 * len as u64 + 16),
                add: 1,
                old: 99,
            },
            Op::Read {
                at: at.plus(3),
                into: &mut x,
            },
            Op::Read {
                at: at.plus(len as u64 + 3),
                into: &mut y,
            },
            Op::Faa {
                at: at.plus(2 * len as u64 + 16),
                add: 1,
                old: 99,
            },
        ];
        conn.execute(&mut ops).unwrap();
        let Op::Faa { old, .. } = ops[3] else {
            unreachable!()
        };
        assert_eq!(old, u64::from(round) * 2 + 1);
        assert!(x == a && y == b);
    }
}

pub fn counters(world: &World) {
    let (target, source, conn, _) = world.pair();
    let (_mem, at) = target.memory(4096);
    faa(&*conn, at, 1).unwrap();
    conn.send(b"four").unwrap();
    world.until("message", || target.seen.count() == 1);
    let stats = conn.stats();
    assert_eq!(
        (
            stats.ops,
            stats.op_bytes,
            stats.messages_sent,
            stats.message_bytes_sent
        ),
        (1, 8, 1, 4)
    );
    let theirs = target.fabric.stats();
    assert_eq!((theirs.messages_received, theirs.message_bytes_received), (1, 4));
    assert_eq!(source.fabric.stats().connections, 1);
    conn.close();
    world.assert_ended_once(&[&target, &source]);
    assert_eq!(source.fabric.stats().ops, 1, "counters outlive connections");
    drop(Arc::clone(&conn));
}
