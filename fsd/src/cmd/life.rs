//! What a role and who has started it tell each other.

use anyhow::Context;

use fsd_client::Mounted;

/// Set by `fsd dev`, and by a keeper, for its children: they end when it dies.
pub const PARENT_ENV: &str = "FSD_PARENT";
/// Set for the next life of a mount: what the one before has left mounted.
pub const FORMER_ENV: &str = "FSD_FORMER";

/// Arranges for a signal when the parent dies, if we are a child of `fsd dev` or of a keeper.
///
/// # Errors
/// The system refuses, or the parent has died already.
pub fn follow_parent(signal: rustix::process::Signal) -> anyhow::Result<()> {
    if let Some(parent) = std::env::var(PARENT_ENV).ok().and_then(|p| p.parse::<i32>().ok()) {
        rustix::process::set_parent_process_death_signal(Some(signal)).context("prctl")?;
        let now = rustix::process::getppid().map(|p| p.as_raw_nonzero().get());
        anyhow::ensure!(now == Some(parent), "the parent has died already");
    }
    Ok(())
}

/// Tells systemd, or `fsd dev`, that we are ready.
pub fn ready(what: &str) {
    if let Err(error) = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]) {
        tracing::debug!("readiness not told: {error}");
    }
    tracing::info!("{what}");
}

/// What a former life of this process has left mounted, if this is not the first.
#[must_use]
pub fn former() -> Option<Mounted> {
    Mounted::from_text(&std::env::var(FORMER_ENV).ok()?)
}
