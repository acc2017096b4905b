//! The program in a guest that starts other programs for the lab and sends back what they print.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lab::proto::{self, CHUNK, Ending, FromGuest, Program, Size, Stream, ToGuest};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process_group, setrlimit};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::time::{ClockId, Timespec, clock_settime};

/// Where programs are looked for: real tools before busybox's of the same names.
const PATH: &str = "/usr/sbin:/usr/bin:/target:/lab/applets";
/// How long a program's output is awaited after its end: what it left running may hold it open for ever.
const OUTPUT_WAIT: Duration = Duration::from_millis(500);

/// What has a terminal of ours is written to through this.
type Terminals = Arc<Mutex<HashMap<u32, File>>>;
type Port = Arc<Mutex<File>>;

fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // On the console, where the lab shows it.
            eprintln!("fsd-lab-agent: {error}");
            std::thread::sleep(Duration::from_secs(1));
            ExitCode::FAILURE
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve() -> io::Result<()> {
    let none = Rlimit {
        current: None,
        maximum: None,
    };
    setrlimit(Resource::Memlock, none)?;
    let files = Rlimit {
        current: Some(1 << 20),
        maximum: Some(1 << 20),
    };
    setrlimit(Resource::Nofile, files)?;
    let path = find_port()?;
    let port = OpenOptions::new().read(true).write(true).open(path)?;
    let mut input = Patient(port.try_clone()?);
    let port: Port = Arc::new(Mutex::new(port));
    let terminals = Terminals::default();
    let running = Arc::new(Mutex::new(HashMap::new()));
    loop {
        match proto::receive::<ToGuest>(&mut input)? {
            ToGuest::Hello { nonce, unix_ms } => {
                set_clock(unix_ms)?;
                proto::send(
                    &mut *lock(&port),
                    &FromGuest::Ready {
                        nonce,
                        uptime_ms: uptime_ms()?,
                    },
                )?;
            }
            ToGuest::Start { id, program } => {
                let (port, running, terminals) =
                    (Arc::clone(&port), Arc::clone(&running), Arc::clone(&terminals));
                std::thread::spawn(move || {
                    let ending = run(id, &program, &port, &running, &terminals)
                        .unwrap_or_else(|error| Ending::NotStarted(error.to_string()));
                    // Nobody is there to be told of a broken port.
                    let _ = proto::send(&mut *lock(&port), &FromGuest::Ended { id, ending });
                });
            }
            ToGuest::Input { id, data } => {
                if let Some(terminal) = lock(&terminals).get_mut(&id) {
                    // The program may just have ended.
                    let _ = terminal.write_all(&data);
                }
            }
            ToGuest::Resize { id, size } => {
                if let Some(terminal) = lock(&terminals).get(&id) {
                    tcsetwinsize(terminal, winsize(size))?;
                }
            }
            ToGuest::Kill { id } => {
                if let Some(group) = lock(&running).get(&id) {
                    // It may just have ended.
                    let _ = kill_process_group(*group, Signal::KILL);
                }
            }
            ToGuest::PowerOff => {
                rustix::fs::sync();
                rustix::system::reboot(rustix::system::RebootCommand::PowerOff)?;
            }
        }
    }
}

fn find_port() -> io::Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name"))?.trim() == proto::PORT {
            return Ok(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        "no virtio-serial port of the lab",
    ))
}

/// Reads from the port, also over times when no lab is connected: then it is at its end, but not for ever.
struct Patient(File);

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Ok(0) => {
                    std::thread::sleep(Duration::from_millis(50));
                    poll(&mut [PollFd::new(&self.0, PollFlags::IN)], None)?;
                }
                done => return done,
            }
        }
    }
}

