//! `fsd replace`: another process, perhaps of a newer program, serves what is mounted, while programs go on.
//!
//! The daemon starts its successor itself, so that this is where the daemon was: the same arguments and environment, the same unit of the system's
//! manager. The command only asks it to.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};

use anyhow::{Context, anyhow};

use super::life::{FORMER_ENV, SUCCESSOR_ENV, predecessor};
use fsd_client::mount::replace;

/// Set for processes whose end is taken for the end of their role by who has started them.
pub const ATTENDED_ENV: &str = "FSD_ATTENDED";

/// Arguments of `fsd replace`.
#[derive(Debug, clap::Args)]
pub struct ReplaceArgs {
    /// The program that serves the mount from now on (default: the one that this command is of).
    #[arg(long)]
    pub program: Option<PathBuf>,
    /// Where it is mounted.
    pub point: PathBuf,
}

/// Has a mount's daemon replaced.
///
/// # Errors
/// Nothing is mounted there; it goes on as before.
pub fn run(args: &ReplaceArgs) -> anyhow::Result<ExitCode> {
    let shown = args.point.display();
    let point = args.point.canonicalize().with_context(|| shown.to_string())?;
    let program = match &args.program {
        Some(program) => program
            .canonicalize()
            .with_context(|| program.display().to_string())?,
        None => std::env::current_exe().context("the path of fsd")?,
    };
    let process = replace::control::replace(&point, &program).map_err(|why| anyhow!(why))?;
    println!("{shown} is served by process {process} now");
    Ok(ExitCode::SUCCESS)
}

/// Starts a successor of this process.
///
/// # Errors
/// It cannot be started, or must not be.
pub fn start(program: &Path, stream: UnixStream) -> io::Result<Child> {
    if std::env::var_os(ATTENDED_ENV).is_some() {
        let why = "fsd dev and fsd launch take the end of this process for the end of the mount";
        return Err(io::Error::other(why));
    }
    Command::new(program)
        .args(std::env::args_os().skip(1))
        .env(SUCCESSOR_ENV, "1")
        .env_remove(FORMER_ENV)
        .stdin(OwnedFd::from(stream))
        .spawn()
}

/// Tells the daemon that was to be replaced why it is not, if so.
pub fn refuse(why: &anyhow::Error) {
    if let Some(stream) = predecessor() {
        replace::refuse(stream, &format!("{why:#}"));
    }
}
