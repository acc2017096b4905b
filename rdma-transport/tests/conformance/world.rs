//! What the clauses run on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rdma_transport::mem::SharedMem;
use rdma_transport::sim::{SimConfig, SimNet};
use rdma_transport::{
    Access, Connection, Fabric, FabricConfig, FabricKind, Handler, Op, RegionKey, RemoteAddr, TransportError,
    open,
};

pub const KEY: &[u8] = b"the key of the conformance suite";
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A provider to test.
pub struct World {
    pub kind: FabricKind,
    pub dir: tempfile::TempDir,
    pub net: Option<SimNet>,
}

type OnMessage = Box<dyn Fn(&Arc<dyn Connection>, &[u8]) + Send + Sync>;

/// A handler that remembers everything.
#[derive(Default)]
pub struct Recorder {
    pub refuse: Mutex<Option<String>>,
    pub connected: Mutex<Vec<Arc<dyn Connection>>>,
    pub messages: Mutex<Vec<Vec<u8>>>,
    pub count: AtomicU64,
    pub ended: Mutex<Vec<(Arc<dyn Connection>, TransportError)>>,
    pub log: Mutex<Vec<String>>,
    pub on_message: Mutex<Option<Arc<OnMessage>>>,
}

impl Recorder {
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    pub fn on_message(&self, act: impl Fn(&Arc<dyn Connection>, &[u8]) + Send + Sync + 'static) {
        *self.on_message.lock() = Some(Arc::new(Box::new(act)));
    }
}

impl Handler for Recorder {
    fn admit(&self, _identity: &[u8]) -> Result<(), String> {
        self.refuse.lock().clone().map_or(Ok(()), Err)
    }
    fn connected(&self, conn: &Arc<dyn Connection>) {
        self.log.lock().push(format!("connected {}", conn.id().0));
        self.connected.lock().push(Arc::clone(conn));
    }
    fn message(&self, conn: &Arc<dyn Connection>, message: &[u8]) {
        let act = self.on_message.lock().clone();
        match act {
            Some(act) => act(conn, message),
            None => self.messages.lock().push(message.to_vec()),
        }
        self.count.fetch_add(1, Ordering::SeqCst);
    }
    fn disconnected(&self, conn: &Arc<dyn Connection>, why: &TransportError) {
        self.log.lock().push(format!("disconnected {}", conn.id().0));
        self.ended.lock().push((Arc::clone(conn), why.clone()));
    }
}

/// An endpoint and its handler.
pub struct End {
    pub fabric: Arc<dyn Fabric>,
    pub seen: Arc<Recorder>,
}

impl End {
    /// Registers fresh memory.
    pub fn memory(&self, len: usize) -> (Arc<SharedMem>, RemoteAddr) {
        let mem = Arc::new(SharedMem::anonymous(len).unwrap());
        let key = self.fabric.register(&mem, Access::ALL).unwrap();
        (mem, RemoteAddr { key, offset: 0 })
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.fabric.shutdown();
    }
}

impl World {
    fn real(kind: FabricKind) -> Self {
        Self {
            kind,
            dir: tempfile::tempdir().unwrap(),
            net: None,
        }
    }
    pub fn shm() -> Self {
        Self::real(FabricKind::Shm)
    }
    pub fn tcp() -> Self {
        Self::real(FabricKind::Tcp)
    }
    pub fn verbs() -> Self {
        Self::real(FabricKind::Verbs)
    }
    /// Whether connections are set up over TCP.
    pub fn over_tcp(&self) -> bool {
        matches!(self.kind, FabricKind::Tcp | FabricKind::Verbs)
    }
    /// The provider's number in greetings.
    pub fn number(&self) -> u8 {
        match self.kind {
            FabricKind::Tcp => 2,
            FabricKind::Verbs => 3,
            _ => 1,
        }
    }
    pub fn sim(seed: u64) -> Self {
        let net = Some(SimNet::new(seed, SimConfig::default()));
        Self {
            kind: FabricKind::Sim,
            dir: tempfile::tempdir().unwrap(),
            net,
        }
    }

