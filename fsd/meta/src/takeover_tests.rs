//! Deaths of mounts, with a server whose threads are the test, storage nodes that note what they are asked and may be away, and mounts
//! that answer when the test says so.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use rdma_transport::{ConnId, Connection, TransportError};
use rt::sync::Mutex;

use crate::crash_tests::world::{NODES, config, join};
use crate::journal::format::{make, read_superblock};
use crate::journal::records::{encode, key};
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
    DeadMount, Hello, LockKind, LockOwner, LockRange, LockSpec, MetaReply, MetaRequest, PeerState, Records,
    Role, StorageReply, StorageRequest, View,
};

/// The lease record at storage node 0 that the second mount owns, and a number that has it.
const OWNED: u64 = 5;

/// Storage nodes that do what they are asked, as long as they are there.
#[derive(Default)]
struct Storage {
    away: Mutex<BTreeSet<u16>>,
    /// So many requests are answered before the server's host dies.
    fuel: Mutex<Option<usize>>,
    asked: Mutex<Vec<(u16, StorageRequest)>>,
    freed: Mutex<BTreeSet<u16>>,
}

impl Storage {
    fn asked(&self, what: impl Fn(&StorageRequest) -> bool) -> Vec<u16> {
        let asked = self.asked.lock();
        asked.iter().filter(|(_, r)| what(r)).map(|(n, _)| *n).collect()
    }

