//! Hosts on this machine: network namespaces on a bridge.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

/// Preference of the rule that finds local addresses, and of those that drop packets.
const LOCAL: u32 = 200;
const DROP: u32 = 100;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Some hosts with addresses of one network; dropping them takes them away, with what still runs there.
#[derive(Debug)]
pub struct Hosts {
    name: String,
    net: String,
    count: u32,
    dir: tempfile::TempDir,
}

fn ip(args: &str) -> anyhow::Result<()> {
    let out = Command::new("ip")
        .args(args.split(' '))
        .output()
        .context("cannot run ip")?;
    let error = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "ip {args}: {}", error.trim());
    Ok(())
}

impl Hosts {
    /// Makes `count` hosts.
    ///
    /// # Errors
    /// The system refuses.
    pub fn new(count: u32) -> anyhow::Result<Self> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let hosts = Self {
            // An interface's name has 15 bytes at most.
            name: format!("df{:x}{number:x}", pid & 0xffff),
            net: format!("10.{}.{}", 64 + pid % 64, number % 256),
            count,
            dir: tempfile::Builder::new().prefix("dfst-").tempdir_in("/tmp")?,
        };
        let name = &hosts.name;
        ip(&format!("link add {name}b type bridge"))?;
        ip(&format!("addr add {}/24 dev {name}b", hosts.head()))?;
        ip(&format!("link set {name}b up"))?;
        for i in 0..count {
            let (host, address) = (hosts.namespace(i), hosts.address(i));
            ip(&format!("netns add {host}"))?;
            ip(&format!(
                "link add {name}v{i} type veth peer name eth0 netns {host}"
            ))?;
            ip(&format!("link set {name}v{i} master {name}b up"))?;
            ip(&format!("-n {host} addr add {address}/24 dev eth0"))?;
            ip(&format!("-n {host} link set eth0 up"))?;
            ip(&format!("-n {host} link set lo up"))?;
            // What is local is found after the rules that drop packets.
            ip(&format!("-n {host} rule add pref {LOCAL} lookup local"))?;
            ip(&format!("-n {host} rule del pref 0"))?;
            hosts.tell_nobody(i)?;
        }
        let cases: Vec<String> = (0..count)
            .map(|i| format!("{}) host={} ;;", hosts.address(i), hosts.namespace(i)))
            .collect();
        // As sshd, it tells where the connection comes from; an unknown host is ssh's status 255.
        let script = format!(
            "#!/bin/sh\nwhile [ \"${{1#-}}\" != \"$1\" ]; do shift; done\ncase $1 in\n{}\n*) echo \"no host $1\" >&2; exit 255 ;;\nesac\nshift\n\
             export SSH_CONNECTION=\"{} 40000 0.0.0.0 22\"\n\
             # Hosts do not share a folder for temporary files: Open MPI's daemons would remove each other's.\n\
             export TMPDIR=\"{}/$host\"; mkdir -p \"$TMPDIR\"\nexec ip netns exec \"$host\" sh -c \"$*\"\n",
            cases.join("\n"),
            hosts.head(),
            hosts.dir().display()
        );
        std::fs::write(hosts.ssh(), script)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(hosts.ssh(), mode)?;
        Ok(hosts)
    }

    fn namespace(&self, i: u32) -> String {
        format!("{}n{i}", self.name)
    }

    /// This machine's address in the hosts' network.
    #[must_use]
    pub fn head(&self) -> String {
        format!("{}.254", self.net)
    }

    /// Address, and name, of a host.
    #[must_use]
    pub fn address(&self, i: u32) -> String {
        format!("{}.{}", self.net, i + 1)
    }

    /// A hostfile with all of them.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn hostfile(&self) -> anyhow::Result<PathBuf> {
        let path = self.dir.path().join("hosts");
        let lines: Vec<String> = (0..self.count)
            .map(|i| format!("{} slots=1\n", self.address(i)))
            .collect();
        std::fs::write(&path, lines.concat())?;
        Ok(path)
    }

    /// A program that is used like ssh.
    #[must_use]
    pub fn ssh(&self) -> PathBuf {
        self.dir.path().join("ssh")
    }

    /// A folder that all hosts see.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Processes on the hosts.
    ///
    /// # Errors
    /// The system does not say.
    pub fn pids(&self) -> anyhow::Result<Vec<u32>> {
        let mut pids = Vec::new();
        for i in 0..self.count {
            let out = Command::new("ip")
                .args(["netns", "pids", &self.namespace(i)])
                .output()?;
            let text = String::from_utf8_lossy(&out.stdout);
            pids.extend(text.split_whitespace().filter_map(|p| p.parse::<u32>().ok()));
        }
        Ok(pids)
    }

    /// A host that does not forward packets tells nobody of those that it drops.
    fn tell_nobody(&self, i: u32) -> anyhow::Result<()> {
        let status = Command::new("nsenter")
            .arg(format!("--net={}", self.net_of(i).display()))
            .args([
                "sh",
                "-c",
                "for f in /proc/sys/net/ipv4/conf/*/forwarding; do echo 0 >$f; done",
            ])
            .status()
            .context("cannot run nsenter")?;
        ensure!(status.success(), "nsenter: {status}");
        Ok(())
    }

    /// The file of a host's network, for nsenter(1).
    #[must_use]
    pub fn net_of(&self, i: u32) -> PathBuf {
        Path::new("/run/netns").join(self.namespace(i))
    }

    /// Nothing goes from one of two hosts to the other any more, and nobody is told.
    ///
    /// # Errors
    /// The system refuses.
    pub fn cut(&self, a: u32, b: u32) -> anyhow::Result<()> {
        self.cut_way(a, b)?;
        self.cut_way(b, a)
    }

    /// Ends [`Hosts::cut`].
    ///
    /// # Errors
    /// The system refuses.
    pub fn mend(&self, a: u32, b: u32) -> anyhow::Result<()> {
        self.mend_way(a, b)?;
        self.mend_way(b, a)
    }

    /// What one host sends to another does not arrive; what comes back does.
    ///
    /// # Errors
    /// The system refuses.
    pub fn cut_way(&self, from: u32, to: u32) -> anyhow::Result<()> {
        self.way(from, to, "add")
    }

    /// Ends [`Hosts::cut_way`].
    ///
    /// # Errors
    /// The system refuses.
    pub fn mend_way(&self, from: u32, to: u32) -> anyhow::Result<()> {
        self.way(from, to, "del")
    }

    /// The receiver drops what comes: a sender that knows of it would not wait, as it does where packets are lost.
    fn way(&self, from: u32, to: u32, what: &str) -> anyhow::Result<()> {
        let (host, of) = (self.namespace(to), self.address(from));
        ip(&format!(
            "-n {host} rule {what} pref {DROP} from {of}/32 blackhole"
        ))
    }

    /// Connections of a host to another one.
    ///
    /// # Errors
    /// The system does not say.
    pub fn connections(&self, from: u32, to: u32) -> anyhow::Result<usize> {
        let (host, address) = (self.namespace(from), self.address(to));
        let out = Command::new("ip")
            .args([
                "netns",
                "exec",
                &host,
                "ss",
                "-Htn",
                "state",
                "established",
                "dst",
            ])
            .arg(address)
            .output()?;
        ensure!(
            out.status.success(),
            "ss: {}",
            String::from_utf8_lossy(&out.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&out.stdout).lines().count())
    }

    /// Waits until nothing runs on the hosts any more.
    ///
    /// # Errors
    /// Something still does after `limit`.
    pub fn wait_quiet(&self, limit: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let left: Vec<String> = self
                .pids()?
                .into_iter()
                .filter_map(|p| std::fs::read(format!("/proc/{p}/cmdline")).ok())
                .map(|c| String::from_utf8_lossy(&c).replace('\0', " "))
                .collect();
            if left.is_empty() {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "still running: {left:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for pid in self.pids().unwrap_or_default() {
            if let Some(pid) = rustix::process::Pid::from_raw(pid as i32) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        // What was not made cannot be taken away.
        for i in 0..self.count {
            let _ = ip(&format!("netns del {}", self.namespace(i)));
        }
        let _ = ip(&format!("link del {}b", self.name));
    }
}
