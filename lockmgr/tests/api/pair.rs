//! Two managers, the memory that they share, and the messages between them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use lockmgr::{
    Directory, Guard, LeaseError, LeaseManager, LeaseUser, ManagerConfig, Mode, NodeId, OwnerWord, RecordId,
    Relinquish,
};
use parking_lot::Mutex;
use rdma_transport::{AsyncOp, Completion, Connection, OpResult, RemoteAddr, TransportError};

use crate::common::{Conn, Memory, Submit, layout};

pub const ID: RecordId = RecordId(2);
pub const SOON: Duration = Duration::from_millis(20);

/// Messages under way: from, to, bytes.
pub type Wire = Arc<Mutex<VecDeque<(u16, u16, Vec<u8>)>>>;

pub struct Link {
    memory: Arc<Memory>,
    down: Arc<Mutex<bool>>,
}

impl Submit for Link {
    fn submit(&self, batch: Vec<AsyncOp>, done: Completion) {
        if *self.down.lock() {
            return done(Err(TransportError::Shutdown.into()));
        }
        done(Ok(batch.iter().map(|op| self.memory.run(op)).collect()));
    }
}

#[derive(Default)]
pub struct Log {
    pub revokes: Vec<(Mode, Option<Mode>)>,
    pub grants: Vec<(Mode, u64, Option<Vec<u8>>)>,
    pub confirms: Vec<u64>,
}

pub struct Side {
    pub node: u16,
    pub link: Arc<Conn<Link>>,
    pub wire: Wire,
    pub log: Mutex<Log>,
    /// How long leases are kept, each time that is asked.
    pub keeps: Mutex<VecDeque<Duration>>,
}

impl Directory for Side {
    fn record(&self, id: RecordId) -> Result<(Arc<dyn Connection>, RemoteAddr), LeaseError> {
        if id.shard() != 0 {
            return Err(LeaseError::NoSuchRecord { record: id });
        }
        Ok((Arc::clone(&self.link) as _, Memory::at(id)))
    }
    fn send(&self, to: NodeId, msg: &[u8]) -> Result<(), LeaseError> {
        self.wire.lock().push_back((self.node, to.0, msg.to_vec()));
        Ok(())
    }
}

impl LeaseUser for Side {
    fn revoke(&self, _: RecordId, from: Mode, to: Option<Mode>) {
        self.log.lock().revokes.push((from, to));
    }
    fn granted(&self, _: RecordId, mode: Mode, version: u64, payload: Option<&[u8]>) {
        self.log
            .lock()
            .grants
            .push((mode, version, payload.map(<[u8]>::to_vec)));
    }
    fn keep(&self, _: RecordId, _: Mode, _: Duration) -> Duration {
        self.keeps.lock().pop_front().unwrap_or_default()
    }
    fn confirm(&self, _: RecordId, version: u64) {
        self.log.lock().confirms.push(version);
    }
}

pub struct Pair {
    pub managers: [Arc<LeaseManager>; 2],
    pub sides: [Arc<Side>; 2],
    pub wire: Wire,
    pub memory: Arc<Memory>,
    pub down: Arc<Mutex<bool>>,
}

pub fn pair(min_hold: Duration) -> Pair {
    pair_of(|cfg| cfg.min_hold = min_hold)
}

pub fn pair_of(change: impl Fn(&mut ManagerConfig)) -> Pair {
    pair_with(4, change)
}

pub fn pair_with(records: u64, change: impl Fn(&mut ManagerConfig)) -> Pair {
    let (wire, memory, down) = (
        Arc::default(),
        Arc::new(Memory::new(records)),
        Arc::new(Mutex::new(false)),
    );
    let sides = [0, 1].map(|node| {
        let link = Link {
            memory: Arc::clone(&memory),
            down: Arc::clone(&down),
        };
        Arc::new(Side {
            node,
            link: Arc::new(Conn(link)),
            wire: Arc::clone(&wire),
            log: Mutex::default(),
            keeps: Mutex::default(),
        })
    });
    let managers = [0, 1].map(|i| {
        let mut cfg = ManagerConfig::new(NodeId(i as u16), 1, layout());
        change(&mut cfg);
        LeaseManager::new(cfg, Arc::clone(&sides[i]) as _, Arc::clone(&sides[i]) as _).unwrap()
    });
    Pair {
        managers,
        sides,
        wire,
        memory,
        down,
    }
}

impl Pair {
    pub fn deliver(&self) {
        loop {
            let Some((from, to, msg)) = self.wire.lock().pop_front() else {
                return;
            };
            self.managers[usize::from(to)]
                .message(NodeId(from), &msg)
                .unwrap();
        }
    }

    /// Answers the last revoke of this node.
    pub fn bring_down(&self, i: usize, how: Relinquish) -> u64 {
        let drained = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&drained);
        self.managers[i].close_gate(ID, Box::new(move || bump(&seen)));
        assert_eq!(drained.load(SeqCst), 1, "somebody is inside");
        self.managers[i].relinquished(ID, how).unwrap()
    }

    /// The owner word.
    pub fn word(&self) -> OwnerWord {
        let word = AsyncOp::ReadWords {
            at: Memory::at(ID),
            words: 1,
        };
        let OpResult::Words(words) = self.memory.run(&word) else {
            panic!("no words");
        };
        OwnerWord::decode(words[0])
    }

    pub fn park(&self, i: usize, mode: Mode) -> Arc<Mutex<Option<Result<Guard, LeaseError>>>> {
        let cell = Arc::new(Mutex::new(None));
        let theirs = Arc::clone(&cell);
        let f = Box::new(move |r| *theirs.lock() = Some(r));
        self.managers[i].enter_async(ID, mode, Instant::now() + Duration::from_secs(60), f);
        cell
    }
}

pub fn bump(n: &AtomicUsize) {
    n.fetch_add(1, SeqCst);
}

pub fn payload(bytes: &[u8]) -> Relinquish {
    Relinquish {
        modified: true,
        needs_confirm: false,
        payload: bytes.to_vec(),
    }
}