fn set_clock(unix_ms: u64) -> io::Result<()> {
    let time = Timespec {
        tv_sec: i64::try_from(unix_ms / 1000).map_err(io::Error::other)?,
        tv_nsec: i64::try_from(unix_ms % 1000 * 1_000_000).map_err(io::Error::other)?,
    };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

fn uptime_ms() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/uptime")?;
    let digits: String = text
        .split(' ')
        .next()
        .unwrap_or_default()
        .chars()
        .filter(char::is_ascii_digit)
        .collect();
    // Hundredths of a second.
    digits
        .parse::<u64>()
        .map(|hundredths| hundredths * 10)
        .map_err(io::Error::other)
}

fn winsize(size: Size) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn run(
    id: u32,
    program: &Program,
    port: &Port,
    running: &Mutex<HashMap<u32, Pid>>,
    terminals: &Terminals,
) -> io::Result<Ending> {
    let (name, args) = program
        .argv
        .split_first()
        .ok_or_else(|| io::Error::other("no program was named"))?;
    let mut command = match program.terminal {
        // A process of its own session, with the terminal as its controlling one.
        Some(_) => {
            let mut command = Command::new("/usr/bin/busybox");
            command.args(["setsid", "-c", name]);
            command
        }
        None => Command::new(name),
    };
    command.args(args).env_clear();
    command
        .env("PATH", PATH)
        .env("HOME", "/root")
        .env("USER", "root")
        .env("TERM", "vt100");
    command.envs(program.env.iter().cloned());
    command.current_dir(if program.dir.is_empty() {
        "/tmp"
    } else {
        &program.dir
    });
    let (mut child, pumps) = match program.terminal {
        Some(size) => on_terminal(id, &mut command, size, port, terminals)?,
        None => on_pipes(id, &mut command, port)?,
    };
    // The command holds copies of the terminal, which would keep its output open.
    drop(command);
    let group = Pid::from_child(&child);
    lock(running).insert(id, group);
    let status = child.wait();
    lock(running).remove(&id);
    let deadline = Instant::now() + OUTPUT_WAIT;
    while !pumps.iter().all(JoinHandle::is_finished) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    lock(terminals).remove(&id);
    let status = status?;
    Ok(match (status.code(), status.signal()) {
        (Some(code), _) => Ending::Code(code),
        (None, signal) => Ending::Signal(signal.unwrap_or(0)),
    })
}

fn on_pipes(id: u32, command: &mut Command, port: &Port) -> io::Result<(Child, Vec<JoinHandle<()>>)> {
    // A group of its own, to be ended as a whole.
    command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let out = child
        .stdout
        .take()
        .map(|pipe| pump(id, Stream::Out, OwnedFd::from(pipe), port));
    let err = child
        .stderr
        .take()
        .map(|pipe| pump(id, Stream::Err, OwnedFd::from(pipe), port));
    Ok((child, out.into_iter().chain(err).collect()))
}

fn on_terminal(
    id: u32,
    command: &mut Command,
    size: Size,
    port: &Port,
    terminals: &Terminals,
) -> io::Result<(Child, Vec<JoinHandle<()>>)> {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    tcsetwinsize(&ours, winsize(size))?;
    let name = ptsname(&ours, Vec::new())?;
    let theirs = OpenOptions::new()
        .read(true)
        .write(true)
        .open(name.to_str().map_err(io::Error::other)?)?;
    command
        .stdin(theirs.try_clone()?)
        .stdout(theirs.try_clone()?)
        .stderr(theirs);
    let child = command.spawn()?;
    let ours = File::from(ours);
    lock(terminals).insert(id, ours.try_clone()?);
    Ok((child, vec![pump(id, Stream::Out, OwnedFd::from(ours), port)]))
}

/// Sends on what a program prints, to the end.
fn pump(id: u32, stream: Stream, from: OwnedFd, port: &Port) -> JoinHandle<()> {
    let port = Arc::clone(port);
    let mut from = File::from(from);
    std::thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        // A terminal that all have left reports an error as its end.
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let data = buffer.get(..count).unwrap_or_default().to_vec();
            if proto::send(&mut *lock(&port), &FromGuest::Output { id, stream, data }).is_err() {
                return;
            }
        }
    })
}
