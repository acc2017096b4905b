//! The verbs provider beside perftest's tools, between the same two hosts, in turns.

mod leases;
pub mod partner;
pub mod tools;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use parking_lot::{Condvar, Mutex};
use rdma_transport::{Connection, Fabric, FabricKind, Handler, Op, RegionKey, RemoteAddr, TransportError};

use crate::progress::{Progress, check};
use crate::stats::{Latency, median, sig};
use crate::table::Table;
use crate::transport::{peer, size};
use leases::Leases;
use partner::{Answer, Request, decode, encode};
use tools::{Device, Run, Tool};

/// Arguments of `bench rdma`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Be the other side: serve until the end of the process.
    #[arg(long, conflicts_with = "connect")]
    serve: bool,
    /// The other side's address, host:port.
    #[arg(long, required_unless_present = "serve")]
    connect: Option<String>,
    /// This side's address; with `--serve` the port that `--connect` names, else 0.
    #[arg(long)]
    listen: String,
    /// The device that perftest's tools use on this side (without: only this provider is measured).
    #[arg(long, requires = "gid_index")]
    device: Option<String>,
    /// The index of its GID.
    #[arg(long)]
    gid_index: Option<u32>,
    /// How often everything is measured; medians are shown.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Operations of a latency measurement.
    #[arg(long, default_value_t = 500)]
    operations: u64,
    /// MiB of a bandwidth measurement.
    #[arg(long, default_value_t = 16)]
    mib: usize,
    /// Longest time that callers look for completions before they sleep, µs. perftest's tools never sleep.
    #[arg(long, default_value_t = 50)]
    spin_us: u64,
    /// Only what contains this.
    #[arg(long)]
    only: Option<String>,
}

impl Args {
    fn spin(&self) -> Duration {
        Duration::from_micros(self.spin_us)
    }
}

/// What is measured, and with what it is compared.
struct Item {
    name: String,
    what: What,
    size: usize,
    tool: Tool,
}

#[derive(Clone, Copy, PartialEq)]
enum What {
    Read,
    Write,
    Cas,
    Faa,
    /// Half a round trip of messages.
    Echo,
    ReadBandwidth,
    WriteBandwidth,
}

impl What {
    fn is_rate(self) -> bool {
        matches!(self, Self::ReadBandwidth | Self::WriteBandwidth)
    }
}

fn items() -> Vec<Item> {
    let item = |name: &str, what, bytes, tool| Item {
        name: format!("{name}, {}", size(bytes)),
        what,
        size: bytes,
        tool,
    };
    let mut all = vec![
        item("read", What::Read, 8, Tool::ReadLatency),
        item("read", What::Read, 4096, Tool::ReadLatency),
        item("compare-and-swap", What::Cas, 8, Tool::CasLatency),
        item("fetch-and-add", What::Faa, 8, Tool::FaaLatency),
        item("write, completed", What::Write, 8, Tool::WriteCompletion),
        item("write, completed", What::Write, 4096, Tool::WriteCompletion),
        item("write, completed", What::Write, 8, Tool::WriteLatency),
        item("write, completed", What::Write, 4096, Tool::WriteLatency),
        item("message, half ping-pong", What::Echo, 64, Tool::SendLatency),
    ];
    for bytes in [64 << 10, 256 << 10, 1 << 20] {
        all.push(item(
            "read bandwidth",
            What::ReadBandwidth,
            bytes,
            Tool::ReadBandwidth,
        ));
        all.push(item(
            "write bandwidth",
            What::WriteBandwidth,
            bytes,
            Tool::WriteBandwidth,
        ));
    }
    all
}

#[derive(Default)]
struct Heard {
    hello: Option<(RegionKey, String)>,
    answer: Option<Result<(), String>>,
    echoes: u64,
    gone: bool,
}

#[derive(Default)]
struct Probe {
    heard: Mutex<Heard>,
    changed: Condvar,
}

