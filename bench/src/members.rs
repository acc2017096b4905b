//! What a thousand mounts that only say that they live cost the metadata server, and how long it takes with them until one of them is
//! found dead and what it had is taken back.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use parking_lot::Mutex;
use rdma_transport::Connection;

use fsd_node::config::Config;
use fsd_node::endpoint::Endpoint;
use fsd_proto::ask;
use fsd_proto::clock::Skew;
use fsd_proto::rpc::{Responder, RpcError, Service};
use fsd_proto::wire::{self, Hello, MetaReply, MountRequest, Role, View};

use crate::procs::{cpu_time, fsd_binary};
use crate::progress::{Progress, check};
use crate::stats::{median, sig};
use crate::table::Table;

/// Arguments of `bench members`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Mounts.
    #[arg(long, default_value_t = 1000)]
    mounts: usize,
    /// Seconds of heartbeats that are measured.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Deaths.
    #[arg(long, default_value_t = 10)]
    rounds: usize,
}

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);
/// Mounts of an endpoint: it makes no more than 128 connections to one address.
const SHARE: usize = 100;

/// Servers that end with this.
struct Servers {
    dir: tempfile::TempDir,
    running: Vec<Child>,
}

impl Drop for Servers {
    fn drop(&mut self) {
        for child in &mut self.running {
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Servers {
    fn start(term_ms: u64, heartbeat_ms: u64) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        // Lease records with bits for more than a thousand mounts.
        let config = format!(
            "cluster = \"members\"\nkey_file = \"key\"\nfabric = \"tcp\"\n\
             [lease]\nrecord_bytes = 512\n\
             [membership]\nterm_ms = {term_ms}\nmargin_ms = {}\nheartbeat_ms = {heartbeat_ms}\n\
             [meta]\nlisten = \"127.0.0.1:17340\"\ndir = \"meta\"\n\
             [[storage]]\nid = 0\nlisten = \"127.0.0.1:17341\"\ndir = \"storage0\"\npool = \"64MiB\"\n",
            term_ms / 5
        );
        fs::write(dir.path().join("cluster.toml"), config)?;
        let (fsd, key) = (fsd_binary()?, dir.path().join("key").display().to_string());
        let command = |args: &[&str]| {
            let mut command = Command::new(&fsd);
            command
                .args(args)
                .env("FSD_CONFIG", dir.path().join("cluster.toml"))
                .env("RUST_LOG", "error")
                .stdin(Stdio::null())
                .stdout(Stdio::null());
            command
        };
        for args in [&["keygen", &*key][..], &["format"]] {
            let status = command(args).status()?;
            ensure!(status.success(), "fsd {}: {status}", args.join(" "));
        }
        let running = [&["meta"][..], &["storage", "--id", "0"]]
            .into_iter()
            .map(|args| command(args).spawn())
            .collect::<Result<_, _>>()?;
        Ok(Self { dir, running })
    }
}

/// What the mounts have been told: of each view the first and the last time, and how many.
#[derive(Default)]
struct Told {
    views: Mutex<Vec<(View, Instant)>>,
}

impl Service for Told {
    fn admit(&self, _hello: &Hello) -> Result<(), String> {
        Ok(())
    }

    fn request(&self, _hello: &Hello, body: &[u8], responder: Responder) {
        if let Ok(MountRequest::View(view)) = wire::decode(body) {
            self.views.lock().push((view, Instant::now()));
        }
        responder.reply(&Ok(()));
    }
}

impl Told {
    /// When so many mounts had been told of an epoch, with or without dead in it.
    fn all(&self, epoch: u64, dead: bool, mounts: usize) -> anyhow::Result<Instant> {
        let start = Instant::now();
        loop {
            let views = self.views.lock();
            let of = views
                .iter()
                .filter(|(v, _)| v.epoch == epoch && v.dead.is_empty() != dead);
            let times: Vec<Instant> = of.map(|(_, at)| *at).collect();
            drop(views);
            if let (true, Some(last)) = (times.len() >= mounts, times.iter().max()) {
                return Ok(*last);
            }
            let told = times.len();
            ensure!(
                start.elapsed() < PATIENCE,
                "{told} of {mounts} were told of epoch {epoch}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Mounts as far as the metadata server can tell.
struct Members {
    endpoints: Vec<Endpoint>,
    told: Arc<Told>,
    conns: Vec<Arc<dyn Connection>>,
    /// Heartbeats that were answered.
    answered: Arc<AtomicU64>,
    /// Why one was not.
    refused: Arc<Mutex<Option<String>>>,
}

impl Members {
    fn join(config: &Config, count: usize) -> anyhow::Result<Self> {
        let told = Arc::new(Told::default());
        let key = config.key()?;
        let open = |n: usize| {
            let (listen, service) = (format!("127.0.0.1:{}", 17_342 + n), Arc::clone(&told));
            Endpoint::open(
                config,
                Role::Client(None),
                listen,
                key.clone(),
                service as Arc<dyn Service>,
            )
        };
        let endpoints = (0..count.div_ceil(SHARE)).map(open).collect::<Result<_, _>>()?;
        let mut members = Self {
            endpoints,
            told: Arc::clone(&told),
            conns: Vec::new(),
            answered: Arc::default(),
            refused: Arc::default(),
        };
        for _ in 0..count {
            check()?;
            members.add(config)?;
            if members.conns.len().is_multiple_of(100) {
                members.beat(0..members.conns.len());
            }
        }
        Ok(members)
    }

    /// That of the next mount.
    fn endpoint(&self) -> &Endpoint {
        &self.endpoints[self.conns.len() / SHARE]
    }

    /// Another mount, on a connection of its own. Nobody listens where it says that others reach it.
    fn add(&mut self, config: &Config) -> anyhow::Result<()> {
        let (start, life) = (Instant::now(), rand::random());
        let hello = Hello::new(&config.cluster, Role::Client(None), life);
        self.endpoint().fabric.set_identity(hello.encode());
        let conn = loop {
            match self.join_as(config, life) {
                Ok(conn) => break conn,
                // The servers are just starting.
                Err(error) => ensure!(start.elapsed() < PATIENCE, "a mount cannot join: {error}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        self.conns.push(conn);
        Ok(())
    }

    fn join_as(&self, config: &Config, life: u64) -> Result<Arc<dyn Connection>, RpcError> {
        let endpoint = self.endpoint();
        let conn = endpoint.fabric.connect(&config.meta.listen)?;
        let request = ask::meta::Join {
            again: None,
            life,
            listen: "127.0.0.1:9".to_owned(),
            name: format!("member{}", self.conns.len()),
            skew: Skew { least: 0, most: 0 },
            locks: Vec::new(),
            durable: 0,
        };
        ask::ask_on(&endpoint.calls, &conn, request, PATIENCE)?;
        Ok(conn)
    }

    fn beat(&self, which: std::ops::Range<usize>) {
        for n in which {
            let (conn, endpoint) = (&self.conns[n], &self.endpoints[n / SHARE]);
            let (answered, refused) = (Arc::clone(&self.answered), Arc::clone(&self.refused));
            let beat: wire::MetaRequest = ask::Request::message(ask::meta::Heartbeat {});
            let done = move |answer: Result<MetaReply, RpcError>| match answer {
                Ok(_) => drop(answered.fetch_add(1, Ordering::Relaxed)),
                Err(error) => *refused.lock() = Some(format!("mount {n}: {error}")),
            };
            endpoint.calls.call_async(conn, &beat, done);
        }
    }

    /// Has all of them say that they live, once in each period and evenly spread over it, until `done`.
    fn live(&self, period: Duration, mut done: impl FnMut() -> bool) {
        const SLICES: u32 = 50;
        let (mut next, mut slice) = (Instant::now(), 0);
        while !done() {
            let at = |n: u32| self.conns.len() * n as usize / SLICES as usize;
            self.beat(at(slice)..at(slice + 1));
            slice = (slice + 1) % SLICES;
            next += period / SLICES;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }
}

/// Microseconds of processor time for each heartbeat, per cent of a processor, and the heartbeats.
fn beats(members: &Members, meta: u32, period: Duration, args: &Args) -> anyhow::Result<(f64, f64, u64)> {
    let (cpu, count) = (cpu_time(meta), members.answered.load(Ordering::Relaxed));
    let (start, time) = (Instant::now(), Duration::from_secs(args.seconds));
    members.live(period, || start.elapsed() >= time);
    let took = start.elapsed().as_secs_f64();
    let used = (cpu_time(meta) - cpu).as_secs_f64();
    let count = members.answered.load(Ordering::Relaxed) - count;
    if let Some(why) = members.refused.lock().take() {
        anyhow::bail!("a heartbeat was refused: {why}");
    }
    ensure!(count > 0, "no heartbeat was answered");
    Ok((used * 1e6 / count as f64, used / took * 100.0, count))
}

/// One of them ends: milliseconds until all others were told that it is dead, and until they were told that all it had is free.
fn death(members: &mut Members, epoch: u64, period: Duration) -> anyhow::Result<(f64, f64)> {
    let dead = members.conns.pop().context("a mount")?;
    members.told.views.lock().clear();
    let others = members.conns.len();
    let start = Instant::now();
    dead.close();
    let (told, members) = (Arc::clone(&members.told), &*members);
    std::thread::scope(|scope| {
        let (sent, over) = std::sync::mpsc::channel();
        scope.spawn(move || {
            let both = told
                .all(epoch, true, others)
                .and_then(|known| Ok((known, told.all(epoch, false, others)?)));
            let _ = sent.send(both);
        });
        let mut found = None;
        members.live(period, || {
            found = over.try_recv().ok();
            found.is_some()
        });
        let (known, free) = found.context("the watcher")??;
        let millis = |at: Instant| (at - start).as_secs_f64() * 1e3;
        Ok((millis(known), millis(free)))
    })
}

/// Runs it.
///
/// # Errors
/// A server does not start, a mount is not let in, something takes too long.
pub fn run(args: &Args, out: &Path) -> anyhow::Result<()> {
    let header = [
        "term, s",
        "heartbeat, ms",
        "heartbeats",
        "µs each",
        "% of a processor",
        "% when nobody says anything",
        "known dead, ms",
        "worst",
        "all free, ms",
        "worst",
    ];
    let title = format!(
        "{} mounts, TCP, one storage node; {} deaths",
        args.mounts, args.rounds
    );
    let mut table = Table::new(title, &header);
    let progress = Progress::new("members", 2);
    for (term_ms, heartbeat_ms) in [(10_000, 1_000), (2_000, 400)] {
        progress.step(format!("a term of {term_ms} ms"));
        let servers = Servers::start(term_ms, heartbeat_ms)?;
        let meta = servers.running.first().context("a server")?.id();
        let period = Duration::from_millis(heartbeat_ms);
        let config = Config::load(&servers.dir.path().join("cluster.toml"))?;
        let mut members = Members::join(&config, args.mounts)?;
        // What it costs besides: for less than a term nobody needs to say anything.
        members.beat(0..members.conns.len());
        let (cpu, start) = (cpu_time(meta), Instant::now());
        std::thread::sleep(Duration::from_millis(term_ms / 2));
        let idle = (cpu_time(meta) - cpu).as_secs_f64() / start.elapsed().as_secs_f64() * 100.0;
        let (each, part, count) = beats(&members, meta, period, args)?;
        let (mut known, mut free) = (Vec::new(), Vec::new());
        for round in 1..=args.rounds as u64 {
            check()?;
            let (a, b) = death(&mut members, round, period)?;
            known.push(a);
            free.push(b);
        }
        let worst = |all: &[f64]| all.iter().copied().fold(0.0, f64::max);
        let lives: HashSet<u64> = members.told.views.lock().iter().map(|(v, _)| v.epoch).collect();
        ensure!(lives.len() == 1, "somebody else was declared dead");
        table.row(vec![
            (term_ms / 1000).to_string(),
            heartbeat_ms.to_string(),
            count.to_string(),
            sig(each),
            sig(part),
            sig(idle),
            sig(median(&known)),
            sig(worst(&known)),
            sig(median(&free)),
            sig(worst(&free)),
        ]);
        members.endpoints.iter().for_each(|e| e.fabric.shutdown());
        progress.tick();
    }
    drop(progress);
    println!("{table}");
    table.write_csv(&out.join("members.csv"))
}
