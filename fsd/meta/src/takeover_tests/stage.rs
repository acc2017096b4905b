//! A server whose threads are the test, storage nodes that note what they are asked and may be away, and mounts that answer when the test
//! says so.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use rdma_transport::{ConnId, Connection, TransportError};
use rt::sync::Mutex;

use crate::crash_tests::world::{NODES, config, join};
use crate::journal::format::{make, read_superblock};
use crate::journal::records::encode;
use crate::nodes::Reach;
use crate::nodes::fabric::StorageNodes;
use crate::nodes::mounts::{Done, Mounts};
use crate::rules::Rules;
use crate::service::{News, Service};
use fsd_node::fake_conn::FakeConn;
use fsd_node::fake_disk::FakeStore;
use fsd_node::store::Store;
use fsd_proto::ino;
use fsd_proto::rpc::{Errno, Responder, RpcError, Service as _};
use fsd_proto::wire::{
    Attached, DeadMount, Hello, LockKind, LockOwner, LockRange, LockSpec, MetaReply, MetaRequest, PeerState,
    Records, Role, StorageReply, StorageRequest, View,
};

/// The lease record at storage node 0 that the second mount owns, and a number that has it.
pub const OWNED: u64 = 5;

/// Storage nodes that do what they are asked, as long as they are there.
#[derive(Default)]
pub struct Storage {
    pub away: Mutex<BTreeSet<u16>>,
    /// So many requests are answered before the server's host dies.
    pub fuel: Mutex<Option<usize>>,
    pub asked: Mutex<Vec<(u16, StorageRequest)>>,
    pub freed: Mutex<BTreeSet<u16>>,
    /// The lease tables.
    pub tables: Mutex<[u64; NODES]>,
}

impl Storage {
    pub fn asked(&self, what: impl Fn(&StorageRequest) -> bool) -> Vec<u16> {
        let asked = self.asked.lock();
        asked.iter().filter(|(_, r)| what(r)).map(|(n, _)| *n).collect()
    }

    pub fn fenced(&self) -> Vec<u16> {
        self.asked(|r| matches!(r, StorageRequest::Fence { .. }))
    }
}

impl StorageNodes for Storage {
    fn ask(&self, id: u16, request: &StorageRequest) -> Result<StorageReply, RpcError> {
        let out = match &mut *self.fuel.lock() {
            Some(0) => true,
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        };
        if out || self.away.lock().contains(&id) {
            return Err(TransportError::Shutdown.into());
        }
        self.asked.lock().push((id, request.clone()));
        Ok(match request {
            StorageRequest::Attach => StorageReply::Attached(Attached {
                pool_key: 0,
                dirty_key: 0,
                segment_records: 1,
                table: self.tables.lock()[usize::from(id)],
                store: String::new(),
                generation: 0,
                place: 0,
            }),
            StorageRequest::Owned { .. } => {
                let owned = id == 0 && !self.freed.lock().contains(&id);
                StorageReply::Records(Records {
                    found: owned.then_some(OWNED).into_iter().collect(),
                    next: None,
                })
            }
            StorageRequest::Recover { .. } => {
                self.freed.lock().insert(id);
                StorageReply::Done
            }
            StorageRequest::Unused { inos } => StorageReply::Inodes(inos.clone()),
            StorageRequest::Inodes { after } => {
                let all = [ino::compose(0, 0, OWNED), ino::compose(0, 0, OWNED + 1)];
                StorageReply::Inodes(all.into_iter().filter(|i| i > after).collect())
            }
            StorageRequest::Cut { .. } | StorageRequest::Free { .. } => StorageReply::Freed(0),
            _ => StorageReply::Done,
        })
    }

    fn close(&self) {}
}

/// Mounts that are asked something.
#[derive(Default)]
pub struct Asked {
    pub told: Mutex<Vec<(ConnId, View, Option<Done>)>>,
    pub relayed: Mutex<Vec<(ConnId, u16, Vec<u8>)>>,
    pub tables: Mutex<Vec<(ConnId, Vec<u64>)>>,
}

impl Asked {
    /// What a mount was told last on a connection.
    pub fn last(&self, conn: &FakeConn) -> Option<View> {
        let told = self.told.lock();
        let theirs = told.iter().rev().find(|(id, ..)| *id == conn.id());
        theirs.map(|(_, view, _)| view.clone())
    }

    /// Everybody answers what they were told.
    pub fn answer(&self, answer: &Result<(), RpcError>) {
        let waiting: Vec<Done> = self
            .told
            .lock()
            .iter_mut()
            .filter_map(|(.., done)| done.take())
            .collect();
        for done in waiting {
            done(answer.clone());
        }
    }
}

impl Mounts for Asked {
    fn tell(&self, conn: &Arc<dyn Connection>, view: View, done: Done) {
        self.told.lock().push((conn.id(), view, Some(done)));
    }

    fn tables(&self, conn: &Arc<dyn Connection>, tables: Vec<u64>, done: Done) {
        self.tables.lock().push((conn.id(), tables));
        done(Ok(()));
    }

    fn relay(&self, conn: &Arc<dyn Connection>, (from, _): (u16, u64), frame: Vec<u8>, done: Done) {
        self.relayed.lock().push((conn.id(), from, frame));
        done(Ok(()));
    }
}

pub struct Cluster {
    pub store: Arc<FakeStore>,
    pub memory: tempfile::TempDir,
    pub storage: Arc<Storage>,
    pub mounts: Arc<Asked>,
    pub service: Arc<Service>,
    _news: News,
    pub tool: Arc<FakeConn>,
    pub conns: Vec<Arc<FakeConn>>,
    next: u64,
}

