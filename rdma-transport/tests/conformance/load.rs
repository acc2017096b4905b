//! Many things at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rdma_transport::{AsyncOp, Op, OpResult, TransportError};

use crate::world::{World, cas};

pub fn flood_both_ways(world: &World) {
    // Every message begets another one, of awkward size, until each side has had its number; the handlers send
    // from progress threads into rings that are full most of the time.
    let (target, source, conn, back) = world.pair();
    let rounds = 3000u64;
    for end in [&target, &source] {
        let left = AtomicU64::new(rounds);
        end.seen.on_message(move |conn, message| {
            if left
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
                .is_ok()
            {
                conn.send(message).unwrap();
            }
        });
    }
    let burst = 40;
    std::thread::scope(|scope| {
        for c in [&conn, &back] {
            scope.spawn(move || (0..burst).for_each(|n| c.send(&vec![n as u8; 60_000]).unwrap()));
        }
    });
    world.until("all messages", || {
        target.seen.count() + source.seen.count() >= 2 * rounds + 2 * burst
    });
    assert!(conn.is_alive() && back.is_alive());
}

pub fn blocked_senders_get_through(world: &World) {
    // The receiver is slow, several threads send: all of them get through, in their orders.
    let (target, _source, conn, _) = world.pair();
    let wrong = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&wrong);
    let last = parking_lot::Mutex::new([0u64; 4]);
    target.seen.on_message(move |_, message| {
        let thread = message[0] as usize;
        let n = u64::from_le_bytes(message[1..9].try_into().unwrap());
        let mut last = last.lock();
        if last[thread] + 1 != n {
            count.fetch_add(1, Ordering::SeqCst);
        }
        last[thread] = n;
        if n.is_multiple_of(16) {
            std::thread::sleep(Duration::from_micros(300));
        }
    });
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let conn = &conn;
            scope.spawn(move || {
                for n in 1..=400u64 {
                    let mut message = vec![thread; 20_000];
                    message[1..9].copy_from_slice(&n.to_le_bytes());
                    conn.send(&message).unwrap();
                }
            });
        }
    });
    world.until("all messages", || target.seen.count() == 1600);
    assert_eq!(wrong.load(Ordering::SeqCst), 0);
}

pub fn queueing_waits_for_nobody(world: &World) {
    // The receiver does not even return from its first message until all are queued: far more than it has room for.
    let (target, _source, conn, _) = world.pair();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let gone = parking_lot::Mutex::new(Some(gone));
    let order = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let seen = Arc::clone(&order);
    target.seen.on_message(move |_, message| {
        if let Some(gone) = gone.lock().take() {
            gone.recv().unwrap();
        }
        seen.lock()
            .push(u32::from_le_bytes(message[..4].try_into().unwrap()));
    });
    let count = 2000u32;
    for n in 0..count {
        let mut message = vec![0; 20_000];
        message[..4].copy_from_slice(&n.to_le_bytes());
        conn.queue(&message).unwrap();
    }
    assert!(order.lock().is_empty());
    go.send(()).unwrap();
    world.until("all messages", || target.seen.count() == u64::from(count));
    assert!(order.lock().iter().copied().eq(0..count));
}

pub fn words_are_never_torn(world: &World) {
    // One side flips words between patterns that differ in every byte; nobody ever sees a mixture.
    let (target, source, conn, _) = world.pair();
    let other = source.fabric.connect(&target.fabric.local_addr()).unwrap();
    let (_mem, at) = target.memory(4096);
    let stop = AtomicBool::new(false);
    let pattern = |n: u64| [0, u64::MAX, 0xaaaa_aaaa_aaaa_aaaa, 0x5555_5555_5555_5555][n as usize % 4];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..5000u64 {
                assert_eq!(cas(&*conn, at, pattern(n), pattern(n + 1)).unwrap(), pattern(n));
                let bytes = pattern(n).to_ne_bytes().repeat(8);
                conn.execute(&mut [Op::Write {
                    at: at.plus(8),
                    from: &bytes,
                }])
                .unwrap();
            }
            stop.store(true, Ordering::SeqCst);
        });
        let whole = |word: u64| (0..4).any(|n| pattern(n) == word);
        while !stop.load(Ordering::SeqCst) {
            let mut bytes = [0u8; 72];
            other.execute(&mut [Op::Read { at, into: &mut bytes }]).unwrap();
            for word in bytes.as_chunks::<8>().0 {
                assert!(whole(u64::from_ne_bytes(*word)), "{word:?}");
            }
            let (tx, rx) = std::sync::mpsc::channel();
            let batch = vec![AsyncOp::ReadWords { at, words: 9 }];
            other.submit(batch, Box::new(move |r| tx.send(r.unwrap()).unwrap()));
            let OpResult::Words(words) = &rx.recv().unwrap()[0] else {
                panic!("no words")
            };
            assert!(words.iter().all(|w| whole(*w)));
        }
    });
}

pub fn deregister_waits_for_operations(world: &World) {
    for _ in 0..20 {
        let (target, _source, conn, _) = world.pair();
        let len = 1 << 20;
        let (mem, at) = target.memory(len);
        let running = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 1.. {
                    let result = conn.execute(&mut [Op::Write {
                        at,
                        from: &vec![n as u8; len],
                    }]);
                    running.store(true, Ordering::SeqCst);
                    match result {
                        Ok(()) => {}
                        Err(TransportError::RemoteAccess { .. }) => break,
                        Err(other) => panic!("{other}"),
                    }
                }
            });
            while !running.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            target.fabric.deregister(at.key).unwrap();
            // From here on nothing may change.
            mem.zero(0, len).unwrap();
            std::thread::sleep(Duration::from_millis(5));
            let mut now = vec![0; len];
            mem.read_at(0, &mut now).unwrap();
            assert!(now.iter().all(|b| *b == 0), "a write landed after deregistration");
        });
    }
}
