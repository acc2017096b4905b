//! A cluster at work, and what its mounts know.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::world::{Disks, NODES, Server, join};
use crate::journal::records::{Dirent, Inode, decode, key};
use crate::rules::Flaw;
use fsd_node::fake_conn::FakeConn;
use fsd_node::fake_disk::Table;
use fsd_node::store::Store;
use fsd_proto::layout::BLOCK;
use fsd_proto::rpc::Errno;
use fsd_proto::wire::{
    AttrUpdate, BlockRange, Kind, MetaReply, MetaRequest, NamespaceOp, StorageReply, StorageRequest, Time,
};

/// A mount, and what it knows. Points of time are numbers of events.
pub struct Mount {
    pub node: u16,
    pub incarnation: u8,
    pub life: u64,
    pub conn: Arc<FakeConn>,
    pub born: usize,
    /// Asked to leave, and answered.
    pub left: Option<(usize, usize)>,
    pub seq: u64,
    /// Numbers it has got and not used.
    pub numbers: Vec<u64>,
    /// What it was answered: when, the place, the transaction.
    pub log: Vec<(usize, u64, MetaRequest)>,
    /// Transactions that were answered only when they were durable: when they were done and not answered.
    pub delayed: Vec<(Range<usize>, MetaRequest)>,
    /// When it heard up to which place everything is durable.
    pub heard: Vec<(usize, u64)>,
}

/// A cluster at work.
pub struct World {
    pub disks: Disks,
    pub server: Server,
    pub mounts: Vec<Mount>,
    pub rng: StdRng,
    pub clock: i64,
    /// Numbers given out: when that was answered, to which mount.
    pub given: Vec<(usize, usize, u64)>,
    /// Creations that were answered.
    pub created: Vec<(usize, u64)>,
    /// Blocks written: when, and when a truncation freed them.
    pub written: Vec<(usize, u64, u64)>,
    pub cut: Vec<(usize, u64, u64)>,
    /// What was there when an `fsync` was answered.
    pub synced: Vec<(usize, Table)>,
    /// Syncs of the storage nodes.
    pub stored: Vec<(usize, usize)>,
    pub _memory: tempfile::TempDir,
}

pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// Unwraps what comes with an answer.
pub fn plain(answer: Result<MetaReply, Errno>) -> Result<(u64, u64, MetaReply), Errno> {
    Ok(match answer? {
        MetaReply::Ordered {
            order,
            durable,
            reply,
        } => (order, durable, *reply),
        reply => (0, 0, reply),
    })
}

pub fn inodes(table: &Table) -> BTreeMap<u64, Inode> {
    let pairs = table.range(b"I".to_vec()..b"J".to_vec());
    pairs.map(|(k, v)| (key::number(k), decode(v).unwrap())).collect()
}

pub fn names(table: &Table) -> Vec<(u64, Vec<u8>, Dirent)> {
    let pairs = table.range(b"D".to_vec()..b"E".to_vec());
    pairs
        .map(|(k, v)| (key::number(k), key::rest(k).to_vec(), decode(v).unwrap()))
        .collect()
}

/// Names, inodes, attributes: what applications see.
pub fn visible(table: &Table) -> Table {
    let seen = |k: &Vec<u8>| matches!(k[0], b'I' | b'D' | b'X' | b'O');
    let pairs = table.iter().filter(|(k, _)| seen(k));
    pairs.map(|(k, v)| (k.clone(), v.clone())).collect()
}

impl World {
    pub fn new(seed: u64, flaw: Option<Flaw>) -> Self {
        let (disks, memory) = (Disks::new(), scratch());
        let server = Server::start(&disks, memory.path(), flaw);
        let mut world = Self {
            disks,
            server,
            mounts: Vec::new(),
            rng: StdRng::seed_from_u64(seed),
            clock: 0,
            given: Vec::new(),
            created: Vec::new(),
            written: Vec::new(),
            cut: Vec::new(),
            synced: Vec::new(),
            stored: Vec::new(),
            _memory: memory,
        };
        for _ in 0..3 {
            world.mount();
        }
        world
    }

    pub fn at(&self) -> usize {
        self.disks.journal.len()
    }

