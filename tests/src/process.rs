//! One `fsd` process: started, awaited until ready, ended by its id.

use std::fs::File;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// How long a process may take to be ready.
pub const START_LIMIT: Duration = Duration::from_secs(30);

/// The binary under test: `FSD_BIN`, or `fsd` in the folder that cargo built this program into.
///
/// # Errors
/// There is none.
pub fn fsd_binary() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("FSD_BIN") {
        return Ok(path.into());
    }
    let me = std::env::current_exe()?;
    me.ancestors()
        .skip(1)
        .map(|dir| dir.join("fsd"))
        .find(|path| path.is_file())
        .context("no fsd binary: run cargo build --release -p fsd first, or set FSD_BIN")
}

/// Runs `job` on a thread that lives as long as this program.
///
/// The kernel sends the parent-death signal when the *thread* that started a child ends, so children are
/// started by one thread that never does.
fn on_lasting_thread<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> anyhow::Result<T> {
    type Job = Box<dyn FnOnce() + Send>;
    static JOBS: OnceLock<Sender<Job>> = OnceLock::new();
    let jobs = JOBS.get_or_init(|| {
        let (tx, rx) = channel::<Job>();
        std::thread::spawn(move || rx.into_iter().for_each(|job| job()));
        tx
    });
    let (tx, rx) = channel();
    // The receiver is there: we wait for it.
    let send = Box::new(move || drop(tx.send(job())));
    jobs.send(send).ok().context("the starting thread is gone")?;
    Ok(rx.recv()?)
}

/// A running process of the cluster.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `fsd` with `args`, in the network of a file if there is one; its output is appended to `log`.
    ///
    /// # Errors
    /// It cannot be started, ends, or is not ready in time.
    pub fn start(args: &[String], log: &Path, scratch: &Path, net: Option<&Path>) -> anyhow::Result<Self> {
        let notify = scratch.join(format!("ready-{:08x}", rand::random::<u32>()));
        let socket = UnixDatagram::bind(&notify).context("readiness socket")?;
        let out = File::options().create(true).append(true).open(log)?;
        let mut command = match net {
            None => Command::new(fsd_binary()?),
            // Not `ip netns exec`: mounts that are made in its name space of mounts are seen nowhere else.
            Some(net) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={}", net.display())).arg(fsd_binary()?);
                command
            }
        };
        command
            .args(args)
            .env("NOTIFY_SOCKET", &notify)
            .env("FSD_PARENT", std::process::id().to_string())
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .process_group(0);
        let child = on_lasting_thread(move || command.spawn())?.context("cannot start fsd")?;
        let mut process = Self {
            child,
            log: log.to_owned(),
        };
        let ready = process.wait_ready(&socket);
        // A socket file is of no use to the next process.
        let _ = std::fs::remove_file(&notify);
        if let Err(error) = ready {
            process.kill();
            // In one line: a summary shows how a report begins.
            bail!("fsd {}: {error:#}", args.join(" "));
        }
        Ok(process)
    }

    fn wait_ready(&mut self, socket: &UnixDatagram) -> anyhow::Result<()> {
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        let deadline = Instant::now() + START_LIMIT;
        let mut buffer = [0u8; 256];
        while Instant::now() < deadline {
            if let Ok(n) = socket.recv(&mut buffer)
                && buffer[..n].windows(7).any(|w| w == b"READY=1")
            {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("did not start ({status}): {}", tail(&self.log, 5));
            }
        }
        bail!(
            "not ready within {} s: {}",
            START_LIMIT.as_secs(),
            tail(&self.log, 5)
        )
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id() as i32) {
            // It may have ended already.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM; its exit status, or none where it had to be killed after `limit`.
    pub fn end(&mut self, limit: Duration) -> Option<ExitStatus> {
        self.signal(rustix::process::Signal::TERM);
        let status = self.wait(limit);
        if status.is_none() {
            self.kill();
        }
        status
    }

    /// Waits for the end for at most `limit`.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The last `lines` lines of a file.
#[must_use]
pub fn tail(path: &Path, lines: usize) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
