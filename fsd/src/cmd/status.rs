//! `fsd status`.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use rdma_transport::{Connection, Fabric};
use serde::Serialize;

use fsd_node::config::{Config, StorageConfig};
use fsd_node::endpoint::Endpoint;
use fsd_proto::ask::{self, Request};
use fsd_proto::rpc::{Calls, Errno, Responder, RpcError, Service};
use fsd_proto::wire::{Hello, MetaStatus, MountStatus, NodeInfo, PeerState, Role, StorageStatus};

struct NoService;

impl Service for NoService {
    fn admit(&self, _hello: &Hello) -> Result<(), String> {
        Err("a tool accepts no connections".into())
    }
    fn request(&self, _hello: &Hello, _body: &[u8], responder: Responder) {
        responder.reply::<()>(&Err(Errno(libc::EOPNOTSUPP)));
    }
}

/// Asks the nodes of a cluster, as a tool.
pub struct Asker {
    calls: Arc<Calls>,
    fabric: Arc<dyn Fabric>,
    timeout: Duration,
    _dir: tempfile::TempDir,
}

impl Asker {
    /// An endpoint for asking.
    ///
    /// # Errors
    /// The key cannot be read, or the system refuses.
    pub fn new(config: &Config) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let listen = match config.fabric {
            fsd_node::config::FabricChoice::Shm => {
                dir.path().join("tool.sock").to_string_lossy().into_owned()
            }
            fsd_node::config::FabricChoice::Tcp => "127.0.0.1:0".into(),
            fsd_node::config::FabricChoice::Verbs => "0.0.0.0:0".into(),
        };
        // Nobody waits for a tool in a hurry, and a node that is down shall not hold it up.
        let config = Config {
            spin_us: 0,
            timeout_ms: 5000,
            ..config.clone()
        };
        let Endpoint { fabric, calls, .. } =
            Endpoint::open(&config, Role::Tool, listen, config.key()?, Arc::new(NoService))?;
        Ok(Self {
            calls,
            fabric,
            timeout: Duration::from_millis(config.timeout_ms),
            _dir: dir,
        })
    }

    /// Connects to a node.
    ///
    /// # Errors
    /// It cannot be reached.
    pub fn connect(&self, addr: &str) -> anyhow::Result<Arc<dyn Connection>> {
        Ok(self.fabric.connect(addr)?)
    }

    /// Asks on a connection, and waits for so long.
    ///
    /// # Errors
    /// The node's refusal; no answer within the time.
    pub fn ask_for<R: Request>(
        &self,
        conn: &Arc<dyn Connection>,
        request: R,
        patience: Duration,
    ) -> Result<R::Reply, RpcError> {
        ask::ask_on(&self.calls, conn, request, patience)
    }

    fn ask<R: Request>(&self, addr: &str, request: R) -> Result<R::Reply, String> {
        let conn: Arc<dyn Connection> = self.fabric.connect(addr).map_err(|e| e.to_string())?;
        let reply = ask::ask_on(&self.calls, &conn, request, self.timeout).map_err(|e| e.to_string());
        conn.close();
        reply
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.fabric.shutdown();
    }
}

/// Everything that `fsd status` shows.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Cluster name.
    pub cluster: String,
    /// Fabric.
    pub fabric: &'static str,
    /// Everything is as it should be.
    pub healthy: bool,
    /// What is not, one sentence each.
    pub problems: Vec<String>,
    /// The metadata server, or why there is no answer.
    pub meta: Result<MetaStatus, String>,
    /// The storage nodes.
    pub storage: Vec<(u16, Result<StorageStatus, String>)>,
    /// The mounts.
    pub mounts: Vec<(u16, Result<MountStatus, String>)>,
}

/// Asks every node.
///
/// # Errors
/// The tool's own endpoint cannot be made.
pub fn collect(config: &Config) -> anyhow::Result<Report> {
    let asker = Asker::new(config)?;
    let ask_storage = |s: &StorageConfig| asker.ask(&s.listen, ask::storage::Status {});
    let meta = asker.ask(&config.meta.listen, ask::meta::Status {});
    let storage: Vec<_> = config.storage.iter().map(|s| (s.id, ask_storage(s))).collect();
    let nodes = meta.as_ref().map(|m| m.nodes.clone()).unwrap_or_default();
    let mounts: Vec<_> = nodes
        .iter()
        .filter(|n| matches!(n.state, PeerState::Up | PeerState::Late))
        .map(|n| (n.node, asker.ask(&n.listen, ask::mount::Status {})))
        .collect();
    let problems = problems(&meta, &storage, &mounts);
    Ok(Report {
        cluster: config.cluster.clone(),
        fabric: super::defaults::fabric_name(config.fabric),
        healthy: problems.is_empty(),
        problems,
        meta,
        storage,
        mounts,
    })
}

