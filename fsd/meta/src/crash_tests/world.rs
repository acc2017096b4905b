//! Stores that remember what was done to them, the states a power cut can leave of them, and a cluster on top: a metadata
//! server without threads, storage nodes that are tables, mounts that keep what they were answered.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rand::Rng;
use rand::rngs::StdRng;
use rdma_transport::Connection;
use rt::sync::Mutex;

use crate::house::House;
use crate::journal::format::{make, read_superblock};
use crate::journal::records::encode;
use crate::namespace::freeing::Told;
use crate::nodes::Reach;
use crate::nodes::fabric::StorageNodes;
use crate::nodes::mounts::{Done, Mounts};
use crate::rules::{Flaw, Rules};
use crate::service::{News, Service};
use fsd_node::config::Config;
use fsd_node::fake_conn::FakeConn;
use fsd_node::fake_disk::{FakeStore, Luck, Seen, Table, apply, cut_batches};
use fsd_node::store::{Batch, Store};
use fsd_proto::clock::Skew;
use fsd_proto::layout::BLOCK;
use fsd_proto::rpc::{Errno, Responder, RpcError, Service as _};
use fsd_proto::wire::{
    BlockRange, Hello, MetaReply, MetaRequest, Records, Role, StorageReply, StorageRequest, View,
};

/// Storage nodes; the stores are the metadata server's and theirs.
pub const NODES: usize = 2;
pub const STORES: usize = 1 + NODES;

/// Something that reaches the disk of a store.
#[derive(Debug, Clone)]
pub enum Event {
    Batch(usize, Batch),
    Sync(usize),
}

#[derive(Default)]
pub struct Journal(Mutex<Vec<Event>>);

impl Journal {
    pub fn len(&self) -> usize {
        self.0.lock().len()
    }

    pub fn events(&self) -> Vec<Event> {
        self.0.lock().clone()
    }
}

/// Goes through a journal.
pub struct Cuts {
    events: Vec<Event>,
    at: usize,
    durable: [Table; STORES],
    rest: [Vec<Batch>; STORES],
}

impl Cuts {
    pub fn new(events: Vec<Event>) -> Self {
        Self {
            events,
            at: 0,
            durable: Default::default(),
            rest: Default::default(),
        }
    }

    /// One event more has happened; how many have.
    pub fn step(&mut self) -> Option<usize> {
        match self.events.get(self.at)?.clone() {
            Event::Batch(which, batch) => self.rest[which].push(batch),
            Event::Sync(which) => {
                for batch in self.rest[which].drain(..) {
                    apply(&mut self.durable[which], &batch);
                }
            }
        }
        self.at += 1;
        Some(self.at)
    }

    /// What a store has if its host crashes now.
    pub fn left(&self, which: usize, luck: Luck, rng: &mut StdRng) -> Table {
        let mut table = self.durable[which].clone();
        cut_batches(&mut table, &self.rest[which], luck, &mut |n| {
            rng.random_range(0..n)
        });
        table
    }
}

/// Storage nodes: tables of blocks.
pub struct FakeNodes(pub [Arc<FakeStore>; NODES]);

pub fn block_key(ino: u64, block: u64) -> Vec<u8> {
    [ino.to_be_bytes(), block.to_be_bytes()].concat()
}

pub fn block_of(key: &[u8]) -> (u64, u64) {
    let number = |at: usize| u64::from_be_bytes(key[at..at + 8].try_into().unwrap());
    (number(0), number(8))
}

/// The node that has a block.
pub fn node_of(ino: u64, block: u64) -> usize {
    (usize::from(fsd_proto::ino::shard(ino)) + block as usize) % NODES
}

impl FakeNodes {
    pub fn put(&self, ino: u64, block: u64) {
        let mut batch = Batch::default();
        batch.put(block_key(ino, block), vec![1]);
        self.0[node_of(ino, block)].apply(batch).unwrap();
    }

    fn free(&self, node: usize, ranges: &[BlockRange]) {
        let mut batch = Batch::default();
        for (key, _) in self.0[node].table() {
            let (ino, block) = block_of(&key);
            let has = |r: &BlockRange| r.ino == ino && (r.first..=r.last).contains(&block);
            if ranges.iter().any(has) {
                batch.delete(key);
            }
        }
        if !batch.is_empty() {
            self.0[node].apply(batch).unwrap();
        }
    }
}

impl StorageNodes for FakeNodes {
    fn ask(&self, id: u16, request: &StorageRequest) -> Result<StorageReply, RpcError> {
        let node = usize::from(id);
        Ok(match request {
            StorageRequest::Free { ranges } => {
                self.free(node, ranges);
                StorageReply::Freed(0)
            }
            StorageRequest::Flush { .. } => {
                self.0[node].sync().unwrap();
                StorageReply::Done
            }
            StorageRequest::Inodes { after } => {
                let table = self.0[node].table();
                let inos: BTreeSet<u64> = table.keys().map(|k| block_of(k).0).collect();
                StorageReply::Inodes(inos.into_iter().filter(|i| i > after).take(2).collect())
            }
            StorageRequest::Cut { ends } => {
                for &(ino, size) in ends {
                    let (first, last) = (size.unwrap_or(0).div_ceil(BLOCK), u64::MAX);
                    self.free(node, &[BlockRange { ino, first, last }]);
                }
                self.0[node].sync().unwrap();
                StorageReply::Freed(0)
            }
            StorageRequest::Owned { .. } => StorageReply::Records(Records::default()),
            StorageRequest::Unused { .. } => StorageReply::Inodes(Vec::new()),
            _ => StorageReply::Done,
        })
    }

