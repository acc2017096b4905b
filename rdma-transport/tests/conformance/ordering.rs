//! What comes after what.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rdma_transport::{AsyncOp, Op, OpResult};

use crate::world::{World, cas, faa, read_u64};

pub fn messages_are_fifo(world: &World) {
    let (target, _source, conn, _) = world.pair();
    let rounds = if world.net.is_some() { 500 } else { 20_000u64 };
    for n in 0..rounds {
        let mut message = n.to_le_bytes().to_vec();
        message.resize(8 + (n as usize * 31) % 300, 1);
        conn.send(&message).unwrap();
    }
    world.until("all messages", || target.seen.count() == rounds);
    for (n, message) in target.seen.messages.lock().iter().enumerate() {
        assert_eq!(message[..8], (n as u64).to_le_bytes());
        assert_eq!(message.len(), 8 + (n * 31) % 300);
    }
}

/// A message that follows a write comes after it: none arrives before the write it announces.
pub fn message_after_write(world: &World) {
    let (target, _source, conn, _) = world.pair();
    let (mem, at) = target.memory(64 * 1024);
    let early = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&early);
    target.seen.on_message(move |_, message| {
        let n = u64::from_le_bytes(message.try_into().unwrap());
        let mut seen = vec![0u8; 32 * 1024];
        mem.read_at(8, &mut seen).unwrap();
        // Later writes may be in already; earlier contents may not.
        if seen.iter().any(|b| u64::from(*b) < n) {
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    for n in 1..=200u64 {
        let bytes = vec![n as u8; 32 * 1024];
        conn.execute(&mut [Op::Write {
            at: at.plus(8),
            from: &bytes,
        }])
        .unwrap();
        conn.send(&n.to_le_bytes()).unwrap();
    }
    world.until("all messages", || target.seen.count() == 200);
    assert_eq!(early.load(Ordering::SeqCst), 0);
}

pub fn operations_in_order(world: &World) {
    let (target, _source, conn, _) = world.pair();
    let (mem, at) = target.memory(4096);
    // Within a batch.
    let (mut a, mut b) = ([0u8; 8], [0u8; 8]);
    let mut ops = [
        Op::Write {
            at,
            from: &7u64.to_ne_bytes(),
        },
        Op::Read { at, into: &mut a },
        Op::Faa { at, add: 1, old: 0 },
        Op::Cas {
            at,
            expect: 8,
            new: 20,
            old: 0,
        },
        Op::Read { at, into: &mut b },
    ];
    conn.execute(&mut ops).unwrap();
    let Op::Cas { old, .. } = ops[3] else {
        unreachable!()
    };
    assert_eq!((u64::from_ne_bytes(a), old, u64::from_ne_bytes(b)), (7, 8, 20));
    // Between submitted batches, and between those and messages and blocking operations.
    let seen_at_message = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&seen_at_message);
    target
        .seen
        .on_message(move |_, _| seen.store(mem.word(0).unwrap().load(Ordering::SeqCst), Ordering::SeqCst));
    let wrong = Arc::new(AtomicU64::new(0));
    for n in 0..100u64 {
        let wrong = Arc::clone(&wrong);
        conn.submit(
            vec![AsyncOp::Faa { at, add: 1 }],
            Box::new(move |result| {
                if result.unwrap() != [OpResult::Old(20 + n)] {
                    wrong.fetch_add(1, Ordering::SeqCst);
                }
            }),
        );
    }
    conn.send(b"look").unwrap();
    conn.submit(
        vec![AsyncOp::Faa { at, add: 1 }; 64],
        Box::new(|r| drop(r.unwrap())),
    );
    assert_eq!(read_u64(&*conn, at), 184);
    world.until("message", || target.seen.count() == 1);
    assert!(seen_at_message.load(Ordering::SeqCst) >= 120);
    world.settle();
    assert_eq!(wrong.load(Ordering::SeqCst), 0);
}

pub fn callbacks_may_use_the_fabric(world: &World) {
    let (target, source, conn, back) = world.pair();
    let (_mem, at) = target.memory(4096);
    // source: on a message, submit; on completion, send; target: on that, answer; until 50 rounds are done.
    let done = Arc::new(AtomicU64::new(0));
    let rounds = Arc::clone(&done);
    source.seen.on_message(move |conn, _| {
        let answer = Arc::clone(conn);
        let rounds = Arc::clone(&rounds);
        conn.submit(
            vec![AsyncOp::Faa { at, add: 1 }],
            Box::new(move |result| {
                let [OpResult::Old(old)] = result.unwrap()[..] else {
                    panic!("wrong result")
                };
                rounds.store(old + 1, Ordering::SeqCst);
                if old < 49 {
                    answer.send(b"again").unwrap();
                }
            }),
        );
    });
    target
        .seen
        .on_message(|conn, message| conn.send(message).unwrap());
    back.send(b"start").unwrap();
    world.until("50 rounds", || done.load(Ordering::SeqCst) == 50);
    assert_eq!(read_u64(&*conn, at), 50);
}

pub fn concurrent_atomics(world: &World) {
    let target = world.endpoint("target");
    let (mem, at) = target.memory(4096);
    let sources: Vec<_> = (0..3).map(|n| world.endpoint(&format!("source{n}"))).collect();
    let connect = |s: &crate::world::End| s.fabric.connect(&target.fabric.local_addr()).unwrap();
    let conns: Vec<_> = sources.iter().map(connect).collect();
    if world.net.is_some() {
        for n in 0..300 {
            conns[n % 3].submit(vec![AsyncOp::Faa { at, add: 1 }], Box::new(|r| drop(r.unwrap())));
        }
        world.settle();
        assert_eq!(mem.word(0).unwrap().load(Ordering::SeqCst), 300);
        return;
    }
    let each = 2000u64;
    std::thread::scope(|scope| {
        // Two threads share each connection.
        for conn in conns.iter().chain(&conns) {
            scope.spawn(move || {
                for _ in 0..each {
                    faa(&**conn, at, 1).unwrap();
                    let mut now = read_u64(&**conn, at.plus(8));
                    loop {
                        let found = cas(&**conn, at.plus(8), now, now + 1).unwrap();
                        if found == now {
                            break;
                        }
                        now = found;
                    }
                }
            });
        }
    });
    assert_eq!(mem.word(0).unwrap().load(Ordering::SeqCst), 6 * each);
    assert_eq!(mem.word(8).unwrap().load(Ordering::SeqCst), 6 * each);
}
