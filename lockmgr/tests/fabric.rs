//! Managers over the fabric's own simulator: its delays, its reordering between connections, its broken
//! connections. `tests/sim.rs` schedules more wickedly; this one has the real wire format of operations, and
//! storage in registered memory.
//!
//! `LOCKMGR_SEEDS=from..to` chooses the seeds; a failure prints its own.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use common::{Ghost, layout, node_id, node_number};
use lockmgr::{
    Directory, Guard, LeaseError, LeaseManager, LeaseUser, ManagerConfig, Mode, NodeId, RecordId, Relinquish,
};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rdma_transport::mem::SharedMem;
use rdma_transport::sim::{SimConfig, SimNet};
use rdma_transport::{
    Access, Connection, Fabric, FabricConfig, Handler, RegionKey, RemoteAddr, TransportError,
};

const STORE: u16 = u16::MAX;

/// One endpoint: a node, or the storage node.
struct Side {
    number: u16,
    net: SimNet,
    rng: Arc<Mutex<StdRng>>,
    ghost: Arc<Ghost>,
    key: OnceLock<RegionKey>,
    fabric: OnceLock<Arc<dyn Fabric>>,
    manager: OnceLock<Arc<LeaseManager>>,
    /// Connections made, by peer.
    made: Mutex<HashMap<u16, Arc<dyn Connection>>>,
    /// Connections accepted, by peer.
    accepted: Mutex<HashMap<u16, Arc<dyn Connection>>>,
    me: Weak<Self>,
}

fn number(conn: &Arc<dyn Connection>) -> u16 {
    u16::from_le_bytes(conn.peer_identity().try_into().unwrap())
}

impl Side {
    fn manager(&self) -> &Arc<LeaseManager> {
        self.manager.get().unwrap()
    }

    fn connect(&self, to: u16) {
        let conn = self.fabric.get().unwrap().connect(&name(to)).unwrap();
        self.made.lock().insert(to, conn);
    }

    fn later(&self, call: impl FnOnce(&Self) + Send + 'static) {
        let delay = Duration::from_nanos(self.rng.lock().random_range(0..40_000));
        let me = self.me.upgrade().unwrap();
        self.net.after(delay, move || call(&me));
    }

    fn relinquish(&self, id: RecordId, from: Mode) {
        let mut how = Relinquish::default();
        if from == Mode::Exclusive {
            (how.modified, how.payload) = self.ghost.flush(self.number, id);
            how.needs_confirm = self.rng.lock().random_bool(0.3);
        }
        let confirm = how.needs_confirm && self.rng.lock().random_bool(0.5);
        let version = self.manager().held(id).unwrap().1 + u64::from(how.modified);
        self.ghost.relinquished(self.number, id, version);
        assert_eq!(self.manager().relinquished(id, how).unwrap(), version);
        if confirm {
            self.later(move |side| side.manager().confirmed(id, version));
        }
    }
}

impl Handler for Side {
    fn admit(&self, _: &[u8]) -> Result<(), String> {
        Ok(())
    }
    fn connected(&self, conn: &Arc<dyn Connection>) {
        self.accepted.lock().insert(number(conn), Arc::clone(conn));
    }
    fn message(&self, conn: &Arc<dyn Connection>, message: &[u8]) {
        self.manager().message(node_id(number(conn)), message).unwrap();
    }
    fn disconnected(&self, conn: &Arc<dyn Connection>, _: &TransportError) {
        let current = self.made.lock().get(&STORE).is_some_and(|c| c.id() == conn.id());
        if self.number != STORE && current {
            self.manager().storage_lost(0);
            self.later(|side| {
                side.connect(STORE);
                side.manager().storage_reconnected(0);
            });
        }
    }
}

impl Directory for Side {
    fn record(&self, id: RecordId) -> Result<(Arc<dyn Connection>, RemoteAddr), LeaseError> {
        let conn = Arc::clone(&self.made.lock()[&STORE]);
        Ok((
            conn,
            RemoteAddr {
                key: *self.key.get().unwrap(),
                offset: id.index() * 64,
            },
        ))
    }
    fn send(&self, to: NodeId, msg: &[u8]) -> Result<(), LeaseError> {
        self.made.lock()[&node_number(to)].send(msg).unwrap();
        Ok(())
    }
}

impl LeaseUser for Side {
    fn revoke(&self, id: RecordId, from: Mode, _to: Option<Mode>) {
        self.later(move |side| {
            let me = side.me.clone();
            side.manager().close_gate(
                id,
                Box::new(move || me.upgrade().unwrap().later(move |side| side.relinquish(id, from))),
            );
        });
    }
    fn granted(&self, id: RecordId, _mode: Mode, version: u64, payload: Option<&[u8]>) {
        self.ghost.granted(self.number, id, version, payload);
    }
    fn confirm(&self, id: RecordId, version: u64) {
        self.later(move |side| side.manager().confirmed(id, version));
    }
}

fn name(number: u16) -> String {
    if number == STORE {
        "store".to_owned()
    } else {
        format!("node{number}")
    }
}

