//! Reads and writes that nobody waits for, and the buffers they own.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rdma_transport::{AsyncOp, Buffer, Connection, OpResult, Outcome, RemoteAddr, TransportError, gather};

use crate::world::{End, World, bad_key, faa};

/// Bytes that differ from place to place and from one seed to the next.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * 77) >> 13) as u8)
        .collect()
}

/// A buffer with these bytes: of the endpoint's pool, or of the heap.
fn filled(end: &End, pooled: bool, bytes: &[u8]) -> Buffer {
    if !pooled {
        return bytes.to_vec().into();
    }
    let mut buffer = end.fabric.buffer(bytes.len()).unwrap();
    buffer.copy_from_slice(bytes);
    buffer
}

/// Starts a batch; what comes of it.
fn start(conn: &dyn Connection, batch: Vec<AsyncOp>) -> Receiver<Outcome> {
    let (tx, rx) = channel();
    conn.submit(batch, Box::new(move |outcome| tx.send(outcome).unwrap()));
    rx
}

fn wait(world: &World, come: &Receiver<Outcome>) -> Outcome {
    let got = std::cell::RefCell::new(None);
    world.until("completion", || {
        if got.borrow().is_none() {
            *got.borrow_mut() = come.try_recv().ok();
        }
        got.borrow().is_some()
    });
    assert!(come.try_recv().is_err(), "each completion once");
    got.into_inner().unwrap()
}

fn lens(buffers: &[Buffer]) -> Vec<usize> {
    buffers.iter().map(|b| b.len()).collect()
}

pub fn mixed_batch(world: &World) {
    let (target, source, conn, _) = world.pair();
    let (mem, at) = target.memory(8 << 20);
    let word = at.plus((8 << 20) - 8);
    for pooled in [true, false] {
        for len in [
            0,
            1,
            5,
            8,
            220,
            221,
            512,
            4096,
            65_536,
            65_537,
            300_000,
            (3 << 20) + 17,
        ] {
            let seed = len as u64 + u64::from(pooled);
            let bytes = pattern(seed, len);
            // Misaligned on purpose.
            let there = at.plus(3);
            let batch = vec![
                AsyncOp::Write {
                    at: there,
                    from: filled(&source, pooled, &bytes),
                },
                AsyncOp::Faa { at: word, add: 1 },
                AsyncOp::Read {
                    at: there,
                    into: filled(&source, pooled, &vec![0; len]),
                },
                AsyncOp::ReadWords { at: word, words: 1 },
                AsyncOp::Read {
                    at: there,
                    into: filled(&source, !pooled, &vec![0; len / 2]),
                },
            ];
            let results = wait(world, &start(&*conn, batch)).unwrap();
            let [
                OpResult::Written(from),
                OpResult::Old(old),
                OpResult::Read(whole),
                OpResult::Words(words),
                OpResult::Read(half),
            ] = &results[..]
            else {
                panic!("other results: {results:?}")
            };
            assert_eq!(words[..], [old + 1]);
            assert!(
                from[..] == bytes && whole[..] == bytes && half[..] == bytes[..len / 2],
                "{len}"
            );
            let mut stored = vec![0; len];
            mem.read_at(3, &mut stored).unwrap();
            assert!(stored == bytes);
        }
    }
    let count = wait(
        world,
        &start(&*conn, vec![AsyncOp::ReadWords { at: word, words: 1 }]),
    );
    assert_eq!(count.unwrap(), [OpResult::Words(vec![24])]);
}