    pub fn random(&mut self, below: usize) -> usize {
        self.rng.random_range(0..below.max(1))
    }

    pub fn mount(&mut self) {
        let life = self.mounts.len() as u64 + 1;
        let conn = FakeConn::new(life);
        let joined = plain(self.server.ask(&conn, &join(None, life))).unwrap().2;
        let MetaReply::Joined(joined) = joined else {
            panic!("{joined:?}")
        };
        self.mounts.push(Mount {
            node: joined.node,
            incarnation: joined.incarnation,
            life,
            conn,
            born: self.at(),
            left: None,
            seq: 0,
            numbers: Vec::new(),
            log: Vec::new(),
            delayed: Vec::new(),
            heard: Vec::new(),
        });
    }

    /// A request of a mount, and what it learns by the answer.
    pub fn ask(&mut self, m: usize, request: &MetaRequest) -> Result<MetaReply, Errno> {
        let conn = Arc::clone(&self.mounts[m].conn);
        let number = self.server.send(&conn, request);
        let done = self.at();
        self.server.sync();
        let (order, durable, reply) = plain(conn.taken(number).expect("an answer"))?;
        let at = self.at();
        if order > 0 && done < at {
            self.mounts[m].delayed.push((done..at, request.clone()));
        }
        if order > 0 {
            self.mounts[m].log.push((at, order, request.clone()));
        }
        self.mounts[m].heard.push((at, durable));
        Ok(reply)
    }

    pub fn namespace(&mut self, m: usize, op: NamespaceOp) -> Result<MetaReply, Errno> {
        self.clock += 1;
        let mount = &mut self.mounts[m];
        mount.seq += 1;
        let request = MetaRequest::Namespace {
            seq: mount.seq,
            acknowledged: mount.seq,
            now: Time(self.clock),
            touched: Vec::new(),
            op,
        };
        self.ask(m, &request)
    }

    pub fn update(&mut self, m: usize, inode: &Inode, size: u64) {
        self.clock += 1;
        let update = AttrUpdate {
            size,
            version: inode.attr.version + 1,
            mtime: Time(self.clock),
            ..AttrUpdate::from(&inode.attr)
        };
        let updates = vec![update];
        self.ask(m, &MetaRequest::Update { updates }).unwrap();
    }

    pub fn reserve(&mut self, m: usize) {
        let reply = self.ask(m, &MetaRequest::ReserveInodes { count: 4 }).unwrap();
        let MetaReply::Inodes(range) = reply else {
            panic!("{reply:?}")
        };
        let at = self.at();
        for ino in range.inos {
            self.given.push((at, m, ino));
            self.mounts[m].numbers.push(ino);
        }
    }

    pub fn store(&mut self) {
        for (node, store) in self.disks.nodes.0.iter().enumerate() {
            store.sync().unwrap();
            self.stored.push((self.disks.journal.len(), node));
        }
    }

