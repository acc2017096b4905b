//! The configuration file of a cluster.

use std::fmt::Write as _;
use std::net::TcpListener;
use std::path::Path;

use anyhow::{Context, ensure};

use super::options::{Fabric, Options};
use crate::hosts::Hosts;

/// The address of the `n`th node, where each has one (and an RDMA device) of its own.
pub(super) fn lab_ip(n: usize) -> anyhow::Result<String> {
    let all = std::env::var("LAB_IPS").context("no RDMA devices here: run this in the lab (make lab)")?;
    let all: Vec<&str> = all.split([' ', ',']).filter(|ip| !ip.is_empty()).collect();
    ensure!(!all.is_empty(), "LAB_IPS is empty");
    Ok(all[n % all.len()].to_owned())
}

/// An address with a free port, which is `held` so that no other role is given it.
fn free_port(ip: &str, held: &mut Vec<TcpListener>) -> anyhow::Result<String> {
    let probe = TcpListener::bind((ip, 0))?;
    let address = probe.local_addr()?.to_string();
    held.push(probe);
    Ok(address)
}

/// The configuration file of a cluster in the folder `base`, whose servers keep memory in `memory`; the first of the hosts, if there are
/// some, are those of the metadata server and of the storage nodes.
pub(super) fn settings(
    o: &Options,
    base: &Path,
    memory: &Path,
    hosts: Option<&Hosts>,
) -> anyhow::Result<String> {
    let mut held = Vec::new();
    let mut next = 0..;
    let mut address = |name: &str| -> anyhow::Result<String> {
        let of_host = hosts.zip(next.next()).map(|(hosts, i)| hosts.address(i));
        Ok(match (o.fabric, of_host) {
            (Fabric::Shm, _) => base.join(format!("{name}.sock")).display().to_string(),
            (Fabric::Tcp, Some(ip)) => format!("{ip}:7000"),
            (Fabric::Tcp, None) => free_port("127.0.0.1", &mut held)?,
            (Fabric::Verbs, _) => free_port(&lab_ip(0)?, &mut held)?,
        })
    };
    let mut text = format!(
        "cluster = \"test\"\nkey_file = \"cluster.key\"\nfabric = \"{}\"\nspin_us = {}\ntimeout_ms = {}\n\
         [membership]\nterm_ms = {}\nmargin_ms = {}\nheartbeat_ms = {}\n[lease]\nwait_ms = {}\n\
         [mount]\ncache = \"{}\"\n{}{}buffer_cache = \"32MiB\"\nmax_inodes = {}\nlease_table = {}\n[meta]\nlisten = \"{}\"\ndir = \"meta\"\nmemory_dir = \"{}\"\n",
        o.fabric.name(),
        o.spin_us,
        o.timeout.as_millis(),
        o.term.as_millis(),
        o.term.as_millis() / 5,
        o.term.as_millis() / 5,
        o.lease_wait.as_millis(),
        o.cache.name(),
        if o.shared_mappings {
            "shared_mappings = true\n"
        } else {
            ""
        },
        o.hard
            .map(|hard| format!("hard_ms = {}\n", hard.as_millis()))
            .unwrap_or_default(),
        o.max_inodes,
        o.lease_table,
        address("meta")?,
        memory.display()
    );
    for id in 0..o.storage {
        write!(
            text,
            "[[storage]]\nid = {id}\nlisten = \"{}\"\ndir = \"storage{id}\"\npool = \"{}MiB\"\nmemory_dir = \"{}\"\nscrub_pause_s = 0\n",
            address(&format!("storage{id}"))?,
            o.pool_mib,
            memory.display()
        )?;
    }
    Ok(text)
}