impl Handler for Probe {
    fn admit(&self, _identity: &[u8]) -> Result<(), String> {
        Err("nobody connects to the probe".into())
    }
    fn connected(&self, _conn: &Arc<dyn Connection>) {}
    fn message(&self, conn: &Arc<dyn Connection>, message: &[u8]) {
        let mut heard = self.heard.lock();
        match decode(message) {
            Some(Answer::Hello { key, node }) => heard.hello = Some((RegionKey(key), node)),
            Some(Answer::Ready) => heard.answer = Some(Ok(())),
            Some(Answer::Failed(why)) => heard.answer = Some(Err(why)),
            None => {
                heard.echoes = heard.echoes.saturating_sub(1);
                if heard.echoes > 0 && conn.send(message).is_ok() {
                    return;
                }
            }
        }
        self.changed.notify_all();
    }
    fn disconnected(&self, _conn: &Arc<dyn Connection>, _why: &TransportError) {
        self.heard.lock().gone = true;
        self.changed.notify_all();
    }
}

impl Probe {
    fn until<T>(&self, mut ready: impl FnMut(&mut Heard) -> Option<T>) -> anyhow::Result<T> {
        let mut heard = self.heard.lock();
        loop {
            if let Some(found) = ready(&mut heard) {
                return Ok(found);
            }
            if heard.gone
                || self
                    .changed
                    .wait_for(&mut heard, Duration::from_secs(60))
                    .timed_out()
            {
                bail!("the other side is gone or silent");
            }
            check()?;
        }
    }
}

/// Both sides, connected.
struct Match {
    fabric: Arc<dyn Fabric>,
    conn: Arc<dyn Connection>,
    probe: Arc<Probe>,
    at: RemoteAddr,
    device: Option<Device>,
    server: String,
    operations: u64,
    bytes: usize,
    port: u16,
}

impl Match {
    fn begin(args: &Args, to: &str, device: Option<Device>) -> anyhow::Result<(Self, Leases)> {
        let probe = Arc::new(Probe::default());
        let listen = format!("{}:0", host(&args.listen));
        let handler = Arc::clone(&probe) as _;
        let fabric = peer::open(FabricKind::Verbs, listen, "probe", args.spin(), handler)?;
        let conn = connect(fabric.as_ref(), to)?;
        let (key, node) = probe.until(|h| h.hello.take())?;
        let leases = Leases::open(args, to, key, &node)?;
        let game = Self {
            fabric,
            conn,
            probe,
            at: RemoteAddr {
                key,
                // Behind the lease records.
                offset: 1 << 20,
            },
            device,
            server: host(to).to_owned(),
            operations: args.operations,
            bytes: args.mib << 20,
            port: 18_600,
        };
        Ok((game, leases))
    }

    fn ask(&self, request: &Request) -> anyhow::Result<()> {
        self.conn.send(&encode(request)?)?;
        let answer = self.probe.until(|h| h.answer.take())?;
        answer.map_err(|why| anyhow::anyhow!("the other side: {why}"))
    }

    /// The median in µs, or MiB/s.
    fn ours(&self, item: &Item) -> anyhow::Result<f64> {
        let (conn, at) = (self.conn.as_ref(), self.at);
        let mut buffer = vec![0x5a; item.size];
        match item.what {
            What::Read => self.time(|| {
                conn.execute(&mut [Op::Read {
                    at,
                    into: &mut buffer,
                }])
            }),
            What::Write => self.time(|| conn.execute(&mut [Op::Write { at, from: &buffer }])),
            What::Cas => self.time(|| {
                conn.execute(&mut [Op::Cas {
                    at,
                    expect: 1,
                    new: 1,
                    old: 0,
                }])
            }),
            What::Faa => self.atomic(),
            What::Echo => self.echo(&buffer),
            What::ReadBandwidth | What::WriteBandwidth => self.rate(item),
        }
    }

