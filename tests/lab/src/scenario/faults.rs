//! `faults`: guests that are killed, come back, hang; links that are cut, slow and lossy. What is tested is
//! that the lab does to them what it says.

use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::error::{Error, Result};
use crate::options::{Tier, rdma_mtu};
use crate::scenario::perftest;

const LIMIT: Duration = Duration::from_secs(60);
const PORT: usize = 18_600;

/// The scenario.
///
/// # Errors
/// A fault does not do what it should, or cannot be undone.
pub fn run(cluster: &Cluster) -> Result<()> {
    cluster.step("RDMA between nodes 1 and 2 before all faults");
    rdma(cluster, (1, 2), PORT)?;
    links(cluster)?;
    if cluster.options().tier == Tier::Multi {
        switch(cluster)?;
        pause(cluster)?;
        reboot(cluster)?;
    }
    Ok(())
}

fn rdma(cluster: &Cluster, nodes: (usize, usize), port: usize) -> Result<()> {
    perftest::between(cluster, nodes, port, "ib_read_lat", "-s 8 -n 100").map(drop)
}

/// Whether one node reaches another, by one packet with `seconds` for its answer. Nodes of one guest would
/// reach each other by the guest's own loopback if the interface were not named.
fn reaches(cluster: &Cluster, from: usize, to: usize, seconds: u32) -> Result<bool> {
    let ip = cluster.node(to)?.ip;
    let ping = format!("ping -c 1 -W {seconds} -I $LAB_IP {ip}");
    Ok(cluster.attempt(from, &ping, LIMIT)?.ending.ok())
}

fn expect_reach(cluster: &Cluster, from: usize, to: usize, reach: bool) -> Result<()> {
    let wait = if reach { 10 } else { 1 };
    if reaches(cluster, from, to, wait)? == reach {
        return Ok(());
    }
    let what = if reach { "does not reach" } else { "still reaches" };
    Err(Error::check(format!("node {from} {what} node {to}")))
}

/// The shortest of a few round trips, in ms.
fn round_trip(cluster: &Cluster, from: usize, to: usize) -> Result<f64> {
    let ip = cluster.node(to)?.ip;
    let text = cluster.run(from, &format!("ping -c 3 -I $LAB_IP {ip}"), LIMIT)?;
    // "round-trip min/avg/max = 0.4/0.5/0.6 ms"
    let shortest = text
        .lines()
        .find_map(|line| line.split_once("max = ")?.1.split('/').next()?.parse().ok());
    shortest.ok_or_else(|| Error::check(format!("ping printed no times: {text}")))
}

fn links(cluster: &Cluster) -> Result<()> {
    cluster.step("node 2's link is cut and restored");
    expect_reach(cluster, 1, 2, true)?;
    cluster.cut(2)?;
    expect_reach(cluster, 1, 2, false)?;
    expect_reach(cluster, 1, 3, true)?;
    cluster.restore(2)?;
    expect_reach(cluster, 1, 2, true)?;
    rdma(cluster, (1, 2), PORT + 1)?;

    cluster.step("RDMA goes on after a short cut");
    let flow = std::thread::scope(|scope| {
        let flow =
            scope.spawn(|| perftest::between(cluster, (1, 2), PORT + 2, "ib_write_bw", "-s 65536 -D 4 -f 0"));
        std::thread::sleep(Duration::from_millis(2000));
        let cut = cluster.cut(2);
        std::thread::sleep(Duration::from_millis(300));
        let restored = cluster.restore(2);
        let flow = flow
            .join()
            .unwrap_or_else(|_| Err(Error::check("the measuring thread panicked")));
        cut.and(restored).and(flow)
    });
    flow?;

    cluster.step("netem delays and drops what node 2 sends");
    cluster.netem(2, "delay 60ms")?;
    let slow = round_trip(cluster, 1, 2)?;
    if slow < 60.0 {
        return Err(Error::check(format!(
            "a round trip takes {slow} ms with a delay of 60 ms"
        )));
    }
    cluster.netem(2, "loss 100%")?;
    expect_reach(cluster, 1, 2, false)?;
    cluster.netem(2, "")?;
    expect_reach(cluster, 1, 2, true)?;

    cluster.step("all nodes change their MTU");
    let all: Vec<usize> = cluster.nodes().iter().map(|node| node.number).collect();
    let before = cluster.options().mtu;
    let other = if before == 1500 { 9000 } else { 1500 };
    for mtu in [other, before] {
        for node in &all {
            cluster.set_mtu(*node, mtu)?;
        }
        let rdma_mtu = rdma_mtu(mtu);
        cluster.eventually(
            2,
            &format!("ibv_devinfo -d $LAB_DEVICE | grep -q 'active_mtu:.*{rdma_mtu}'"),
            LIMIT,
        )?;
        rdma(cluster, (1, 2), PORT + 3)?;
    }
    Ok(())
}

fn switch(cluster: &Cluster) -> Result<()> {
    cluster.step("the switch parts guests 1 and 2, delays and drops");
    let switch = cluster.switch();
    switch.part(1, 2);
    expect_reach(cluster, 1, 2, false)?;
    expect_reach(cluster, 3, 2, true)?;
    switch.join(1, 2);
    expect_reach(cluster, 1, 2, true)?;
    switch.delay(2, Duration::from_millis(40));
    let slow = round_trip(cluster, 1, 2)?;
    if slow < 80.0 {
        return Err(Error::check(format!(
            "a round trip takes {slow} ms with a delay of 40 ms each way"
        )));
    }
    switch.delay(2, Duration::ZERO);
    switch.lose(2, 1.0);
    expect_reach(cluster, 1, 2, false)?;
    switch.heal();
    expect_reach(cluster, 1, 2, true)
}

fn pause(cluster: &Cluster) -> Result<()> {
    cluster.step("guest 2 hangs for two seconds");
    let uptime = |text: String| {
        text.split('.')
            .next()
            .and_then(|number| number.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let before = uptime(cluster.run(2, "cat /proc/uptime", LIMIT)?);
    cluster.guest(2)?.pause()?;
    let start = Instant::now();
    expect_reach(cluster, 1, 2, false)?;
    std::thread::sleep(Duration::from_secs(2).saturating_sub(start.elapsed()));
    cluster.guest(2)?.resume()?;
    expect_reach(cluster, 1, 2, true)?;
    let after = uptime(cluster.run(2, "cat /proc/uptime", LIMIT)?);
    if after < before + 2 {
        return Err(Error::check(format!(
            "time stood still for a paused guest: {before} s, then {after} s"
        )));
    }
    rdma(cluster, (1, 2), PORT + 4)
}

fn reboot(cluster: &Cluster) -> Result<()> {
    cluster.step("guest 3 is killed");
    cluster.run(3, "touch /tmp/before", LIMIT)?;
    cluster.guest(3)?.kill();
    if cluster.run(3, "true", LIMIT).is_ok() {
        return Err(Error::check("a killed guest still runs commands"));
    }
    expect_reach(cluster, 1, 3, false)?;
    rdma(cluster, (1, 2), PORT + 5)?;
    cluster.step("guest 3 is booted again and joins");
    cluster.reboot(3)?;
    cluster.run(3, "test ! -e /tmp/before", LIMIT)?;
    expect_reach(cluster, 1, 3, true)?;
    rdma(cluster, (3, 1), PORT + 6)
}
