//! What processes hold before and after a storm.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::cluster::{Cluster, Role};

/// How old a process is when it is first looked at: it has all that it needs for the work.
const AGE: Duration = Duration::from_secs(4);
/// How much more a process may hold after a storm: connections to mounts that came back, caches that are full now.
const MORE: Held = Held {
    threads: 4,
    pooled: 160,
    files: 16,
    kib: 64 << 10,
};
/// Pools, whose threads wait for something to do for ten seconds; the one that has waited longest gets it, so with little to do all of
/// them stay.
const POOLS: [&str; 3] = ["fsd-worker", "fsd-revoke", "fsd-inval"];

/// What a process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Threads that are not of a pool.
    pub threads: u64,
    /// Threads of pools.
    pub pooled: u64,
    /// Open descriptors.
    pub files: u64,
    /// KiB of memory of its own.
    pub kib: u64,
}

impl Held {
    /// Of a process.
    ///
    /// # Errors
    /// It does not run.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let status = std::fs::read_to_string(proc.join("status"))?;
        let field = |name: &str| -> anyhow::Result<u64> {
            let line = status.lines().find_map(|l| l.strip_prefix(name));
            let number = line.and_then(|l| l.split_whitespace().next());
            Ok(number.with_context(|| format!("no {name}"))?.parse()?)
        };
        let tasks = std::fs::read_dir(proc.join("task"))?.flatten();
        let names = tasks.map(|t| std::fs::read_to_string(t.path().join("comm")).unwrap_or_default());
        let (pooled, threads): (Vec<String>, Vec<String>) = names.partition(|n| POOLS.contains(&n.trim()));
        Ok(Self {
            threads: threads.len() as u64,
            pooled: pooled.len() as u64,
            files: std::fs::read_dir(proc.join("fd"))?.count() as u64,
            kib: field("RssAnon:")?,
        })
    }

    fn within(self, base: Self) -> bool {
        self.threads <= base.threads + MORE.threads
            && self.pooled <= base.pooled + MORE.pooled
            && self.files <= base.files + MORE.files
            && self.kib <= base.kib + MORE.kib
    }
}

/// The threads of a process by name, and what its descriptors are, with how many of each.
fn kinds(pid: u32) -> String {
    let mut found: BTreeMap<String, usize> = BTreeMap::new();
    let each = |dir: &str| {
        std::fs::read_dir(format!("/proc/{pid}/{dir}"))
            .into_iter()
            .flatten()
            .flatten()
    };
    for task in each("task") {
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        *found.entry(format!("thread {}", name.trim())).or_default() += 1;
    }
    for file in each("fd") {
        let target = std::fs::read_link(file.path()).unwrap_or_default();
        let text = target.to_string_lossy().into_owned();
        let kind = text.split(['[', '(']).next().unwrap_or_default().to_owned();
        *found.entry(kind).or_default() += 1;
    }
    let all: Vec<String> = found.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
    all.join(", ")
}

#[derive(Debug)]
struct Seen {
    pid: u32,
    since: Instant,
    base: Option<Held>,
}

/// Watches the processes of a cluster.
#[derive(Debug, Default)]
pub struct Watch(BTreeMap<Role, Seen>);

impl Watch {
    /// Looks at all; those that are new are looked at again when they are old enough.
    pub fn look(&mut self, cluster: &Cluster) {
        for role in cluster.roles() {
            let Some(pid) = cluster.pid(role) else { continue };
            let seen = self.0.entry(role).or_insert_with(|| Seen::new(pid));
            if seen.pid != pid {
                *seen = Seen::new(pid);
            }
            if seen.base.is_none() && seen.since.elapsed() > AGE {
                seen.base = Held::of(pid).ok();
            }
        }
    }

    /// Compares at the end; how each has changed, for those that lived long enough.
    ///
    /// # Errors
    /// One holds too much more than before, or fewer than `least` lived long enough.
    pub fn compare(&self, cluster: &Cluster, least: usize) -> anyhow::Result<Vec<String>> {
        let (mut told, mut wrong) = (Vec::new(), Vec::new());
        for (role, seen) in &self.0 {
            let Some(base) = seen.base.filter(|_| cluster.pid(*role) == Some(seen.pid)) else {
                continue;
            };
            let now = Held::of(seen.pid)?;
            let text = format!(
                "{role:?} in {} s: threads {} to {}, of pools {} to {}, descriptors {} to {}, memory {} to {} KiB",
                seen.since.elapsed().as_secs(),
                base.threads,
                now.threads,
                base.pooled,
                now.pooled,
                base.files,
                now.files,
                base.kib,
                now.kib
            );
            if !now.within(base) {
                wrong.push(format!("{text}; {}", kinds(seen.pid)));
            }
            told.push(text);
        }
        ensure!(
            wrong.is_empty(),
            "held too much after the storm: {}",
            wrong.join("; ")
        );
        ensure!(
            told.len() >= least,
            "only {} processes lived long enough: {told:?}",
            told.len()
        );
        Ok(told)
    }
}

impl Seen {
    fn new(pid: u32) -> Self {
        Self {
            pid,
            since: Instant::now(),
            base: None,
        }
    }
}