    /// A mount does something, or a server does by itself.
    pub fn step(&mut self) {
        let alive: Vec<usize> = (0..self.mounts.len())
            .filter(|&m| self.mounts[m].left.is_none())
            .collect();
        let m = alive[self.random(alive.len())];
        let table = self.disks.meta.table();
        let inodes = inodes(&table);
        let names = names(&table);
        let directories: Vec<u64> = inodes
            .values()
            .filter(|i| i.attr.kind == Kind::Directory)
            .map(|i| i.attr.ino)
            .collect();
        let parent = directories[self.random(directories.len())];
        let name = format!("n{}", self.random(8)).into_bytes();
        let some = (!names.is_empty()).then(|| {
            let n = self.random(names.len());
            names[n].clone()
        });
        // Whatever is not possible is refused, and changes nothing.
        match (self.random(20), some) {
            (0..=4, _) => {
                let Some(ino) = self.mounts[m].numbers.pop() else {
                    return self.reserve(m);
                };
                let directory = self.random(4) == 0;
                let kind = if directory { Kind::Directory } else { Kind::File };
                let op = new_inode(parent, ino, kind, &String::from_utf8_lossy(&name));
                match self.namespace(m, op) {
                    Ok(_) => {
                        let at = self.at();
                        self.created.push((at, ino));
                    }
                    Err(_) => self.mounts[m].numbers.push(ino),
                }
            }
            (5..=7, Some((parent, name, entry))) => {
                let (ino, keep) = (entry.ino, self.random(3) == 0);
                let op = if entry.kind == Kind::Directory {
                    NamespaceOp::Rmdir { parent, name, ino }
                } else {
                    NamespaceOp::Unlink {
                        parent,
                        name,
                        ino,
                        keep,
                    }
                };
                let _ = self.namespace(m, op);
            }
            (8..=9, Some((from, old, entry))) => {
                let replaced = names.iter().find(|(p, n, _)| (*p, n) == (parent, &name));
                let op = NamespaceOp::Rename {
                    parent: from,
                    name: old,
                    ino: entry.ino,
                    new_parent: parent,
                    new_name: name,
                    replaced: replaced.map(|(_, _, e)| e.ino),
                    keep: false,
                    flags: if self.random(3) == 0 { 2 } else { 0 },
                };
                let _ = self.namespace(m, op);
            }
            (10, Some((_, _, entry))) => {
                let op = NamespaceOp::Link {
                    ino: entry.ino,
                    parent,
                    name,
                };
                let _ = self.namespace(m, op);
            }
            (11, Some((_, _, entry))) => {
                let op = NamespaceOp::SetXattr {
                    ino: entry.ino,
                    name,
                    // No two are the same.
                    value: self.clock.to_le_bytes().to_vec(),
                    flags: 0,
                };
                let _ = self.namespace(m, op);
            }
            (12..=14, Some((_, _, entry))) if entry.kind == Kind::File => self.write(m, &inodes[&entry.ino]),
            (15, Some((_, _, entry))) if entry.kind == Kind::File => {
                // A truncation: the blocks go, then the size is told.
                let inode = &inodes[&entry.ino];
                let size = self.random(2) as u64 * BLOCK;
                for node in 0..NODES {
                    let (ino, first, last) = (entry.ino, size / BLOCK, u64::MAX);
                    let ranges = vec![BlockRange { ino, first, last }];
                    let request = StorageRequest::Free { ranges };
                    let reply = self.server.service.nodes.asks.ask(node as u16, &request).unwrap();
                    assert_eq!(reply, StorageReply::Freed(0));
                }
                let at = self.at();
                self.cut.push((at, entry.ino, size / BLOCK));
                self.update(m, inode, size);
            }
            (16, _) => {
                let orphans: Vec<u64> = table
                    .range(b"O".to_vec()..b"P".to_vec())
                    .map(|(k, _)| key::number(k))
                    .collect();
                if !orphans.is_empty() {
                    let ino = orphans[self.random(orphans.len())];
                    self.ask(m, &MetaRequest::Reap { ino }).unwrap();
                }
            }
            (17, _) => {
                // fsync.
                self.store();
                self.ask(m, &MetaRequest::Sync).unwrap();
                let there = visible(&self.disks.meta.table());
                self.synced.push((self.at(), there));
            }
            (18, _) if alive.len() > 1 && self.random(3) == 0 => {
                let from = self.at();
                self.ask(m, &MetaRequest::Leave).unwrap();
                self.mounts[m].left = Some((from, self.at()));
                self.mount();
            }
            (18, _) => self.store(),
            _ => self.server.keep_house(),
        }
    }

    pub fn write(&mut self, m: usize, inode: &Inode) {
        let ino = inode.attr.ino;
        let block = self.random(4) as u64;
        self.disks.nodes.put(ino, block);
        let at = self.at();
        self.written.push((at, ino, block));
        if self.random(3) > 0 {
            self.update(m, inode, inode.attr.size.max((block + 1) * BLOCK));
        }
    }
}

pub fn new_inode(parent: u64, ino: u64, kind: Kind, name: &str) -> NamespaceOp {
    NamespaceOp::Create {
        parent,
        name: name.into(),
        ino,
        version: 1,
        kind,
        mode: 0o755,
        uid: 0,
        gid: 0,
        rdev: 0,
        target: Vec::new(),
    }
}
