//! Where a mount is asked to be replaced: a socket without a file, named after the device of what is mounted.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rt::time::Instant;
use rustix::process::Pid;

use super::giving::{Giving, NotGiven, take_back};
use super::standing::{Stage, Standing};
use super::talk::Talk;
use crate::mount::error::MountError;
use crate::mount::join::thread;
use crate::mount::kernel_mount::Mounted;

/// Starts a successor, as this program was started: from a file, with one end of a socket as its standard input.
pub type Start = Box<dyn Fn(&Path, UnixStream) -> io::Result<Child> + Send>;

/// How many successors are tried.
const SUCCESSORS: u32 = 3;
/// Longest wait for a request, and for a successor that gives up to leave the cluster.
const SOON: Duration = Duration::from_secs(10);
/// How often is looked whether it has.
const LOOK: Duration = Duration::from_millis(10);
/// How long whoever asks waits for a daemon that is there in the mount's name before it is, or for one that is only just ending.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest pause between two attempts to have the mount's socket.
const PAUSE: Duration = Duration::from_secs(1);
/// What a daemon answers that has nothing more to do with what is mounted.
const ENDING: &str = "this mount is ending";
/// How an answer begins that a process with this number serves the mount now.
const REPLACED: &str = "replaced ";

fn address(mounted: &Mounted) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("distfuse-mount-{}", mounted.device))
}

/// Asks what is mounted at `point` to be replaced by a process of `program`; the number of that process.
///
/// # Errors
/// In a sentence: nothing is mounted there that could be, or it goes on as before.
pub fn replace(point: &Path, program: &Path) -> Result<u32, String> {
    let began = Instant::now();
    loop {
        let refused = match ask(point, program) {
            Ok(process) => return Ok(process),
            Err(Refused::ForGood(why)) => return Err(why),
            Err(Refused::ForNow(why)) => why,
        };
        if began.elapsed() > PATIENCE {
            return Err(refused);
        }
        rt::thread::sleep(LOOK);
    }
}

/// Why what is mounted is not replaced.
enum Refused {
    /// Nobody answers, or a daemon of something else: the kernel uses the numbers of devices again, before who had one has ended.
    ForNow(String),
    ForGood(String),
}

impl From<String> for Refused {
    fn from(why: String) -> Self {
        Self::ForGood(why)
    }
}

fn ask(point: &Path, program: &Path) -> Result<u32, Refused> {
    let shown = point.display();
    let mounted = Mounted::at(point).ok_or_else(|| format!("nothing is mounted at {shown}"))?;
    let stream = address(&mounted).and_then(|address| UnixStream::connect_addr(&address));
    let stream = stream.map_err(|error| {
        Refused::ForNow(format!(
            "no daemon is to be found of what is mounted at {shown} ({error}): is it a mount of DistFUSE, of this network name space?"
        ))
    })?;
    if !is_trusted(&stream) {
        return Err(format!("the daemon of {shown} is another user's").into());
    }
    let asked = || -> io::Result<String> {
        let mut stream = stream;
        writeln!(stream, "{}", program.display())?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        Ok(answer)
    };
    let answer = asked().map_err(|error| format!("the daemon of {shown}: {error}"))?;
    match answer.trim_end().strip_prefix(REPLACED).map(str::parse) {
        Some(Ok(process)) => Ok(process),
        _ if answer.is_empty() => Err(Refused::ForNow(format!("the daemon of {shown} has ended"))),
        _ if answer.trim_end() == ENDING => Err(Refused::ForNow(ENDING.into())),
        _ => Err(answer.trim_end().to_owned().into()),
    }
}

/// Is the other side root's, or this process's user's?
fn is_trusted(stream: &UnixStream) -> bool {
    rustix::net::sockopt::socket_peercred(stream)
        .is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid())
}

/// The socket of a mount. A daemon that is ending may still have it: what was mounted before had the same device number. That one is
/// waited for as long as this mount serves its kernel; `None` when it no longer does, for then nobody has to reach it.
///
/// # Errors
/// There cannot be one.
fn listen(address: &SocketAddr, serves: impl Fn() -> bool) -> io::Result<Option<UnixListener>> {
    let mut pause = LOOK;
    loop {
        match UnixListener::bind_addr(address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            result => return result.map(Some),
        }
        if !serves() {
            return Ok(None);
        }
        rt::thread::sleep(pause);
        pause = PAUSE.min(pause * 2);
    }
}

/// [`listen`] for what is mounted here.
fn listen_for(standing: &Standing) -> io::Result<Option<UnixListener>> {
    let mounted = standing.mounted.as_ref().ok_or(io::ErrorKind::NotFound)?;
    listen(&address(mounted)?, || *standing.stage.lock() == Stage::Serving)
}

