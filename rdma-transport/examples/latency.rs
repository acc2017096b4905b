//! Measures one provider between two processes: `latency shm`, `latency tcp` or `latency verbs`. With verbs,
//! `LATENCY_HOSTS=A,B` says which addresses (and so devices) the echoing side and the probe use.
//!
//! The parent starts itself again as the peer, then times operations and message round trips, once with both
//! progress threads spinning and once with both asleep between messages.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rdma_transport::mem::SharedMem;
use rdma_transport::{
    Access, Connection, Fabric, FabricConfig, FabricKind, Handler, Op, RegionKey, RemoteAddr, TransportError,
    open,
};

type AnyError = Box<dyn std::error::Error>;

/// Echoes in the child, counts and answers in the parent.
struct Peer {
    echo: bool,
    left: AtomicU64,
    received: AtomicU64,
    key: Mutex<Option<RegionKey>>,
}

impl Handler for Peer {
    fn admit(&self, _identity: &[u8]) -> Result<(), String> {
        Ok(())
    }
    fn connected(&self, conn: &Arc<dyn Connection>) {
        if let Ok(Some(key)) = self.key.lock().map(|k| *k)
            && let Err(e) = conn.send(&key.0.to_le_bytes())
        {
            eprintln!("{e}");
        }
    }
    fn message(&self, conn: &Arc<dyn Connection>, message: &[u8]) {
        let first = self.received.fetch_add(1, Ordering::SeqCst) == 0;
        let again = if self.echo {
            true
        } else {
            if first && let (Ok(mut key), Ok(bytes)) = (self.key.lock(), message.try_into()) {
                *key = Some(RegionKey(u64::from_le_bytes(bytes)));
            }
            self.left
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
                .is_ok()
        };
        if again && let Err(e) = conn.send(message) {
            eprintln!("{e}");
        }
    }
    fn disconnected(&self, _conn: &Arc<dyn Connection>, _why: &TransportError) {
        if self.echo {
            std::process::exit(0);
        }
    }
}

fn endpoint(
    kind: FabricKind,
    listen: String,
    spin: Duration,
    echo: bool,
) -> Result<(Arc<dyn Fabric>, Arc<Peer>), AnyError> {
    let peer = Arc::new(Peer {
        echo,
        left: AtomicU64::new(0),
        received: AtomicU64::new(0),
        key: Mutex::new(None),
    });
    let config = FabricConfig {
        listen,
        key: b"a key for measurements only".to_vec(),
        identity: if echo { b"echo".to_vec() } else { b"probe".to_vec() },
        spin,
        timeout: Duration::from_secs(5),
    };
    Ok((open(kind, config, Arc::clone(&peer) as _)?, peer))
}

