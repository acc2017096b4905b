//! A cluster of real processes on this machine.

mod disk;
mod options;
mod settings;

pub use disk::detach;
pub use options::{Cache, Fabric, Options};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::hosts::Hosts;
use crate::process::{Process, fsd_binary, tail};
use crate::proxy::Proxies;
use disk::Disk;
use settings::{lab_ip, settings};

/// How long a process may take to end by itself.
const END_LIMIT: Duration = Duration::from_secs(20);

/// A process of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Storage node.
    Storage(usize),
    /// The metadata server.
    Meta,
    /// A mount.
    Mount(usize),
}

impl Role {
    fn name(self) -> String {
        match self {
            Self::Meta => "meta".into(),
            Self::Storage(i) => format!("storage{i}"),
            Self::Mount(i) => format!("mount{i}"),
        }
    }
}

/// A process that is stopped, until this is dropped.
pub struct Stopped<'a>(&'a Cluster, Role);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.signal(self.1, Signal::CONT);
    }
}

/// The mounts that the metadata server knows, of a cluster's status.
///
/// # Errors
/// The status does not say.
pub fn nodes(status: &serde_json::Value) -> anyhow::Result<Vec<serde_json::Value>> {
    let nodes = status["meta"]["Ok"]["nodes"].as_array();
    Ok(nodes.context("no nodes")?.clone())
}

/// A running cluster; dropping it leaves no process, no mount and no file behind.
#[derive(Debug)]
pub struct Cluster {
    options: Options,
    /// Taken away before the folder it is in.
    _meta_disk: Option<Disk>,
    base: tempfile::TempDir,
    memory: tempfile::TempDir,
    proxies: Option<Proxies>,
    hosts: Option<Hosts>,
    running: Mutex<BTreeMap<Role, Process>>,
}

impl Cluster {
    /// Formats a cluster and writes its configuration, but starts nothing.
    ///
    /// # Errors
    /// The machine refuses.
    pub fn formatted(options: Options) -> anyhow::Result<Self> {
        ensure!(
            Path::new("/dev/fuse").exists(),
            "this machine has no /dev/fuse: the whole-system tests cannot run here (modprobe fuse)"
        );
        // Short paths: the name of a Unix socket has 107 bytes at most.
        let base = tempfile::Builder::new().prefix("dfst-").tempdir_in("/tmp")?;
        let memory = tempfile::Builder::new().prefix("dfst-").tempdir_in("/dev/shm")?;
        let meta_disk = options
            .meta_disk_mib
            .map(|mib| Disk::of(base.path().join("meta"), mib));
        let mut cluster = Self {
            options,
            _meta_disk: meta_disk.transpose()?,
            base,
            memory,
            proxies: None,
            hosts: None,
            running: Mutex::default(),
        };
        for i in 0..cluster.options.mounts {
            std::fs::create_dir_all(cluster.mount(i))?;
        }
        if cluster.options.apart {
            let count = 1 + cluster.options.storage + cluster.options.mounts;
            cluster.hosts = Some(Hosts::new(u32::try_from(count)?)?);
        }
        let hosts = cluster.hosts.as_ref();
        let settings = settings(&cluster.options, cluster.base.path(), cluster.memory(), hosts)?;
        std::fs::write(cluster.config(), &settings)?;
        if cluster.options.proxied {
            let (proxies, of_meta, of_mounts) = Proxies::start(&settings)?;
            std::fs::write(cluster.config_of(Role::Meta), of_meta)?;
            std::fs::write(cluster.config_of(Role::Mount(0)), of_mounts)?;
            cluster.proxies = Some(proxies);
        }
        let key = cluster.path("cluster.key").to_string_lossy().into_owned();
        cluster.tool(&["keygen", &key])?;
        cluster.format()?;
        Ok(cluster)
    }

    fn format(&self) -> anyhow::Result<()> {
        let config = self.config().display().to_string();
        if self.hosts.is_none() {
            return self.tool(&["format", "--config", &config]).map(drop);
        }
        self.tool(&["format", "--role", "meta", "--config", &config])?;
        (0..self.options.storage).try_for_each(|id| {
            let id = id.to_string();
            self.tool(&["format", "--role", "storage", "--id", &id, "--config", &config])
                .map(drop)
        })
    }

