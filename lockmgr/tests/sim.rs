//! Seeded simulation of several managers: every operation on memory, every message and every step of a
//! user happens at a random moment.
//!
//! `LOCKMGR_SEEDS=from..to` chooses the seeds; a failure prints its own.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Conn, Ghost, Memory, Submit, layout, node_id, node_number};
use lockmgr::{
    Directory, Guard, LeaseError, LeaseManager, LeaseUser, ManagerConfig, Mode, NodeId, RecordId, Relinquish,
};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rdma_transport::{AsyncOp, Completion, Connection, OpResult, RemoteAddr, TransportError};

const SHARD: u32 = 3;

struct Batch {
    ops: Vec<AsyncOp>,
    results: Vec<OpResult>,
    done: Completion,
}

/// What is under way. Locked for moments only.
#[derive(Default)]
struct Net {
    /// Per node: batches on its connection to the memory, in order.
    batches: Vec<VecDeque<Batch>>,
    /// Per node: is the connection up?
    up: Vec<bool>,
    channels: HashMap<(u16, u16), VecDeque<Vec<u8>>>,
    tasks: Vec<Task>,
    left: usize,
}

enum Task {
    /// Close the gate.
    Revoke {
        node: u16,
        id: RecordId,
        from: Mode,
    },
    /// Nobody is inside.
    Relinquish {
        node: u16,
        id: RecordId,
        from: Mode,
    },
    Confirm {
        node: u16,
        id: RecordId,
        version: u64,
    },
    /// An operation ends.
    Finish {
        node: u16,
        guard: Guard,
        write: bool,
    },
    Reconnect {
        node: u16,
    },
}

type Shared = Arc<Mutex<Net>>;

struct Link {
    node: u16,
    net: Shared,
}

fn broken() -> TransportError {
    TransportError::Disconnected {
        addr: "memory".to_owned(),
        reason: "simulated".to_owned(),
    }
}

impl Submit for Link {
    fn submit(&self, ops: Vec<AsyncOp>, done: Completion) {
        let mut net = self.net.lock();
        if net.up[usize::from(self.node)] {
            net.batches[usize::from(self.node)].push_back(Batch {
                ops,
                results: Vec::new(),
                done,
            });
        } else {
            drop(net);
            done(Err(broken().into()));
        }
    }
}

struct Side {
    node: u16,
    net: Shared,
    ghost: Arc<Ghost>,
}

impl Directory for Side {
    fn record(&self, id: RecordId) -> Result<(Arc<dyn Connection>, RemoteAddr), LeaseError> {
        if id.shard() != SHARD {
            return Err(LeaseError::NoSuchRecord { record: id });
        }
        let link = Link {
            node: self.node,
            net: Arc::clone(&self.net),
        };
        Ok((Arc::new(Conn(link)), Memory::at(id)))
    }
    fn send(&self, to: NodeId, msg: &[u8]) -> Result<(), LeaseError> {
        self.net
            .lock()
            .channels
            .entry((self.node, node_number(to)))
            .or_default()
            .push_back(msg.to_vec());
        Ok(())
    }
}

impl LeaseUser for Side {
    fn revoke(&self, id: RecordId, from: Mode, _to: Option<Mode>) {
        self.net.lock().tasks.push(Task::Revoke {
            node: self.node,
            id,
            from,
        });
    }
    fn granted(&self, id: RecordId, _mode: Mode, version: u64, payload: Option<&[u8]>) {
        self.ghost.granted(self.node, id, version, payload);
    }
    fn confirm(&self, id: RecordId, version: u64) {
        let node = self.node;
        self.net.lock().tasks.push(Task::Confirm { node, id, version });
    }
}

