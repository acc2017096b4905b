//! `devices`: every node has an active RoCE port, and every guest what a file system's node needs.

use std::time::Duration;

use crate::cluster::Cluster;
use crate::error::{Error, Result};
use crate::options::{Tier, rdma_mtu};

const LIMIT: Duration = Duration::from_secs(30);

/// Whether `ibv_devinfo -v` shows a port that is up and has a RoCE v2 GID for an IPv4 address.
pub fn usable(info: &str) -> Result<(), String> {
    let active = info
        .lines()
        .any(|line| line.trim().starts_with("state:") && line.contains("PORT_ACTIVE"));
    let address = info
        .lines()
        .any(|line| line.contains("::ffff:") && line.contains("RoCE v2"));
    match (active, address) {
        (true, true) => Ok(()),
        (false, _) => Err("its port is not active".into()),
        (_, false) => Err("it has no RoCE v2 GID for an IPv4 address".into()),
    }
}

/// What each guest must have: what it is called, and the command that finds it.
const FACILITIES: &[(&str, &str)] = &[
    ("/dev/fuse that can be opened", "exec 3<>/dev/fuse"),
    ("the FUSE file system", "grep -qw fuse /proc/filesystems"),
    ("configfs", "grep -q ' /sys/kernel/config configfs ' /proc/mounts"),
    (
        "the shared folder",
        "date >/job/guest$LAB_GUEST && test -s /job/guest$LAB_GUEST",
    ),
    (
        "the programs of this repository",
        "test -x /target/fsd-lab-agent && ! touch /target/x 2>/dev/null",
    ),
    ("rdma_cm", "test -c /dev/infiniband/rdma_cm"),
    ("the right time", "test $(date +%Y) -ge 2024"),
];

/// The scenario.
///
/// # Errors
/// Something is not as it should be.
pub fn run(cluster: &Cluster) -> Result<()> {
    for node in cluster.nodes() {
        cluster.step(&format!("devices of node {}", node.number));
        let info = cluster.run(node.number, "ibv_devinfo -v -d $LAB_DEVICE", LIMIT)?;
        usable(&info)
            .map_err(|why| Error::check(format!("{} of node {}: {why}", node.device, node.number)))?;
        let mtu = rdma_mtu(cluster.options().mtu).to_string();
        if !info
            .lines()
            .any(|line| line.contains("active_mtu") && line.contains(&mtu))
        {
            return Err(Error::check(format!(
                "{} has no active MTU of {mtu} bytes:\n{info}",
                node.device
            )));
        }
    }
    let per_guest = if cluster.options().tier == Tier::Single {
        1
    } else {
        cluster.guests().len()
    };
    for number in 1..=per_guest {
        cluster.step(&format!("facilities of guest {number}"));
        for (what, command) in FACILITIES {
            let done = cluster.attempt(number, command, LIMIT)?;
            if !done.ending.ok() {
                return Err(Error::check(format!(
                    "guest {number} has not {what}: {}",
                    done.err.trim()
                )));
            }
        }
    }
    cluster.step("all nodes reach each other");
    for node in cluster.nodes() {
        let others = "for ip in $LAB_IPS; do ping -c 1 -W 5 -I $LAB_IP $ip || exit 1; done";
        cluster.run(node.number, others, LIMIT)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::usable;

    #[test]
    fn device_reports_are_judged() {
        let good = "hca_id:\trxe1\n\t\t\tstate:\t\t\tPORT_ACTIVE (4)\n\t\t\tGID[  1]:\t\t::ffff:10.77.0.1, RoCE v2\n";
        assert_eq!(usable(good), Ok(()));
        assert!(usable(&good.replace("ACTIVE", "DOWN")).is_err());
        assert!(usable(&good.replace("::ffff:10.77.0.1", "fe80::ff:fe00:1")).is_err());
    }
}