    /// The number of a role's host.
    fn host(&self, role: Role) -> anyhow::Result<u32> {
        let n = match role {
            Role::Meta => 0,
            Role::Storage(i) => 1 + i,
            Role::Mount(i) => 1 + self.options.storage + i,
        };
        Ok(u32::try_from(n)?)
    }

    fn hosts(&self) -> anyhow::Result<&Hosts> {
        self.hosts
            .as_ref()
            .context("the processes of this cluster share a host")
    }

    /// What one role sends to another does not arrive; what comes back does ([`Options::apart`]).
    ///
    /// # Errors
    /// The system refuses.
    pub fn cut_way(&self, from: Role, to: Role) -> anyhow::Result<()> {
        self.hosts()?.cut_way(self.host(from)?, self.host(to)?)
    }

    /// Ends [`Cluster::cut_way`].
    ///
    /// # Errors
    /// The system refuses.
    pub fn mend_way(&self, from: Role, to: Role) -> anyhow::Result<()> {
        self.hosts()?.mend_way(self.host(from)?, self.host(to)?)
    }

    /// Formats and starts a cluster.
    ///
    /// # Errors
    /// A role does not start.
    pub fn start(options: Options) -> anyhow::Result<Self> {
        let cluster = Self::formatted(options)?;
        cluster.start_all()?;
        Ok(cluster)
    }

