//! Answers that the kernel takes in late: whoever waits for them gets little of the processor, while another mount changes what they are about.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use system_tests::cluster::{Cache, Cluster, Fabric, Options};
use system_tests::{guard, sys};

const LIMIT: Duration = Duration::from_secs(120);
const FILES: usize = 60;

fn path(cluster: &Cluster, mount: usize, n: usize) -> std::path::PathBuf {
    cluster.mount(mount).join(format!("f{n}"))
}

/// Does a thread of this process wait for something else than a processor?
fn is_waiting(thread: i32) -> anyhow::Result<bool> {
    let stat = fs::read_to_string(format!("/proc/self/task/{thread}/stat"))?;
    let state = stat
        .rsplit(')')
        .next()
        .and_then(|rest| rest.trim().chars().next());
    Ok(state.context("no state")? != 'R')
}

/// Looks at files for the first time on mount 0, on a processor that is busy with something else, while their modes are changed on mount 1.
fn raced(cluster: &Cluster) -> anyhow::Result<()> {
    for n in 0..FILES {
        fs::write(path(cluster, 1, n), b"x")?;
        fs::set_permissions(path(cluster, 1, n), Permissions::from_mode(0o600))?;
    }
    let over = AtomicBool::new(false);
    let (go, asked) = mpsc::channel::<usize>();
    let (tell, told) = mpsc::channel();
    let (name, named) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            let _ = sys::stay_on(0);
            while !over.load(SeqCst) {
                std::hint::spin_loop();
            }
        });
        scope.spawn(move || {
            let alone = sys::stay_on(0).and_then(|()| sys::be_last());
            let _ = name.send(rustix::thread::gettid().as_raw_nonzero().get());
            for n in asked {
                let seen = alone
                    .as_ref()
                    .map_err(|error| anyhow!("{error}"))
                    .and_then(|()| Ok(sys::open(&path(cluster, 0, n), libc::O_PATH)?));
                let _ = tell.send(seen);
            }
        });
        let number = named.recv();
        let changed = (0..FILES).try_for_each(|n| {
            let number = number?;
            go.send(n)?;
            // It waits for an answer, and then for the processor.
            for waits in [true, false, true, false].iter().take(2 + n % 2 * 2) {
                let end = Instant::now() + Duration::from_millis(20);
                while is_waiting(number)? != *waits && Instant::now() < end {}
            }
            let mode = 0o644;
            let set = fs::set_permissions(path(cluster, 1, n), Permissions::from_mode(mode));
            let seen = told.recv_timeout(LIMIT / 4)??;
            set?;
            // By its path it would be looked up once more.
            let found = seen.metadata()?.mode() & 0o777;
            ensure!(found == mode, "file {n} has mode {found:o} instead of {mode:o}");
            Ok(())
        });
        over.store(true, SeqCst);
        drop(go);
        changed
    })
}

#[test]
fn who_looks_a_file_up_late_is_shown_nothing_old() -> anyhow::Result<()> {
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        let options = Options {
            fabric,
            cache: Cache::Writethrough,
            ..Options::default()
        };
        guard::with_cluster_within(LIMIT, options, raced)?;
    }
    Ok(())
}
