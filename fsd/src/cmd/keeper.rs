//! A small process that waits for a mount's daemon, and starts it again when it has died.
//!
//! The daemon is a child of the keeper, and tells it over a pipe what it has mounted. One that dies leaves that mount behind, dead:
//! the keeper never looks into it, it only gives it to the next life, which mounts in its place. What the keeper does is decided by
//! [`next`] alone.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::io::FdFlags;
use rustix::pipe::PipeFlags;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, set_child_subreaper,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};

use super::alarm::wait_for;
use super::children::code_of;
use super::life::{FORMER_ENV, PARENT_ENV, follow_parent, ready};
use fsd_client::Mounted;

/// Set for a daemon that is kept: the number of the descriptor over which it tells what it has mounted.
const KEEPER_ENV: &str = "FSD_KEEPER";
/// A daemon that has lived for so long and dies is started again at once.
const STEADY: Duration = Duration::from_secs(30);
/// The first pause before one is started again that had not lived for long.
const SHORTEST: Duration = Duration::from_millis(100);
/// The longest one.
const LONGEST: Duration = Duration::from_secs(30);
/// Ends what a daemon tells; no path has it.
const END: u8 = 0;
/// How a daemon tells of its successor; what tells of a mount begins with a number.
const SUCCESSOR: &str = "successor ";

/// Is this process one that is kept?
#[must_use]
pub fn is_kept() -> bool {
    std::env::var_os(KEEPER_ENV).is_some()
}

/// Tells the keeper, if there is one, what is mounted now.
pub fn tell(mounted: &Mounted) {
    say(mounted.to_text());
}

/// Tells the keeper, if there is one, that another process serves the mount now: a child of this one, which is the keeper's when this one has
/// ended.
pub fn tell_successor(successor: Pid) {
    say(format!("{SUCCESSOR}{}", successor.as_raw_nonzero()));
}

fn say(text: String) {
    let Ok(number) = std::env::var(KEEPER_ENV) else {
        return;
    };
    // The descriptor stays as it is for the next life in this process.
    let told = std::fs::OpenOptions::new()
        .write(true)
        .open(format!("/proc/self/fd/{number}"))
        .and_then(|mut pipe| {
            let mut text = text.into_bytes();
            text.push(END);
            pipe.write_all(&text)
        });
    if let Err(error) = told {
        tracing::warn!("the keeper was not told what has changed: {error}");
    }
}

/// What comes after the end of a daemon.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// The keeper ends as well, with this number.
    End(u8),
    /// Another life, after a pause.
    Again(Duration),
}

/// A daemon has ended that had been started `lived` ago, after a pause of `pause`. `served` says whether it or one before it was ready
/// once: one that never was has a fault that the next one would have, too, and its message is for who started it. `told` says whether
/// the keeper was told to end.
fn next(status: ExitStatus, served: bool, told: bool, lived: Duration, pause: Duration) -> Next {
    if status.success() || told || !served {
        return Next::End(code_of(status));
    }
    Next::Again(if lived >= STEADY {
        Duration::ZERO
    } else {
        (pause * 2).clamp(SHORTEST, LONGEST)
    })
}

/// What a daemon tells.
#[derive(Debug, PartialEq, Eq)]
enum Message {
    /// What is mounted.
    Mounted(Mounted),
    /// Who serves that now.
    Successor(Pid),
}

impl Message {
    fn from_text(text: &str) -> Option<Self> {
        match text.strip_prefix(SUCCESSOR) {
            Some(number) => Some(Self::Successor(Pid::from_raw(number.parse().ok()?)?)),
            None => Mounted::from_text(text).map(Self::Mounted),
        }
    }
}

/// What the daemons have told, in order; bytes come in any portions.
#[derive(Default)]
struct Told {
    bytes: Vec<u8>,
}

impl Told {
    /// The messages that are whole by now.
    fn take(&mut self, bytes: &[u8]) -> Vec<Message> {
        self.bytes.extend_from_slice(bytes);
        let mut all = Vec::new();
        while let Some(end) = self.bytes.iter().position(|byte| *byte == END) {
            let message: Vec<u8> = self.bytes.drain(..=end).collect();
            all.extend(
                std::str::from_utf8(&message[..end])
                    .ok()
                    .and_then(Message::from_text),
            );
        }
        all
    }
}

/// A signal that is passed on, and what tells that it has come.
type Passed = (Signal, UnixStream);