    /// A path in the cluster's folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    /// The configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.path("cluster.toml")
    }

    /// The configuration file that a role is started with.
    fn config_of(&self, role: Role) -> PathBuf {
        match role {
            Role::Meta if self.options.proxied => self.path("meta.toml"),
            Role::Mount(_) if self.options.proxied => self.path("mounts.toml"),
            _ => self.config(),
        }
    }

    /// The proxies that mounts reach the servers through.
    ///
    /// # Errors
    /// There are none ([`Options::proxied`]).
    pub fn proxies(&self) -> anyhow::Result<&Proxies> {
        self.proxies.as_ref().context("this cluster has no proxies")
    }

    /// Where the storage nodes keep their registered memory.
    #[must_use]
    pub fn memory(&self) -> &Path {
        self.memory.path()
    }

    /// Mount point `i`.
    #[must_use]
    pub fn mount(&self, i: usize) -> PathBuf {
        self.path(&format!("mnt{i}"))
    }

    /// What it was made from.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The roles in the order they start in.
    #[must_use]
    pub fn roles(&self) -> Vec<Role> {
        let storage = (0..self.options.storage).map(Role::Storage);
        storage
            .chain([Role::Meta])
            .chain((0..self.options.mounts).map(Role::Mount))
            .collect()
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<Role, Process>> {
        // A test that panicked must still be cleaned up after.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address of a server as the configuration says.
    ///
    /// # Errors
    /// The configuration cannot be read.
    pub fn address(&self, role: Role) -> anyhow::Result<String> {
        let text = std::fs::read_to_string(self.config())?;
        let mut addresses = text.lines().filter_map(|l| l.strip_prefix("listen = "));
        let index = match role {
            Role::Meta => 0,
            Role::Storage(i) => i + 1,
            Role::Mount(_) => bail!("a mount's address is in the status"),
        };
        Ok(addresses
            .nth(index)
            .context("no such address")?
            .trim_matches('"')
            .to_owned())
    }

    /// Starts every role that does not run.
    ///
    /// # Errors
    /// One does not start.
    pub fn start_all(&self) -> anyhow::Result<()> {
        self.roles()
            .into_iter()
            .try_for_each(|role| self.start_role(role))
    }

    /// Starts one role; nothing if it runs already.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_role(&self, role: Role) -> anyhow::Result<()> {
        if self.running().contains_key(&role) {
            return Ok(());
        }
        let config = self.config_of(role).display().to_string();
        let mut args: Vec<String> = match role {
            Role::Meta => vec!["meta".into()],
            Role::Storage(id) => vec!["storage".into(), "--id".into(), id.to_string()],
            Role::Mount(_) => vec!["mount".into()],
        };
        args.extend(["--config".into(), config]);
        if let Role::Mount(i) = role {
            if self.options.fabric == Fabric::Verbs {
                args.extend(["--listen".into(), format!("{}:0", lab_ip(i + 1)?)]);
            }
            if self.options.keep {
                args.push("--keep".into());
            }
            args.push(self.mount(i).display().to_string());
        }
        let host = self.host(role)?;
        let net = self.hosts.as_ref().map(|hosts| hosts.net_of(host));
        let process = Process::start(&args, &self.log(role), self.base.path(), net.as_deref())?;
        self.running().insert(role, process);
        Ok(())
    }

    /// The log of a role.
    #[must_use]
    pub fn log(&self, role: Role) -> PathBuf {
        self.path(&format!("{}.log", role.name()))
    }

    /// The process id of a running role.
    #[must_use]
    pub fn pid(&self, role: Role) -> Option<u32> {
        self.running().get(&role).map(Process::pid)
    }

    /// Sends a signal to a running role.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal(&self, role: Role, signal: Signal) -> anyhow::Result<()> {
        let pid = self.pid(role).and_then(|pid| Pid::from_raw(pid as i32));
        Ok(kill_process(pid.context("it does not run")?, signal)?)
    }

    /// SIGSTOP, and SIGCONT when that is dropped.
    ///
    /// # Errors
    /// It does not run.
    pub fn stopped(&self, role: Role) -> anyhow::Result<Stopped<'_>> {
        self.signal(role, Signal::STOP)?;
        Ok(Stopped(self, role))
    }

    /// SIGKILL; a mount's mount point is detached.
    pub fn kill(&self, role: Role) {
        let process = self.running().remove(&role);
        if let (Some(process), Role::Mount(i)) = (&process, role) {
            process.signal(Signal::KILL);
            // A thread that invalidates a page which a read has locked does not end before that has got an answer.
            disk::disconnect(&self.mount(i));
        }
        if let Some(mut process) = process {
            process.kill();
        }
        if let Role::Mount(i) = role {
            detach(&self.mount(i));
        }
    }

    /// SIGKILL, and starts it again.
    ///
    /// # Errors
    /// It does not start.
    pub fn kill_and_restart(&self, role: Role) -> anyhow::Result<()> {
        self.kill(role);
        self.start_role(role)
    }

    /// Waits until a role has ended by itself.
    ///
    /// # Errors
    /// It does not run, or has not ended in time.
    pub fn wait(&self, role: Role, limit: Duration) -> anyhow::Result<std::process::ExitStatus> {
        let mut process = self
            .running()
            .remove(&role)
            .ok_or_else(|| anyhow::anyhow!("{} does not run", role.name()))?;
        match process.wait(limit) {
            Some(status) => Ok(status),
            None => {
                process.kill();
                anyhow::bail!("{} has not ended within {limit:?}", role.name())
            }
        }
    }

    /// SIGTERM, and waits for a clean end.
    ///
    /// # Errors
    /// It does not end in time or with a status that is not success.
    pub fn end(&self, role: Role) -> anyhow::Result<()> {
        let Some(mut process) = self.running().remove(&role) else {
            return Ok(());
        };
        let status = process.end(END_LIMIT);
        if let Role::Mount(i) = role {
            detach(&self.mount(i));
        }
        match status {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("{role:?} ended with {status}"),
            None => bail!("{role:?} did not end within {} s of SIGTERM", END_LIMIT.as_secs()),
        }
    }

    /// Ends all roles: mounts first.
    ///
    /// # Errors
    /// One of them did not end cleanly; the others are ended nevertheless.
    pub fn end_all(&self) -> anyhow::Result<()> {
        let errors: Vec<String> = self
            .roles()
            .into_iter()
            .rev()
            .filter_map(|r| self.end(r).err())
            .map(|e| e.to_string())
            .collect();
        ensure!(errors.is_empty(), "{}", errors.join("; "));
        Ok(())
    }

    /// Kills everything at once: also unblocks system calls that hang on a mount.
    pub fn abort(&self) {
        for role in self.roles().into_iter().rev() {
            self.kill(role);
        }
    }

    /// The sum over all mounts of a field of their status, or of a counter of their kernel.
    ///
    /// # Errors
    /// The status is not to be had.
    pub fn total(&self, name: &str) -> anyhow::Result<u64> {
        let status = self.status()?;
        let mounts = status["mounts"].as_array().context("no mounts")?;
        let of = |mount: &serde_json::Value| {
            let kernel = mount["kernel"].as_array();
            let counter = kernel.and_then(|all| all.iter().find(|c| c[0] == name));
            mount[name].as_u64().or_else(|| counter?[1].as_u64()).unwrap_or(0)
        };
        Ok(mounts.iter().map(|m| of(&m[1]["Ok"])).sum())
    }

    /// Does something so many times; fails where that costs the mounts more messages and batches of one-sided operations, each. What goes on
    /// besides is a few in all.
    ///
    /// # Errors
    /// A call fails, or it costs more.
    pub fn messages_below(
        &self,
        most: f64,
        what: &str,
        calls: u64,
        act: impl FnMut(u64) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let before = self.total("messages")?;
        (0..calls).try_for_each(act)?;
        let each = (self.total("messages")? - before) as f64 / calls as f64;
        println!("{what}: {each:.3} messages and batches of operations each");
        anyhow::ensure!(
            each < most,
            "{what}: {each} messages and batches of operations each"
        );
        Ok(())
    }

    /// Kills everything at once, and starts it anew once the mounts of before are known to be dead.
    ///
    /// # Errors
    /// Something does not start, or they are not declared dead.
    pub fn restart_after_abort(&self) -> anyhow::Result<()> {
        self.abort();
        let servers = self.roles().into_iter().filter(|r| !matches!(r, Role::Mount(_)));
        for role in servers {
            self.start_role(role)?;
        }
        let end = Instant::now() + Duration::from_secs(60);
        while !nodes(&self.status()?)?.is_empty() {
            ensure!(Instant::now() < end, "the killed mounts are not declared dead");
            std::thread::sleep(Duration::from_millis(200));
        }
        self.start_all()
    }

    /// Runs an `fsd` command to its end; its standard output.
    ///
    /// # Errors
    /// It fails.
    pub fn tool(&self, args: &[&str]) -> anyhow::Result<String> {
        let out = Command::new("timeout")
            .arg("20")
            .arg(fsd_binary()?)
            .args(args)
            .output()?;
        let text = String::from_utf8_lossy(&out.stderr);
        ensure!(
            out.status.success(),
            "fsd {}: {} {text}",
            args.join(" "),
            out.status
        );
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// What `fsd status --json` says; the command fails where the cluster is not healthy, the report counts.
    ///
    /// # Errors
    /// There is no report.
    pub fn status(&self) -> anyhow::Result<serde_json::Value> {
        let out = Command::new("timeout")
            .arg("30")
            .arg(fsd_binary()?)
            .args(["status", "--json", "--config"])
            .arg(self.config())
            .output()?;
        let text = String::from_utf8_lossy(&out.stderr);
        serde_json::from_slice(&out.stdout).with_context(|| format!("fsd status: {} {text}", out.status))
    }

    /// The ends of all logs.
    #[must_use]
    pub fn logs(&self, lines: usize) -> String {
        self.roles()
            .into_iter()
            .map(|role| format!("--- {}\n{}\n", role.name(), tail(&self.log(role), lines)))
            .collect()
    }

    /// Roles whose logs tell of a panic.
    #[must_use]
    pub fn panicked(&self) -> Vec<Role> {
        let told = |role: &Role| {
            std::fs::read(self.log(*role)).is_ok_and(|log| log.windows(11).any(|w| w == b"panicked at"))
        };
        self.roles().into_iter().filter(told).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.abort();
    }
}