fn run(seed: u64) -> u64 {
    let rng = Arc::new(Mutex::new(StdRng::seed_from_u64(seed)));
    let (nodes, records) = {
        let mut rng = rng.lock();
        (rng.random_range(2..=5u16), rng.random_range(1..=4u64))
    };
    let net = SimNet::new(seed, SimConfig::default());
    let ghost = Arc::new(Ghost::new(records));
    let side = |number: u16| {
        let side = Arc::new_cyclic(|me| Side {
            number,
            net: net.clone(),
            rng: Arc::clone(&rng),
            ghost: Arc::clone(&ghost),
            key: OnceLock::new(),
            fabric: OnceLock::new(),
            manager: OnceLock::new(),
            made: Mutex::default(),
            accepted: Mutex::default(),
            me: Weak::clone(me),
        });
        let config = FabricConfig {
            listen: name(number),
            key: vec![7; 32],
            identity: number.to_le_bytes().to_vec(),
            spin: Duration::ZERO,
            timeout: Duration::from_secs(1),
            keep: None,
        };
        side.fabric
            .set(net.endpoint(config, Arc::clone(&side) as _).unwrap())
            .ok()
            .unwrap();
        side
    };
    let store = side(STORE);
    let memory = Arc::new(SharedMem::anonymous(records as usize * 64).unwrap());
    let key = store
        .fabric
        .get()
        .unwrap()
        .register(&memory, Access::ALL)
        .unwrap();
    let sides: Vec<_> = (0..nodes).map(side).collect();
    for side in &sides {
        let cfg = ManagerConfig::new(node_id(side.number), 1, layout());
        let manager = LeaseManager::new(cfg, Arc::clone(side) as _, Arc::clone(side) as _).unwrap();
        side.manager.set(manager).ok().unwrap();
        side.key.set(key).unwrap();
        side.connect(STORE);
        (0..nodes)
            .filter(|&to| to != side.number)
            .for_each(|to| side.connect(to));
    }
    net.run_until_idle();

    let unserved = Arc::new(Mutex::new(0u64));
    let operations = 100;
    for _ in 0..operations {
        let (who, id, mode, write, steps, cut) = {
            let mut rng = rng.lock();
            let mode = if rng.random_bool(0.4) {
                Mode::Exclusive
            } else {
                Mode::Shared
            };
            let id = RecordId::new(0, rng.random_range(0..records));
            let who = rng.random_range(0..nodes);
            (
                who,
                id,
                mode,
                rng.random_bool(0.7),
                rng.random_range(0..25),
                rng.random_bool(0.03),
            )
        };
        let side = &sides[usize::from(who)];
        if cut {
            // The storage node ends the connection: nothing of it takes effect from now on.
            let conn = store.accepted.lock().get(&who).cloned();
            conn.unwrap().close();
        }
        if steps == 0 {
            side.manager().release(id);
        } else if steps == 1 {
            side.manager().downgrade(id);
        }
        *unserved.lock() += 1;
        let (unserved, me) = (Arc::clone(&unserved), side.me.clone());
        let f = Box::new(move |result: Result<Guard, LeaseError>| {
            let guard = result.unwrap();
            *unserved.lock() -= 1;
            let side = me.upgrade().unwrap();
            side.ghost.entered(who, id, mode);
            side.later(move |side| {
                side.ghost.left(who, id, mode, write);
                drop(guard);
            });
        });
        side.manager()
            .enter_async(id, mode, Instant::now() + Duration::from_secs(1000), f);
        (0..steps).for_each(|_| {
            net.step();
        });
    }
    net.run_until_idle();
    let snapshots: Vec<_> = sides.iter().map(|s| s.manager().snapshot()).collect();
    assert_eq!(*unserved.lock(), 0, "operations never served: {snapshots:?}");

    let left = Arc::new(Mutex::new(0));
    for side in &sides {
        let left = Arc::clone(&left);
        side.manager().leave(Box::new(move || *left.lock() += 1));
    }
    net.run_until_idle();
    assert_eq!(*left.lock(), nodes);
    let mut bytes = vec![0; memory.len()];
    memory.read_at(0, &mut bytes).unwrap();
    for (i, word) in bytes.chunks(8).enumerate() {
        let word = u64::from_ne_bytes(word.try_into().unwrap());
        assert!(
            if i % 8 == 0 { word >> 40 == 0 } else { word == 0 },
            "word {i} is {word:#x} at the end"
        );
    }
    assert!(sides.iter().all(|s| s.manager().stats().violations == 0));
    operations
}

#[test]
fn managers_over_the_simulated_fabric() {
    let start = Instant::now();
    let chosen = std::env::var("LOCKMGR_SEEDS").ok();
    let range = match &chosen {
        None => 0..1500,
        Some(range) => {
            let (from, to) = range.split_once("..").expect("LOCKMGR_SEEDS=from..to");
            from.parse().unwrap()..to.parse().unwrap()
        }
    };
    let (mut seeds, mut operations) = (0, 0);
    for seed in range {
        if chosen.is_none() && start.elapsed() > Duration::from_secs(15) {
            break;
        }
        match std::panic::catch_unwind(|| run(seed)) {
            Ok(n) => operations += n,
            Err(e) => {
                eprintln!("failed with seed {seed}: LOCKMGR_SEEDS={seed}..{}", seed + 1);
                std::panic::resume_unwind(e);
            }
        }
        seeds += 1;
    }
    println!("{seeds} seeds, {operations} operations");
}
