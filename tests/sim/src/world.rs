//! The cluster: a metadata server, storage nodes and mounts, each a group of threads on one simulated network.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use fsd_client::{Detached, MountError};
use fsd_meta::MetaServer;
use fsd_meta::rules::Rules;
use fsd_meta::server::Base as MetaBase;
use fsd_node::config::{CacheMode, Config};
use fsd_node::fake_disk::Luck;
use fsd_storage::StorageNode;
use fsd_storage::label::Label;
use fsd_storage::server::Base as StorageBase;
use lockmgr::RecordLayout;
use rdma_transport::sim::{SimConfig, SimNet};
use rt::sync::Mutex;

use crate::chance;
use crate::cluster;
use crate::disk::{Ledger, Platter, SimDisk};
use crate::flaws::{ClusterFlaw, Flaws};
use crate::task::Mounted;

const KEY: &[u8] = b"a key for simulations only";

/// One life of a process.
struct Life {
    group: u32,
    addr: String,
    alive: Arc<AtomicBool>,
}

/// A node, by what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// The metadata server.
    Meta,
    /// A storage node.
    Storage(usize),
    /// A mount.
    Mount(usize),
}

/// A node that is stopped.
struct Stopped {
    addr: String,
    group: u32,
    /// Who is not heard meanwhile.
    unheard: Vec<String>,
}

impl Life {
    /// The process is no more.
    fn end(&self, net: &SimNet) {
        // First of all nobody hears it any more: else it could tell that its disk is gone.
        net.crash(&self.addr);
        self.alive.store(false, Ordering::Relaxed);
        rt::sim::kill(self.group);
    }
}

struct Host<S> {
    running: Option<(S, Life)>,
}

struct Storage {
    label: Label,
    platter: Arc<Platter>,
    ledger: Arc<Ledger>,
    host: Mutex<Host<StorageNode>>,
}

/// The cluster.
pub struct World {
    net: SimNet,
    config: Arc<Config>,
    dir: tempfile::TempDir,
    flaws: Flaws,
    groups: AtomicU32,
    ledger: Arc<Ledger>,
    meta: Mutex<Host<MetaServer>>,
    nodes: Vec<Storage>,
    stopped: Mutex<Vec<Stopped>>,
    next_rate: Mutex<Option<i64>>,
}

/// A mount.
pub struct Mount {
    /// What tasks need of it.
    pub mounted: Mounted,
    detached: Detached,
    life: Life,
}

impl World {
    /// A formatted cluster in which nothing runs.
    #[must_use]
    pub fn new(seed: u64, nodes: usize, flaws: Flaws) -> Arc<Self> {
        Self::with(seed, nodes, flaws, |_| {})
    }

    /// As [`World::new`], of a configuration that is changed first.
    #[must_use]
    pub fn with(seed: u64, nodes: usize, flaws: Flaws, change: impl FnOnce(&mut Config)) -> Arc<Self> {
        let dir = tempfile::Builder::new()
            .prefix("fsd-sim-")
            .tempdir_in("/dev/shm")
            .expect("a directory in /dev/shm");
        let mut config = cluster::config(dir.path(), nodes, flaws);
        change(&mut config);
        let config = Arc::new(config);
        let delays = SimConfig {
            min_delay: Duration::from_micros(2),
            max_delay: Duration::from_micros(40),
            // So little that whoever waits for it with a lock is found, and as much as an RDMA connection has.
            room: if seed.is_multiple_of(2) { 1 } else { 28 },
        };
        let ledger = Arc::new(Ledger::default());
        let alive = Arc::new(AtomicBool::new(true));
        fsd_meta::server::make(&ledger.open(&alive), &config, "sim").expect("format");
        let nodes = config.storage.iter().map(|section| Storage {
            label: Label::new(&config, section),
            platter: Arc::default(),
            ledger: Arc::default(),
            host: Mutex::new(Host { running: None }),
        });
        Arc::new(Self {
            net: SimNet::threaded(seed, delays).expect("threads"),
            nodes: nodes.collect(),
            config,
            dir,
            flaws,
            groups: AtomicU32::new(1),
            ledger,
            meta: Mutex::new(Host { running: None }),
            stopped: Mutex::default(),
            next_rate: Mutex::default(),
        })
    }

