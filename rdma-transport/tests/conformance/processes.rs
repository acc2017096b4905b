//! Several processes, some of which die.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rdma_transport::{AsyncOp, FabricConfig, FabricKind, Op, TransportError, gather};

use crate::children::{Helper, place};
use crate::world::{PATIENCE, World, faa};

pub fn processes_share_atomics(world: &World) {
    let target = world.endpoint("target");
    let (_mem, at) = target.memory(4096);
    let place = format!("{} {}", target.fabric.local_addr(), at.key.0);
    let each = 3000;
    let args = [place, each.to_string()];
    let mut helpers: Vec<Helper> = (0..3).map(|_| Helper::start(world, "adder", &args)).collect();
    let own = target.fabric.connect(&target.fabric.local_addr()).unwrap();
    for _ in 0..each {
        faa(&*own, at, 1).unwrap();
    }
    for helper in &mut helpers {
        assert_eq!(helper.line(), "done");
    }
    helpers.into_iter().for_each(Helper::finish);
    assert_eq!(faa(&*own, at, 0).unwrap(), 4 * each);
    assert_eq!(faa(&*own, at.plus(8), 0).unwrap(), 3 * each / 2);
    // Three of them have left, once each; our connection to ourselves has not.
    world.until("ends", || target.seen.ended.lock().len() == 3);
}

pub fn killed_peer(world: &World) {
    for round in 0..5u64 {
        let mut helper = Helper::start(world, "target", &[]);
        let (addr, at) = place(&helper.line());
        let source = world.endpoint("source");
        let conn = source.fabric.connect(&addr).unwrap();
        let (begun, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let failed = AtomicBool::new(false);
        let typed = |e: TransportError| assert!(matches!(e, TransportError::Disconnected { .. }), "{e:?}");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut large = vec![1; 4 << 20];
                loop {
                    let mut ops = [
                        Op::Write {
                            at,
                            from: &vec![2; 1 << 20],
                        },
                        Op::Read { at, into: &mut large },
                    ];
                    if let Err(e) = conn.execute(&mut ops) {
                        typed(e);
                        failed.store(true, Ordering::SeqCst);
                        break;
                    }
                }
            });
            scope.spawn(|| {
                loop {
                    let ended = Arc::clone(&ended);
                    begun.fetch_add(1, Ordering::SeqCst);
                    let batch = vec![AsyncOp::Faa { at, add: 1 }; 4];
                    conn.submit(
                        batch,
                        Box::new(move |r| {
                            ended.fetch_add(1, Ordering::SeqCst);
                            if let Err(e) = r {
                                assert!(matches!(e.why, TransportError::Disconnected { .. }), "{e:?}");
                            }
                        }),
                    );
                    if let Err(e) = conn.send(&[1; 3000]) {
                        typed(e);
                        break;
                    }
                }
            });
            std::thread::sleep(Duration::from_millis(20 + 13 * round));
            helper.kill();
            let start = Instant::now();
            while !failed.load(Ordering::SeqCst) {
                assert!(
                    start.elapsed() < Duration::from_secs(5),
                    "operations go on after the peer's death"
                );
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        world.assert_ended_once(&[&source]);
        assert!(matches!(
            source.seen.ended.lock()[0].1,
            TransportError::Disconnected { .. }
        ));
        world.until("completions", || {
            ended.load(Ordering::SeqCst) == begun.load(Ordering::SeqCst)
        });
        assert!(!conn.is_alive());
    }
}

pub fn killed_peer_says_what_it_said(world: &World) {
    let target = world.endpoint("target");
    target
        .seen
        .on_message(|_, _| std::thread::sleep(Duration::from_millis(1)));
    let mut helper = Helper::start(world, "talker", &[target.fabric.local_addr()]);
    assert_eq!(helper.line(), "said");
    helper.kill();
    world.assert_ended_once(&[&target]);
    assert_eq!(
        target.seen.count(),
        100,
        "everything sent before the death arrives before the end"
    );
}

pub fn idle_costs_nothing(world: &World) {
    let mut helper = Helper::start(world, "idle", &[]);
    let micros: u64 = helper.line().parse().unwrap();
    assert!(micros < 10_000, "{micros} µs of CPU in one idle second");
    helper.finish();
}

pub fn shutdown_frees_everything(world: &World) {
    let mut helper = Helper::start(world, "leak", &[]);
    assert_eq!(helper.line(), "0 0", "descriptors and threads left behind");
    helper.finish();
}

pub fn dead_process_frees_address(world: &World) {
    let listen = match world.kind {
        FabricKind::Tcp | FabricKind::Verbs => {
            let free = std::net::TcpListener::bind(world.name("mortal")).unwrap();
            free.local_addr().unwrap().to_string()
        }
        _ => world.name("mortal"),
    };
    let mut helper = Helper::start(world, "target", std::slice::from_ref(&listen));
    helper.line();
    let config = || FabricConfig {
        listen: listen.clone(),
        ..world.config("heir")
    };
    assert!(
        world
            .try_open(config())
            .err()
            .unwrap()
            .to_string()
            .contains("in use")
    );
    helper.kill();
    let heir = world.try_open(config()).unwrap();
    heir.fabric.connect(&listen).unwrap();
}

pub fn unresponsive_peer_times_out(world: &World) {
    let mut helper = Helper::start(world, "target", &[]);
    let (addr, at) = place(&helper.line());
    let config = FabricConfig {
        // Long enough for a busy emulated machine to connect in.
        timeout: Duration::from_secs(1),
        ..world.config("hasty")
    };
    let source = world.try_open(config).unwrap();
    let conn = source.fabric.connect(&addr).unwrap();
    faa(&*conn, at, 1).unwrap();
    helper.stop();
    let start = Instant::now();
    let error = source.fabric.connect(&addr).err();
    assert!(matches!(error, Some(TransportError::Timeout { .. })), "{error:?}");
    // Messages fill what there is to fill, then time out; one-sided operations of shm do not need the peer.
    let error = loop {
        if let Err(e) = conn.send(&[0; 60_000]) {
            break e;
        }
    };
    assert!(matches!(error, TransportError::Timeout { .. }), "{error:?}");
    assert!(start.elapsed() < PATIENCE);
    world.assert_ended_once(&[&source]);
    helper.kill();
}

pub fn silent_peer_is_given_up(world: &World) {
    // One peer answers, the other is stopped: what was asked of that one fails in time and gives its buffers back.
    let (target, source, conn, _) = world.pair();
    let (_mem, at) = target.memory(1 << 20);
    let mut helper = Helper::start(world, "target", &[]);
    let (addr, stopped) = place(&helper.line());
    let other = source.fabric.connect(&addr).unwrap();
    faa(&*other, stopped, 1).unwrap();
    helper.stop();
    let read = |at, len| AsyncOp::Read {
        at,
        into: source.fabric.buffer(len).unwrap(),
    };
    let batches = vec![(conn, vec![read(at, 1 << 20)]), (other, vec![read(stopped, 8)])];
    let outcomes = gather(batches, Duration::from_secs(1));
    assert!(outcomes[0].is_ok(), "{outcomes:?}");
    match &outcomes[1] {
        // Shared memory does not need the peer's help, nor does an adapter.
        Ok(_) => assert_ne!(world.kind, FabricKind::Tcp),
        Err(error) => {
            assert!(matches!(error.why, TransportError::Timeout { .. }), "{error:?}");
            assert_eq!(error.buffers.iter().map(|b| b.len()).collect::<Vec<_>>(), [8]);
        }
    }
    helper.kill();
}