fn passed() -> anyhow::Result<Vec<Passed>> {
    let all = [
        (SIGTERM, Signal::TERM),
        (SIGINT, Signal::INT),
        (SIGHUP, Signal::HUP),
        (SIGUSR1, Signal::USR1),
    ];
    let one = |(number, signal)| {
        let (read, write) = UnixStream::pair()?;
        read.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(number, write)?;
        Ok((signal, read))
    };
    let signals = all.into_iter().map(one).collect::<std::io::Result<_>>();
    signals.context("signal handlers")
}

/// The signals that have come since the last time.
fn come(signals: &[Passed]) -> impl Iterator<Item = Signal> + '_ {
    signals.iter().filter_map(|(signal, pipe)| {
        let mut pipe = pipe;
        let count = pipe.read(&mut [0; 64]).unwrap_or(0);
        (count > 0).then_some(*signal)
    })
}

/// The keeper.
struct Keeper {
    signals: Vec<Passed>,
    heard: std::fs::File,
    /// Given to the daemons.
    says: OwnedFd,
    told: Told,
    /// What the last life that was ready has mounted.
    mounted: Option<Mounted>,
    /// Who serves that instead of the daemon that is attended.
    successor: Option<Pid>,
    /// The program that daemons are of.
    program: PathBuf,
    /// Children that have ended.
    ended: HashMap<Pid, ExitStatus>,
    /// It was told to end.
    ends: bool,
}

impl Keeper {
    fn new() -> anyhow::Result<Self> {
        let (heard, says) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).context("a pipe")?;
        rustix::io::fcntl_setfd(&says, FdFlags::empty()).context("fcntl")?;
        Ok(Self {
            signals: passed()?,
            heard: heard.into(),
            says,
            told: Told::default(),
            mounted: None,
            successor: None,
            program: "/proc/self/exe".into(),
            ended: HashMap::new(),
            ends: false,
        })
    }

    /// Starts a life. From this thread, which lasts as long as the process: the daemon is told to end when it does.
    fn start(&self) -> anyhow::Result<Pid> {
        let mut command = Command::new(&self.program);
        command
            .args(std::env::args_os().skip(1))
            .env(KEEPER_ENV, self.says.as_raw_fd().to_string())
            .env(PARENT_ENV, std::process::id().to_string())
            // That is the keeper's to tell.
            .env_remove("NOTIFY_SOCKET");
        match &self.mounted {
            Some(former) => command.env(FORMER_ENV, former.to_text()),
            None => command.env_remove(FORMER_ENV),
        };
        let daemon = command.spawn().context("the daemon cannot be started")?;
        Ok(Pid::from_child(&daemon))
    }

    /// Takes in what daemons have told.
    fn hear(&mut self) {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = self.heard.read(&mut bytes) {
            for message in self.told.take(&bytes[..count]) {
                match message {
                    Message::Mounted(mounted) => {
                        let point = mounted.point().display().to_string();
                        if self.mounted.replace(mounted).is_none() {
                            ready(&format!("the mount on {point} is kept"));
                        }
                    }
                    Message::Successor(process) => self.successor = Some(process),
                }
            }
        }
    }

    /// How a child has ended, if it has. Processes that daemons have left behind are this one's children, too.
    fn status_of(&mut self, child: Pid) -> anyhow::Result<Option<ExitStatus>> {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((process, status))) => {
                    let status = ExitStatus::from_raw(status.as_raw());
                    self.ended.insert(process, status);
                }
                Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(self.ended.remove(&child)),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("wait"),
            }
        }
    }

    /// The daemon that has ended was replaced by another process, which is a child of this one since then.
    fn adopt(&mut self) -> Option<Pid> {
        let successor = self.successor.take()?;
        let program = std::fs::read_link(format!("/proc/{}/exe", successor.as_raw_nonzero()));
        // Another life is of the same program, if that is still there.
        if let Some(program) = program.ok().filter(|program| program.exists()) {
            self.program = program;
        }
        tracing::info!("process {} is kept now", successor.as_raw_nonzero());
        Some(successor)
    }

    /// Passes signals on until the daemon has ended.
    fn attend(&mut self, daemon: Pid) -> anyhow::Result<ExitStatus> {
        if let Some(status) = self.ended.remove(&daemon) {
            return Ok(status);
        }
        let ended = pidfd_open(daemon, PidfdFlags::empty()).context("pidfd_open")?;
        loop {
            if let Some(status) = self.status_of(daemon)? {
                self.hear();
                return Ok(status);
            }
            self.hear();
            for signal in come(&self.signals) {
                self.ends = true;
                // It may have ended by now.
                let _ = pidfd_send_signal(&ended, signal);
            }
            let pipes = self.signals.iter().map(|(_, pipe)| pipe.as_fd());
            let fds: Vec<_> = pipes.chain([ended.as_fd(), self.heard.as_fd()]).collect();
            wait_for(&fds, None)?;
        }
    }

    /// False: it was told to end meanwhile.
    fn pause(&mut self, pause: Duration) -> anyhow::Result<bool> {
        let begun = Instant::now();
        loop {
            self.ends |= come(&self.signals).count() > 0;
            let left = pause.saturating_sub(begun.elapsed());
            if self.ends || left.is_zero() {
                return Ok(!self.ends);
            }
            let fds: Vec<_> = self.signals.iter().map(|(_, pipe)| pipe.as_fd()).collect();
            wait_for(&fds, Some(left))?;
        }
    }

    fn run(&mut self) -> anyhow::Result<u8> {
        let mut pause = Duration::ZERO;
        let mut daemon = self.start()?;
        loop {
            let begun = Instant::now();
            let status = self.attend(daemon)?;
            if let Some(successor) = self.adopt() {
                daemon = successor;
                continue;
            }
            let served = self.mounted.is_some();
            match next(status, served, self.ends, begun.elapsed(), pause) {
                Next::End(code) => return Ok(code),
                Next::Again(next) => pause = next,
            }
            let how = match status.signal() {
                Some(signal) => format!("was killed by signal {signal}"),
                None => format!("has failed ({status})"),
            };
            tracing::error!("the daemon {how}: another life begins in {pause:?}");
            if !self.pause(pause)? {
                return Ok(code_of(ExitStatus::default()));
            }
            // What others have left behind is of no interest.
            self.ended.clear();
            daemon = self.start()?;
        }
    }
}

