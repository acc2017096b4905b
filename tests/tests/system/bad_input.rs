//! Bad input: names, offsets, full pools, configurations, keys, and whatever arrives at a socket.

use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rand::Rng;
use system_tests::cluster::{Cluster, Fabric, Options, Role};
use system_tests::guard;
use system_tests::process::fsd_binary;
use system_tests::sys::{self, errno};

#[test]
fn names_and_offsets() -> anyhow::Result<()> {
    guard::with_cluster(
        Options {
            storage: 1,
            ..Options::default()
        },
        |cluster| {
            let (a, b) = (cluster.mount(0), cluster.mount(1));
            let longest = "n".repeat(255);
            fs::write(a.join(&longest), b"x")?;
            ensure!(fs::read(b.join(&longest))? == b"x", "the longest name");
            for call in [
                errno(&File::create(a.join("n".repeat(256)))),
                errno(&b.join("n".repeat(256)).metadata()),
            ] {
                ensure!(call == libc::ENAMETOOLONG, "a name of 256 bytes: errno {call}");
            }
            ensure!(
                errno(&fs::create_dir(a.join("m".repeat(256)))) == libc::ENAMETOOLONG,
                "mkdir"
            );
            let odd = "\u{1}\"'\\ \t\n*?é";
            fs::write(a.join(odd), b"x")?;
            let listed = fs::read_dir(&b)?.any(|e| e.is_ok_and(|e| e.file_name() == odd));
            ensure!(listed, "a name of odd characters");
            let file = sys::open(&a.join("f"), libc::O_RDWR | libc::O_CREAT)?;
            let far = errno(&file.write_at(b"x", i64::MAX as u64 - 1));
            ensure!(
                far == libc::EFBIG || far == libc::EINVAL,
                "a write at the end of the number range: errno {far}"
            );
            let far = errno(&file.set_len(i64::MAX as u64));
            ensure!(
                far == libc::EFBIG || far == libc::EINVAL,
                "a truncate to the end: errno {far}"
            );
            let far = errno(&sys::fallocate(&file, 0, i64::MAX as u64 - 4096, 4096));
            ensure!(
                far == libc::EFBIG || far == libc::ENOSPC,
                "fallocate at the end: errno {far}"
            );
            ensure!(file.metadata()?.len() == 0, "size after refused calls");
            ensure!(
                sys::read_at(&file, i64::MAX as u64 - 10, 5)?.is_empty(),
                "a read far behind the end"
            );
            ensure!(
                errno(&sys::fallocate(&file, 0, 0, 0)) == libc::EINVAL,
                "fallocate of nothing"
            );
            Ok(())
        },
    )
}

#[test]
fn a_full_metadata_disk() -> anyhow::Result<()> {
    const RECOVERY: Duration = Duration::from_secs(20);
    let options = Options {
        storage: 1,
        meta_disk_mib: Some(32),
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        let (a, b) = (cluster.mount(0), cluster.mount(1));
        let name = |i: usize| format!("{}{i}", "n".repeat(200));
        let value = vec![7; 4000];
        let make = |i: usize| -> std::io::Result<()> {
            File::create(a.join(name(i)))?;
            sys::setxattr(&a.join(name(i)), "user.a", &value, 0)
        };
        let mut made = 0;
        let refused = loop {
            match make(made) {
                Ok(()) => made += 1,
                Err(error) => break error,
            }
            ensure!(made < 100_000, "a disk of 32 MiB holds {made} files");
        };
        ensure!(refused.raw_os_error() == Some(libc::ENOSPC), "{refused}");
        ensure!(made > 1000, "full after {made} files");
        // There is still room for what does not make it grow.
        fs::write(b.join(name(0)), b"written on a full disk")?;
        fs::rename(a.join(name(1)), a.join("renamed"))?;
        fs::remove_file(b.join(name(2)))?;
        File::open(b.join(name(0)))?.sync_all()?;
        // Until somebody else takes that as well: errors then, but nothing half done, and no restart needed.
        let hog = cluster.path("meta").join("hog");
        let took = File::create(&hog)?;
        let mut taken = 0;
        while sys::fallocate(&took, 0, taken, 64 << 10).is_ok() {
            taken += 64 << 10;
        }
        let mut at = "renamed".to_owned();
        let failed = (0..10_000).find_map(|i| {
            let to = format!("renamed{i}{}", "r".repeat(200));
            let error = fs::rename(a.join(&at), a.join(&to)).err();
            if error.is_none() {
                at = to;
            }
            error
        });
        let failed = failed.context("10,000 renames without any room")?;
        let number = failed.raw_os_error();
        ensure!(
            number == Some(libc::ENOSPC) || number == Some(libc::EIO),
            "a transaction without room: {failed}"
        );
        drop(took);
        fs::remove_file(&hog)?;
        let start = Instant::now();
        while let Err(error) = fs::rename(a.join(&at), a.join("renamed")) {
            ensure!(start.elapsed() < RECOVERY, "there is room again, but: {error}");
            std::thread::sleep(Duration::from_millis(100));
        }
        let all_there = || -> anyhow::Result<()> {
            ensure!(
                fs::read(a.join(name(0)))? == b"written on a full disk",
                "what was written on a full disk"
            );
            for side in [&a, &b] {
                // The last one may have got its name before its attribute was refused.
                let listed = fs::read_dir(side)?.count();
                ensure!(listed == made - 1 || listed == made, "{listed} names of {made}");
                ensure!(side.join("renamed").exists(), "the renamed file");
                ensure!(!side.join(name(2)).exists(), "the removed file");
                let attribute = sys::getxattr(&side.join(name(made - 1)), "user.a")?;
                ensure!(attribute == value, "an attribute made before the disk was full");
            }
            Ok(())
        };
        all_there()?;
        cluster.kill_and_restart(Role::Meta)?;
        all_there()
    })
}

