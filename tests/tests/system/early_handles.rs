//! Handles through the page cache that were opened before another mount opened the file: what they have written is seen.

use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};

use std::time::{Duration, Instant};

use anyhow::ensure;
use system_tests::cluster::{Cache, Fabric, Options};
use system_tests::{guard, sys};

const PAGE: usize = 4096;
const PAGES: usize = 16;
const READERS: usize = 3;
/// Longest time to wait for reads, which come slowly where writes keep the pages locked.
const LIMIT: Duration = Duration::from_secs(20);
const WRITES: u64 = 2000;

/// One task counts up, others read that through the same page cache, and another mount takes the file from them all the time.
fn counted(fabric: Fabric) -> anyhow::Result<()> {
    let options = Options {
        fabric,
        cache: Cache::Writethrough,
        ..Options::default()
    };
    guard::with_cluster(options, move |cluster| {
        let open = |mount: usize, flags| sys::open(&cluster.mount(mount).join("f"), flags);
        // Nobody else has it: through the page cache.
        let writer = open(0, libc::O_RDWR | libc::O_CREAT)?;
        writer.write_all_at(&[0; PAGES * PAGE], 0)?;
        let reader = open(0, libc::O_RDONLY)?;
        let other = open(1, libc::O_RDWR)?;
        let (acked, over) = (AtomicU64::new(0), AtomicBool::new(false));
        let reads = AtomicU64::new(0);
        let read = || -> anyhow::Result<()> {
            let mut page = 0;
            while !over.load(SeqCst) {
                let due = acked.load(SeqCst);
                let mut bytes = [0; 8];
                reader.read_exact_at(&mut bytes, (page % PAGES * PAGE) as u64)?;
                let seen = u64::from_le_bytes(bytes);
                ensure!(
                    seen >= due,
                    "{due} was acknowledged, and {seen} is read after that"
                );
                reads.fetch_add(1, SeqCst);
                page += 1;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let taking = scope.spawn(|| -> anyhow::Result<()> {
                while !over.load(SeqCst) {
                    other.write_all_at(&[7; PAGE], (PAGES * PAGE) as u64)?;
                }
                Ok(())
            });
            let reading: Vec<_> = (0..READERS).map(|_| scope.spawn(read)).collect();
            let start = Instant::now();
            let enough = |n: &u64| *n <= WRITES || reads.load(SeqCst) < WRITES && start.elapsed() < LIMIT;
            let written = (1..).take_while(enough).try_for_each(|n| {
                // Whole pages: the kernel shows them at once, and keeps nobody from reading them.
                writer.write_all_at(&n.to_le_bytes().repeat(PAGES * PAGE / 8), 0)?;
                acked.store(n, SeqCst);
                ensure!(!reading.iter().any(|r| r.is_finished()), "a reader has ended");
                Ok(())
            });
            over.store(true, SeqCst);
            let panicked = |_| anyhow::anyhow!("panic");
            for reading in reading {
                reading.join().map_err(panicked)??;
            }
            taking.join().map_err(panicked)??;
            written?;
            let reads = reads.load(SeqCst);
            println!("{fabric:?}: {reads} reads beside {} writes", acked.load(SeqCst));
            ensure!(reads >= WRITES, "only {reads} reads");
            Ok(())
        })
    })
}

#[test]
fn what_an_early_handle_has_written_is_read() -> anyhow::Result<()> {
    counted(Fabric::Shm)?;
    counted(Fabric::Tcp)
}