    fn close(&self) {}
}

/// Mounts that have got to every view as soon as they are told of it.
pub struct FakeMounts;

impl Mounts for FakeMounts {
    fn tell(&self, _: &Arc<dyn Connection>, _: View, done: Done) {
        done(Ok(()));
    }

    fn tables(&self, _: &Arc<dyn Connection>, _: Vec<u64>, done: Done) {
        done(Ok(()));
    }

    fn relay(&self, _: &Arc<dyn Connection>, _: (u16, u64), _: Vec<u8>, done: Done) {
        done(Ok(()));
    }
}

/// What asks them.
pub fn reach(nodes: &Arc<FakeNodes>) -> Reach {
    Reach {
        storage: Arc::clone(nodes) as Arc<dyn StorageNodes>,
        mounts: Arc::new(FakeMounts),
    }
}

pub fn config() -> &'static Config {
    static CONFIG: OnceLock<Config> = OnceLock::new();
    CONFIG.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let mut text = "cluster = \"test\"\nkey_file = \"key\"\nfabric = \"shm\"\n\
                        [meta]\nlisten = \"meta.sock\"\ndir = \"meta\"\n"
            .to_owned();
        for node in 0..NODES {
            text += &format!(
                "[[storage]]\nid = {node}\nlisten = \"{node}.sock\"\ndir = \"{node}\"\npool = \"8MiB\"\n"
            );
        }
        let path = dir.path().join("cluster.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path).unwrap()
    })
}

/// The disks of a cluster.
pub struct Disks {
    pub journal: Arc<Journal>,
    pub meta: Arc<FakeStore>,
    pub nodes: Arc<FakeNodes>,
}

impl Disks {
    /// With these contents.
    pub fn with(tables: [Table; STORES]) -> Self {
        let journal = Arc::new(Journal::default());
        let mut stores = tables.into_iter().enumerate().map(|(which, table)| {
            let journal = Arc::clone(&journal);
            Arc::new(FakeStore::watched(table, move |seen| {
                journal.0.lock().push(match seen {
                    Seen::Batch(batch) => Event::Batch(which, batch),
                    Seen::Sync => Event::Sync(which),
                });
                Ok(())
            }))
        });
        let mut next = || stores.next().unwrap();
        Self {
            meta: next(),
            nodes: Arc::new(FakeNodes([next(), next()])),
            journal,
        }
    }

    /// Formatted.
    pub fn new() -> Self {
        let disks = Self::with(Default::default());
        make(disks.meta.as_ref(), config(), "u").unwrap();
        disks
    }
}

/// A metadata server whose threads are the test.
pub struct Server {
    pub service: Arc<Service>,
    news: News,
    house: House,
    tool: Arc<FakeConn>,
    next: u64,
}

impl Server {
    /// Starts one; `memory` is what its host remembers.
    pub fn start(disks: &Disks, memory: &Path, flaw: Option<Flaw>) -> Self {
        let store: Arc<dyn Store> = Arc::clone(&disks.meta) as Arc<dyn Store>;
        let mut config = config().clone();
        config.meta.memory_dir = memory.to_owned();
        let superblock = read_superblock(store.as_ref(), &config).unwrap();
        let options = (false, Rules::without(flaw));
        let reach = reach(&disks.nodes);
        let (service, news) = Service::open(store, &config, &superblock, options, |_| reach).unwrap();
        Self {
            house: House::new(&service),
            service,
            news,
            tool: FakeConn::new(0),
            next: 0,
        }
    }

    /// Sends a request; its number.
    pub fn send(&mut self, conn: &Arc<FakeConn>, request: &MetaRequest) -> u64 {
        let hello = Hello::new("test", Role::Client(None), conn.id().0);
        let body = encode(request);
        self.next += 1;
        let responder = Responder::new(Arc::clone(conn) as Arc<dyn Connection>, self.next);
        self.service.request(&hello, &body, responder);
        self.next
    }

    /// What the thread does that syncs.
    pub fn sync(&mut self) {
        let waiting: Vec<_> = self.news.commits.try_iter().collect();
        if !waiting.is_empty() {
            self.service.journal.commits.answer(waiting);
        }
    }

    /// What the thread does that keeps house.
    pub fn keep_house(&mut self) {
        let mut news: Vec<Told> = self.news.house.try_iter().collect();
        // Now, and not after a while.
        self.next += 1;
        let tool = Arc::clone(&self.tool) as Arc<dyn Connection>;
        news.push(Told::Settle(Responder::new(tool, self.next)));
        self.house.look_after(news);
        self.service.judge();
        self.service.membership.takeover.advance();
    }

    pub fn ask(&mut self, conn: &Arc<FakeConn>, request: &MetaRequest) -> Result<MetaReply, Errno> {
        let number = self.send(conn, request);
        self.sync();
        conn.taken(number).expect("an answer")
    }

    /// Whoever has not come is dead.
    pub fn bury(&mut self) {
        for session in self.service.membership.members.sessions.lock().nodes.values_mut() {
            if session.conn.is_none() {
                session.gone = true;
            }
        }
        self.keep_house();
    }
}

pub fn join(again: Option<(u16, u8)>, life: u64) -> MetaRequest {
    MetaRequest::Join {
        again,
        life,
        listen: String::new(),
        name: format!("mount {life}"),
        skew: Skew { least: 0, most: 0 },
        locks: Vec::new(),
        durable: 0,
    }
}