/// Answers at the mount's socket, a predecessor's if there is one, until the mount has been replaced.
///
/// # Errors
/// No thread can be started.
pub(crate) fn answer(
    standing: Arc<Standing>,
    predecessors: Option<UnixListener>,
    start: Start,
) -> Result<(), MountError> {
    thread("fsd-control", move || {
        let listener = match predecessors.map_or_else(|| listen_for(&standing), |them| Ok(Some(them))) {
            Ok(Some(listener)) => listener,
            Ok(None) => return,
            Err(error) => return tracing::warn!("this mount cannot be asked to be replaced: {error}"),
        };
        for stream in listener.incoming() {
            let Ok(stream) = stream else { continue };
            let done = asked(&standing, &listener, &start, &stream);
            let text = match &done {
                Ok(process) => format!("{REPLACED}{}", process.as_raw_nonzero()),
                Err(why) => why.replace('\n', " "),
            };
            let mut stream = stream;
            let _ = writeln!(stream, "{text}");
            if done.is_ok() {
                // The stage is unlocked by now.
                standing.client.session.fate.may_end();
                return;
            }
        }
    })
    .map(drop)
}

fn asked(
    standing: &Standing,
    listener: &UnixListener,
    start: &Start,
    stream: &UnixStream,
) -> Result<Pid, String> {
    if !is_trusted(stream) {
        return Err("only root, and the user of the daemon, may replace it".into());
    }
    let mut program = String::new();
    let read = stream
        .set_read_timeout(Some(SOON))
        .and_then(|()| BufReader::new(stream).read_line(&mut program));
    read.map_err(|error| error.to_string())?;
    let program = PathBuf::from(program.trim_end());
    // Whoever ends the mount waits.
    let mut stage = standing.stage.lock();
    if *stage != Stage::Serving {
        return Err(ENDING.into());
    }
    if let Some(why) = standing.never {
        return Err(why.into());
    }
    if standing.client.session.fate.doomed.load(Ordering::SeqCst) {
        return Err("this mount begins anew".into());
    }
    if !is_connected(standing) {
        // It would be waited for, and nobody could end this mount meanwhile.
        return Err("a server of the cluster is away: see fsd status".into());
    }
    let mut last = String::new();
    for _ in 0..SUCCESSORS {
        match replace_once(standing, listener, start, &program) {
            Ok(process) => {
                *stage = Stage::Replaced(process);
                return Ok(process);
            }
            Err(Failure { why, again }) => {
                tracing::warn!("this mount was not replaced, and goes on: {why}");
                last = why;
                if !again {
                    break;
                }
            }
        }
    }
    Err(format!("not replaced, the daemon of before goes on: {last}"))
}

/// Are all servers connected?
fn is_connected(standing: &Standing) -> bool {
    let net = &standing.client.session.net;
    let storage = &net.storage;
    net.meta.is_up() && (0..storage.count()).all(|node| storage.session_now(node).is_some())
}

struct Failure {
    why: String,
    /// Another successor may do better.
    again: bool,
}

fn replace_once(
    standing: &Standing,
    listener: &UnixListener,
    start: &Start,
    program: &Path,
) -> Result<Pid, Failure> {
    let began = || -> io::Result<(Child, Talk)> {
        let (near, far) = UnixStream::pair()?;
        Ok((start(program, far)?, Talk::new(near)))
    };
    let (mut child, mut talk) = began().map_err(|error| Failure {
        why: format!("{} cannot be started: {error}", program.display()),
        again: false,
    })?;
    let process = Pid::from_child(&child);
    let given = Giving {
        place: standing,
        talk: &mut talk,
        kill: &mut || {
            let _ = child.kill();
            let _ = child.wait();
        },
    }
    .give(listener.as_fd());
    let error = match given {
        Ok(()) => {
            *standing.successor.lock() = Some(talk);
            return Ok(process);
        }
        Err(error) => error,
    };
    // It leaves the cluster when it sees that.
    drop(talk);
    if let Err(error) = end(&mut child) {
        tracing::warn!("the new process: {error}");
    }
    take_back(standing);
    Err(Failure {
        why: error.to_string(),
        again: matches!(error, NotGiven::ToThis(_)),
    })
}

/// Waits for a successor that has given up, or ends it.
fn end(child: &mut Child) -> io::Result<std::process::ExitStatus> {
    let begun = Instant::now();
    while begun.elapsed() < SOON {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        rt::thread::sleep(LOOK);
    }
    child.kill()?;
    child.wait()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn address(name: &str) -> io::Result<SocketAddr> {
        SocketAddr::from_abstract_name(format!("distfuse-test-{name}-{}", std::process::id()))
    }

    #[test]
    fn a_mount_that_ends_while_another_has_its_socket_has_nothing_to_say() -> io::Result<()> {
        let address = address("ends")?;
        let _other = UnixListener::bind_addr(&address)?;
        let looks = Cell::new(0);
        let serves = || looks.replace(looks.get() + 1) < 2;
        assert!(listen(&address, serves)?.is_none());
        assert_eq!(looks.get(), 3);
        Ok(())
    }

    #[test]
    fn a_socket_is_had_when_the_other_daemon_has_ended() -> io::Result<()> {
        let address = address("had")?;
        let other = Cell::new(Some(UnixListener::bind_addr(&address)?));
        let serves = || {
            other.take();
            true
        };
        assert!(listen(&address, serves)?.is_some());
        Ok(())
    }
}
