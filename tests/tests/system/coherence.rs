//! Every kind of cross-mount check, on each fabric and with each cache mode.

use anyhow::ensure;
use system_tests::cluster::{Cache, Fabric, Options};
use system_tests::coherence::Choice;
use system_tests::{coherence, guard};

fn check(fabric: Fabric, cache: Cache) -> anyhow::Result<()> {
    let options = Options {
        fabric,
        cache,
        // Past the page cache nothing can be mapped without it.
        shared_mappings: cache == Cache::Direct,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        let outcomes = coherence::run(&cluster.mount(0), &cluster.mount(1), 20, Choice::default())?;
        let violations = coherence::print(&outcomes);
        ensure!(violations == 0, "{violations} violations, see the table");
        Ok(())
    })
}

#[test]
fn shm_direct() -> anyhow::Result<()> {
    check(Fabric::Shm, Cache::Direct)
}

#[test]
fn shm_writethrough() -> anyhow::Result<()> {
    check(Fabric::Shm, Cache::Writethrough)
}

#[test]
fn tcp_direct() -> anyhow::Result<()> {
    check(Fabric::Tcp, Cache::Direct)
}

#[test]
fn tcp_writethrough() -> anyhow::Result<()> {
    check(Fabric::Tcp, Cache::Writethrough)
}
