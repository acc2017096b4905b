//! `kmod`: the kernel extension by itself, without a cluster.

use std::time::Duration;

use crate::cluster::Cluster;
use crate::error::Result;
use crate::kmod;

const SHORT: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(240);

/// Loads and unloads, with a mount that keeps the module in, and again without.
const RELOAD: &str = "set -e
for round in 1 2 3 4 5 6 7 8; do
    insmod /job/distfuse.ko
    kmod-check 'waits for who is inside' >/dev/null
    rmmod distfuse
done
insmod /job/distfuse.ko
mkfifo /tmp/hold
kmod-check hold </tmp/hold >/tmp/held &
exec 3>/tmp/hold
until grep -q attached /tmp/held; do sleep 0.1; done
if rmmod distfuse 2>/dev/null; then echo 'unloaded while attached'; exit 1; fi
exec 3>&-
wait
rmmod distfuse
test ! -e /dev/distfuse";

/// The scenario.
///
/// # Errors
/// A check fails.
pub fn run(cluster: &Cluster) -> Result<()> {
    kmod::load(cluster)?;
    cluster.step("checks");
    let report = cluster.run(1, "kmod-check", LONG);
    // Its list tells which, on one that fails too.
    if let Ok(report) = &report {
        cluster.write_down(report);
    }
    report?;
    cluster.step("what a call costs");
    let table = cluster.run(1, "kmod-check bench 3000", SHORT)?;
    cluster.write_down(&table);
    cluster.step("unload");
    cluster.run(1, "rmmod distfuse", SHORT)?;
    cluster.step("load and unload");
    cluster.run(1, RELOAD, SHORT)?;
    cluster.step("as DKMS builds it");
    kmod::place_by_dkms(cluster)?;
    cluster.run(
        1,
        "insmod /job/dkms.ko && test -c /dev/distfuse && rmmod distfuse",
        SHORT,
    )?;
    Ok(())
}