#[test]
fn a_full_pool() -> anyhow::Result<()> {
    const PIECE: usize = 1 << 20;
    guard::with_cluster(
        Options {
            pool_mib: 16,
            ..Options::default()
        },
        |cluster| {
            let (a, b) = (cluster.mount(0), cluster.mount(1));
            let kept: Vec<u8> = (0..PIECE).map(|i| (i / 7) as u8).collect();
            let file = File::create(a.join("kept"))?;
            file.write_all_at(&kept, 0)?;
            file.sync_all()?;
            for round in 0..3 {
                let mut full = None;
                let mut written = Vec::new();
                for i in 0..200 {
                    let path = a.join(format!("fill{i}"));
                    let made = File::create(&path).and_then(|f| {
                        written.push(path.clone());
                        f.write_all_at(&vec![i as u8 + 1; PIECE], 0)?;
                        f.sync_all()
                    });
                    if let Err(error) = made {
                        full = Some((i, error));
                        break;
                    }
                }
                let (pieces, error) = full.context("200 MiB fit into 2 × 16 MiB")?;
                ensure!(
                    error.raw_os_error() == Some(libc::ENOSPC),
                    "round {round}: full, but the error is {error}"
                );
                ensure!(
                    pieces >= 10,
                    "round {round}: full after {pieces} MiB already: {:?}",
                    cluster.status()?["storage"]
                );
                ensure!(
                    fs::read(b.join("kept"))? == kept,
                    "earlier data after the pool was full"
                );
                for (i, path) in written.iter().enumerate().take(pieces) {
                    let got = fs::read(b.join(path.file_name().context("name")?))?;
                    ensure!(got == vec![i as u8 + 1; PIECE], "fill{i} is damaged");
                }
                for path in written {
                    fs::remove_file(path)?;
                }
                // Freed space comes back, if not at once.
                let start = Instant::now();
                while let Err(error) =
                    fs::write(b.join("again"), &kept).and_then(|()| File::open(b.join("again"))?.sync_all())
                {
                    ensure!(
                        start.elapsed() < Duration::from_secs(15),
                        "no space after deletion: {error}"
                    );
                    std::thread::sleep(Duration::from_millis(100));
                }
                fs::remove_file(b.join("again"))?;
                // The next round wants room for ten pieces.
                let start = Instant::now();
                while free(&a)? < 12 * PIECE as u64 {
                    ensure!(
                        start.elapsed() < Duration::from_secs(15),
                        "{} bytes are free after all is removed",
                        free(&a)?
                    );
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            Ok(())
        },
    )
}

fn free(at: &Path) -> anyhow::Result<u64> {
    let fs = rustix::fs::statvfs(at)?;
    Ok(fs.f_bavail * fs.f_frsize)
}

/// Runs `fsd` that must refuse; what it says.
fn refused(args: &[&str], config: &Path) -> anyhow::Result<String> {
    let out = Command::new("timeout")
        .args(["-s", "KILL", "20"])
        .arg(fsd_binary()?)
        .args(args)
        .arg("--config")
        .arg(config)
        .output()?;
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(
        out.status.code() == Some(1),
        "fsd {args:?}: {} instead of 1: {text}",
        out.status
    );
    ensure!(!text.contains("panicked"), "fsd {args:?}: {text}");
    Ok(text)
}

fn tells(text: &str, words: &[&str]) -> anyhow::Result<()> {
    let missing: Vec<_> = words
        .iter()
        .filter(|w| !text.to_lowercase().contains(*w))
        .collect();
    ensure!(missing.is_empty(), "the message lacks {missing:?}: {text}");
    Ok(())
}

#[test]
fn configurations() -> anyhow::Result<()> {
    guard::with(Cluster::formatted(Options::default())?, |cluster| {
        let good = fs::read_to_string(cluster.config())?;
        let bad = cluster.path("bad.toml");
        let attempt = |text: String, words: &[&str]| -> anyhow::Result<()> {
            fs::write(&bad, text)?;
            tells(&refused(&["meta"], &bad)?, words)
        };
        attempt(format!("colour = 1\n{good}"), &["colour", "bad.toml"])?;
        attempt(good.replace("id = 1", "id = 0"), &["id 0"])?;
        attempt(good.replace("fabric = \"shm\"", "fabric = \"wire\""), &["wire"])?;
        attempt(good.replace("128MiB", "12 elephants"), &["12 elephants"])?;
        attempt(good.replace("128MiB", "1MiB"), &["too small"])?;
        attempt(
            good.replace("key_file = \"cluster.key\"", "key_file = \"none\""),
            &["none"],
        )?;
        attempt("what is this".into(), &["bad.toml"])?;
        tells(
            &refused(&["meta"], &cluster.path("absent.toml"))?,
            &["absent.toml"],
        )?;
        tells(&refused(&["storage", "--id", "7"], &cluster.config())?, &["7"])?;
        // A second format would destroy data.
        tells(
            &refused(&["format"], &cluster.config())?,
            &["meta", "is formatted already"],
        )?;
        fs::set_permissions(cluster.path("cluster.key"), Permissions::from_mode(0o644))?;
        tells(&refused(&["meta"], &cluster.config())?, &["cluster.key", "chmod"])?;
        fs::set_permissions(cluster.path("cluster.key"), Permissions::from_mode(0o600))?;
        cluster.start_all()
    })
}

#[test]
fn strangers_are_refused() -> anyhow::Result<()> {
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        guard::with_cluster(
            Options {
                fabric,
                mounts: 1,
                ..Options::default()
            },
            |cluster| {
                let good = fs::read_to_string(cluster.config())?;
                let point = cluster.path("stranger");
                fs::create_dir(&point)?;
                let mount = ["mount", &*point.to_string_lossy()];
                cluster.tool(&["keygen", &cluster.path("other.key").to_string_lossy()])?;
                let other = cluster.path("other.toml");
                fs::write(&other, good.replace("cluster.key", "other.key"))?;
                refused(&mount, &other).context("wrong key")?;
                fs::write(&other, good.replace("cluster = \"test\"", "cluster = \"prod\""))?;
                refused(&mount, &other).context("wrong cluster name")?;
                works(cluster)
            },
        )?;
    }
    Ok(())
}

#[test]
fn mount_points() -> anyhow::Result<()> {
    guard::with_cluster(
        Options {
            mounts: 2,
            ..Options::default()
        },
        |cluster| {
            let mount = |point: &Path| refused(&["mount", &*point.to_string_lossy()], &cluster.config());
            let full = cluster.path("full");
            fs::create_dir(&full)?;
            fs::write(full.join("f"), b"x")?;
            tells(&mount(&full)?, &["full", "empty"])?;
            mount(&cluster.path("absent")).context("absent")?;
            mount(&full.join("f")).context("a file")?;
            mount(&cluster.mount(0)).context("mounted already")?;
            // What a killed mount leaves is told of; with it taken away the mount works again.
            let pid = cluster.pid(Role::Mount(1)).context("pid")?;
            let pid = rustix::process::Pid::from_raw(pid as i32).context("pid")?;
            rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
            let works = || -> std::io::Result<bool> {
                let stat = Command::new("timeout")
                    .args(["5", "stat"])
                    .arg(cluster.mount(1))
                    .output()?;
                Ok(stat.status.success())
            };
            let start = Instant::now();
            while works()? {
                ensure!(
                    start.elapsed() < Duration::from_secs(10),
                    "the mount point of a killed mount still works"
                );
            }
            cluster.kill(Role::Mount(1));
            cluster.start_role(Role::Mount(1))?;
            // The status goes on telling of the mount that died.
            serves(cluster)
        },
    )
}

#[test]
fn addresses_that_are_taken() -> anyhow::Result<()> {
    guard::with_cluster(
        Options {
            fabric: Fabric::Tcp,
            ..Options::default()
        },
        |cluster| {
            let text = refused(&["meta"], &cluster.config())?;
            ensure!(!text.is_empty(), "no message");
            refused(&["storage", "--id", "0"], &cluster.config())?;
            works(cluster)
        },
    )
}

/// The cluster serves all mounts, and says that it is healthy.
fn works(cluster: &Cluster) -> anyhow::Result<()> {
    serves(cluster)?;
    let status = cluster.status()?;
    ensure!(status["healthy"] == true, "not healthy: {status}");
    Ok(())
}

fn serves(cluster: &Cluster) -> anyhow::Result<()> {
    let name = format!("works-{:08x}", rand::random::<u32>());
    fs::write(cluster.mount(0).join(&name), &name)?;
    for i in 0..cluster.options().mounts {
        ensure!(
            fs::read_to_string(cluster.mount(i).join(&name))? == name,
            "mount {i}"
        );
    }
    Ok(())
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

fn connect(address: &str) -> anyhow::Result<Box<dyn Stream>> {
    let limit = Some(Duration::from_secs(2));
    Ok(if address.starts_with('/') {
        let kind = rustix::net::SocketType::SEQPACKET;
        let socket = rustix::net::socket(rustix::net::AddressFamily::UNIX, kind, None)?;
        rustix::net::connect(&socket, &rustix::net::SocketAddrUnix::new(address)?)?;
        // Only for its reads and writes: each is a packet.
        let stream = UnixStream::from(socket);
        stream.set_read_timeout(limit)?;
        stream.set_write_timeout(limit)?;
        Box::new(stream)
    } else {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(limit)?;
        stream.set_write_timeout(limit)?;
        Box::new(stream)
    })
}

fn garbage(fabric: Fabric) -> anyhow::Result<()> {
    guard::with_cluster(
        Options {
            fabric,
            ..Options::default()
        },
        |cluster| {
            let mut addresses = vec![
                cluster.address(Role::Meta)?,
                cluster.address(Role::Storage(0))?,
                cluster.address(Role::Storage(1))?,
            ];
            let status = cluster.status()?;
            let nodes = status["meta"]["Ok"]["nodes"]
                .as_array()
                .context("nodes in the status")?;
            addresses.extend(
                nodes
                    .iter()
                    .filter_map(|n| n["listen"].as_str())
                    .map(str::to_owned),
            );
            ensure!(addresses.len() == 5, "addresses {addresses:?}");
            let mut rng = rand::rng();
            let mut held = Vec::new();
            for address in &addresses {
                for round in 0..12 {
                    let mut stream = connect(address).with_context(|| format!("connect to {address}"))?;
                    let len = [0, 1, 3, 8, 64, 1000, 70_000][round % 7];
                    let mut data = vec![0u8; len];
                    if round % 3 < 2 {
                        rng.fill(&mut data[..]);
                    }
                    // What claims to be huge, and is half of something.
                    if round % 3 == 1 && len >= 8 {
                        data[..8].fill(0xff);
                    }
                    // It may be cut off while we send.
                    let _ = stream.write_all(&data);
                    match round % 4 {
                        // Silent and never closed by us.
                        0 => held.push(stream),
                        1 => drop(stream.read(&mut [0; 64])),
                        _ => {}
                    }
                }
                works(cluster).with_context(|| format!("after garbage at {address}"))?;
            }
            for role in cluster.roles() {
                let pid = cluster.pid(role).context("running")?;
                ensure!(
                    Path::new(&format!("/proc/{pid}/exe")).exists(),
                    "{role:?} has ended"
                );
            }
            drop(held);
            works(cluster)
        },
    )
}

#[test]
fn garbage_at_every_socket_shm() -> anyhow::Result<()> {
    garbage(Fabric::Shm)
}

#[test]
fn garbage_at_every_socket_tcp() -> anyhow::Result<()> {
    garbage(Fabric::Tcp)
}