    /// The clock of the next node that is started is too fast by so many parts of a million; else the seed says by how many.
    pub fn next_clock(&self, rate: i64) {
        *self.next_rate.lock() = Some(rate);
    }

    /// A life that is about to begin.
    fn life(&self, addr: String) -> Life {
        let drawn = cluster::rate(self.flaws);
        let rate = self.next_rate.lock().take().unwrap_or(drawn);
        let group = self.groups.fetch_add(1, Ordering::Relaxed);
        rt::sim::set_clock_rate(group, rate);
        Life {
            group,
            addr,
            alive: Arc::new(AtomicBool::new(true)),
        }
    }

    /// Storage nodes.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// What a storage node keeps its blocks on.
    #[must_use]
    pub fn platter(&self, node: usize) -> &Platter {
        &self.nodes[node].platter
    }

    /// Starts the metadata server.
    pub fn start_meta(self: &Arc<Self>) {
        let life = self.life(self.config.meta.listen.clone());
        let (me, alive) = (Arc::clone(self), Arc::clone(&life.alive));
        let started = rt::sim::spawn_in(life.group, "meta", move || {
            let base = MetaBase {
                store: Arc::new(me.ledger.open(&alive)),
                network: &me.net,
                rules: Rules::without(me.flaws.meta),
            };
            MetaServer::start_on(base, &me.config, KEY.to_vec(), false)
        });
        let server = started
            .join()
            .expect("no panic")
            .expect("the metadata server starts");
        self.meta.lock().running = Some((server, life));
    }