/// What is not as it should be.
fn problems(
    meta: &Result<MetaStatus, String>,
    storage: &[(u16, Result<StorageStatus, String>)],
    mounts: &[(u16, Result<MountStatus, String>)],
) -> Vec<String> {
    let mut problems = Vec::new();
    let nodes = match meta {
        Ok(meta) => {
            let troubles = meta.troubles.iter();
            problems.extend(troubles.map(|what| format!("metadata server: {what}")));
            meta.nodes.as_slice()
        }
        Err(error) => {
            problems.push(format!("metadata server: no answer: {error}"));
            &[]
        }
    };
    for (id, status) in storage {
        let status = match status {
            Ok(status) => status,
            Err(error) => {
                problems.push(format!("storage node {id}: no answer: {error}"));
                continue;
            }
        };
        let troubles = status.troubles.iter();
        problems.extend(troubles.map(|what| format!("storage node {id}: {what}")));
        if status.lost > 0 {
            problems.push(format!(
                "storage node {id}: {} blocks cannot be read from its disk: replace the disk",
                status.lost
            ));
        }
    }
    problems.extend(nodes.iter().filter_map(absent));
    for (number, status) in mounts {
        match status {
            Ok(status) => {
                let troubles = status.troubles.iter();
                problems.extend(troubles.map(|what| format!("mount {number}: {what}")));
            }
            Err(error) => problems.push(format!("mount {number}: no answer: {error}")),
        }
    }
    problems
}

/// What is wrong with a mount as the metadata server sees it.
fn absent(node: &NodeInfo) -> Option<String> {
    let NodeInfo {
        node: number, name, ..
    } = node;
    let silent = node.silent_ms as f64 / 1000.0;
    match node.state {
        PeerState::Up => None,
        PeerState::Late => Some(format!("mount {number} ({name}) is silent for {silent:.1} s")),
        PeerState::Lost => Some(format!(
            "mount {number} ({name}) is not connected, and silent for {silent:.1} s"
        )),
        PeerState::Dead => Some(format!(
            "mount {number} ({name}) is dead, and what it had leased is being taken back"
        )),
    }
}

/// Bytes for people.
#[must_use]
pub fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn print(report: &Report) {
    println!(
        "cluster {} over {}: {}",
        report.cluster,
        report.fabric,
        if report.healthy { "healthy" } else { "NOT HEALTHY" }
    );
    for problem in &report.problems {
        println!("  {problem}");
    }
    match &report.meta {
        Ok(m) => println!(
            "metadata server  up    {} inodes, {} orphans, {} being freed, {} requests, epoch {}",
            m.inodes, m.orphans, m.freeing, m.requests, m.epoch
        ),
        Err(error) => println!("metadata server  DOWN  {error}"),
    }
    for (id, status) in &report.storage {
        match status {
            Ok(s) => {
                println!(
                    "storage node {id:<3} up    {} of {} free, {} reserved, {} not yet stored; leases: {} exclusive, {} shared",
                    mib(s.free),
                    mib(s.total),
                    mib(s.reserved),
                    mib(s.dirty),
                    s.exclusive,
                    s.shared
                );
                if s.lost > 0 {
                    println!(
                        "                       {} blocks CANNOT BE READ from its disk",
                        s.lost
                    );
                }
                if s.damaged > 0 {
                    println!(
                        "                       {} copies on its disk were damaged, and made anew from memory: look at the disk",
                        s.damaged
                    );
                }
            }
            Err(error) => println!("storage node {id:<3} DOWN  {error}"),
        }
    }
    let Ok(meta) = &report.meta else { return };
    for node in &meta.nodes {
        println!(
            "mount {:<10} {:<5} {} ({} file locks; heard of {} ms ago)",
            node.node,
            node.state.to_string(),
            node.name,
            node.locks,
            node.silent_ms
        );
        match report.mounts.iter().find(|(n, _)| *n == node.node) {
            Some((_, Ok(m))) => {
                println!(
                    "                       {}; leases: {} exclusive, {} shared, {} waiting; {} dirty files, {} cached; {} requests, {} messages, {} revocations",
                    m.cache,
                    m.exclusive,
                    m.shared,
                    m.waiting,
                    m.dirty_files,
                    mib(m.cached_bytes),
                    m.requests,
                    m.messages,
                    m.revocations
                );
                let counted = m.kernel.iter().filter(|(_, n)| *n > 0);
                let counted: Vec<String> = counted.map(|(name, n)| format!("{name} {n}")).collect();
                if !counted.is_empty() {
                    println!("                       kernel: {}", counted.join(", "));
                }
            }
            Some((_, Err(error))) => println!("                       no answer: {error}"),
            None => {}
        }
    }
}

/// Runs `fsd status`. Exit status 0 where all is well, 1 where not, 2 where that cannot be found out from here.
#[must_use]
pub fn run(path: &Path, json: bool) -> ExitCode {
    match tell(path, json) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("fsd: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Shows the report; is all well?
fn tell(path: &Path, json: bool) -> anyhow::Result<bool> {
    let report = collect(&Config::load(path)?)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(report.healthy)
}
