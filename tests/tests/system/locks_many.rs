//! File locks: many waiters, what ends them, and which locks meet.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::cluster::{Cache, Cluster, Options, Role};
use system_tests::guard;
use system_tests::sys::{self, errno};

fn check(job: fn(&Cluster, &Path, &Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let options = Options {
        cache: Cache::Direct,
        storage: 1,
        ..Options::default()
    };
    guard::with_cluster(options, move |cluster| {
        job(cluster, &cluster.mount(0), &cluster.mount(1))
    })
}

fn open(path: &Path) -> anyhow::Result<File> {
    Ok(sys::open(path, libc::O_RDWR | libc::O_CREAT)?)
}

#[test]
fn waiters_take_no_threads() -> anyhow::Result<()> {
    const WAITERS: usize = 300;
    check(|_, a, b| {
        let holder = open(&b.join("f"))?;
        sys::flock(&holder, libc::LOCK_EX)?;
        fs::write(b.join("other"), b"1")?;
        let (asked, served) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let (asked, served) = (&asked, &served);
        guard::together(WAITERS + 1, |n| {
            if n < WAITERS {
                let file = open(&a.join("f"))?;
                asked.fetch_add(1, Ordering::SeqCst);
                sys::flock(&file, libc::LOCK_EX)?;
                served.fetch_add(1, Ordering::SeqCst);
                return Ok(());
            }
            while asked.load(Ordering::SeqCst) < WAITERS {
                std::thread::sleep(Duration::from_millis(5));
            }
            // All of these wait for somebody: they need threads.
            for i in 0..20 {
                fs::create_dir(a.join(format!("d{i}")))?;
                fs::write(b.join("other"), format!("{i}"))?;
                ensure!(fs::read_to_string(a.join("other"))? == format!("{i}"), "other");
            }
            let early = served.load(Ordering::SeqCst);
            sys::flock(&holder, libc::LOCK_UN)?;
            ensure!(early == 0, "{early} served while it is held");
            Ok(())
        })?;
        ensure!(served.load(Ordering::SeqCst) == WAITERS, "served {served:?}");
        Ok(())
    })
}

#[test]
fn a_waiter_that_is_killed_ends() -> anyhow::Result<()> {
    check(|_, a, b| {
        let holder = open(&b.join("f"))?;
        sys::lock(&holder, libc::F_WRLCK, 0, 10, false)?;
        let code =
            "import fcntl,sys; f=open(sys.argv[1],'r+'); print(flush=True); fcntl.lockf(f,fcntl.LOCK_EX)";
        let mut waiter = Command::new("python3")
            .args(["-c", code])
            .arg(a.join("f"))
            .stdout(std::process::Stdio::piped())
            .spawn()?;
        std::io::Read::read(waiter.stdout.as_mut().context("pipe")?, &mut [0; 8])?;
        waiter.kill()?;
        waiter.wait()?;
        sys::lock(&holder, libc::F_UNLCK, 0, 10, false)?;
        // It has not got the lock after its end.
        let end = Instant::now() + Duration::from_secs(5);
        while let taken @ Err(_) = sys::lock(&holder, libc::F_WRLCK, 0, 10, false) {
            ensure!(Instant::now() < end, "{taken:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    })
}

#[test]
fn flock_and_fcntl_locks_do_not_meet() -> anyhow::Result<()> {
    check(|_, a, b| {
        let (one, other) = (open(&a.join("f"))?, open(&b.join("f"))?);
        sys::flock(&one, libc::LOCK_EX)?;
        sys::lock(&one, libc::F_WRLCK, 0, 0, false).context("fcntl beside the own flock")?;
        ensure!(
            errno(&sys::flock(&other, libc::LOCK_EX | libc::LOCK_NB)) == libc::EAGAIN,
            "flock"
        );
        ensure!(
            errno(&sys::lock(&other, libc::F_WRLCK, 0, 0, false)) == libc::EAGAIN,
            "fcntl"
        );
        sys::flock(&one, libc::LOCK_UN)?;
        sys::flock(&other, libc::LOCK_EX | libc::LOCK_NB).context("flock beside another's fcntl lock")?;
        sys::lock(&one, libc::F_UNLCK, 0, 0, false)?;
        sys::lock(&other, libc::F_WRLCK, 0, 0, false).context("fcntl beside the own flock")?;
        // Closing ends both kinds.
        drop(other);
        sys::flock(&one, libc::LOCK_EX)?;
        Ok(sys::lock(&one, libc::F_WRLCK, 0, 0, true)?)
    })
}

#[test]
fn locks_of_an_open_file_end_with_its_last_descriptor() -> anyhow::Result<()> {
    check(|_, a, b| {
        let one = open(&a.join("f"))?;
        sys::ofd_lock(&one, libc::F_WRLCK, 0, 10)?;
        let (copy, other) = (one.try_clone()?, open(&b.join("f"))?);
        // The process closes the file elsewhere, which ends locks of the process only.
        drop(File::open(a.join("f"))?);
        drop(one);
        ensure!(
            errno(&sys::ofd_lock(&other, libc::F_WRLCK, 0, 10)) == libc::EAGAIN,
            "a copy is open"
        );
        drop(copy);
        let end = Instant::now() + Duration::from_secs(5);
        while let taken @ Err(_) = sys::ofd_lock(&other, libc::F_WRLCK, 0, 10) {
            ensure!(Instant::now() < end, "{taken:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    })
}

#[test]
fn who_holds_a_lock_elsewhere_is_somebody() -> anyhow::Result<()> {
    check(|_, a, b| {
        let (one, other) = (open(&a.join("f"))?, open(&b.join("f"))?);
        sys::lock(&one, libc::F_WRLCK, 0, 10, false)?;
        let pid = sys::lock_holder(&other, 0, 10)?;
        ensure!(pid.is_some_and(|pid| pid > 0), "{pid:?}");
        Ok(())
    })
}

#[test]
fn many_locks_of_before_do_not_keep_a_mount_from_joining_again() -> anyhow::Result<()> {
    check(|cluster, a, b| {
        let (one, other) = (open(&a.join("f"))?, open(&b.join("f"))?);
        for i in 0..6000 {
            sys::lock(&one, libc::F_WRLCK, i * 2, 1, false)?;
            sys::lock(&one, libc::F_UNLCK, i * 2, 1, false)?;
        }
        sys::lock(&one, libc::F_WRLCK, 5, 3, false)?;
        cluster.kill_and_restart(Role::Meta)?;
        fs::create_dir(a.join("again"))?;
        ensure!(
            errno(&sys::lock(&other, libc::F_WRLCK, 6, 1, false)) == libc::EAGAIN,
            "what is held"
        );
        Ok(sys::lock(&other, libc::F_WRLCK, 8, 1, false)?)
    })
}