/// Runs this very command as a child, and again whenever that dies.
///
/// # Errors
/// The system refuses what a keeper needs.
pub fn run() -> anyhow::Result<ExitCode> {
    let mut keeper = Keeper::new()?;
    follow_parent(Signal::TERM)?;
    // The successor of a daemon is a child of that, and this process's when it has ended.
    set_child_subreaper(Some(rustix::process::getpid())).context("prctl")?;
    let result = keeper.run();
    // Nobody is left who could serve it, if it is still there.
    keeper.mounted.iter().for_each(Mounted::abandon);
    result.map(ExitCode::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn killed() -> ExitStatus {
        ExitStatus::from_raw(9)
    }

    #[test]
    fn only_one_that_served_and_was_not_told_to_end_is_started_again() {
        let (long, none) = (STEADY, Duration::ZERO);
        let failed = ExitStatus::from_raw(1 << 8);
        for died in [killed(), failed] {
            assert_eq!(next(died, true, false, long, none), Next::Again(none));
            assert_eq!(next(died, true, true, long, none), Next::End(code_of(died)));
            assert_eq!(next(died, false, false, long, none), Next::End(code_of(died)));
        }
        // It was unmounted.
        assert_eq!(next(ExitStatus::default(), true, false, none, none), Next::End(0));
    }

    #[test]
    fn who_dies_again_at_once_waits_longer_each_time() {
        let mut pause = Duration::ZERO;
        let mut pauses = Vec::new();
        for _ in 0..12 {
            let Next::Again(next) = next(killed(), true, false, Duration::from_secs(1), pause) else {
                unreachable!("it served");
            };
            pauses.push(next);
            pause = next;
        }
        assert_eq!(pauses[..3], [SHORTEST, SHORTEST * 2, SHORTEST * 4]);
        assert_eq!(pauses.last(), Some(&LONGEST));
        assert_eq!(
            next(killed(), true, false, STEADY, pause),
            Next::Again(Duration::ZERO)
        );
    }

    #[test]
    fn what_is_told_may_come_in_pieces() {
        let mut told = Told::default();
        let mounted = |text: &str| Message::Mounted(Mounted::from_text(text).unwrap());
        assert_eq!(told.take(b"24 0:4"), []);
        assert_eq!(told.take(b"0 /a\nb\0"), [mounted("24 0:40 /a\nb")]);
        assert_eq!(
            told.take(b"25 0:41 /c\x0026 0:42 /d\x0027"),
            [mounted("25 0:41 /c"), mounted("26 0:42 /d")]
        );
        assert_eq!(told.take(b" 0:43 /e\0succ"), [mounted("27 0:43 /e")]);
        let successor = Message::Successor(Pid::from_raw(88).unwrap());
        assert_eq!(told.take(b"essor 88\0successor x\0"), [successor]);
    }
}
