//! Real threads: three managers over records in plain memory, every manager with a thread for messages, one
//! for completions, one for revocations, and several that work.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use common::{Conn, Ghost, Memory, Submit, layout};
use lockmgr::{
    Directory, LeaseError, LeaseManager, LeaseUser, ManagerConfig, Mode, NodeId, RecordId, Relinquish,
};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rdma_transport::{AsyncOp, Completion, Connection, RemoteAddr};

const NODES: u16 = 3;
const RECORDS: u64 = 3;

enum Job {
    Message(u16, Vec<u8>),
    Revoke(RecordId, Mode),
    Drained(RecordId, Mode),
    Complete(Completion, Vec<rdma_transport::OpResult>),
    Stop,
}

struct Link {
    memory: Arc<Memory>,
    completions: Option<Mutex<Sender<Job>>>,
}

impl Submit for Link {
    fn submit(&self, batch: Vec<AsyncOp>, done: Completion) {
        let results = batch.iter().map(|op| self.memory.run(op)).collect();
        match &self.completions {
            None => done(Ok(results)),
            Some(q) => q.lock().send(Job::Complete(done, results)).unwrap(),
        }
    }
}

struct Side {
    node: u16,
    link: Arc<Conn<Link>>,
    ghost: Arc<Ghost>,
    messages: Vec<Mutex<Sender<Job>>>,
    revocations: Mutex<Sender<Job>>,
}

impl Directory for Side {
    fn record(&self, id: RecordId) -> Result<(Arc<dyn Connection>, RemoteAddr), LeaseError> {
        Ok((Arc::clone(&self.link) as _, Memory::at(id)))
    }
    fn send(&self, to: NodeId, msg: &[u8]) -> Result<(), LeaseError> {
        self.messages[usize::from(to.0)]
            .lock()
            .send(Job::Message(self.node, msg.to_vec()))
            .unwrap();
        Ok(())
    }
}

impl LeaseUser for Side {
    fn revoke(&self, id: RecordId, from: Mode, _to: Option<Mode>) {
        self.revocations.lock().send(Job::Revoke(id, from)).unwrap();
    }
    fn granted(&self, id: RecordId, _mode: Mode, version: u64, payload: Option<&[u8]>) {
        self.ghost.granted(self.node, id, version, payload);
    }
    fn confirm(&self, id: RecordId, _version: u64) {
        panic!("{id}: nothing was to be confirmed");
    }
}

fn serve(manager: &Arc<LeaseManager>, ghost: &Ghost, node: u16, jobs: &Receiver<Job>, own: &Sender<Job>) {
    for job in jobs {
        match job {
            Job::Message(from, bytes) => manager.message(NodeId(from), &bytes).unwrap(),
            Job::Complete(done, results) => done(Ok(results)),
            Job::Revoke(id, from) => {
                let own = own.clone();
                manager.close_gate(id, Box::new(move || own.send(Job::Drained(id, from)).unwrap()));
            }
            Job::Drained(id, from) => {
                let mut how = Relinquish::default();
                if from == Mode::Exclusive {
                    (how.modified, how.payload) = ghost.flush(node, id);
                }
                let version = manager.held(id).unwrap().1 + u64::from(how.modified);
                ghost.relinquished(node, id, version);
                assert_eq!(manager.relinquished(id, how).unwrap(), version);
            }
            Job::Stop => return,
        }
    }
}

fn work(manager: &Arc<LeaseManager>, ghost: &Ghost, node: u16, seed: u64, until: Instant) -> u64 {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut done = 0;
    while Instant::now() < until {
        let id = RecordId::new(0, rng.random_range(0..RECORDS));
        let mode = if rng.random_bool(0.3) {
            Mode::Exclusive
        } else {
            Mode::Shared
        };
        match rng.random_range(0..100) {
            0 => manager.release(id),
            1 => manager.downgrade(id),
            _ => {}
        }
        let guard = match manager.handle(id).and_then(|h| h.try_enter(mode)) {
            Some(guard) => guard,
            None => manager
                .enter(id, mode, Duration::from_secs(20))
                .unwrap_or_else(|error| {
                    panic!("{error}: {:?}", manager.snapshot());
                }),
        };
        ghost.entered(node, id, mode);
        for _ in 0..rng.random_range(0..200) {
            std::hint::spin_loop();
        }
        ghost.left(node, id, mode, rng.random_bool(0.5));
        drop(guard);
        done += 1;
    }
    done
}

#[test]
fn threads() {
    let memory = Arc::new(Memory::new(RECORDS));
    let ghost = Arc::new(Ghost::new(RECORDS));
    let queues: Vec<_> = (0..NODES).map(|_| [channel(), channel(), channel()]).collect();
    let mut managers = Vec::new();
    let mut servers = Vec::new();
    let mut stops = Vec::new();
    let senders: Vec<Sender<Job>> = queues.iter().map(|q| q[0].0.clone()).collect();
    for (node, [messages, completions, revocations]) in queues.into_iter().enumerate() {
        let node = node as u16;
        let asynchronous = (node != 0).then(|| Mutex::new(completions.0.clone()));
        let side = Arc::new(Side {
            node,
            link: Arc::new(Conn(Link {
                memory: Arc::clone(&memory),
                completions: asynchronous,
            })),
            ghost: Arc::clone(&ghost),
            messages: senders.iter().cloned().map(Mutex::new).collect(),
            revocations: Mutex::new(revocations.0.clone()),
        });
        let cfg = ManagerConfig::new(NodeId(node), 1, layout());
        let manager = LeaseManager::new(cfg, Arc::clone(&side) as _, side).unwrap();
        for (own, jobs) in [messages, completions, revocations] {
            let (manager, ghost) = (Arc::clone(&manager), Arc::clone(&ghost));
            stops.push(own.clone());
            servers.push(thread::spawn(move || serve(&manager, &ghost, node, &jobs, &own)));
        }
        managers.push(manager);
    }
    let until = Instant::now() + Duration::from_secs(4);
    let done: u64 = thread::scope(|s| {
        let workers: Vec<_> = (0..NODES * 2)
            .map(|i| {
                let (manager, ghost) = (&managers[usize::from(i / 2)], &ghost);
                s.spawn(move || work(manager, ghost, i / 2, i.into(), until))
            })
            .collect();
        workers.into_iter().map(|w| w.join().unwrap()).sum()
    });
    let (tell, left) = channel();
    for manager in &managers {
        let tell = tell.clone();
        manager.leave(Box::new(move || tell.send(()).unwrap()));
    }
    for _ in 0..NODES {
        left.recv_timeout(Duration::from_secs(10)).unwrap();
    }
    stops.iter().for_each(|s| s.send(Job::Stop).unwrap());
    servers.into_iter().for_each(|s| s.join().unwrap());
    memory.assert_all_free("threads");
    for manager in &managers {
        println!("{:?}", manager.stats());
        assert_eq!(manager.stats().violations, 0);
    }
    println!("{done} operations");
    assert!(done > 1000);
}