fn wait_for(peer: &Peer, count: u64) {
    while peer.received.load(Ordering::SeqCst) < count {
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn report(what: &str, mut each: Vec<f64>) {
    each.sort_by(f64::total_cmp);
    let at = |q: f64| each[((each.len() - 1) as f64 * q) as usize];
    println!("{what:<44} p50 {:>9.3} µs   p99 {:>9.3} µs", at(0.5), at(0.99));
}

/// Times `n` groups of `group` calls; per call, µs.
fn time(
    n: usize,
    group: usize,
    mut call: impl FnMut() -> Result<(), AnyError>,
) -> Result<Vec<f64>, AnyError> {
    let mut each = Vec::with_capacity(n);
    for _ in 0..n {
        let start = Instant::now();
        for _ in 0..group {
            call()?;
        }
        each.push(start.elapsed().as_secs_f64() * 1e6 / group as f64);
    }
    Ok(each)
}

fn main() -> Result<(), AnyError> {
    let args: Vec<String> = std::env::args().collect();
    let kind = match args.get(1).map(String::as_str) {
        Some("shm") => FabricKind::Shm,
        Some("tcp") => FabricKind::Tcp,
        Some("verbs") => FabricKind::Verbs,
        _ => return Err("usage: latency shm|tcp|verbs".into()),
    };
    let dir = std::env::temp_dir();
    let hosts = std::env::var("LATENCY_HOSTS").unwrap_or_default();
    let (echoes, probes) = hosts.split_once(',').unwrap_or(("127.0.0.1", "127.0.0.1"));
    let name = |who: &str, id: u32| match kind {
        FabricKind::Tcp => "127.0.0.1:0".to_owned(),
        FabricKind::Verbs => format!("{}:0", if who == "echo" { echoes } else { probes }),
        _ => dir
            .join(format!("fabric-latency-{who}-{id}"))
            .display()
            .to_string(),
    };
    if let Some(spin) = args.get(2) {
        let spin = Duration::from_micros(spin.parse()?);
        let (fabric, peer) = endpoint(kind, name("echo", std::process::id()), spin, true)?;
        let mem = Arc::new(SharedMem::anonymous(32 << 20)?);
        mem.zero(0, mem.len())?;
        if let Ok(mut key) = peer.key.lock() {
            *key = Some(fabric.register(&mem, Access::ALL)?);
        }
        println!("{}", fabric.local_addr());
        std::thread::sleep(Duration::from_secs(120));
        return Ok(());
    }
    // Two threads that spin are one too many for the guests that SoftRoCE runs in.
    let spins = match kind {
        FabricKind::Verbs => [("as configured by default", 20), ("sleeping", 0)],
        _ => [("spinning", 2_000_000), ("sleeping", 0)],
    };
    let large_rounds = if kind == FabricKind::Verbs { 4 } else { 20 };
    for (label, spin) in spins {
        let mut child = Command::new(std::env::current_exe()?)
            .args([args[1].as_str(), &spin.to_string()])
            .stdout(Stdio::piped())
            .spawn()?;
        let mut addr = String::new();
        if let Some(out) = child.stdout.as_mut() {
            std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut addr)?;
        }
        let (fabric, peer) = endpoint(
            kind,
            name("probe", std::process::id()),
            Duration::from_micros(spin),
            false,
        )?;
        let conn = fabric.connect(addr.trim())?;
        wait_for(&peer, 1);
        let key = peer.key.lock().ok().and_then(|k| *k).ok_or("no key")?;
        let at = RemoteAddr { key, offset: 64 };
        println!("-- {label}");
        let group = if kind == FabricKind::Shm { 1000 } else { 1 };
        report(
            "read 8 B",
            time(2000, group, || {
                Ok(conn.execute(&mut [Op::Read {
                    at,
                    into: &mut [0; 8],
                }])?)
            })?,
        );
        report(
            "compare-and-swap",
            time(2000, group, || {
                Ok(conn.execute(&mut [Op::Cas {
                    at,
                    expect: 0,
                    new: 0,
                    old: 0,
                }])?)
            })?,
        );
        report(
            "fetch-and-add",
            time(2000, group, || {
                Ok(conn.execute(&mut [Op::Faa { at, add: 1, old: 0 }])?)
            })?,
        );
        let mut page = vec![1u8; 4096];
        report(
            "read 4 KiB",
            time(2000, 1, || {
                Ok(conn.execute(&mut [Op::Read { at, into: &mut page }])?)
            })?,
        );
        report(
            "write 4 KiB",
            time(
                2000,
                1,
                || Ok(conn.execute(&mut [Op::Write { at, from: &page }])?),
            )?,
        );
        let mut large = vec![1u8; 16 << 20];
        report(
            "read 16 MiB",
            time(large_rounds, 1, || {
                Ok(conn.execute(&mut [Op::Read { at, into: &mut large }])?)
            })?,
        );
        report(
            "write 16 MiB",
            time(large_rounds, 1, || {
                Ok(conn.execute(&mut [Op::Write { at, from: &large }])?)
            })?,
        );
        let rounds = 2000u64;
        let mut one_way = Vec::new();
        for n in 0..10 {
            let before = peer.received.load(Ordering::SeqCst);
            peer.left.store(rounds - 1, Ordering::SeqCst);
            let start = Instant::now();
            conn.send(&[n; 64])?;
            wait_for(&peer, before + rounds);
            one_way.push(start.elapsed().as_secs_f64() * 1e6 / (2 * rounds) as f64);
        }
        report("message 64 B, one way", one_way);
        fabric.shutdown();
        child.wait()?;
    }
    Ok(())
}