    /// The median of a fetch-and-add, µs.
    fn atomic(&self) -> anyhow::Result<f64> {
        let at = self.at;
        self.time(|| self.conn.execute(&mut [Op::Faa { at, add: 1, old: 0 }]))
    }

    /// The median of an atomic and a read with one doorbell, as batches of leases have them where holders are far, µs.
    fn pair(&self) -> anyhow::Result<f64> {
        let at = self.at;
        let mut word = [0; 8];
        self.time(|| {
            let into = &mut word;
            self.conn
                .execute(&mut [Op::Faa { at, add: 1, old: 0 }, Op::Read { at, into }])
        })
    }

    fn time(&self, mut call: impl FnMut() -> Result<(), TransportError>) -> anyhow::Result<f64> {
        let mut latency = Latency::new()?;
        for _ in 0..10 {
            call()?;
        }
        for _ in 0..self.operations {
            let start = Instant::now();
            call()?;
            latency.add(start.elapsed());
        }
        check()?;
        Ok(latency.at(0.5) / 1e3)
    }

    /// The mean: messages follow each other by themselves.
    fn echo(&self, message: &[u8]) -> anyhow::Result<f64> {
        self.probe.heard.lock().echoes = self.operations;
        let start = Instant::now();
        self.conn.send(message)?;
        self.probe.until(|h| (h.echoes == 0).then_some(()))?;
        Ok(start.elapsed().as_secs_f64() * 1e6 / self.operations as f64 / 2.0)
    }

    /// Two callers, as many operations in a batch as make 2 MiB: what a mount does with large files.
    fn rate(&self, item: &Item) -> anyhow::Result<f64> {
        const CALLERS: usize = 2;
        let batch = ((2 << 20) / item.size).max(1);
        let batches = self.bytes.div_ceil(CALLERS * batch * item.size).max(1);
        let start = Instant::now();
        std::thread::scope(|scope| {
            let callers: Vec<_> = (0..CALLERS)
                .map(|_| {
                    scope.spawn(|| -> anyhow::Result<()> {
                        let mut buffer = vec![0x5a; batch * item.size];
                        for _ in 0..batches {
                            let mut ops: Vec<Op<'_>> = buffer
                                .chunks_mut(item.size)
                                .map(|into| match item.what {
                                    What::ReadBandwidth => Op::Read { at: self.at, into },
                                    _ => Op::Write {
                                        at: self.at,
                                        from: into,
                                    },
                                })
                                .collect();
                            self.conn.execute(&mut ops)?;
                            check()?;
                        }
                        Ok(())
                    })
                })
                .collect();
            callers
                .into_iter()
                .try_for_each(|c| c.join().unwrap_or_else(|_| bail!("a caller died")))
        })?;
        let moved = (CALLERS * batches * batch * item.size) as f64 / f64::from(1 << 20);
        Ok(moved / start.elapsed().as_secs_f64())
    }

    fn theirs(&mut self, item: &Item) -> anyhow::Result<Option<f64>> {
        let Some(device) = self.device.clone() else {
            return Ok(None);
        };
        // Each run has a port of its own: that of the last one may not be free yet.
        self.port = if self.port >= 19_500 {
            18_600
        } else {
            self.port + 1
        };
        let iterations = if item.what.is_rate() {
            (self.bytes / item.size).max(4) as u64
        } else {
            self.operations
        };
        let run = Run {
            tool: item.tool,
            size: item.size,
            iterations,
            port: self.port,
        };
        self.ask(&Request::Tool(run))?;
        run.measure(&device, &self.server).map(Some)
    }
}

impl Drop for Match {
    fn drop(&mut self) {
        self.fabric.shutdown();
    }
}

/// The other side may have been started only now.
///
/// # Errors
/// It does not answer, or refuses.
pub fn connect(fabric: &dyn Fabric, to: &str) -> anyhow::Result<Arc<dyn Connection>> {
    let start = Instant::now();
    loop {
        match fabric.connect(to) {
            Err(TransportError::Unreachable { .. }) if start.elapsed() < Duration::from_secs(10) => {
                check()?;
                std::thread::sleep(Duration::from_millis(100));
            }
            result => return result.context("the other side"),
        }
    }
}

