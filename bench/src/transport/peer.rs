//! The process at the other end: memory to operate on, and an echo.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::Context;
use rdma_transport::mem::SharedMem;
use rdma_transport::{
    Access, Connection, Fabric, FabricConfig, FabricKind, Handler, RegionKey, TransportError,
};

use super::PeerArgs;

/// Bytes of registered memory.
pub const MEMORY: usize = 32 << 20;

/// `shm`, `tcp` or `verbs`.
///
/// # Errors
/// Neither.
pub fn kind(name: &str) -> anyhow::Result<FabricKind> {
    match name {
        "shm" => Ok(FabricKind::Shm),
        "tcp" => Ok(FabricKind::Tcp),
        "verbs" => Ok(FabricKind::Verbs),
        _ => anyhow::bail!("no provider {name} here: shm, tcp or verbs"),
    }
}

/// Which fabric, and where its endpoints listen.
#[derive(Debug, Clone, clap::Args)]
pub struct Hosts {
    /// Addresses of this machine that endpoints over tcp and verbs listen at, in turn; over verbs they also choose the
    /// devices. [default: 127.0.0.1]
    #[arg(long = "hosts", value_delimiter = ',', value_name = "ADDRESSES")]
    pub list: Vec<String>,
}

impl Hosts {
    /// Where endpoint `number` listens.
    fn listen(&self, number: usize) -> String {
        let host = match self.list.len() {
            0 => "127.0.0.1",
            n => &self.list[number % n],
        };
        format!("{host}:0")
    }
}

/// An endpoint with a socket in `dir`, or on any port of host `number`.
///
/// # Errors
/// It cannot be opened.
pub fn endpoint(
    provider: &str,
    hosts: &Hosts,
    (dir, number, name): (&std::path::Path, usize, &str),
    spin: Duration,
    handler: Arc<dyn Handler>,
) -> anyhow::Result<Arc<dyn Fabric>> {
    let kind = kind(provider)?;
    let listen = match kind {
        FabricKind::Tcp | FabricKind::Verbs => hosts.listen(number),
        _ => dir.join(name).to_string_lossy().into_owned(),
    };
    open(kind, listen, name, spin, handler)
}

/// An endpoint that listens there.
///
/// # Errors
/// It cannot be opened.
pub fn open(
    kind: FabricKind,
    listen: String,
    name: &str,
    spin: Duration,
    handler: Arc<dyn Handler>,
) -> anyhow::Result<Arc<dyn Fabric>> {
    let config = FabricConfig {
        listen,
        key: b"a key for measurements only".to_vec(),
        identity: name.as_bytes().to_vec(),
        spin,
        timeout: Duration::from_secs(10),
        keep: None,
    };
    rdma_transport::open(kind, config, handler).context("cannot open the endpoint")
}

/// Sends the key of its region to whoever connects, and everything else back.
pub struct Echo(pub OnceLock<RegionKey>);

impl Handler for Echo {
    fn admit(&self, _identity: &[u8]) -> Result<(), String> {
        Ok(())
    }
    fn connected(&self, conn: &Arc<dyn Connection>) {
        if let Some(key) = self.0.get() {
            // A peer that is gone again needs no key.
            let _ = conn.send(&key.0.to_le_bytes());
        }
    }
    fn message(&self, conn: &Arc<dyn Connection>, message: &[u8]) {
        let _ = conn.send(message);
    }
    fn disconnected(&self, _conn: &Arc<dyn Connection>, _why: &TransportError) {}
}

/// Serves until its standard input ends.
///
/// # Errors
/// The endpoint cannot be opened.
pub fn run(args: &PeerArgs) -> anyhow::Result<()> {
    let echo = Arc::new(Echo(OnceLock::new()));
    let spin = Duration::from_micros(args.spin_us);
    let fabric = endpoint(
        &args.provider,
        &args.hosts,
        (&args.dir, 0, "peer"),
        spin,
        Arc::clone(&echo) as _,
    )?;
    let memory = Arc::new(SharedMem::anonymous(MEMORY)?);
    memory.zero(0, MEMORY)?;
    let _ = echo.0.set(fabric.register(&memory, Access::ALL)?);
    println!("{}", fabric.local_addr());
    std::io::stdout().flush()?;
    let mut rest = Vec::new();
    let _ = std::io::stdin().read_to_end(&mut rest);
    fabric.shutdown();
    Ok(())
}