pub fn open(
    store: &Arc<FakeStore>,
    memory: &tempfile::TempDir,
    storage: &Arc<Storage>,
    mounts: &Arc<Asked>,
) -> (Arc<Service>, News) {
    let mut config = config().clone();
    config.meta.memory_dir = memory.path().to_owned();
    let superblock = read_superblock(store.as_ref(), &config).unwrap();
    let reach = Reach {
        storage: Arc::clone(storage) as _,
        mounts: Arc::clone(mounts) as _,
    };
    let store = Arc::clone(store) as Arc<dyn Store>;
    Service::open(store, &config, &superblock, (false, Rules::without(None)), |_| {
        reach
    })
    .unwrap()
}

impl Cluster {
    /// With so many mounts, of the lives 1, 2 … on connections of these numbers.
    pub fn new(mounts: u64) -> Self {
        let (store, memory) = (Arc::new(FakeStore::default()), tempfile::tempdir().unwrap());
        make(store.as_ref(), config(), "u").unwrap();
        let (storage, asked) = (Arc::<Storage>::default(), Arc::<Asked>::default());
        let (service, news) = open(&store, &memory, &storage, &asked);
        // A new store has no past.
        service.journal.order.settle(0).unwrap();
        let mut cluster = Self {
            store,
            memory,
            storage,
            mounts: asked,
            service,
            _news: news,
            tool: FakeConn::new(1000),
            conns: Vec::new(),
            next: 0,
        };
        for life in 1..=mounts {
            let conn = FakeConn::new(life);
            let joined = cluster.ask(&conn, &join(None, life));
            assert!(matches!(joined, Some(Ok(MetaReply::Joined(_)))), "{joined:?}");
            cluster.conns.push(conn);
        }
        cluster
    }

    pub fn conn(&self, mount: usize) -> Arc<FakeConn> {
        Arc::clone(&self.conns[mount])
    }

    /// The server's process dies and is there again; these mounts come back, on new connections.
    pub fn restart(&mut self, back: &[usize]) {
        self.mounts.told.lock().clear();
        (self.service, self._news) = open(&self.store, &self.memory, &self.storage, &self.mounts);
        for &mount in back {
            let life = mount as u64 + 1;
            let conn = FakeConn::new(life + 100);
            self.conns[mount] = Arc::clone(&conn);
            let hello = Hello::new("test", Role::Client(None), life);
            let again = join(Some((mount as u16, 1)), life);
            let joined = self.ask_as(&hello, &conn, &again);
            assert!(matches!(joined, Some(Ok(MetaReply::Joined(_)))), "{joined:?}");
        }
    }

    pub fn send_as(&mut self, hello: &Hello, conn: &Arc<FakeConn>, request: &MetaRequest) -> u64 {
        self.next += 1;
        let responder = Responder::new(Arc::clone(conn) as Arc<dyn Connection>, self.next);
        self.service.request(hello, &encode(request), responder);
        self.next
    }

    pub fn ask_as(
        &mut self,
        hello: &Hello,
        conn: &Arc<FakeConn>,
        request: &MetaRequest,
    ) -> Option<Result<MetaReply, Errno>> {
        let number = self.send_as(hello, conn, request);
        conn.taken(number)
    }

    pub fn ask(&mut self, conn: &Arc<FakeConn>, request: &MetaRequest) -> Option<Result<MetaReply, Errno>> {
        let hello = Hello::new("test", Role::Client(None), conn.id().0 % 100);
        self.ask_as(&hello, conn, request)
    }

    /// Asks for an eviction; the number of the request.
    pub fn evict(&mut self, node: u16) -> u64 {
        let (hello, tool) = (Hello::new("test", Role::Tool, 1000), Arc::clone(&self.tool));
        self.send_as(&hello, &tool, &MetaRequest::Evict { node })
    }

    pub fn advance(&self) {
        self.service.membership.takeover.advance();
    }

    /// Goes on until nothing is left of the dead.
    pub fn finish(&self) {
        for _ in 0..5 {
            self.advance();
            self.mounts.answer(&Ok(()));
        }
        self.advance();
        assert!(self.view().dead.is_empty(), "{:?}", self.view());
    }

    pub fn view(&self) -> View {
        self.service.membership.members.view().0
    }

    pub fn waits(&self) -> String {
        self.service.membership.takeover.waits().join("; ")
    }

    /// A mount has been silent for so long.
    pub fn silent(&self, node: u16, time: Duration) {
        let mut sessions = self.service.membership.members.sessions.lock();
        let session = sessions.nodes.get_mut(&node).unwrap();
        session.heard = session.heard.checked_sub(time).unwrap();
    }

    pub fn state(&self, node: u16) -> Option<PeerState> {
        let infos = self.service.membership.members.infos();
        infos.iter().find(|i| i.node == node).map(|i| i.state)
    }
}

pub fn dead(node: u16) -> DeadMount {
    DeadMount {
        node,
        incarnation: 1,
        life: u64::from(node) + 1,
    }
}

pub fn lock(node: u16) -> LockSpec {
    LockSpec {
        ino: ino::ROOT,
        owner: LockOwner {
            node,
            owner: 7,
            flock: false,
        },
        pid: 1,
        range: LockRange { start: 0, end: 9 },
        kind: Some(LockKind::Write),
    }
}

pub fn set(node: u16) -> MetaRequest {
    MetaRequest::SetLock {
        lock: lock(node),
        wait: true,
    }
}
