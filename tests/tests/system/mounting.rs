//! Mounting and unmounting: nobody ends what is another's, and what is mounted says what it is.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use system_tests::cluster::{Cluster, Fabric, Options, Role, detach, nodes};
use system_tests::guard;
use system_tests::process::fsd_binary;

const PATIENCE: Duration = Duration::from_secs(20);

fn options() -> Options {
    Options {
        mounts: 1,
        storage: 1,
        ..Options::default()
    }
}

/// The line of /proc/self/mounts for a point.
fn line_of(point: &Path) -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let text = point.to_string_lossy();
    let mut lines = mounts.lines().rev();
    lines
        .find(|l| l.split(' ').nth(1) == Some(&*text))
        .map(str::to_owned)
}

fn until(what: &str, done: impl Fn() -> bool) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    while !done() {
        if Instant::now() > end {
            bail!("not within {PATIENCE:?}: {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A daemon at a point that is no role of the cluster; killed at the end, whatever happens.
struct Extra {
    child: Child,
    point: PathBuf,
}

impl Extra {
    fn start(cluster: &Cluster, point: &Path, args: &[&str]) -> anyhow::Result<Self> {
        let child = Command::new(fsd_binary()?)
            .arg("mount")
            .args(["--config", &cluster.config().to_string_lossy()])
            .args(args)
            .arg(point)
            .stderr(File::create(cluster.path("extra.log"))?)
            .spawn()?;
        let extra = Self {
            child,
            point: point.to_owned(),
        };
        until("the mount is there", || line_of(point).is_some())?;
        // And answers.
        fs::metadata(point.join("none"))
            .err()
            .context("a file that was not made")?;
        Ok(extra)
    }

    fn signal(&self, name: &str) -> anyhow::Result<()> {
        let sent = Command::new("kill")
            .args([name, &self.child.id().to_string()])
            .status()?;
        ensure!(sent.success(), "kill {name}");
        Ok(())
    }

    fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    fn wait(&mut self) -> anyhow::Result<()> {
        let end = Instant::now() + PATIENCE;
        while !self.has_ended() {
            ensure!(Instant::now() < end, "the daemon has not ended");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Extra {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        detach(&self.point);
    }
}

#[test]
fn a_daemon_unmounts_only_its_own() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let point = cluster.path("extra");
        fs::create_dir(&point)?;
        // Unmounted by somebody, and mounted again at once: the old one hears of its end when the new one is there.
        let mut old = Extra::start(cluster, &point, &[])?;
        for round in 0..4 {
            ensure!(Command::new("umount").arg(&point).status()?.success(), "umount");
            let new = Extra::start(cluster, &point, &[])?;
            old.wait()?;
            fs::write(point.join("f"), format!("{round}"))
                .with_context(|| format!("round {round}: the new mount has gone with the old daemon"))?;
            std::mem::forget(std::mem::replace(&mut old, new));
        }
        // Ended while a file is open: it goes when that is closed, and leaves alone what was mounted meanwhile.
        let open = File::open(point.join("f"))?;
        old.signal("-TERM")?;
        until("unmounted", || line_of(&point).is_none())?;
        let mut new = Extra::start(cluster, &point, &[])?;
        drop(open);
        old.wait()?;
        ensure!(fs::read_to_string(point.join("f"))? == "3", "the new mount");
        ensure!(!new.has_ended(), "the new daemon");
        std::mem::forget(old);
        new.signal("-TERM")?;
        new.wait()?;
        ensure!(line_of(&point).is_none(), "still mounted");
        Ok(())
    })
}

#[test]
fn what_is_mounted_says_what_it_is() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let words = |point: &Path| -> anyhow::Result<(String, Vec<String>)> {
            let line = line_of(point).context("not mounted")?;
            let words: Vec<&str> = line.split(' ').collect();
            let flags = words
                .get(3)
                .context("options")?
                .split(',')
                .map(str::to_owned)
                .collect();
            Ok(((*words.get(2).context("type")?).to_owned(), flags))
        };
        let (kind, flags) = words(&cluster.mount(0))?;
        ensure!(kind == "fuse.distfuse", "type {kind}");
        for flag in ["rw", "nosuid", "nodev"] {
            ensure!(flags.iter().any(|f| f == flag), "{flag} is not among {flags:?}");
        }
        let point = cluster.path("extra");
        fs::create_dir(&point)?;
        let extra = Extra::start(cluster, &point, &["-o", "suid,dev", "-o", "ro,noexec"])?;
        let (kind, flags) = words(&point)?;
        ensure!(kind == "fuse.distfuse", "type {kind}");
        for (flag, set) in [
            ("ro", true),
            ("noexec", true),
            ("nosuid", false),
            ("nodev", false),
        ] {
            ensure!(flags.iter().any(|f| f == flag) == set, "{flag}: {flags:?}");
        }
        let refused = system_tests::sys::errno(&fs::write(point.join("f"), "f"));
        ensure!(
            refused == libc::EROFS,
            "a write to a mount that only reads: {refused}"
        );
        drop(extra);
        let told = Command::new(fsd_binary()?)
            .args(["mount", "-o", "nonsense", "--config"])
            .arg(cluster.config())
            .arg(&point)
            .output()?;
        let text = String::from_utf8_lossy(&told.stderr).into_owned();
        ensure!(!told.status.success() && text.contains("nonsense"), "{text}");
        Ok(())
    })
}