    fn node_base(&self, n: usize, alive: &Arc<AtomicBool>) -> StorageBase<'_> {
        let node = &self.nodes[n];
        StorageBase {
            label: node.label.clone(),
            disk: Arc::new(SimDisk::new(&node.platter, alive)),
            disk_path: self.config.storage[n].dir.join("pool.data"),
            store: Arc::new(node.ledger.open(alive)),
            network: &self.net,
            flaw: self.flaws.storage,
        }
    }

    /// Starts a storage node.
    pub fn start_node(self: &Arc<Self>, n: usize) {
        let life = self.life(self.config.storage[n].listen.clone());
        let (me, alive) = (Arc::clone(self), Arc::clone(&life.alive));
        let started = rt::sim::spawn_in(life.group, &format!("storage{n}"), move || {
            let base = me.node_base(n, &alive);
            StorageNode::start_on(base, &me.config, &me.config.storage[n], KEY.to_vec(), false)
        });
        let server = started
            .join()
            .expect("no panic")
            .expect("the storage node starts");
        self.nodes[n].host.lock().running = Some((server, life));
    }

    /// Starts a storage node whose process dies while it starts, perhaps with a disk that cannot be read just then.
    pub fn start_node_in_vain(self: &Arc<Self>, n: usize) {
        let unreadable = &self.nodes[n].platter.faults.unreadable;
        unreadable.store(chance::once_in(2), Ordering::Relaxed);
        let life = self.life(self.config.storage[n].listen.clone());
        let (me, alive) = (Arc::clone(self), Arc::clone(&life.alive));
        let _started = rt::sim::spawn_in(life.group, &format!("storage{n}"), move || {
            let base = me.node_base(n, &alive);
            drop(StorageNode::start_on(
                base,
                &me.config,
                &me.config.storage[n],
                KEY.to_vec(),
                false,
            ));
        });
        chance::wait(Duration::from_millis(1));
        life.end(&self.net);
        unreadable.store(false, Ordering::Relaxed);
        self.nodes[n].platter.cut(Luck::All);
        self.nodes[n].ledger.cut(Luck::All);
    }

    /// Starts all servers.
    pub fn start(self: &Arc<Self>) {
        self.start_meta();
        for n in 0..self.nodes() {
            self.start_node(n);
        }
    }

    fn forget_memory(&self, of: &str) {
        let dir = self.dir.path().join("memory").join(of);
        std::fs::remove_dir_all(&dir).expect("memory");
        std::fs::create_dir(&dir).expect("memory");
    }

    /// The metadata server dies; with less than [`Luck::All`], its host does.
    pub fn crash_meta(&self, luck: Luck) {
        let running = self.meta.lock().running.take();
        let Some((server, life)) = running else { return };
        life.end(&self.net);
        self.go_on(life.group);
        drop(server);
        self.ledger.cut(luck);
        if luck != Luck::All {
            self.forget_memory("meta");
        }
    }

    /// A storage node dies; with less than [`Luck::All`], its host does.
    pub fn crash_node(&self, n: usize, luck: Luck) {
        let node = &self.nodes[n];
        let running = node.host.lock().running.take();
        let Some((server, life)) = running else { return };
        life.end(&self.net);
        self.go_on(life.group);
        drop(server);
        node.platter.cut(luck);
        node.ledger.cut(luck);
        if luck != Luck::All {
            self.forget_memory(&n.to_string());
        }
    }

    /// Records that say of a mount that it has the file open or pins it: the storage node, and the record's number there.
    #[must_use]
    pub fn used_records(&self) -> Vec<(usize, usize)> {
        let bytes = self.config.lease.record_bytes;
        let layout = RecordLayout::new(bytes).expect("a size of records");
        let mut used = Vec::new();
        for node in 0..self.nodes() {
            let dir = self.dir.path().join("memory").join(node.to_string());
            let files = std::fs::read_dir(dir).expect("memory");
            for file in files.map(|f| f.expect("memory").path()) {
                let segment = file.extension().and_then(|e| e.to_str()?.parse::<usize>().ok());
                let Some(segment) = segment.filter(|_| file.to_string_lossy().contains("leases")) else {
                    continue;
                };
                let memory = std::fs::read(&file).expect("memory");
                let records = memory.chunks_exact(bytes as usize);
                let first = segment * records.len();
                let says = |record: &[u8]| record[layout.opens() as usize..].iter().any(|&b| b != 0);
                let found = records.enumerate().filter(|(_, record)| says(record));
                used.extend(found.map(|(n, _)| (node, first + n)));
            }
        }
        used
    }

    /// Stops all servers in order, and has them give their memory up.
    pub fn stop(&self) {
        for node in &self.nodes {
            let running = node.host.lock().running.take();
            if let Some((server, life)) = running {
                let stopped = rt::sim::spawn_in(life.group, "stopping", move || server.stop(true));
                stopped.join().expect("no panic").expect("it can be stored");
                life.end(&self.net);
                node.platter.cut(Luck::All);
                node.ledger.cut(Luck::All);
            }
        }
        let running = self.meta.lock().running.take();
        if let Some((server, life)) = running {
            let stopped = rt::sim::spawn_in(life.group, "stopping", move || server.stop());
            stopped.join().expect("no panic").expect("it can be stored");
            life.end(&self.net);
            self.ledger.cut(Luck::All);
        }
    }

    /// Starts a mount. While it cannot join because the dead have to be taken over first it is tried again, as the daemon does it.
    pub fn mount(self: &Arc<Self>, name: &str) -> Mount {
        for _ in 0..60 {
            match self.try_mount(name) {
                Ok(mount) => return mount,
                Err(error) => rt::sim::note(&format!("{name} cannot join: {error}")),
            }
            rt::thread::sleep(Duration::from_secs(1));
        }
        self.try_mount(name).expect("the mount joins")
    }

    fn try_mount(self: &Arc<Self>, name: &str) -> Result<Mount, MountError> {
        let life = self.life(format!("{name}-{}:1", self.groups.load(Ordering::Relaxed)));
        let (me, addr) = (Arc::clone(self), life.addr.clone());
        let started = rt::sim::spawn_in(life.group, name, move || {
            let flaws = me.flaws.leases.map_or(0, |flaw| 1 << flaw as u32);
            Detached::start(&me.net, &me.config, KEY.to_vec(), addr, CacheMode::Direct, flaws)
        });
        let detached = started.join().expect("no panic")?;
        Ok(Mount {
            mounted: Mounted {
                client: Arc::clone(detached.client()),
                kernel: Arc::default(),
                late: self.flaws.cluster == Some(ClusterFlaw::AnsweredLate),
            },
            detached,
            life,
        })
    }

    /// The connections between two mounts break.
    pub fn cut(&self, addrs: [&str; 2]) {
        self.net.cut(addrs);
    }

    /// There is no link between two mounts any more, and nobody is told.
    pub fn separate(&self, addrs: [&str; 2]) {
        self.net.separate(addrs);
    }

    /// There is one again.
    pub fn join(&self, addrs: [&str; 2]) {
        self.net.join(addrs);
    }

    /// Nothing comes from the first of two addresses to the second.
    pub fn silence(&self, way: [&str; 2]) {
        self.net.silence(way);
    }

    /// It does again.
    pub fn hear(&self, way: [&str; 2]) {
        self.net.hear(way);
    }

    /// Where a node is reached, and the group of its threads; none while it does not run.
    #[must_use]
    pub fn whereabouts(&self, node: Node, mounts: &[(String, u32)]) -> Option<(String, u32)> {
        let of = |life: &Life| (life.addr.clone(), life.group);
        match node {
            Node::Meta => self.meta.lock().running.as_ref().map(|(_, life)| of(life)),
            Node::Storage(n) => {
                let host = self.nodes[n].host.lock();
                host.running.as_ref().map(|(_, life)| of(life))
            }
            Node::Mount(n) => mounts.get(n).cloned(),
        }
    }

    /// The other addresses that there are.
    fn others(&self, node: Node, mounts: &[(String, u32)]) -> Vec<String> {
        let servers = (0..self.nodes()).map(Node::Storage).chain([Node::Meta]);
        let all = servers.chain((0..mounts.len()).map(Node::Mount));
        let others = all.filter(|other| *other != node);
        others
            .filter_map(|other| Some(self.whereabouts(other, mounts)?.0))
            .collect()
    }

    /// None of a node's threads runs any more. What others do on its memory they still do, unless it is `deaf`, as a node is whose
    /// system carries out nothing without the process.
    /// Until [`World::go_on`] with the number that this returns, or until it dies.
    pub fn stop_node(&self, node: Node, mounts: &[(String, u32)], deaf: bool) -> Option<u32> {
        let (addr, group) = self.whereabouts(node, mounts)?;
        self.net.still(|| rt::sim::stop(group));
        let mut unheard = self.others(node, mounts);
        unheard.retain(|_| deaf);
        for other in &unheard {
            self.net.silence([other, &addr]);
        }
        self.stopped.lock().push(Stopped { addr, group, unheard });
        Some(group)
    }

    /// It goes on, unless it has died meanwhile.
    pub fn go_on(&self, group: u32) {
        let mut all = self.stopped.lock();
        let Some(n) = all.iter().position(|s| s.group == group) else {
            return;
        };
        let stopped = all.swap_remove(n);
        drop(all);
        for other in &stopped.unheard {
            self.net.hear([other, &stopped.addr]);
        }
        rt::sim::go_on(stopped.group);
    }

    /// A mount's process dies.
    pub fn kill_mount(&self, mount: Mount) {
        mount.life.end(&self.net);
    }
}