    pub fn name(&self, name: &str) -> String {
        match self.kind {
            FabricKind::Tcp => "127.0.0.1:0".to_owned(),
            FabricKind::Verbs => format!("{}:0", host(name)),
            FabricKind::Sim => name.to_owned(),
            _ => self.dir.path().join(name).display().to_string(),
        }
    }

    pub fn config(&self, name: &str) -> FabricConfig {
        FabricConfig {
            listen: self.name(name),
            key: KEY.to_vec(),
            identity: name.as_bytes().to_vec(),
            spin: Duration::from_micros(20),
            timeout: Duration::from_secs(10),
            keep: None,
        }
    }

    pub fn try_open(&self, config: FabricConfig) -> Result<End, TransportError> {
        let seen = Arc::new(Recorder::default());
        let handler = Arc::clone(&seen) as Arc<dyn Handler>;
        let fabric = match &self.net {
            Some(net) => net.endpoint(config, handler)?,
            None => open(self.kind, config, handler)?,
        };
        Ok(End { fabric, seen })
    }

    pub fn endpoint(&self, name: &str) -> End {
        self.try_open(self.config(name)).unwrap()
    }

    /// Waits (or steps) until something holds.
    pub fn until(&self, what: &str, holds: impl Fn() -> bool) {
        let start = Instant::now();
        while !holds() {
            match &self.net {
                Some(net) => assert!(net.step() || holds(), "idle, but not yet: {what}"),
                None => {
                    assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
        }
    }

    /// As [`World::until`], for what a thread brings about: there may be nothing to step in between.
    pub fn until_or_idle(&self, what: &str, holds: impl Fn() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
            if !self.net.as_ref().is_some_and(SimNet::step) {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }

    /// Gives things that must not happen a chance to happen.
    pub fn settle(&self) {
        match &self.net {
            Some(net) => net.run_until_idle(),
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    }

    /// Two endpoints, the second connected to the first; also the first one's end of the connection.
    pub fn pair(&self) -> (End, End, Arc<dyn Connection>, Arc<dyn Connection>) {
        let target = self.endpoint("target");
        let source = self.endpoint("source");
        let conn = source.fabric.connect(&target.fabric.local_addr()).unwrap();
        self.until("connected", || !target.seen.connected.lock().is_empty());
        let back = Arc::clone(&target.seen.connected.lock()[0]);
        (target, source, conn, back)
    }

    /// Both ends learn of the end exactly once.
    pub fn assert_ended_once(&self, ends: &[&End]) {
        for end in ends {
            self.until("disconnected", || !end.seen.ended.lock().is_empty());
        }
        self.settle();
        for end in ends {
            assert_eq!(end.seen.ended.lock().len(), 1, "{:?}", end.seen.log.lock());
        }
    }
}

pub fn read_u64(conn: &dyn Connection, at: RemoteAddr) -> u64 {
    let mut bytes = [0u8; 8];
    conn.execute(&mut [Op::Read { at, into: &mut bytes }]).unwrap();
    u64::from_ne_bytes(bytes)
}

pub fn faa(conn: &dyn Connection, at: RemoteAddr, add: u64) -> Result<u64, TransportError> {
    let mut ops = [Op::Faa { at, add, old: 0 }];
    conn.execute(&mut ops)?;
    match &ops[0] {
        Op::Faa { old, .. } => Ok(*old),
        _ => unreachable!(),
    }
}

pub fn cas(conn: &dyn Connection, at: RemoteAddr, expect: u64, new: u64) -> Result<u64, TransportError> {
    let mut ops = [Op::Cas {
        at,
        expect,
        new,
        old: 0,
    }];
    conn.execute(&mut ops)?;
    match &ops[0] {
        Op::Cas { old, .. } => Ok(*old),
        _ => unreachable!(),
    }
}

/// The address that an endpoint of this name has in the lab, where there are several; names are spread over them.
fn host(name: &str) -> String {
    let all = std::env::var("LAB_IPS").unwrap_or_default();
    let all: Vec<&str> = all.split([' ', ',']).filter(|ip| !ip.is_empty()).collect();
    let sum: usize = name.bytes().map(usize::from).sum();
    match all.len() {
        0 => "127.0.0.1".to_owned(),
        n => all[sum % n].to_owned(),
    }
}

pub fn bad_key() -> RegionKey {
    RegionKey(0x8000_0000_0000_0007)
}