/// As on other file systems: the first read after a change counts, the next ones do not; and without the option none does.
#[test]
fn access_times_are_kept_where_the_options_say_so() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let point = cluster.path("relatime");
        fs::create_dir(&point)?;
        let _extra = Extra::start(cluster, &point, &["-o", "relatime"])?;
        let (plain, kept) = (cluster.mount(0), &point);
        let times = |path: PathBuf| -> anyhow::Result<(i64, i64, i64)> {
            let about = fs::metadata(path)?;
            let at = |s: i64, n: i64| s * 1_000_000_000 + n;
            Ok((
                at(about.atime(), about.atime_nsec()),
                at(about.mtime(), about.mtime_nsec()),
                at(about.ctime(), about.ctime_nsec()),
            ))
        };
        fs::create_dir(plain.join("d"))?;
        fs::write(plain.join("d/f"), "data")?;
        let before = times(plain.join("d/f"))?;
        fs::read(plain.join("d/f"))?;
        ensure!(times(plain.join("d/f"))? == before, "without the option");
        fs::read(kept.join("d/f"))?;
        let read = times(kept.join("d/f"))?;
        ensure!(
            read.0 > before.0 && (read.1, read.2) == (before.1, before.2),
            "{before:?} {read:?}"
        );
        ensure!(times(plain.join("d/f"))? == read, "on the other mount");
        fs::read(kept.join("d/f"))?;
        ensure!(times(kept.join("d/f"))? == read, "read again");
        fs::write(plain.join("d/f"), "other")?;
        fs::read(kept.join("d/f"))?;
        ensure!(times(kept.join("d/f"))?.0 > read.0, "after a change");
        let before = times(kept.join("d"))?;
        ensure!(fs::read_dir(kept.join("d"))?.count() == 1);
        until("the time of the listing", || {
            times(kept.join("d")).is_ok_and(|t| t.0 > before.0)
        })
    })
}

/// Two ports that were free just now, one after the other.
fn two_ports() -> anyhow::Result<u16> {
    let free = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
    let mut ports = (23_100..23_900)
        .step_by(2)
        .skip(usize::from(std::process::id() as u8));
    let found = ports.find(|&port| free(port) && free(port + 1));
    found.context("no two ports are free")
}

#[test]
fn mounts_listen_where_firewalls_allow_it() -> anyhow::Result<()> {
    let options = Options {
        mounts: 3,
        storage: 1,
        fabric: Fabric::Tcp,
        ..Options::default()
    };
    guard::with(Cluster::formatted(options)?, |cluster| {
        let low = two_ports()?;
        let text = fs::read_to_string(cluster.config())?;
        let ports = format!("[mount]\nports = \"{low}-{}\"\n", low + 1);
        fs::write(cluster.config(), text.replace("[mount]\n", &ports))?;
        for role in [Role::Storage(0), Role::Meta, Role::Mount(0), Role::Mount(1)] {
            cluster.start_role(role)?;
        }
        let listen: Vec<String> = nodes(&cluster.status()?)?
            .iter()
            .map(|n| n["listen"].as_str().unwrap_or_default().to_owned())
            .collect();
        ensure!(
            listen == [low, low + 1].map(|p| format!("127.0.0.1:{p}")),
            "{listen:?}"
        );
        fs::write(cluster.mount(0).join("f"), b"x")?;
        ensure!(fs::read(cluster.mount(1).join("f"))? == b"x");
        let told = cluster
            .start_role(Role::Mount(2))
            .err()
            .context("no port was left")?;
        let told = format!("{told:#}");
        ensure!(
            told.contains("all ports") && told.contains(&format!("{low}-{}", low + 1)),
            "{told}"
        );
        // One that ends makes room.
        cluster.end(Role::Mount(0))?;
        cluster.start_role(Role::Mount(2))?;
        fs::write(
            cluster.config(),
            text.replace("[mount]\n", "[mount]\nports = \"9-8\"\n"),
        )?;
        let told = cluster
            .start_role(Role::Mount(0))
            .err()
            .context("a bad range was taken")?;
        ensure!(format!("{told:#}").contains("'9-8' names no ports"), "{told:#}");
        fs::write(cluster.config(), text)?;
        Ok(())
    })
}