fn host(addr: &str) -> &str {
    addr.rsplit_once(':').map_or(addr, |(host, _)| host)
}

/// What the issue of a comparison must be: latencies at most so much longer, bandwidths at least so high.
const LATENCY_LIMIT: f64 = 1.15;
const RATE_LIMIT: f64 = 0.9;

/// Runs `bench rdma`.
///
/// # Errors
/// There is no RDMA device, the other side does not answer, a tool fails.
pub fn run(args: &Args, out: &Path) -> anyhow::Result<()> {
    let device = match (&args.device, args.gid_index) {
        (Some(name), Some(gid)) => Some(Device {
            name: name.clone(),
            gid,
        }),
        _ => None,
    };
    let Some(to) = &args.connect else {
        return partner::run(&args.listen, device, args.spin());
    };
    let mut items = items();
    items.retain(|i| args.only.as_ref().is_none_or(|only| i.name.contains(only)));
    let with_leases = args
        .only
        .as_ref()
        .is_none_or(|only| "leases".contains(only.as_str()));
    let steps = (items.len() + usize::from(with_leases)) * args.rounds;
    let progress = Progress::new("rdma", steps as u64);
    let (mut game, mut leases) = Match::begin(args, to, device)?;
    let mut samples = vec![(Vec::new(), Vec::new()); items.len()];
    for round in 0..args.rounds {
        for (item, (ours, theirs)) in items.iter().zip(&mut samples) {
            progress.step(format!("round {}: {}", round + 1, item.name));
            ours.push(game.ours(item).with_context(|| item.name.clone())?);
            theirs.extend(game.theirs(item).with_context(|| item.name.clone())?);
        }
        if with_leases {
            progress.step(format!("round {}: leases", round + 1));
            leases.round(&game).context("leases")?;
        }
    }
    drop(progress);
    let header = [
        "operation",
        "unit",
        "here",
        "perftest",
        "tool",
        "ratio",
        "least–most of a round",
        "target",
        "verdict",
    ];
    let mut table = Table::new("Verbs beside perftest, medians of the rounds", &header);
    for (item, (ours, theirs)) in items.iter().zip(&samples) {
        table.row(row(item, ours, theirs));
    }
    table.write_csv(&out.join("rdma.csv"))?;
    println!("{table}");
    if with_leases {
        leases.report(out)?;
    }
    Ok(())
}

fn row(item: &Item, ours: &[f64], theirs: &[f64]) -> Vec<String> {
    let rate = item.what.is_rate();
    let mut row = vec![
        item.name.clone(),
        if rate { "MiB/s" } else { "us" }.to_owned(),
        sig(median(ours)),
    ];
    if theirs.is_empty() {
        row.extend(["-"; 6].map(str::to_owned));
        return row;
    }
    row.extend([sig(median(theirs)), item.tool.describe()]);
    let limit = if rate { RATE_LIMIT } else { LATENCY_LIMIT };
    row.extend(judge(ours, theirs, rate, limit));
    row
}

/// The median of the rounds' ratios, its least and most, the limit, and whether it is met; `rate`: more is better.
fn judge(ours: &[f64], theirs: &[f64], rate: bool, limit: f64) -> [String; 4] {
    let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(o, t)| o / t).collect();
    let ratio = median(&ratios);
    let least = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ratios.iter().copied().fold(0.0, f64::max);
    let met = if rate { ratio >= limit } else { ratio <= limit };
    [
        sig(ratio),
        format!("{}–{}", sig(least), sig(most)),
        format!("{} {limit}", if rate { ">=" } else { "<=" }),
        if met { "met" } else { "MISSED" }.to_owned(),
    ]
}
