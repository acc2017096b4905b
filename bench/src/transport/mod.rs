//! Latency and bandwidth of the fabric between two processes.

pub mod peer;

use std::io::BufRead;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use parking_lot::{Condvar, Mutex};
use rdma_transport::{Connection, Fabric, Handler, Op, RegionKey, RemoteAddr, TransportError};

use crate::plot::Chart;
use crate::progress::{Progress, check};
use crate::stats::{Latency, sig};
use crate::table::Table;

/// Arguments of `bench transport`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Providers.
    #[arg(long, value_delimiter = ',', default_values_t = ["shm".to_owned(), "tcp".to_owned()])]
    providers: Vec<String>,
    /// Fewer samples.
    #[arg(long)]
    quick: bool,
    /// How long progress threads spin before they sleep, µs.
    #[arg(long, default_value_t = 50)]
    spin_us: u64,
    #[command(flatten)]
    hosts: peer::Hosts,
}

/// Arguments of the process at the other end.
#[derive(Debug, clap::Args)]
pub struct PeerArgs {
    /// Provider.
    pub provider: String,
    /// Where its socket goes.
    pub dir: PathBuf,
    /// As in [`Args`].
    pub spin_us: u64,
    #[command(flatten)]
    pub hosts: peer::Hosts,
}

struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let end = Instant::now() + Duration::from_secs(2);
        while Instant::now() < end && matches!(self.0.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is played with the echo.
struct Game {
    key: Option<RegionKey>,
    left: u64,
    sent: Instant,
    latency: Option<Latency>,
    message: Vec<u8>,
}

struct Player {
    game: Mutex<Game>,
    over: Condvar,
}

impl Game {
    fn serve(&mut self, conn: &dyn Connection) -> Result<(), TransportError> {
        self.sent = Instant::now();
        conn.send(&self.message)
    }
}

impl Handler for Player {
    fn admit(&self, _identity: &[u8]) -> Result<(), String> {
        Err("nobody connects to the probe".into())
    }
    fn connected(&self, _conn: &Arc<dyn Connection>) {}
    fn message(&self, conn: &Arc<dyn Connection>, message: &[u8]) {
        let mut game = self.game.lock();
        if game.key.is_none() {
            game.key = message.try_into().ok().map(|b| RegionKey(u64::from_le_bytes(b)));
        } else {
            let took = game.sent.elapsed();
            if let Some(l) = &mut game.latency {
                l.add(took);
            }
            game.left = game.left.saturating_sub(1);
            if game.left > 0 && game.serve(conn.as_ref()).is_ok() {
                return;
            }
        }
        self.over.notify_all();
    }
    fn disconnected(&self, _conn: &Arc<dyn Connection>, _why: &TransportError) {
        self.over.notify_all();
    }
}

impl Player {
    fn play(&self, conn: &dyn Connection, rounds: u64) -> anyhow::Result<Latency> {
        let mut game = self.game.lock();
        game.left = rounds;
        game.latency = Some(Latency::new()?);
        game.serve(conn)?;
        while game.left > 0 {
            let timed_out = self.over.wait_for(&mut game, Duration::from_secs(30)).timed_out();
            check()?;
            if timed_out || !conn.is_alive() {
                anyhow::bail!("no echo");
            }
        }
        game.latency.take().ok_or_else(|| anyhow!("no samples"))
    }
}

/// Times `samples` groups of `group` calls.
fn time(
    samples: u32,
    group: u32,
    mut call: impl FnMut() -> Result<(), TransportError>,
) -> anyhow::Result<Latency> {
    let mut latency = Latency::new()?;
    for _ in 0..samples / 10 {
        call()?;
    }
    for _ in 0..samples {
        let start = Instant::now();
        for _ in 0..group {
            call()?;
        }
        latency.add_mean(start.elapsed(), group);
    }
    check()?;
    Ok(latency)
}

struct Probe {
    fabric: Arc<dyn Fabric>,
    conn: Arc<dyn Connection>,
    player: Arc<Player>,
    at: RemoteAddr,
    _dir: tempfile::TempDir,
    _child: Peer,
}

impl Probe {
    fn start(provider: &str, args: &Args) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["transport-peer", provider]).arg(dir.path());
        command.arg(args.spin_us.to_string());
        if !args.hosts.list.is_empty() {
            command.args(["--hosts", &args.hosts.list.join(",")]);
        }
        let mut child = Peer(
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .process_group(0)
                .spawn()
                .context("cannot start the peer")?,
        );
        let mut addr = String::new();
        let out = child.0.stdout.take().context("output of the peer")?;
        std::io::BufReader::new(out).read_line(&mut addr)?;
        let player = Arc::new(Player {
            game: Mutex::new(Game {
                key: None,
                left: 0,
                sent: Instant::now(),
                latency: None,
                message: vec![7; 64],
            }),
            over: Condvar::new(),
        });
        let fabric = peer::endpoint(
            provider,
            &args.hosts,
            (dir.path(), 1, "probe"),
            Duration::from_micros(args.spin_us),
            Arc::clone(&player) as _,
        )?;
        let conn = fabric.connect(addr.trim())?;
        let mut game = player.game.lock();
        if game.key.is_none() {
            player.over.wait_for(&mut game, Duration::from_secs(10));
        }
        let key = game.key.context("the peer did not tell its key")?;
        drop(game);
        Ok(Self {
            fabric,
            conn,
            player,
            at: RemoteAddr { key, offset: 4096 },
            _dir: dir,
            _child: child,
        })
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.fabric.shutdown();
    }
}

