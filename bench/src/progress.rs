//! Progress on stderr: a bar on a terminal, a line a step elsewhere. And the wish to stop.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

static STOP: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on Ctrl-C and the like make [`check`] fail, so that everything is taken down in order; the second
/// one ends the process at once.
///
/// # Errors
/// The system refuses.
pub fn catch_signals() -> anyhow::Result<()> {
    let flag = STOP.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(flag)).context("signals")?;
        signal_hook::flag::register(signal, Arc::clone(flag)).context("signals")?;
    }
    Ok(())
}

/// Has somebody asked us to stop?
pub fn stopped() -> bool {
    STOP.get().is_some_and(|s| s.load(Ordering::Relaxed))
}

/// Fails once somebody has asked us to stop.
///
/// # Errors
/// Then.
pub fn check() -> anyhow::Result<()> {
    if stopped() {
        bail!("interrupted");
    }
    Ok(())
}

/// Steps of something long.
pub struct Progress {
    bar: ProgressBar,
    lines: bool,
}

impl Progress {
    /// `steps` steps of `what`.
    pub fn new(what: &str, steps: u64) -> Self {
        let lines = !std::io::stderr().is_terminal();
        let bar = if lines {
            ProgressBar::hidden()
        } else {
            ProgressBar::new(steps)
        };
        if let Ok(style) =
            ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len} {elapsed} {wide_msg}")
        {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(what.to_owned());
        if lines {
            eprintln!("{what} …");
        }
        Self { bar, lines }
    }

    /// What the next step is.
    pub fn step(&self, what: impl Into<String>) {
        let what = what.into();
        if self.lines {
            eprintln!("  {what}");
        }
        self.bar.set_message(what);
        self.bar.inc(1);
    }

    /// One of very many steps: no line of its own.
    pub fn tick(&self) {
        self.bar.inc(1);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