    fn fenced(&self) -> Vec<u16> {
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
            StorageRequest::Unused { records } => StorageReply::Records(Records {
                found: records.clone(),
                next: None,
            }),
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
struct Asked {
    told: Mutex<Vec<(ConnId, View, Option<Done>)>>,
    relayed: Mutex<Vec<(ConnId, u16, Vec<u8>)>>,
}

impl Asked {
    /// What a mount was told last on a connection.
    fn last(&self, conn: &FakeConn) -> Option<View> {
        let told = self.told.lock();
        let theirs = told.iter().rev().find(|(id, ..)| *id == conn.id());
        theirs.map(|(_, view, _)| view.clone())
    }

    /// Everybody answers what they were told.
    fn answer(&self, answer: &Result<(), RpcError>) {
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

    fn relay(&self, conn: &Arc<dyn Connection>, (from, _): (u16, u64), frame: Vec<u8>, done: Done) {
        self.relayed.lock().push((conn.id(), from, frame));
        done(Ok(()));
    }
}

struct Cluster {
    store: Arc<FakeStore>,
    memory: tempfile::TempDir,
    storage: Arc<Storage>,
    mounts: Arc<Asked>,
    service: Arc<Service>,
    _news: News,
    tool: Arc<FakeConn>,
    conns: Vec<Arc<FakeConn>>,
    next: u64,
}

fn open(
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
    fn new(mounts: u64) -> Self {
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

    fn conn(&self, mount: usize) -> Arc<FakeConn> {
        Arc::clone(&self.conns[mount])
    }

    /// The server's process dies and is there again; these mounts come back, on new connections.
    fn restart(&mut self, back: &[usize]) {
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

    fn send_as(&mut self, hello: &Hello, conn: &Arc<FakeConn>, request: &MetaRequest) -> u64 {
        self.next += 1;
        let responder = Responder::new(Arc::clone(conn) as Arc<dyn Connection>, self.next);
        self.service.request(hello, &encode(request), responder);
        self.next
    }

    fn ask_as(
        &mut self,
        hello: &Hello,
        conn: &Arc<FakeConn>,
        request: &MetaRequest,
    ) -> Option<Result<MetaReply, Errno>> {
        let number = self.send_as(hello, conn, request);
        conn.taken(number)
    }

    fn ask(&mut self, conn: &Arc<FakeConn>, request: &MetaRequest) -> Option<Result<MetaReply, Errno>> {
        let hello = Hello::new("test", Role::Client(None), conn.id().0 % 100);
        self.ask_as(&hello, conn, request)
    }

    /// Asks for an eviction; the number of the request.
    fn evict(&mut self, node: u16) -> u64 {
        let (hello, tool) = (Hello::new("test", Role::Tool, 1000), Arc::clone(&self.tool));
        self.send_as(&hello, &tool, &MetaRequest::Evict { node })
    }

    fn advance(&self) {
        self.service.membership.takeover.advance();
    }

    /// Goes on until nothing is left of the dead.
    fn finish(&self) {
        for _ in 0..5 {
            self.advance();
            self.mounts.answer(&Ok(()));
        }
        self.advance();
        assert!(self.view().dead.is_empty(), "{:?}", self.view());
    }

    fn view(&self) -> View {
        self.service.membership.members.view().0
    }

    fn waits(&self) -> String {
        self.service.membership.takeover.waits().join("; ")
    }

    /// A mount has been silent for so long.
    fn silent(&self, node: u16, time: Duration) {
        let mut sessions = self.service.membership.members.sessions.lock();
        let session = sessions.nodes.get_mut(&node).unwrap();
        session.heard = session.heard.checked_sub(time).unwrap();
    }

    fn state(&self, node: u16) -> Option<PeerState> {
        let infos = self.service.membership.members.infos();
        infos.iter().find(|i| i.node == node).map(|i| i.state)
    }
}

fn dead(node: u16) -> DeadMount {
    DeadMount {
        node,
        incarnation: 1,
        life: u64::from(node) + 1,
    }
}

fn lock(node: u16) -> LockSpec {
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

fn set(node: u16) -> MetaRequest {
    MetaRequest::SetLock {
        lock: lock(node),
        wait: true,
    }
}

#[test]
fn what_a_dead_mount_had_is_taken_back_behind_the_fence_and_the_answers() {
    let mut cluster = Cluster::new(2);
    let (alive, gone) = (cluster.conn(0), cluster.conn(1));
    let evicting = cluster.evict(1);
    cluster.advance();
    let view = View {
        epoch: 1,
        dead: vec![dead(1)],
    };
    assert_eq!(cluster.view(), view);
    assert_eq!(cluster.store.get(&key::view()).unwrap(), Some(encode(&view)));
    assert!(!gone.is_alive() && alive.is_alive());
    assert_eq!(cluster.storage.fenced(), [0, 1]);
    assert_eq!(cluster.mounts.last(&alive), Some(view));
    assert!(cluster.mounts.last(&gone).is_none());
    assert!(
        cluster
            .waits()
            .contains("recovery of mount 1 (mount 2) waits for mount 0")
    );
    // Nothing is freed, and nobody new comes in, before the other mount has got there.
    let newcomer = FakeConn::new(3);
    for _ in 0..3 {
        cluster.advance();
        assert!(cluster.storage.freed.lock().is_empty());
        let refused = cluster.ask(&newcomer, &join(None, 3));
        assert_eq!(refused, Some(Err(Errno(libc::EAGAIN))));
        assert!(cluster.tool.taken::<MetaReply>(evicting).is_none());
    }
    assert_eq!(
        cluster.mounts.told.lock().len(),
        1,
        "it is told once on a connection"
    );
    cluster.mounts.answer(&Ok(()));
    cluster.advance();
    assert_eq!(cluster.storage.freed.lock().len(), NODES);
    // The file that it owned is cut before its record is free, and no other.
    let asked = cluster.storage.asked.lock().clone();
    let first = |what: fn(&StorageRequest) -> bool| asked.iter().position(|(_, r)| what(r));
    let cut = first(|r| matches!(r, StorageRequest::Cut { .. }));
    assert!(cut.is_some() && cut < first(|r| matches!(r, StorageRequest::Recover { .. })));
    let ends = vec![(ino::compose(0, 0, OWNED), None)];
    assert_eq!(asked[cut.unwrap()].1, StorageRequest::Cut { ends });
    let after = View {
        epoch: 1,
        dead: Vec::new(),
    };
    assert_eq!(cluster.mounts.last(&alive), Some(after));
    assert_eq!(
        cluster.tool.taken::<MetaReply>(evicting),
        Some(Ok(MetaReply::Done))
    );
    assert!(cluster.waits().is_empty());
    // Its number is free, for the next incarnation.
    match cluster.ask(&newcomer, &join(None, 3)) {
        Some(Ok(MetaReply::Joined(joined))) => {
            assert_eq!((joined.node, joined.incarnation, joined.epoch), (1, 2, 1));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn evictions_that_make_no_sense_are_refused() {
    let mut cluster = Cluster::new(2);
    let none = cluster.evict(7);
    let first = cluster.evict(1);
    cluster.advance();
    let second = cluster.evict(1);
    cluster.advance();
    let tool = Arc::clone(&cluster.tool);
    let taken = |number| tool.taken::<MetaReply>(number);
    assert_eq!(taken(none), Some(Err(Errno(libc::ENOENT))));
    assert_eq!(taken(second), Some(Err(Errno(libc::EALREADY))));
    assert_eq!(taken(first), None);
    let conn = cluster.conn(0);
    let mount = cluster.ask(&conn, &MetaRequest::Evict { node: 0 });
    assert_eq!(mount, Some(Err(Errno(libc::EPERM))));
}

/// Case 30, and 12: whoever was declared dead is told so, whatever it asks and however it comes.
#[test]
fn the_dead_are_told_that_they_are() {
    let mut cluster = Cluster::new(2);
    let (alive, gone) = (cluster.conn(0), cluster.conn(1));
    assert_eq!(
        cluster.ask(&gone, &MetaRequest::Heartbeat),
        Some(Ok(MetaReply::Done))
    );
    cluster.evict(1);
    for _ in 0..2 {
        cluster.advance();
        for request in [
            MetaRequest::Heartbeat,
            MetaRequest::GetAttr { ino: ino::ROOT },
            MetaRequest::Leave,
            join(Some((1, 1)), 2),
        ] {
            assert_eq!(cluster.ask(&gone, &request), Some(Err(Errno(libc::ESTALE))));
        }
        assert_eq!(
            cluster.ask(&alive, &MetaRequest::Heartbeat),
            Some(Ok(MetaReply::Done))
        );
        cluster.finish();
    }
    let unknown = FakeConn::new(9);
    assert_eq!(
        cluster.ask(&unknown, &MetaRequest::Heartbeat),
        Some(Err(Errno(libc::ESTALE)))
    );
}

/// Case 24: another mount dies while the first one's things are taken back.
#[test]
fn a_second_death_begins_the_recovery_again() {
    let mut cluster = Cluster::new(3);
    let alive = cluster.conn(0);
    cluster.evict(1);
    cluster.advance();
    // One has answered, the other dies instead.
    let first: Vec<Done> = {
        let mut told = cluster.mounts.told.lock();
        let theirs = told.iter_mut().filter(|(id, ..)| *id == alive.id());
        theirs.filter_map(|(.., done)| done.take()).collect()
    };
    first.into_iter().for_each(|done| done(Ok(())));
    cluster.advance();
    assert!(cluster.storage.freed.lock().is_empty());
    cluster.evict(2);
    cluster.advance();
    assert_eq!((cluster.view().epoch, cluster.view().dead.len()), (2, 2));
    assert_eq!(cluster.mounts.last(&alive), Some(cluster.view()));
    assert!(
        cluster.storage.freed.lock().is_empty(),
        "the answer was to the epoch before"
    );
    cluster.finish();
    assert_eq!(cluster.storage.freed.lock().len(), NODES);
    assert_eq!(cluster.state(1), None);
    assert_eq!(cluster.state(2), None);
    assert_eq!(cluster.view().epoch, 2);
}

/// Cases 15 and 18: locks of the dead are others' only when it is shut out everywhere.
#[test]
fn a_storage_node_that_is_away_is_waited_for_and_locks_stay_until_then() {
    let mut cluster = Cluster::new(2);
    let (alive, gone) = (cluster.conn(0), cluster.conn(1));
    assert_eq!(cluster.ask(&gone, &set(1)), Some(Ok(MetaReply::Done)));
    let hello = Hello::new("test", Role::Client(None), 1);
    let waiting = cluster.send_as(&hello, &alive, &set(0));
    cluster.storage.away.lock().insert(1);
    cluster.evict(1);
    for _ in 0..3 {
        cluster.advance();
        cluster.mounts.answer(&Ok(()));
    }
    // Nobody has to stop for it.
    assert!(cluster.mounts.last(&alive).is_none_or(|view| view.epoch == 0));
    assert!(
        cluster
            .waits()
            .contains("recovery of mount 1 (mount 2) waits for storage node 1")
    );
    assert!(cluster.storage.freed.lock().is_empty());
    assert_eq!(alive.taken::<MetaReply>(waiting), None);
    cluster.storage.away.lock().clear();
    cluster.advance();
    assert_eq!(alive.taken::<MetaReply>(waiting), Some(Ok(MetaReply::Done)));
    assert_eq!(cluster.mounts.last(&alive), Some(cluster.view()));
    cluster.finish();
}

/// Case 27: the server dies after each request to a storage node; the next life goes on with what is not finished, and ends the same.
#[test]
fn a_server_that_dies_in_the_middle_finishes_in_its_next_life() {
    for fuel in 0..40 {
        let mut cluster = Cluster::new(2);
        *cluster.storage.fuel.lock() = Some(fuel);
        cluster.evict(1);
        for _ in 0..4 {
            cluster.advance();
            cluster.mounts.answer(&Ok(()));
        }
        if cluster.view().dead.is_empty() {
            assert!(fuel > 5, "only {fuel} places to die at");
            return;
        }
        *cluster.storage.fuel.lock() = None;
        cluster.restart(&[0]);
        assert_eq!(cluster.view().dead, [dead(1)], "it is durable");
        cluster.finish();
        assert_eq!((cluster.view().epoch, cluster.state(1)), (1, None));
        let asked = cluster.storage.asked.lock().clone();
        let cuts = |(_, r): &&(u16, StorageRequest)| matches!(r, StorageRequest::Cut { .. });
        assert!(
            asked.iter().filter(cuts).count() >= NODES,
            "the file was not cut: {asked:?}"
        );
        assert_eq!(cluster.storage.freed.lock().len(), NODES);
    }
    panic!("it never finishes");
}

#[test]
fn a_mount_that_reconnects_is_told_again_and_one_that_is_not_ready_too() {
    let mut cluster = Cluster::new(2);
    cluster.evict(1);
    cluster.advance();
    // It had not even begun to listen.
    cluster.mounts.answer(&Err(RpcError::Errno(Errno(libc::EAGAIN))));
    cluster.advance();
    assert_eq!(cluster.mounts.told.lock().len(), 1, "not at once");
    rt::thread::sleep(Duration::from_millis(250));
    cluster.advance();
    assert_eq!(cluster.mounts.told.lock().len(), 2);
    // Its connection breaks, and it comes back.
    let members = Arc::clone(&cluster.service.membership.members);
    members.disconnected(ConnId(1));
    cluster.mounts.answer(&Err(TransportError::Shutdown.into()));
    let conn = FakeConn::new(101);
    assert!(matches!(
        cluster.ask(&conn, &join(Some((0, 1)), 1)),
        Some(Ok(MetaReply::Joined(_)))
    ));
    cluster.advance();
    assert_eq!(cluster.mounts.last(&conn), Some(cluster.view()));
    cluster.finish();
}

/// Cases 7, 15 and 16: the term counts, connected or not; and what the server was not there for does not.
#[test]
fn who_is_silent_dies_at_the_end_of_its_term_and_not_before() {
    let cluster = Cluster::new(3);
    let gone = cluster.conn(1);
    let terms = cluster.service.membership.members.terms;
    let term = Duration::from_millis(terms.term_ms + terms.margin_ms);
    cluster.silent(1, term - Duration::from_secs(1));
    cluster.service.judge();
    assert_eq!(cluster.state(1), Some(PeerState::Late));
    assert_eq!(cluster.state(2), Some(PeerState::Up));
    cluster.silent(1, Duration::from_secs(1));
    cluster.service.judge();
    assert_eq!(cluster.state(1), Some(PeerState::Dead));
    assert!(!gone.is_alive());
    // The server was stopped for long: the others are not silent for that.
    let members = &cluster.service.membership.members;
    members.judge(rt::time::Instant::now() + term * 3);
    assert_eq!(cluster.view().dead.len(), 1);
}

#[test]
fn when_all_mounts_are_dead_everything_is_reset() {
    let mut cluster = Cluster::new(2);
    cluster.evict(0);
    cluster.evict(1);
    cluster.finish();
    let resets = cluster.storage.asked(|r| *r == StorageRequest::ResetLeases);
    assert_eq!(resets, [0, 1]);
    assert!(cluster.storage.freed.lock().is_empty());
}

/// Case 19: after a restart nobody gets a lock that another mount may have, whether that comes back or is dead.
#[test]
fn locks_survive_a_restart_and_nobody_else_gets_them_meanwhile() {
    let mut cluster = Cluster::new(3);
    let hello = Hello::new("test", Role::Client(None), 1);
    cluster.restart(&[0]);
    let conn = cluster.conn(0);
    let asking = cluster.send_as(&hello, &conn, &set(0));
    let testing = cluster.send_as(&hello, &conn, &MetaRequest::GetLock { lock: lock(0) });
    assert_eq!(conn.taken::<MetaReply>(asking), None);
    // One comes back, and has the lock; the other is dead.
    let back = FakeConn::new(102);
    let mut again = join(Some((1, 1)), 2);
    if let MetaRequest::Join { locks, .. } = &mut again {
        locks.push(lock(1));
    }
    let joined = cluster.ask(&back, &again);
    assert!(matches!(joined, Some(Ok(MetaReply::Joined(_)))), "{joined:?}");
    assert_eq!(conn.taken::<MetaReply>(testing), None);
    cluster.evict(2);
    cluster.advance();
    assert_eq!(
        conn.taken::<MetaReply>(testing),
        Some(Ok(MetaReply::Lock(Some(lock(1)))))
    );
    assert_eq!(conn.taken::<MetaReply>(asking), None, "the other has it");
    let mut unlock = lock(1);
    unlock.kind = None;
    let unlocking = MetaRequest::SetLock {
        lock: unlock,
        wait: false,
    };
    assert_eq!(cluster.ask(&back, &unlocking), Some(Ok(MetaReply::Done)));
    assert_eq!(conn.taken::<MetaReply>(asking), Some(Ok(MetaReply::Done)));
}

#[test]
fn a_lock_that_waits_for_the_others_can_be_given_up() {
    let mut cluster = Cluster::new(2);
    let hello = Hello::new("test", Role::Client(None), 1);
    cluster.restart(&[0]);
    let conn = cluster.conn(0);
    let asking = cluster.send_as(&hello, &conn, &set(0));
    let cancel = MetaRequest::CancelLock { lock: lock(0) };
    assert_eq!(cluster.ask(&conn, &cancel), Some(Ok(MetaReply::Done)));
    assert_eq!(conn.taken::<MetaReply>(asking), Some(Err(Errno(libc::EINTR))));
}

#[test]
fn frames_are_passed_on_between_mounts() {
    let mut cluster = Cluster::new(2);
    let (from, to) = (cluster.conn(0), cluster.conn(1));
    let relay = |to| MetaRequest::Relay { to, frame: vec![7] };
    assert_eq!(cluster.ask(&from, &relay(1)), Some(Ok(MetaReply::Done)));
    assert_eq!(*cluster.mounts.relayed.lock(), [(to.id(), 0, vec![7])]);
    assert_eq!(cluster.ask(&from, &relay(5)), Some(Err(Errno(libc::ENOENT))));
    cluster.service.membership.members.disconnected(to.id());
    assert_eq!(
        cluster.ask(&from, &relay(1)),
        Some(Err(Errno(libc::EHOSTUNREACH)))
    );
}
