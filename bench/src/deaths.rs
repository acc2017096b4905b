//! How long others wait for what a mount had that dies, stops, or is evicted; and how long it takes to come back.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::procs::fsd_binary;
use crate::progress::{Progress, check};
use crate::stats::{median, sig};
use crate::table::Table;

/// Arguments of `bench deaths`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Deaths of each kind.
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// Term of the mounts, milliseconds; the margin is a fifth of it.
    #[arg(long, default_value_t = 2000)]
    term_ms: u64,
    /// What the nodes talk over: shm or tcp.
    #[arg(long, default_value = "tcp")]
    fabric: String,
}

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the mount that dies has written: fsynced, and not.
const LEN: usize = 1 << 20;

/// Processes that end with this.
struct Roles {
    dir: tempfile::TempDir,
    fsd: PathBuf,
    running: Vec<(String, Child)>,
}

impl Drop for Roles {
    fn drop(&mut self) {
        for (_, child) in &mut self.running {
            // It may have ended, or be stopped.
            let _ = child.kill();
            let _ = child.wait();
        }
        for n in 0..2 {
            let _ = rustix::mount::unmount(self.point(n), rustix::mount::UnmountFlags::DETACH);
        }
    }
}

impl Roles {
    fn start(args: &Args) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let base = dir.path().display();
        let address = |port: u16| match &*args.fabric {
            "shm" => format!("{base}/{port}.sock"),
            _ => format!("127.0.0.1:{port}"),
        };
        let config = format!(
            "cluster = \"deaths\"\nkey_file = \"key\"\nfabric = \"{}\"\n\
             [membership]\nterm_ms = {}\nmargin_ms = {}\nheartbeat_ms = {}\n\
             [meta]\nlisten = \"{}\"\ndir = \"meta\"\n\
             [[storage]]\nid = 0\nlisten = \"{}\"\ndir = \"storage0\"\npool = \"256MiB\"\n",
            args.fabric,
            args.term_ms,
            args.term_ms / 5,
            args.term_ms / 5,
            address(17_330),
            address(17_331)
        );
        fs::write(dir.path().join("cluster.toml"), config)?;
        let mut roles = Self {
            dir,
            fsd: fsd_binary()?,
            running: Vec::new(),
        };
        let key = roles.dir.path().join("key").display().to_string();
        roles.run(&["keygen", &key])?;
        roles.run(&["format"])?;
        roles.role("meta", &["meta"])?;
        roles.role("storage", &["storage", "--id", "0"])?;
        for n in 0..2 {
            fs::create_dir(roles.point(n))?;
            roles.mount(n)?;
        }
        Ok(roles)
    }

    fn point(&self, n: usize) -> PathBuf {
        self.dir.path().join(format!("mnt{n}"))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.fsd);
        command
            .args(args)
            .env("FSD_CONFIG", self.dir.path().join("cluster.toml"))
            .env("RUST_LOG", "error")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> anyhow::Result<()> {
        let status = self.command(args).status()?;
        ensure!(status.success(), "fsd {}: {status}", args.join(" "));
        Ok(())
    }

    fn role(&mut self, name: &str, args: &[&str]) -> anyhow::Result<()> {
        let child = self.command(args).spawn()?;
        self.running.push((name.to_owned(), child));
        Ok(())
    }

    fn mount(&mut self, n: usize) -> anyhow::Result<()> {
        let point = self.point(n).display().to_string();
        self.role(&format!("mount{n}"), &["mount", "--cache", "direct", &point])?;
        let mounted = || fs::read_to_string("/proc/self/mounts").is_ok_and(|all| all.contains(&point));
        until("the mount", mounted).map(drop)
    }

    fn pid(&self, name: &str) -> anyhow::Result<Pid> {
        let found = self.running.iter().find(|(n, _)| n == name);
        let id = found.context("it runs")?.1.id();
        Pid::from_raw(i32::try_from(id)?).context("a process")
    }

    fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        let at = self
            .running
            .iter()
            .position(|(n, _)| n == name)
            .context("it runs")?;
        let (_, mut child) = self.running.remove(at);
        child.kill()?;
        child.wait()?;
        Ok(())
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) -> anyhow::Result<Duration> {
    let start = Instant::now();
    while !holds() {
        ensure!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(start.elapsed())
}

/// The mount gets the file exclusively, with data that it has not stored, and the directory.
fn hold(dir: &Path, round: usize) -> anyhow::Result<()> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(dir.join("file"))?;
    file.write_all_at(&vec![round as u8; LEN], 0)?;
    file.sync_all()?;
    file.write_all_at(&vec![0xee; LEN], LEN as u64)?;
    File::create(dir.join(format!("name{round}")))?;
    Ok(())
}

