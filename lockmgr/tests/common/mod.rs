//! What the tests share: records in plain memory, and a ghost that knows what is true.
#![allow(dead_code, missing_docs)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use lockmgr::{Mode, NEAR_NODES, NodeId, OwnerWord, RecordId, RecordLayout};
use parking_lot::Mutex;
use rdma_transport::{AsyncOp, ConnId, Connection, Op, OpResult, RegionKey, RemoteAddr, TransportError};

/// Records of 64 bytes, of one shard.
pub struct Memory(Vec<AtomicU64>);

pub fn layout() -> RecordLayout {
    RecordLayout::new(64).unwrap()
}

/// The name of the test's `n`th node: every other one has its holder bit outside of the owner word.
pub fn node_id(n: u16) -> NodeId {
    NodeId(n + n % 2 * NEAR_NODES)
}

/// Which of the test's nodes that is.
pub fn node_number(id: NodeId) -> u16 {
    id.0 - id.0 % 2 * NEAR_NODES
}

impl Memory {
    pub fn new(records: u64) -> Self {
        Self((0..records * 8).map(|_| AtomicU64::new(0)).collect())
    }

    pub fn at(id: RecordId) -> RemoteAddr {
        RemoteAddr {
            key: RegionKey(7),
            offset: id.index() * 64,
        }
    }

    fn word(&self, at: RemoteAddr) -> &AtomicU64 {
        assert!(at.key == RegionKey(7) && at.offset.is_multiple_of(8));
        &self.0[at.offset as usize / 8]
    }

    pub fn run(&self, op: &AsyncOp) -> OpResult {
        match *op {
            AsyncOp::ReadWords { at, words } => OpResult::Words(
                (0..u64::from(words))
                    .map(|i| self.word(at.plus(i * 8)).load(SeqCst))
                    .collect(),
            ),
            AsyncOp::Cas { at, expect, new } => OpResult::Old(
                self.word(at)
                    .compare_exchange(expect, new, SeqCst, SeqCst)
                    .unwrap_or_else(|x| x),
            ),
            AsyncOp::Faa { at, add } => OpResult::Old(self.word(at).fetch_add(add, SeqCst)),
            AsyncOp::Read { .. } | AsyncOp::Write { .. } => {
                unreachable!("the lease manager uses words only")
            }
        }
    }

    /// No writer, no holder anywhere.
    pub fn assert_all_free(&self, what: &str) {
        for (i, w) in self.0.iter().enumerate() {
            let w = w.load(SeqCst);
            let owner = OwnerWord::decode(w);
            // Who read last leaves the flag that tells of far readers.
            let unused = OwnerWord::free(owner.version).read_by(0, owner.far);
            let free = if i % 8 == 0 { owner == unused } else { w == 0 };
            assert!(free, "{what}: word {} of record {} is {w:#x}", i % 8, i / 8);
        }
    }
}

/// The part of a connection that the lease manager does not use.
pub trait Submit: Send + Sync {
    fn submit(&self, batch: Vec<AsyncOp>, done: rdma_transport::Completion);
}

pub struct Conn<T>(pub T);

impl<T: Submit> Connection for Conn<T> {
    fn id(&self) -> ConnId {
        ConnId(0)
    }
    fn peer_identity(&self) -> &[u8] {
        &[]
    }
    fn peer_addr(&self) -> String {
        "memory".to_owned()
    }
    fn is_alive(&self) -> bool {
        true
    }
    fn execute(&self, _: &mut [Op<'_>]) -> Result<(), TransportError> {
        unreachable!("the lease manager never blocks on the fabric")
    }
    fn submit(&self, batch: Vec<AsyncOp>, done: rdma_transport::Completion) {
        self.0.submit(batch, done);
    }
    fn send(&self, _: &[u8]) -> Result<(), TransportError> {
        unreachable!("messages go through the directory")
    }
    fn queue(&self, _: &[u8]) -> Result<(), TransportError> {
        unreachable!("messages go through the directory")
    }
    fn close(&self) {}
}

#[derive(Default, Clone)]
struct Cache {
    version: u64,
    value: u64,
    dirty: bool,
}

#[derive(Default)]
struct Truth {
    /// What was written last, by whomever.
    latest: u64,
    /// What storage shows.
    stored: u64,
    caches: HashMap<u16, Cache>,
    readers: HashMap<u16, i64>,
    writers: HashMap<u16, i64>,
}

/// Knows what every node caches, and what it should.
pub struct Ghost(Vec<Mutex<Truth>>);

impl Ghost {
    pub fn new(records: u64) -> Self {
        Self((0..records).map(|_| Mutex::default()).collect())
    }

    fn truth(&self, id: RecordId) -> parking_lot::MutexGuard<'_, Truth> {
        self.0[id.index() as usize].lock()
    }

    pub fn granted(&self, node: u16, id: RecordId, version: u64, payload: Option<&[u8]>) {
        let mut t = self.truth(id);
        let (stored, latest) = (t.stored, t.latest);
        assert_eq!(
            stored, latest,
            "{id} granted to node {node} with something not written back"
        );
        if let Some(p) = payload {
            assert_eq!(
                p,
                latest.to_le_bytes(),
                "{id}: attributes of a grant to node {node} are old"
            );
        }
        let cache = t.caches.entry(node).or_default();
        if cache.version != version {
            *cache = Cache {
                version,
                value: stored,
                dirty: false,
            };
        }
    }

    /// An operation begins; ends with `left`.
    pub fn entered(&self, node: u16, id: RecordId, mode: Mode) {
        let mut t = self.truth(id);
        let others = |m: &HashMap<u16, i64>| m.iter().any(|(&n, &c)| n != node && c > 0);
        assert!(
            !others(&t.writers),
            "{id}: node {node} enters {mode} beside a writer"
        );
        if mode == Mode::Exclusive {
            assert!(!others(&t.readers), "{id}: node {node} writes beside a reader");
            *t.writers.entry(node).or_default() += 1;
        } else {
            *t.readers.entry(node).or_default() += 1;
        }
    }

    pub fn left(&self, node: u16, id: RecordId, mode: Mode, write: bool) {
        let mut t = self.truth(id);
        let latest = t.latest;
        let cached = t.caches.entry(node).or_default().value;
        assert_eq!(cached, latest, "{id}: node {node} reads old data");
        if mode == Mode::Exclusive {
            *t.writers.entry(node).or_default() -= 1;
            if write {
                t.latest += 1;
                let latest = t.latest;
                let cache = t.caches.entry(node).or_default();
                cache.value = latest;
                cache.dirty = true;
            }
        } else {
            *t.readers.entry(node).or_default() -= 1;
        }
    }

    /// Writes back; was there anything, and the attributes.
    pub fn flush(&self, node: u16, id: RecordId) -> (bool, Vec<u8>) {
        let mut t = self.truth(id);
        let cache = t.caches.entry(node).or_default();
        let (value, dirty) = (cache.value, std::mem::take(&mut cache.dirty));
        if dirty {
            t.stored = value;
        }
        (dirty, value.to_le_bytes().to_vec())
    }

    /// The version under which the caches go on.
    pub fn relinquished(&self, node: u16, id: RecordId, version: u64) {
        self.truth(id).caches.entry(node).or_default().version = version;
    }
}