pub fn in_order(world: &World) {
    // Batches one behind the other without waiting, with messages between them: each read finds what was written
    // before it, and no message arrives before the write it announces.
    let (target, source, conn, _) = world.pair();
    let (mem, at) = target.memory(1 << 20);
    let len = 200_000;
    let early = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = Arc::clone(&early);
    target.seen.on_message(move |_, message| {
        let mut seen = vec![0; len];
        mem.read_at(0, &mut seen).unwrap();
        // Later writes may be in already.
        if seen.iter().any(|b| *b < message[0]) {
            count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
    });
    let mut come = Vec::new();
    for n in 1..=20u8 {
        let from = filled(&source, n % 2 == 0, &vec![n; len]);
        come.push(start(&*conn, vec![AsyncOp::Write { at, from }]));
        let into = filled(&source, n % 3 == 0, &vec![0; len]);
        come.push(start(&*conn, vec![AsyncOp::Read { at, into }]));
        conn.send(&[n]).unwrap();
    }
    for (n, come) in come.iter().enumerate() {
        let results = wait(world, come).unwrap();
        let [OpResult::Written(buffer) | OpResult::Read(buffer)] = &results[..] else {
            panic!("other results: {results:?}")
        };
        assert!(buffer.iter().all(|b| usize::from(*b) == n / 2 + 1));
    }
    world.until("messages", || target.seen.count() == 20);
    assert_eq!(early.load(std::sync::atomic::Ordering::SeqCst), 0);
}

/// Some targets, each with memory, and a connection to each.
fn targets(
    world: &World,
    source: &End,
    count: usize,
    len: usize,
) -> Vec<(End, Arc<dyn Connection>, RemoteAddr)> {
    let one = |n| {
        let target = world.endpoint(&format!("target{n}"));
        let conn = source.fabric.connect(&target.fabric.local_addr()).unwrap();
        let (_mem, at) = target.memory(len);
        (target, conn, at)
    };
    (0..count).map(one).collect()
}

pub fn many_at_once(world: &World) {
    // One thread has two hundred batches under way on four connections before it looks at the first completion.
    let source = world.endpoint("source");
    let len = 30_000;
    let targets = targets(world, &source, 4, 50 * len);
    let mut come = Vec::new();
    for n in 0..200 {
        let (_, conn, at) = &targets[n % 4];
        let at = at.plus((n / 4 * len) as u64);
        let batch = vec![
            AsyncOp::Write {
                at,
                from: filled(&source, n % 3 > 0, &pattern(n as u64, len)),
            },
            AsyncOp::Read {
                at,
                into: filled(&source, n % 5 > 0, &vec![0; len]),
            },
        ];
        come.push(start(&**conn, batch));
    }
    for (n, come) in come.iter().enumerate() {
        let results = wait(world, come).unwrap();
        let [OpResult::Written(from), OpResult::Read(into)] = &results[..] else {
            panic!("other results: {results:?}")
        };
        assert!(from == into && into[..] == pattern(n as u64, len), "{n}");
    }
}

pub fn more_than_fits(world: &World) {
    // Both sides ask the other for more than a fabric may let be under way: nobody waits for ever, and what is behind
    // it comes behind it.
    let rounds = if world.net.is_some() { 1 } else { 3 };
    let (target, source, conn, back) = world.pair();
    let len = 16 << 20;
    let (there, at_target) = target.memory(len);
    let (here, at_source) = source.memory(len);
    there.write_at(0, &pattern(1, len)).unwrap();
    here.write_at(0, &pattern(2, len)).unwrap();
    let mut come = Vec::new();
    for _ in 0..rounds {
        for (end, conn, at) in [(&source, &conn, at_target), (&target, &back, at_source)] {
            let read = |_| AsyncOp::Read {
                at,
                into: end.fabric.buffer(len).unwrap(),
            };
            come.push(start(&**conn, (0..2).map(read).collect()));
        }
    }
    conn.send(b"behind").unwrap();
    back.send(b"behind").unwrap();
    for (n, come) in come.iter().enumerate() {
        let expected = pattern(n as u64 % 2 + 1, len);
        for result in wait(world, come).unwrap() {
            assert!(matches!(&result, OpResult::Read(into) if into[..] == expected));
        }
    }
    world.until("messages", || target.seen.count() + source.seen.count() == 2);
}

pub fn gathered(world: &World) {
    let source = world.endpoint("source");
    let len = 100_000;
    let targets = targets(world, &source, 3, 1 << 20);
    // One contiguous buffer in parts: from each target a part, side by side.
    let mut whole = source.fabric.buffer(3 * len).unwrap();
    let mut batches = Vec::new();
    for (n, (_, conn, at)) in targets.iter().enumerate() {
        let rest = whole.split_off(len);
        let part = std::mem::replace(&mut whole, rest);
        let write = AsyncOp::Write {
            at: *at,
            from: pattern(n as u64, len).into(),
        };
        batches.push((Arc::clone(conn), vec![write]));
        batches.push((Arc::clone(conn), vec![AsyncOp::Read { at: *at, into: part }]));
    }
    batches.push((Arc::clone(&targets[0].1), Vec::new()));
    let waiting = std::thread::spawn(move || gather(batches, Duration::from_secs(20)));
    world.until_or_idle("all", || waiting.is_finished());
    let mut outcomes = waiting.join().unwrap().into_iter();
    let mut parts: Vec<Buffer> = Vec::new();
    for n in 0..3 {
        assert!(matches!(
            outcomes.next().unwrap().unwrap()[..],
            [OpResult::Written(_)]
        ));
        let mut read = outcomes.next().unwrap().unwrap();
        let Some(OpResult::Read(part)) = read.pop() else {
            panic!("nothing read")
        };
        assert!(part[..] == pattern(n, len));
        parts.push(part);
    }
    assert_eq!(outcomes.next().unwrap().unwrap(), []);
    assert!(outcomes.next().is_none());
    let mut parts = parts.into_iter();
    let mut whole = parts.next().unwrap();
    parts.for_each(|part| whole.join(part).unwrap());
    assert_eq!(whole.len(), 3 * len);
    assert!(gather(Vec::new(), Duration::ZERO).is_empty());
}

pub fn failures_return_buffers(world: &World) {
    for pooled in [true, false] {
        let (target, source, conn, _) = world.pair();
        let (_mem, at) = target.memory(1 << 20);
        let bad = RemoteAddr {
            key: bad_key(),
            offset: 0,
        };
        let write = |at, len| AsyncOp::Write {
            at,
            from: filled(&source, pooled, &vec![1; len]),
        };
        let read = |at, len| AsyncOp::Read {
            at,
            into: filled(&source, pooled, &vec![1; len]),
        };
        let good = start(&*conn, vec![write(at, 100_000), AsyncOp::Faa { at, add: 1 }]);
        let broken = vec![
            write(at, 1),
            read(at, 2000),
            AsyncOp::Faa { at, add: 1 },
            read(bad, 300_000),
            write(at, 40_000),
            read(at, 5),
        ];
        let failed = start(&*conn, broken);
        let behind = start(&*conn, vec![read(at, 6), write(at, 70_000)]);
        assert!(wait(world, &good).is_ok());
        let error = wait(world, &failed).unwrap_err();
        assert!(
            matches!(error.why, TransportError::RemoteAccess { .. }),
            "{error:?}"
        );
        assert_eq!(lens(&error.buffers), [1, 2000, 300_000, 40_000, 5]);
        let error = wait(world, &behind).unwrap_err();
        assert!(
            matches!(error.why, TransportError::Disconnected { .. }),
            "{error:?}"
        );
        assert_eq!(lens(&error.buffers), [6, 70_000]);
        world.assert_ended_once(&[&target, &source]);
    }
}

pub fn dead_connections_return_buffers(world: &World) {
    // Closed while much is under way, by either side: every batch completes once, with all of its buffers.
    for by_peer in [false, true] {
        let (target, source, conn, back) = world.pair();
        let (_mem, at) = target.memory(4 << 20);
        let mut come = Vec::new();
        for n in 0..30 {
            let batch = vec![
                AsyncOp::Write {
                    at,
                    from: filled(&source, n % 2 == 0, &vec![1; 200_000]),
                },
                AsyncOp::Read {
                    at,
                    into: filled(&source, n % 3 == 0, &vec![1; 100_000]),
                },
            ];
            if n == 20 {
                let closer = if by_peer { &back } else { &conn };
                closer.close();
            }
            come.push(start(&*conn, batch));
        }
        for come in &come {
            match wait(world, come) {
                Ok(results) => assert_eq!(results.len(), 2),
                Err(error) => {
                    assert!(
                        matches!(error.why, TransportError::Disconnected { .. }),
                        "{error:?}"
                    );
                    assert_eq!(lens(&error.buffers), [200_000, 100_000]);
                }
            }
        }
        world.assert_ended_once(&[&target, &source]);
    }
}

pub fn limits(world: &World) {
    let (target, source, conn, _) = world.pair();
    let (_mem, at) = target.memory(4096);
    let limits = source.fabric.limits();
    assert!(limits.max_batch_bytes >= 64 << 20);
    let long = limits.max_transfer + 1;
    assert!(matches!(
        source.fabric.buffer(long),
        Err(TransportError::Invalid(_))
    ));
    let read = |len| AsyncOp::Read {
        at,
        into: vec![0; len].into(),
    };
    let many = limits.max_batch_bytes / limits.max_transfer;
    let mut too_much: Vec<AsyncOp> = (0..many).map(|_| read(limits.max_transfer)).collect();
    too_much.push(read(1));
    for (batch, buffers) in [
        (vec![AsyncOp::Faa { at, add: 1 }, read(long)], 1),
        (too_much, many + 1),
        (
            vec![
                read(1),
                AsyncOp::Faa {
                    at: at.plus(4),
                    add: 1,
                },
            ],
            1,
        ),
    ] {
        let error = wait(world, &start(&*conn, batch)).unwrap_err();
        assert!(matches!(error.why, TransportError::Invalid(_)), "{error:?}");
        assert_eq!(error.buffers.len(), buffers);
    }
    // Nothing was done, and the connection is as before.
    assert_eq!(faa(&*conn, at, 1).unwrap(), 0);
}