impl Mount {
    /// Leaves in order.
    pub fn stop(self) {
        let detached = self.detached;
        let stopped = rt::sim::spawn_in(self.life.group, "leaving", move || detached.stop());
        stopped.join().expect("no panic");
    }

    /// Stores what it has not stored.
    pub fn sync(&self) {
        let client = Arc::clone(&self.mounted.client);
        let synced = rt::sim::spawn_in(self.life.group, "sync", move || {
            client.storing.writeback.write_all();
            for inode in client.cache.inodes.all() {
                // What was changed under a lease that others have been let in under.
                client
                    .storing
                    .push
                    .push_attrs_now(&inode)
                    .expect("the server is there");
            }
        });
        synced.join().expect("no panic");
    }

    /// Does something as one of its threads does it.
    pub fn run<T: Send + 'static>(&self, act: impl FnOnce(&Mounted) -> T + Send + 'static) -> T {
        let mounted = self.mounted.clone();
        let done = rt::sim::spawn_in(self.life.group, "act", move || act(&mounted));
        done.join().expect("no panic")
    }

    /// Has its life ended, because it was declared dead?
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.mounted.is_over()
    }

    /// Where others reach it.
    #[must_use]
    pub fn addr(&self) -> String {
        self.life.addr.clone()
    }

    /// The group of its threads.
    #[must_use]
    pub fn group(&self) -> u32 {
        self.life.group
    }
}
