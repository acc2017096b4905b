//! The side that is measured against: memory, echoes, a node that takes leases, and the servers of perftest's tools.

use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context;
use lockmgr::{LeaseManager, Mode, RecordId};
use parking_lot::Mutex;
use rdma_transport::mem::SharedMem;
use rdma_transport::{Access, Connection, FabricKind, Handler, TransportError};
use serde::{Deserialize, Serialize};

use super::host;
use super::tools::{Device, Run};
use crate::lease::PATIENCE;
use crate::lease::node::Member;
use crate::progress::stopped;
use crate::transport::peer;

/// Bytes of memory on each side.
pub const MEMORY: usize = 8 << 20;
/// The record whose lease goes to and fro.
pub const CONTENDED: u64 = 7;
/// The partner's number among the nodes that take leases; the probe's is 0.
pub const NODE: u16 = 1;
/// Longest time for a tool's server to listen.
const LISTEN: Duration = Duration::from_secs(20);

/// What the probe asks for. Everything that is no request is echoed.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Start the server of a tool.
    Tool(Run),
    /// Take the lease on record [`CONTENDED`], and let go of it when somebody asks.
    Lease,
}

/// What the partner tells.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// First of all: the key of its memory, whose beginning are lease records, and where its node listens.
    Hello { key: u64, node: String },
    /// The tool listens, the lease is held.
    Ready,
    /// It could not.
    Failed(String),
}

/// First byte of requests and answers; echoes begin with another.
const MARK: u8 = 0xd5;

/// As a message.
///
/// # Errors
/// Never for these types.
pub fn encode<T: Serialize>(what: &T) -> anyhow::Result<Vec<u8>> {
    let mut bytes = vec![MARK];
    serde_json::to_writer(&mut bytes, what).context("encode")?;
    Ok(bytes)
}

/// From a message; None if it is none of them.
pub fn decode<T: for<'a> Deserialize<'a>>(message: &[u8]) -> Option<T> {
    let (mark, rest) = message.split_first()?;
    (*mark == MARK).then(|| serde_json::from_slice(rest).ok())?
}

struct Partner {
    hello: Arc<OnceLock<Vec<u8>>>,
    node: OnceLock<Arc<LeaseManager>>,
    device: Option<Device>,
    tool: Arc<Mutex<Option<Child>>>,
}

impl Partner {
    /// On a thread of its own: this blocks.
    fn serve(&self, conn: &Arc<dyn Connection>, request: Request) {
        let conn = Arc::clone(conn);
        let device = self.device.clone();
        let tool = Arc::clone(&self.tool);
        let node = self.node.get().cloned();
        std::thread::spawn(move || {
            let answer = |result: anyhow::Result<()>| {
                let answer = match result {
                    Ok(()) => Answer::Ready,
                    Err(e) => Answer::Failed(format!("{e:#}")),
                };
                if let Err(e) = encode(&answer).map(|m| conn.send(&m)) {
                    eprintln!("bench: {e:#}");
                }
            };
            match request {
                Request::Tool(run) => answer(start(device.as_ref(), &run, &tool)),
                Request::Lease => answer(node.context("not ready yet").and_then(|n| take(&n))),
            }
        });
    }
}

/// Takes the lease that both sides want.
///
/// # Errors
/// It does not come.
pub fn take(node: &LeaseManager) -> anyhow::Result<()> {
    drop(node.enter(RecordId::new(0, CONTENDED), Mode::Exclusive, PATIENCE)?);
    Ok(())
}

/// Starts a tool's server in place of the last one.
fn start(device: Option<&Device>, run: &Run, tool: &Mutex<Option<Child>>) -> anyhow::Result<()> {
    let device = device.context("the partner was started without --device")?;
    let mut running = tool.lock();
    if let Some(mut last) = running.take() {
        let _ = last.kill();
        let _ = last.wait();
    }
    *running = Some(serve_tool(device, run)?);
    Ok(())
}

/// Starts a tool's server and waits until it listens.
///
/// # Errors
/// The tool is not installed, or fails.
pub fn serve_tool(device: &Device, run: &Run) -> anyhow::Result<Child> {
    let mut child = Command::new(run.tool.program())
        .args(run.arguments(device))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .with_context(|| format!("cannot run {}: install perftest", run.tool.program()))?;
    let deadline = Instant::now() + LISTEN;
    while !listens(run.port) {
        if let Some(status) = child.try_wait()? {
            anyhow::bail!("{} ended at once: {status}", run.tool.program());
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            anyhow::bail!("{} does not listen", run.tool.program());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(child)
}

/// Whether something on this machine listens on a TCP port (state 0A of the kernel's table).
fn listens(port: u16) -> bool {
    let listener = format!(":{port:04X} ");
    ["/proc/net/tcp", "/proc/net/tcp6"].iter().any(|table| {
        let text = std::fs::read_to_string(table).unwrap_or_default();
        text.lines()
            .any(|l| l.contains(&listener) && l.split_whitespace().nth(3) == Some("0A"))
    })
}

impl Handler for Partner {
    fn admit(&self, _identity: &[u8]) -> Result<(), String> {
        Ok(())
    }
    fn connected(&self, conn: &Arc<dyn Connection>) {
        let (hello, conn) = (Arc::clone(&self.hello), Arc::clone(conn));
        // A probe may come before everything is open, and one that is gone again needs no greeting.
        std::thread::spawn(move || conn.send(hello.wait()));
    }
    fn message(&self, conn: &Arc<dyn Connection>, message: &[u8]) {
        match decode(message) {
            Some(request) => self.serve(conn, request),
            None => {
                let _ = conn.send(message);
            }
        }
    }
    fn disconnected(&self, _conn: &Arc<dyn Connection>, _why: &TransportError) {}
}

/// Serves at `listen` until the process is asked to end.
///
/// # Errors
/// The endpoint cannot be opened.
pub fn run(listen: &str, device: Option<Device>, spin: Duration) -> anyhow::Result<()> {
    let memory = Arc::new(SharedMem::anonymous(MEMORY)?);
    memory.zero(0, MEMORY)?;
    let tool = Arc::new(Mutex::new(None));
    let partner = Arc::new(Partner {
        hello: Arc::default(),
        node: OnceLock::new(),
        device,
        tool: Arc::clone(&tool),
    });
    let fabric = peer::open(
        FabricKind::Verbs,
        listen.to_owned(),
        "partner",
        spin,
        Arc::clone(&partner) as _,
    )?;
    let key = fabric.register(&memory, Access::ALL)?;
    let node = Member::open(NODE, key, &fabric.local_addr(), |name, handler| {
        let listen = format!("{}:0", host(&fabric.local_addr()));
        peer::open(FabricKind::Verbs, listen, name, spin, handler)
    })?;
    let _ = partner.node.set(Arc::clone(node.manager()));
    let _ = partner.hello.set(encode(&Answer::Hello {
        key: key.0,
        node: node.addr(),
    })?);
    println!("listening at {}", fabric.local_addr());
    while !stopped() {
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(node);
    fabric.shutdown();
    if let Some(mut child) = tool.lock().take() {
        let _ = child.kill();
        let _ = child.wait();
    }
    Ok(())
}
