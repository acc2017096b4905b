//! Linux AIO and io_uring with the kernel extension: what the page cache gives out is given out under a lease there too.

use std::io::{self, Write};

use anyhow::Context;
use system_tests::async_io::{self, Aio, Engine, Uring};
use system_tests::cluster::Options;
use system_tests::guard;

/// Operations under way at a time.
const DEPTH: usize = 12;
const BATCHES: u64 = 40;

fn beside_another_mount(
    name: &str,
    flags: i32,
    engine: fn() -> io::Result<Box<dyn Engine + Send>>,
) -> anyhow::Result<()> {
    let options = Options::extension();
    let mut engine = match engine() {
        Ok(engine) => engine,
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
            // Past the test harness, which shows nothing of tests that pass.
            writeln!(
                io::stderr(),
                "{name}: NOT TRIED, this kernel was built without it"
            )?;
            return Ok(());
        }
        Err(error) => return Err(error).context(name.to_owned()),
    };
    guard::with_cluster(options, move |cluster| {
        let (a, b) = (cluster.mount(0).join("f"), cluster.mount(1).join("f"));
        async_io::check(&mut *engine, (&a, flags), &b, BATCHES, DEPTH)
    })
}

fn aio() -> io::Result<Box<dyn Engine + Send>> {
    Ok(Box::new(Aio::new(DEPTH)?))
}

fn io_uring() -> io::Result<Box<dyn Engine + Send>> {
    Ok(Box::new(Uring::new(DEPTH)?))
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_aio_beside_another_mount() -> anyhow::Result<()> {
    beside_another_mount("AIO", 0, aio)
}

/// As databases do it. The extension serves it from the page cache.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_aio_direct_beside_another_mount() -> anyhow::Result<()> {
    beside_another_mount("AIO", libc::O_DIRECT, aio)
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_io_uring_beside_another_mount() -> anyhow::Result<()> {
    beside_another_mount("io_uring", 0, io_uring)
}

/// Here the kernel tries without waiting first: FUSE files can be polled, which it takes for that they do not block.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_io_uring_direct_beside_another_mount() -> anyhow::Result<()> {
    beside_another_mount("io_uring", libc::O_DIRECT, io_uring)
}
