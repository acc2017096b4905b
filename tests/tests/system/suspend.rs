//! Programs of a machine that is put to sleep are frozen, those that serve mounts and those that use them in any order.
//! Only that much: emulated machines do not wake up from more.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use system_tests::cluster::Options;
use system_tests::pressure::Setting;
use system_tests::{guard, sys};

/// The kernel's test of suspending, as far as freezing; as ever once this is dropped.
struct Test {
    _delay: Setting,
    _limit: Setting,
}

impl Test {
    fn begin() -> anyhow::Result<Self> {
        let test = Self {
            _delay: Setting::set("/sys/module/suspend/parameters/pm_test_delay", "1")?,
            _limit: Setting::set("/sys/power/pm_freeze_timeout", "5000")?,
        };
        fs::write("/sys/power/pm_test", "freezer").context("this kernel cannot test suspending")?;
        Ok(test)
    }
}

impl Drop for Test {
    fn drop(&mut self) {
        // Nobody could do anything about it.
        let _ = fs::write("/sys/power/pm_test", "none");
    }
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_frozen_and_thawed() -> anyhow::Result<()> {
    let options = Options::extension();
    guard::with_cluster(options, |cluster| {
        let open =
            |mount: usize, name| sys::open(&cluster.mount(mount).join(name), libc::O_RDWR | libc::O_CREAT);
        let _test = Test::begin()?;

        // Dirty pages, one of them by a mapping, under a lease that nobody asks for.
        let (file, other) = (open(0, "still")?, open(1, "still")?);
        file.write_all_at(&[b'a'; 1 << 20], 0)?;
        let map = sys::Map::writable(&file, 1 << 20)?;
        map.write(5000, b"stored");
        fs::write("/sys/power/state", "freeze").context("frozen at rest")?;
        let data = sys::read_at(&other, 0, 1 << 20)?;
        ensure!(
            data.len() == 1 << 20
                && &data[5000..5006] == b"stored"
                && data[5006..].iter().all(|b| *b == b'a'),
            "what was dirty then"
        );

        // A lease that goes to and fro. Who waits for it cannot be frozen, so this may be refused; never more than that.
        let (writer, reader) = (open(0, "moving")?, open(1, "moving")?);
        let (turns, over) = (AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let moving = scope.spawn(|| -> anyhow::Result<()> {
                while !over.load(Ordering::SeqCst) {
                    let n = turns.load(Ordering::SeqCst) + 1;
                    writer.write_all_at(&n.to_le_bytes(), 0)?;
                    let mut seen = [0; 8];
                    reader.read_exact_at(&mut seen, 0)?;
                    ensure!(seen == n.to_le_bytes(), "turn {n}");
                    turns.store(n, Ordering::SeqCst);
                }
                Ok(())
            });
            let more = || -> anyhow::Result<()> {
                let (from, end) = (
                    turns.load(Ordering::SeqCst),
                    Instant::now() + Duration::from_secs(40),
                );
                while turns.load(Ordering::SeqCst) < from + 20 {
                    ensure!(Instant::now() < end && !moving.is_finished(), "it does not go on");
                    std::thread::yield_now();
                }
                Ok(())
            };
            let mut refused = 0;
            let frozen = (0..3).try_for_each(|_| {
                more()?;
                match fs::write("/sys/power/state", "freeze") {
                    Ok(()) => Ok(()),
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                        refused += 1;
                        Ok(())
                    }
                    Err(error) => Err(error).context("frozen on the move"),
                }
            });
            let frozen = frozen.and_then(|()| more());
            over.store(true, Ordering::SeqCst);
            moving.join().map_err(|_| anyhow!("panic"))??;
            eprintln!("frozen on the move: {} of 3, the others refused", 3 - refused);
            frozen
        })
    })
}
