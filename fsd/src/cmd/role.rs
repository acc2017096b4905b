//! Running one role in the foreground until a signal ends it.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use fsd_client::{Mount, MountOptions};
use fsd_meta::MetaServer;
use fsd_node::config::Config;
use fsd_storage::StorageNode;

/// Set by `fsd dev` for its children: they end when it dies.
pub const PARENT_ENV: &str = "FSD_PARENT";
/// How long a server outlives a parent that died, for the mounts to write back.
const LINGER: Duration = Duration::from_secs(3);

/// Arranges for a signal when the parent dies, if we are a child of `fsd dev`.
fn follow_parent(signal: rustix::process::Signal) -> anyhow::Result<()> {
    if let Some(parent) = std::env::var(PARENT_ENV).ok().and_then(|p| p.parse::<i32>().ok()) {
        rustix::process::set_parent_process_death_signal(Some(signal)).context("prctl")?;
        let now = rustix::process::getppid().map(|p| p.as_raw_nonzero().get());
        anyhow::ensure!(now == Some(parent), "the parent has died already");
    }
    Ok(())
}

/// Tells systemd, or `fsd dev`, that we are ready.
fn ready(what: &str) {
    if let Err(error) = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]) {
        tracing::debug!("readiness not told: {error}");
    }
    tracing::info!("{what}");
}

/// Waits for the signal to end; `poll` may end it, too.
fn wait(signals: &mut Signals, mut poll: impl FnMut() -> bool) {
    let mut linger: Option<Instant> = None;
    loop {
        for signal in signals.pending() {
            if signal != SIGUSR1 {
                return;
            }
            linger = Some(Instant::now());
        }
        if poll() || linger.is_some_and(|t| t.elapsed() > LINGER) {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn signals() -> anyhow::Result<Signals> {
    Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1]).context("signal handlers")
}

/// Runs the metadata server.
///
/// # Errors
/// It cannot start, or its store fails at the end.
pub fn meta(config: &Config, key: Vec<u8>, accept_older: bool) -> anyhow::Result<ExitCode> {
    let mut signals = signals()?;
    follow_parent(rustix::process::Signal::USR1)?;
    let server = MetaServer::start(config, key, accept_older)?;
    ready(&format!("metadata server on {}", server.addr()));
    wait(&mut signals, || server.is_older().is_some());
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
    let mut signals = signals()?;
    follow_parent(rustix::process::Signal::USR1)?;
    let node = StorageNode::start(config, id, key, accept_older)?;
    ready(&format!("storage node {id} on {}", node.addr()));
    wait(&mut signals, || false);
    node.stop(forget)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs a mount.
///
/// # Errors
/// It cannot join or mount.
pub fn mount(config: &Config, key: Vec<u8>, options: &MountOptions) -> anyhow::Result<ExitCode> {
    let mut signals = signals()?;
    follow_parent(rustix::process::Signal::TERM)?;
    let mount = Mount::start(config, key, options)?;
    ready(&format!(
        "mounted on {} ({:?})",
        mount.point().display(),
        mount.mode()
    ));
    wait(&mut signals, || mount.is_gone());
    let doomed = mount.is_doomed();
    mount.stop();
    Ok(if doomed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
