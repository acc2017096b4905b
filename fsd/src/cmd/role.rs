//! Running one role in the foreground until a signal ends it.

use std::os::unix::process::CommandExt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, Signal};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};

use super::alarm::Alarm;
use super::life::{FORMER_ENV, Followed, SUCCESSOR_ENV, follow_parent, predecessor, ready};
use super::{keeper, mask, replace};
use fsd_client::{Mount, MountError, MountOptions, Mounted};
use fsd_meta::MetaServer;
use fsd_node::config::Config;
use fsd_storage::StorageNode;

/// Pause before servers that are not there are looked for again.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a server outlives a parent that died, for the mounts to write back.
const LINGER: Duration = Duration::from_secs(3);

/// How often it is looked whether a mount is over, whose end should have rung.
const LOOK: Duration = Duration::from_secs(10);

/// Waits for the signal to end; it may be `over`, too, which is looked at when somebody has rung, and every so often. Whether a signal ended
/// it.
fn wait(
    alarm: &mut Alarm,
    parent: &Followed,
    look: Option<Duration>,
    mut over: impl FnMut() -> bool,
) -> anyhow::Result<bool> {
    let mut linger: Option<Instant> = None;
    loop {
        for signal in alarm.signals() {
            if signal != SIGUSR1 {
                return Ok(true);
            }
            linger = Some(Instant::now());
        }
        if over() || parent.has_ended() || linger.is_some_and(|t| t.elapsed() > LINGER) {
            return Ok(false);
        }
        let rest = linger.map(|t| LINGER.saturating_sub(t.elapsed()) + Duration::from_millis(1));
        alarm.wait(parent.process().as_slice(), rest.or(look))?;
    }
}

const SIGNALS: [i32; 4] = [SIGTERM, SIGINT, SIGHUP, SIGUSR1];

fn alarm() -> anyhow::Result<Alarm> {
    Alarm::new(&SIGNALS)
}

/// Runs the metadata server.
///
/// # Errors
/// It cannot start, or its store fails at the end.
pub fn meta(config: &Config, key: Vec<u8>, accept_older: bool) -> anyhow::Result<ExitCode> {
    let mut alarm = alarm()?;
    follow_parent(Signal::USR1)?;
    let server = MetaServer::start(config, key, accept_older)?;
    let bell = alarm.bell();
    server.once_older(Box::new(move || bell.ring()));
    ready(&format!("metadata server on {}", server.addr()));
    wait(&mut alarm, &Followed::default(), None, || {
        server.is_older().is_some()
    })?;
    let older = server.is_older();
    server.stop()?;
    anyhow::ensure!(older.is_none(), older.unwrap_or_default());
    Ok(ExitCode::SUCCESS)
}

/// Runs a storage node.
///
/// # Errors
/// It cannot start, or cannot store everything at the end.
pub fn storage(
    config: &Config,
    key: Vec<u8>,
    id: u16,
    forget: bool,
    accept_older: bool,
) -> anyhow::Result<ExitCode> {
    let mut alarm = alarm()?;
    follow_parent(Signal::USR1)?;
    let node = StorageNode::start(config, id, key, accept_older)?;
    ready(&format!("storage node {id} on {}", node.addr()));
    wait(&mut alarm, &Followed::default(), None, || false)?;
    node.stop(forget)?;
    Ok(ExitCode::SUCCESS)
}

/// Begins anew in the same process: another life of the mount, at the same mount point, with the same arguments.
fn begin_anew(former: &Mounted) -> anyhow::Result<ExitCode> {
    tracing::warn!("the mount on {} begins anew", former.point().display());
    let mut command = std::process::Command::new("/proc/self/exe");
    command
        .args(std::env::args_os().skip(1))
        .env(FORMER_ENV, former.to_text())
        .env_remove(SUCCESSOR_ENV);
    let error = command.exec();
    Err(error).context("this program cannot be started again")
}

/// Mounts. A life that follows another one waits for the servers as long as it takes.
fn start(config: &Config, key: &[u8], options: &MountOptions, alarm: &mut Alarm) -> anyhow::Result<Mount> {
    loop {
        match Mount::start(config, key.to_vec(), options) {
            Err(error @ MountError::Join(_)) if options.former.is_some() => {
                tracing::warn!("{error}; tried again");
                mask::let_come(&SIGNALS).context("signals")?;
                if alarm.signals().any(|signal| signal != SIGUSR1) {
                    return Err(error.into());
                }
                mask::hold(&SIGNALS).context("signals")?;
                std::thread::sleep(AGAIN);
            }
            started => return Ok(started?),
        }
    }
}

/// Another process serves the mount: who looks after this one is to look after that.
fn succeeded_by(successor: Pid) {
    keeper::tell_successor(successor);
    let process = NotifyState::MainPid(successor.as_raw_nonzero().get().unsigned_abs());
    if let Err(error) = sd_notify::notify(false, &[process]) {
        tracing::debug!("the system's manager was not told of the successor: {error}");
    }
}

/// Runs a mount.
///
/// # Errors
/// It cannot join or mount.
pub fn mount(config: &Config, key: &[u8], options: &MountOptions) -> anyhow::Result<ExitCode> {
    let mut alarm = alarm()?;
    // Signals come to this thread only, when it lets them; those that it holds outlive the program, where it begins anew. Other threads, which
    // are started meanwhile, never take one.
    mask::hold(&SIGNALS).context("signals")?;
    let parent = follow_parent(Signal::TERM)?;
    let mut mount = match predecessor() {
        Some(stream) => Mount::succeed(config, key, options, stream)?,
        None => start(config, key, options, &mut alarm)?,
    };
    mount.may_be_replaced(Box::new(replace::start))?;
    mount.mounted().into_iter().for_each(keeper::tell);
    ready(&format!(
        "mounted on {} ({:?})",
        mount.point().display(),
        mount.mode()
    ));
    let bell = alarm.bell();
    mount.once_ending(Box::new(move || bell.ring()));
    mask::let_come(&SIGNALS).context("signals")?;
    let told = wait(&mut alarm, &parent, Some(LOOK), || {
        mount.is_gone() || mount.replaced_by().is_some()
    })?;
    mount.replaced_by().into_iter().for_each(succeeded_by);
    let former = mount.mounted().filter(|_| mount.is_doomed()).cloned();
    let doomed = mount.is_doomed();
    if let Some(successor) = mount.stop() {
        // Who was told to end meanwhile was meant as the one who serves the mount.
        if told || alarm.signals().any(|signal| signal != SIGUSR1) {
            rustix::process::kill_process(successor, Signal::TERM).context("the successor")?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    if former.is_some() {
        // What comes from here on is for the next life, which would end by it before it listens.
        mask::hold(&SIGNALS).context("signals")?;
    }
    match former {
        // Who was told to end does, before or after it was declared dead.
        Some(former) if told || alarm.signals().any(|signal| signal != SIGUSR1) => {
            former.abandon();
            Ok(ExitCode::SUCCESS)
        }
        Some(former) => begin_anew(&former),
        // It is not mounted any more.
        None if doomed => Ok(ExitCode::FAILURE),
        None => Ok(ExitCode::SUCCESS),
    }
}
