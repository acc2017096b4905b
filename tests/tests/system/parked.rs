//! A write that is begun on the thread that reads requests, and has to go on elsewhere, has changed nothing by then.

use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};

use anyhow::ensure;
use system_tests::cluster::{Fabric, Options};
use system_tests::{guard, sys};

const PAGE: usize = 4096;
/// A write of so much replaces what the mount has cached, and goes past its cache.
const LARGE: usize = 64 << 10;
const ROUNDS: u64 = 4000;
/// Tasks that have the mount wait for storage nodes, so that the threads that read requests must not.
const BUSY: usize = 5;

/// What was acknowledged is seen by another mount while a large write is about to replace it.
#[test]
fn what_a_large_write_replaces_is_there_until_then() -> anyhow::Result<()> {
    let options = Options {
        fabric: Fabric::Tcp,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        let open = |mount: usize, name: &str| {
            sys::open(&cluster.mount(mount).join(name), libc::O_RDWR | libc::O_CREAT)
        };
        let writer = open(0, "f")?;
        writer.write_all_at(&[0; LARGE], 0)?;
        let reader = open(1, "f")?;
        let (acked, over) = (AtomicU64::new(0), AtomicBool::new(false));
        let (acked, over) = (&acked, &over);
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for n in 0..BUSY {
                let busy = open(0, &format!("busy{n}"))?;
                threads.push(scope.spawn(move || -> anyhow::Result<()> {
                    while !over.load(SeqCst) {
                        busy.write_all_at(&[1; 100], 0)?;
                        busy.sync_all()?;
                    }
                    Ok(())
                }));
            }
            threads.push(scope.spawn(move || -> anyhow::Result<()> {
                while !over.load(SeqCst) {
                    let due = acked.load(SeqCst);
                    let mut bytes = [0; 8];
                    reader.read_exact_at(&mut bytes, 0)?;
                    let seen = u64::from_le_bytes(bytes);
                    ensure!(
                        seen >= due,
                        "{due} was acknowledged, and {seen} is read after that"
                    );
                }
                Ok(())
            }));
            let written = (1..=ROUNDS).try_for_each(|n| {
                for (number, len) in [(2 * n, PAGE), (2 * n + 1, LARGE)] {
                    writer.write_all_at(&number.to_le_bytes().repeat(len / 8), 0)?;
                    acked.store(number, SeqCst);
                }
                ensure!(!threads.iter().any(|t| t.is_finished()), "a task has ended");
                Ok(())
            });
            over.store(true, SeqCst);
            for thread in threads {
                thread.join().map_err(|_| anyhow::anyhow!("panic"))??;
            }
            written
        })
    })
}