/// Another writes to the file, and makes a name.
fn use_it(dir: &Path, round: usize) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let file = OpenOptions::new().read(true).write(true).open(dir.join("file"))?;
    let mut first = [0];
    file.read_exact_at(&mut first, 0)?;
    ensure!(first[0] == round as u8, "what was fsynced is not there");
    file.write_all_at(b"mine", 0)?;
    file.sync_all()?;
    File::create(dir.join(format!("other{round}")))?;
    Ok(start.elapsed())
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Killed,
    Stopped,
    Evicted,
}

fn round(roles: &mut Roles, kind: Kind, round: usize) -> anyhow::Result<(Duration, Duration)> {
    let (dying, other) = (roles.point(0), roles.point(1));
    hold(&dying, round)?;
    match kind {
        Kind::Killed => {
            roles.kill("mount0")?;
            let waited = use_it(&other, round)?;
            rustix::mount::unmount(&dying, rustix::mount::UnmountFlags::DETACH)?;
            let start = Instant::now();
            roles.mount(0)?;
            Ok((waited, start.elapsed()))
        }
        Kind::Stopped | Kind::Evicted => {
            let pid = roles.pid("mount0")?;
            // The status asks the mounts, too, and waits for one that is stopped.
            let number = number_of(roles, &dying)?;
            kill_process(pid, Signal::STOP)?;
            let start = Instant::now();
            if matches!(kind, Kind::Evicted) {
                roles.run(&["evict", &number])?;
            }
            use_it(&other, round)?;
            let waited = start.elapsed();
            kill_process(pid, Signal::CONT)?;
            let served = until("the mount to serve again", || {
                fs::read(dying.join("file")).is_ok_and(|bytes| bytes.starts_with(b"mine"))
            })?;
            Ok((waited, served))
        }
    }
}

/// The number of the mount at a point.
fn number_of(roles: &Roles, point: &Path) -> anyhow::Result<String> {
    let config = roles.dir.path().join("cluster.toml");
    let status = crate::procs::status(&roles.fsd, &config).context("no status")?;
    let text = point.display().to_string();
    let nodes = status["meta"]["Ok"]["nodes"].as_array().context("mounts")?;
    let named = |node: &&serde_json::Value| node["name"].as_str().is_some_and(|name| name.ends_with(&text));
    let node = nodes.iter().find(named).context("the mount is not there")?;
    Ok(node["node"].as_u64().context("a number")?.to_string())
}

/// Runs `bench deaths`.
///
/// # Errors
/// Something is lost, or does not come back.
pub fn run(args: &Args, out: &Path) -> anyhow::Result<()> {
    let kinds = [Kind::Killed, Kind::Stopped, Kind::Evicted];
    let progress = Progress::new("deaths", (kinds.len() * args.rounds) as u64);
    let title = format!(
        "{} rounds, {}, term {} ms and margin {} ms: milliseconds until another mount has written and fsynced the file, and until the mount \
         serves again",
        args.rounds,
        args.fabric,
        args.term_ms,
        args.term_ms / 5
    );
    let header = [
        "mount",
        "others wait, median",
        "worst",
        "serves again, median",
        "worst",
    ];
    let mut table = Table::new(title, &header);
    for kind in kinds {
        let mut roles = Roles::start(args)?;
        let (mut waits, mut returns) = (Vec::new(), Vec::new());
        for n in 0..args.rounds {
            check()?;
            progress.step(format!("{kind:?} {}", n + 1));
            let (waited, served) =
                round(&mut roles, kind, n + 1).with_context(|| format!("{kind:?}, round {}", n + 1))?;
            waits.push(waited.as_secs_f64() * 1e3);
            returns.push(served.as_secs_f64() * 1e3);
            progress.tick();
        }
        let worst = |all: &[f64]| all.iter().copied().fold(0.0, f64::max);
        table.row(vec![
            format!("{kind:?}").to_lowercase(),
            sig(median(&waits)),
            sig(worst(&waits)),
            sig(median(&returns)),
            sig(worst(&returns)),
        ]);
    }
    drop(progress);
    println!("{table}");
    table.write_csv(&out.join("deaths.csv"))
}