/// Bytes for people.
pub fn size(n: usize) -> String {
    match n {
        n if n >= 1 << 20 => format!("{} MiB", n >> 20),
        n if n >= 1 << 10 => format!("{} KiB", n >> 10),
        n => format!("{n} B"),
    }
}

fn latencies(
    p: &Probe,
    quick: bool,
    inline: bool,
    mut row: impl FnMut(String, &Latency),
) -> anyhow::Result<()> {
    let n = if quick { 500 } else { 5_000 };
    let (conn, at) = (p.conn.as_ref(), p.at);
    for bytes in [8usize, 4 << 10, 64 << 10, 1 << 20] {
        // Where an operation takes less than reading the clock, some are timed together.
        let group = if inline && bytes < 1024 { 32 } else { 1 };
        let samples = if bytes >= 1 << 20 { n / 10 } else { n };
        let mut buffer = vec![1u8; bytes];
        row(
            format!("read {}", size(bytes)),
            &time(samples, group, || {
                conn.execute(&mut [Op::Read {
                    at,
                    into: &mut buffer,
                }])
            })?,
        );
        row(
            format!("write {}", size(bytes)),
            &time(samples, group, || {
                conn.execute(&mut [Op::Write { at, from: &buffer }])
            })?,
        );
    }
    let group = if inline { 32 } else { 1 };
    let word = RemoteAddr {
        key: at.key,
        offset: 64,
    };
    let cas = || {
        conn.execute(&mut [Op::Cas {
            at: word,
            expect: 0,
            new: 0,
            old: 0,
        }])
    };
    row("compare-and-swap".into(), &time(n, group, cas)?);
    let faa = || {
        conn.execute(&mut [Op::Faa {
            at: word,
            add: 1,
            old: 0,
        }])
    };
    row("fetch-and-add".into(), &time(n, group, faa)?);
    let rounds = u64::from(n);
    row("send 64 B and its echo".into(), &p.player.play(conn, rounds)?);
    Ok(())
}

fn bandwidth(p: &Probe, quick: bool) -> anyhow::Result<Vec<(usize, f64, f64)>> {
    let run = Duration::from_millis(if quick { 50 } else { 300 });
    let (conn, at) = (p.conn.as_ref(), p.at);
    let rate = |bytes: usize, call: &mut dyn FnMut() -> Result<(), TransportError>| -> anyhow::Result<f64> {
        let (start, mut n) = (Instant::now(), 0u64);
        while start.elapsed() < run {
            call()?;
            n += 1;
        }
        check()?;
        Ok(n as f64 * bytes as f64 / f64::from(1 << 20) / start.elapsed().as_secs_f64())
    };
    let mut all = Vec::new();
    for bytes in [512usize, 4 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20] {
        let mut buffer = vec![1u8; bytes];
        let read = rate(bytes, &mut || {
            conn.execute(&mut [Op::Read {
                at,
                into: &mut buffer,
            }])
        })?;
        let write = rate(bytes, &mut || {
            conn.execute(&mut [Op::Write { at, from: &buffer }])
        })?;
        all.push((bytes, read, write));
    }
    Ok(all)
}

/// Runs `bench transport`.
///
/// # Errors
/// A provider does not work here.
pub fn run(args: &Args, out: &Path) -> anyhow::Result<()> {
    let progress = Progress::new("transport", args.providers.len() as u64 * 2);
    let mut header = vec!["operation"];
    header.extend(Latency::HEADER);
    let mut tables = Vec::new();
    let mut speed = Table::new(
        "Bandwidth, one operation at a time, MiB/s",
        &["size", "provider", "read", "write"],
    );
    let mut chart = Chart {
        title: "Fabric bandwidth by size".into(),
        unit: "MiB/s".into(),
        groups: Vec::new(),
        series: Vec::new(),
        log: true,
    };
    for provider in &args.providers {
        progress.step(format!("{provider}: latency"));
        let probe = Probe::start(provider, args)?;
        let mut table = Table::new(format!("Latency over {provider}"), &header);
        latencies(&probe, args.quick, provider == "shm", |name, latency| {
            let mut row = vec![name];
            row.extend(latency.row());
            table.row(row);
        })?;
        table.write_csv(&out.join(format!("transport-latency-{provider}.csv")))?;
        tables.push(table);
        progress.step(format!("{provider}: bandwidth"));
        let all = bandwidth(&probe, args.quick)?;
        for (bytes, read, write) in &all {
            speed.row(vec![size(*bytes), provider.clone(), sig(*read), sig(*write)]);
        }
        chart.groups = all.iter().map(|(b, ..)| size(*b)).collect();
        chart.series.push((
            format!("{provider} read"),
            all.iter().map(|(_, r, _)| *r).collect(),
        ));
        chart.series.push((
            format!("{provider} write"),
            all.iter().map(|(.., w)| *w).collect(),
        ));
    }
    drop(progress);
    speed.write_csv(&out.join("transport-bandwidth.csv"))?;
    chart.write(&out.join("transport-bandwidth"))?;
    tables.push(speed);
    for table in tables {
        println!("{table}");
    }
    println!(
        "Operations under 1 KiB over shm are timed in groups of 32. CSV and plots: {}",
        out.display()
    );
    Ok(())
}
