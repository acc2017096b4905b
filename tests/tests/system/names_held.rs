//! What a name was a moment ago can be used, whoever takes the name away: programs never see ESTALE.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use system_tests::cluster::{Cache, Fabric, Options, Role};
use system_tests::guard;
use system_tests::sys::{self, errno};

fn check(fabric: Fabric, job: fn(&Path, &Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    for cache in [Cache::Writethrough, Cache::Direct] {
        let options = Options {
            fabric,
            cache,
            storage: 1,
            ..Options::default()
        };
        guard::with_cluster(options, move |cluster| {
            job(&cluster.mount(0), &cluster.mount(1)).with_context(|| format!("{cache:?}"))
        })?;
    }
    Ok(())
}

/// A call by name.
type Call = fn(&Path) -> std::io::Result<()>;

const CALLS: [(&str, Call); 8] = [
    ("open and read", |p| {
        let file = File::open(p)?;
        let (mut data, len) = ([0; 4], file.metadata()?.len());
        ensure_io(len == 4 && file.read_at(&mut data, 0)? == 4)
    }),
    ("append", |p| {
        sys::open(p, libc::O_WRONLY | libc::O_APPEND).map(drop)
    }),
    ("chmod", |p| fs::set_permissions(p, Permissions::from_mode(0o640))),
    ("chown", |p| chown(p, Some(0), Some(0))),
    ("utimes", |p| sys::utimens(p, (1, 0), (1, 0))),
    ("setxattr", |p| sys::setxattr(p, "user.a", b"1", 0)),
    ("getxattr", |p| sys::listxattr(p).map(drop)),
    ("truncate", |p| sys::truncate(p, 4)),
];

fn ensure_io(right: bool) -> std::io::Result<()> {
    if right {
        Ok(())
    } else {
        Err(std::io::Error::other("not the whole of a version"))
    }
}

/// One replaces a file by rename all the time; the name is always there for everybody else, on both mounts.
fn replaced(a: &Path, b: &Path) -> anyhow::Result<()> {
    let (name, next) = (a.join("f"), a.join("f.next"));
    let done = AtomicBool::new(false);
    fs::write(&name, b"0000")?;
    let done = &done;
    guard::together(CALLS.len() + 2, |n| {
        if n == 0 {
            let result = (0..400).try_for_each(|i| {
                fs::write(&next, format!("{i:04}"))?;
                fs::rename(&next, &name)
            });
            done.store(true, Ordering::SeqCst);
            return Ok(result?);
        }
        let (side, (what, call)) = match n {
            1 => (a, CALLS[0]),
            n => (b, CALLS[n - 2]),
        };
        let mut times = 0;
        while !done.load(Ordering::SeqCst) {
            times += 1;
            call(&side.join("f")).with_context(|| format!("{what}, time {times}"))?;
        }
        Ok(())
    })?;
    // What was kept for that goes by itself.
    fs::remove_file(&name)?;
    Ok(())
}

#[test]
fn a_name_that_is_replaced_is_always_there() -> anyhow::Result<()> {
    check(Fabric::Shm, replaced)
}

#[test]
fn a_name_that_is_replaced_is_always_there_over_tcp() -> anyhow::Result<()> {
    check(Fabric::Tcp, replaced)
}

#[test]
fn what_was_kept_for_a_while_goes_by_itself() -> anyhow::Result<()> {
    guard::with_cluster(Options::default(), |cluster| {
        replaced(&cluster.mount(0), &cluster.mount(1))?;
        let end = Instant::now() + Duration::from_secs(20);
        let left = || Ok::<_, anyhow::Error>(cluster.status()?["meta"]["Ok"]["orphans"].as_u64());
        while left()? != Some(0) {
            ensure!(Instant::now() < end, "orphans left: {:?}", left()?);
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    })
}

fn remove_tree(path: &Path) -> anyhow::Result<()> {
    let gone = |e: &std::io::Error| e.raw_os_error() == Some(libc::ENOENT);
    let entries = match fs::read_dir(path) {
        Err(e) if gone(&e) => return Ok(()),
        entries => entries.context("opendir")?,
    };
    for entry in entries {
        let entry = match entry {
            Err(e) if gone(&e) => continue,
            entry => entry.context("readdir")?,
        };
        let removed = if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
            fs::remove_dir(entry.path())
        } else {
            fs::remove_file(entry.path())
        };
        match removed {
            Err(e) if !gone(&e) => bail!("{}: {e}", entry.path().display()),
            _ => {}
        }
    }
    Ok(())
}

#[test]
fn two_mounts_remove_one_tree() -> anyhow::Result<()> {
    check(Fabric::Tcp, |a, b| {
        for round in 0..4 {
            let top = format!("tree{round}");
            for i in 0..6 {
                for k in 0..8 {
                    let dir = a.join(format!("{top}/d{i}/e{k}"));
                    fs::create_dir_all(&dir)?;
                    fs::write(dir.join("f"), b"1")?;
                }
            }
            guard::together(2, |n| remove_tree(&[a, b][n].join(&top)))?;
        }
        Ok(())
    })
}

#[test]
fn in_a_directory_that_is_gone_nothing_is_found() -> anyhow::Result<()> {
    check(Fabric::Shm, |a, b| {
        fs::create_dir(a.join("d"))?;
        let inside = std::process::Command::new("sh")
            .current_dir(b.join("d"))
            .args(["-c", "read x; mkdir y 2>&1; cat z 2>&1; for i in $(seq 100); do env -u PWD python3 -c 'import os; os.getcwd()' 2>/dev/null || exit 0; done; echo cwd"])
            .env("LC_ALL", "C")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()?;
        let handle = File::open(b.join("d"))?;
        fs::remove_dir(a.join("d"))?;
        fs::create_dir(a.join("d"))?;
        let made = rustix::fs::mkdirat(&handle, "x", rustix::fs::Mode::RWXU);
        ensure!(made == Err(rustix::io::Errno::NOENT), "mkdirat: {made:?}");
        let out = inside.wait_with_output()?;
        let told = String::from_utf8_lossy(&out.stdout).into_owned();
        let right = told.lines().all(|l| l.ends_with("No such file or directory"));
        ensure!(right && told.lines().count() == 2, "{told}");
        ensure!(errno(&fs::metadata(b.join("d/x"))) == libc::ENOENT, "stat");
        Ok(fs::remove_dir(b.join("d"))?)
    })
}

#[test]
fn a_link_that_is_replaced_leads_somewhere() -> anyhow::Result<()> {
    check(Fabric::Shm, |a, b| {
        let done = AtomicBool::new(false);
        symlink("t0", a.join("l"))?;
        let done = &done;
        guard::together(3, |n| {
            if n == 0 {
                let result = (0..300).try_for_each(|i| {
                    symlink(format!("t{i}"), a.join("l.next"))?;
                    fs::rename(a.join("l.next"), a.join("l"))
                });
                done.store(true, Ordering::SeqCst);
                return Ok(result?);
            }
            while !done.load(Ordering::SeqCst) {
                fs::read_link([a, b][n - 1].join("l")).context("readlink")?;
            }
            Ok(())
        })
        .map(drop)
    })
}

/// The kernel sends changes of one directory one after the other; when nobody can have its lease, they nevertheless end together.
#[test]
fn who_waits_for_a_directory_in_vain_waits_beside_the_others() -> anyhow::Result<()> {
    const WAIT: Duration = Duration::from_secs(3);
    let options = Options {
        storage: 1,
        lease_wait: WAIT,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        fs::create_dir(cluster.mount(0).join("d"))?;
        fs::write(cluster.mount(1).join("d/f"), b"")?;
        let stopped = cluster.stopped(Role::Mount(1))?;
        let began = Instant::now();
        let ended = guard::together(5, |n| {
            let made = fs::create_dir(cluster.mount(0).join(format!("d/{n}")));
            Ok((errno(&made), began.elapsed()))
        });
        drop(stopped);
        let ended = ended?;
        ensure!(
            ended
                .iter()
                .all(|(e, after)| *e == libc::ETIMEDOUT && *after < 2 * WAIT),
            "{ended:?}"
        );
        Ok(fs::create_dir(cluster.mount(0).join("d/more"))?)
    })
}
