//! Roles run as processes of their own, by `fsd dev` and `fsd launch`.
//!
//! The children are told to end when this process dies, however it dies: the mounts by SIGTERM, the
//! servers a little later, so that the mounts can still write back. What a killed mount leaves behind is
//! unmounted here.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::temporary::Temporary;
use fsd_client::mount::kernel_mount::Mounted;

/// How long a child may take to be ready, or to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a user says what is to be logged.
const RUST_LOG: &str = "RUST_LOG";

struct Member {
    what: String,
    child: Child,
    /// What it has mounted.
    mounted: Option<Mounted>,
}

/// The roles that run here, in the order they were started in; dropping them takes all down.
pub struct Children {
    members: Vec<Member>,
    config: PathBuf,
    quiet: bool,
    temporary: Temporary,
}

/// Has a program ended by SIGTERM when the thread that starts it ends, also by SIGKILL to this process.
pub fn follow_us(command: &mut Command) {
    let follow = || {
        let signal = Some(rustix::process::Signal::TERM);
        Ok(rustix::process::set_parent_process_death_signal(signal)?)
    };
    // SAFETY: between fork and exec the closure makes one system call, allocates nothing and takes no lock.
    unsafe { command.pre_exec(follow) };
}

/// The number a program that has ended leaves to a shell.
#[must_use]
pub fn code_of(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code).unwrap_or(1)
}

impl Children {
    /// None yet; they will read this configuration, and hold this folder as long as they run.
    #[must_use]
    pub fn new(config: PathBuf, temporary: Temporary) -> Self {
        Self {
            members: Vec::new(),
            config,
            quiet: false,
            temporary,
        }
    }

    /// They say only what is wrong, unless the user has asked for more (`RUST_LOG`).
    #[must_use]
    pub fn quiet(mut self, quiet: bool) -> Self {
        self.quiet = quiet;
        self
    }

    /// Starts a role, called `what` in messages, and waits until it is ready; `point` is where it mounts.
    ///
    /// # Errors
    /// It does not start, or is not ready in time.
    pub fn spawn(&mut self, what: &str, args: &[&str], point: Option<&Path>) -> anyhow::Result<()> {
        let path = self.temporary.path().join("ready");
        let socket = std::os::unix::net::UnixDatagram::bind(&path).context("readiness socket")?;
        let exe = std::env::current_exe().context("the path of fsd")?;
        let mut command = Command::new(exe);
        if self.quiet && std::env::var_os(RUST_LOG).is_none() {
            command.env(RUST_LOG, super::logging::QUIET_LOG);
        }
        let child = command
            .args(args)
            .arg("--config")
            .arg(&self.config)
            .args(point)
            .env("NOTIFY_SOCKET", &path)
            .env(super::life::PARENT_ENV, std::process::id().to_string())
            .env(super::replace::ATTENDED_ENV, "1")
            .stdin(self.temporary.held()?)
            // Ctrl-C is for this process; it takes the others down in order.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start the {what}"))?;
        self.members.push(Member {
            what: what.to_owned(),
            child,
            mounted: None,
        });
        let ready = self.wait_ready(&socket, what);
        if let Some(member) = self.members.last_mut() {
            member.mounted = point.filter(|_| ready.is_ok()).and_then(Mounted::at);
        }
        let _ = std::fs::remove_file(&path);
        ready
    }

    fn wait_ready(&mut self, socket: &std::os::unix::net::UnixDatagram, what: &str) -> anyhow::Result<()> {
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let deadline = Instant::now() + PATIENCE;
        let mut buffer = [0u8; 256];
        while Instant::now() < deadline {
            if let Ok(n) = socket.recv(&mut buffer)
                && buffer[..n].windows(7).any(|w| w == b"READY=1")
            {
                return Ok(());
            }
            if let Some(member) = self.members.last_mut()
                && let Some(status) = member.child.try_wait()?
            {
                bail!("the {what} did not start ({status}); its message is above");
            }
        }
        bail!("the {what} was not ready within {} s", PATIENCE.as_secs());
    }

    /// A role that has died, and what it was.
    pub fn dead(&mut self) -> Option<String> {
        self.members.iter_mut().find_map(|m| match m.child.try_wait() {
            Ok(Some(status)) => Some(format!("the {} has ended ({status})", m.what)),
            _ => None,
        })
    }

    /// What runs, and its process.
    pub fn pids(&self) -> impl Iterator<Item = (&str, u32)> {
        self.members.iter().map(|m| (m.what.as_str(), m.child.id()))
    }

    /// Ends the roles in reverse order of their start; true if all ended by themselves.
    pub fn take_down(&mut self) -> bool {
        self.take_down_to("")
    }

    /// As [`Children::take_down`], but only as long as the last one's name begins like this.
    pub fn take_down_to(&mut self, prefix: &str) -> bool {
        let mut clean = true;
        while let Some(mut member) = self.members.pop_if(|m| m.what.starts_with(prefix)) {
            let gone = matches!(member.child.try_wait(), Ok(Some(_)));
            if !gone {
                signal(&member.child, rustix::process::Signal::TERM);
                clean &= wait_for(&mut member.child, PATIENCE);
            }
            member.mounted.iter().for_each(Mounted::unmount);
            let _ = member.child.wait();
        }
        clean
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        self.take_down();
    }
}

/// Sends a signal to a child, unless it has ended.
pub fn signal(child: &Child, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(child.id() as i32) {
        // It may have ended meanwhile.
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Waits for the end of a child; kills it after `limit`. True if it ended by itself.
pub fn wait_for(child: &mut Child, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = child.kill();
    false
}