struct World {
    rng: StdRng,
    net: Shared,
    memory: Memory,
    ghost: Arc<Ghost>,
    nodes: Vec<Arc<LeaseManager>>,
    records: u64,
    /// Operations begun and not let in yet, and what became of the others.
    waiting: Arc<Mutex<(u64, u64, u64)>>,
    losses: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let n = rng.random_range(2..=5u16);
        let records = rng.random_range(1..=4);
        let net: Shared = Arc::new(Mutex::new(Net {
            batches: (0..n).map(|_| VecDeque::new()).collect(),
            up: vec![true; n.into()],
            ..Net::default()
        }));
        let ghost = Arc::new(Ghost::new(records));
        let hold = Duration::from_secs(if rng.random_bool(0.3) { 1 } else { 0 });
        let keep_shared = rng.random_bool(0.7);
        let keep_word = Duration::from_secs(if rng.random_bool(0.5) { 1 } else { 0 });
        let nodes = (0..n)
            .map(|node| {
                let mut cfg = ManagerConfig::new(node_id(node), node as u8 + 1, layout());
                cfg.min_hold = hold;
                cfg.keep_shared = keep_shared;
                cfg.keep_word = keep_word;
                let side = Arc::new(Side {
                    node,
                    net: Arc::clone(&net),
                    ghost: Arc::clone(&ghost),
                });
                LeaseManager::new(cfg, Arc::clone(&side) as _, side).unwrap()
            })
            .collect();
        let memory = Memory::new(records);
        let losses = if rng.random_bool(0.5) { 8 } else { 0 };
        Self {
            rng,
            net,
            memory,
            ghost,
            nodes,
            records,
            waiting: Arc::default(),
            losses,
        }
    }

    fn begin(&mut self) {
        let node = self.rng.random_range(0..self.nodes.len()) as u16;
        let id = RecordId::new(SHARD, self.rng.random_range(0..self.records));
        let manager = &self.nodes[usize::from(node)];
        match self.rng.random_range(0..20) {
            0 => return manager.release(id),
            1 => return manager.downgrade(id),
            _ => {}
        }
        let mode = if self.rng.random_bool(0.4) {
            Mode::Exclusive
        } else {
            Mode::Shared
        };
        let write = self.rng.random_bool(0.7);
        let patience = if self.rng.random_bool(0.1) { 1 } else { 1_000_000 };
        let (net, ghost) = (Arc::clone(&self.net), Arc::clone(&self.ghost));
        let waiting = Arc::clone(&self.waiting);
        waiting.lock().0 += 1;
        let f = Box::new(move |result: Result<Guard, LeaseError>| {
            waiting.lock().0 -= 1;
            match result {
                Ok(guard) => {
                    waiting.lock().1 += 1;
                    ghost.entered(node, id, mode);
                    net.lock().tasks.push(Task::Finish { node, guard, write });
                }
                Err(error @ (LeaseError::Timeout { .. } | LeaseError::StorageLost { .. })) => {
                    waiting.lock().2 += 1;
                    assert!(patience == 1, "{error}");
                }
                Err(error) => panic!("{error}"),
            }
        });
        manager.enter_async(id, mode, Instant::now() + Duration::from_secs(patience), f);
    }

    /// Does one thing that is under way; false if nothing is.
    fn step(&mut self) -> bool {
        enum Choice {
            Memory(usize),
            Message(u16, u16),
            Task(usize),
        }
        let choice = {
            let net = self.net.lock();
            let mut choices = Vec::new();
            choices.extend(
                (0..net.batches.len())
                    .filter(|&i| !net.batches[i].is_empty())
                    .map(Choice::Memory),
            );
            let mut pairs: Vec<_> = net
                .channels
                .iter()
                .filter(|(_, c)| !c.is_empty())
                .map(|(&p, _)| p)
                .collect();
            pairs.sort_unstable();
            choices.extend(pairs.into_iter().map(|(from, to)| Choice::Message(from, to)));
            choices.extend((0..net.tasks.len()).map(Choice::Task));
            let n = choices.len();
            if n == 0 {
                drop(net);
                // Nothing moves but time.
                return self.tick();
            }
            choices.swap_remove(self.rng.random_range(0..n))
        };
        match choice {
            Choice::Memory(i) => self.memory_step(i),
            Choice::Message(from, to) => {
                let msg = self
                    .net
                    .lock()
                    .channels
                    .get_mut(&(from, to))
                    .unwrap()
                    .pop_front()
                    .unwrap();
                self.nodes[usize::from(to)].message(node_id(from), &msg).unwrap();
            }
            Choice::Task(i) => {
                let task = self.net.lock().tasks.swap_remove(i);
                self.task(task);
            }
        }
        true
    }

    fn tick(&self) -> bool {
        let soon = Instant::now() + Duration::from_secs(2);
        let mut any = false;
        for node in &self.nodes {
            if node.next_deadline().is_some_and(|d| d <= soon) {
                node.expire(soon);
                any = true;
            }
        }
        any
    }

    fn memory_step(&mut self, i: usize) {
        if self.losses > 0 && self.rng.random_bool(0.02) {
            self.losses -= 1;
            let lost = {
                let mut net = self.net.lock();
                net.up[i] = false;
                net.tasks.push(Task::Reconnect { node: i as u16 });
                std::mem::take(&mut net.batches[i])
            };
            self.nodes[i].storage_lost(SHARD);
            lost.into_iter().for_each(|b| (b.done)(Err(broken().into())));
            return;
        }
        let finished = {
            let mut net = self.net.lock();
            // Operations of a connection take effect in order, the completions come later.
            let queue = &mut net.batches[i];
            let complete = |b: &Batch| b.results.len() == b.ops.len();
            let next = queue.iter().position(|b| !complete(b));
            match next {
                Some(at) if !complete(&queue[0]) || self.rng.random_bool(0.7) => {
                    let batch = &mut queue[at];
                    batch
                        .results
                        .push(self.memory.run(&batch.ops[batch.results.len()]));
                    None
                }
                _ => queue.pop_front(),
            }
        };
        if let Some(batch) = finished {
            (batch.done)(Ok(batch.results));
        }
    }

    fn task(&mut self, task: Task) {
        match task {
            Task::Revoke { node, id, from } => {
                let net = Arc::clone(&self.net);
                let manager = &self.nodes[usize::from(node)];
                manager.close_gate(
                    id,
                    Box::new(move || net.lock().tasks.push(Task::Relinquish { node, id, from })),
                );
            }
            Task::Relinquish { node, id, from } => {
                let manager = &self.nodes[usize::from(node)];
                if self.rng.random_bool(0.1) {
                    // Something was found dirty after all: serve again, try again.
                    manager.open_gate(id);
                    self.net.lock().tasks.push(Task::Revoke { node, id, from });
                    return;
                }
                let mut how = Relinquish::default();
                if from == Mode::Exclusive {
                    (how.modified, how.payload) = self.ghost.flush(node, id);
                    how.needs_confirm = self.rng.random_bool(0.3);
                }
                // Else when it is asked for.
                let confirm = how.needs_confirm && self.rng.random_bool(0.5);
                let before = manager.held(id).unwrap().1;
                self.ghost
                    .relinquished(node, id, before + u64::from(how.modified));
                let version = manager.relinquished(id, how.clone()).unwrap();
                assert_eq!(version, before + u64::from(how.modified));
                if confirm {
                    self.net.lock().tasks.push(Task::Confirm { node, id, version });
                }
            }
            Task::Confirm { node, id, version } => self.nodes[usize::from(node)].confirmed(id, version),
            Task::Finish { node, guard, write } => {
                self.ghost.left(node, guard.id(), guard.mode(), write);
                drop(guard);
            }
            Task::Reconnect { node } => {
                self.net.lock().up[usize::from(node)] = true;
                self.nodes[usize::from(node)].storage_reconnected(SHARD);
            }
        }
    }

    fn run(mut self, seed: u64) -> (u64, u64) {
        for _ in 0..self.rng.random_range(20..200) {
            self.begin();
            for _ in 0..self.rng.random_range(0..30) {
                if !self.step() {
                    break;
                }
            }
            if self.rng.random_bool(0.05) {
                self.tick();
            }
        }
        while self.step() {}
        let (waiting, served, gave_up) = *self.waiting.lock();
        assert_eq!(
            waiting,
            0,
            "seed {seed}: operations never served: {:?}",
            self.snapshots()
        );
        // Everybody leaves, in any order and at the same time.
        let mut order: Vec<usize> = (0..self.nodes.len()).collect();
        while let Some(&i) = order.choose(&mut self.rng) {
            order.retain(|&x| x != i);
            let net = Arc::clone(&self.net);
            self.nodes[i].leave(Box::new(move || net.lock().left += 1));
            for _ in 0..self.rng.random_range(0..10) {
                self.step();
            }
        }
        while self.step() {}
        assert_eq!(
            self.net.lock().left,
            self.nodes.len(),
            "seed {seed}: {:?}",
            self.snapshots()
        );
        self.memory.assert_all_free(&format!("seed {seed}"));
        for node in &self.nodes {
            assert_eq!(node.stats().violations, 0);
            assert!(node.snapshot().is_empty());
            assert_eq!(node.next_deadline(), None);
        }
        (served, gave_up)
    }

    fn snapshots(&self) -> Vec<Vec<lockmgr::LeaseInfo>> {
        self.nodes.iter().map(|n| n.snapshot()).collect()
    }
}

fn seeds() -> std::ops::Range<u64> {
    let Ok(range) = std::env::var("LOCKMGR_SEEDS") else {
        return 0..12_000;
    };
    let (from, to) = range.split_once("..").expect("LOCKMGR_SEEDS=from..to");
    from.parse().unwrap()..to.parse().unwrap()
}

#[test]
fn every_schedule_is_safe_and_serves_everybody() {
    let start = Instant::now();
    let (mut served, mut gave_up, mut ran) = (0, 0, 0u64);
    for seed in seeds() {
        if start.elapsed() > Duration::from_secs(20) && std::env::var("LOCKMGR_SEEDS").is_err() {
            break;
        }
        let result = std::panic::catch_unwind(|| World::new(seed).run(seed));
        match result {
            Ok((s, g)) => {
                served += s;
                gave_up += g;
                ran += 1;
            }
            Err(e) => {
                eprintln!("failed with seed {seed}: LOCKMGR_SEEDS={seed}..{}", seed + 1);
                std::panic::resume_unwind(e);
            }
        }
    }
    println!("{ran} seeds, {served} operations served, {gave_up} gave up in time");
    assert!(served > 100);
}
