//! What the program logs.

use std::io::IsTerminal as _;

/// What is logged by default. The FUSE library takes two things for failures that are none: that the process behind a request was
/// killed before the answer, and that a mount is gone when its session ends.
const LOG: &str = "warn,fsd=info,fuser::reply=off,fuser::mnt=error";
/// The same of roles that run beside a command, whose output is the user's: only what is wrong.
pub const QUIET_LOG: &str = "warn,fuser::reply=off,fuser::mnt=error";

/// Starts logging to standard error.
pub fn start() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(LOG));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .try_init();
}
