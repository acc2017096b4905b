//! What can go wrong, each with one sentence for the person at the terminal.

use std::io;
use std::path::PathBuf;

use serde::Serialize;

/// Result of the lab's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of the lab.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something that the host must provide is not there.
    #[error("{what} is missing: {advice}")]
    Missing {
        /// What is missing.
        what: String,
        /// What to do about it.
        advice: String,
    },
    /// An operation of the host's operating system failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried, as an infinitive.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A program of the host that the lab uses failed.
    #[error("{tool} failed ({status}): {output}")]
    Tool {
        /// Its name.
        tool: String,
        /// How it ended.
        status: String,
        /// The end of what it printed.
        output: String,
    },
    /// A guest did not come up.
    #[error("{guest} did not boot: {why} (console: {})", .console.display())]
    Boot {
        /// Which guest.
        guest: String,
        /// What was seen.
        why: String,
        /// Where to look.
        console: PathBuf,
    },
    /// A guest ended, or its agent did.
    #[error("{guest} is gone ({doing})")]
    Gone {
        /// Which guest.
        guest: String,
        /// What was under way.
        doing: String,
    },
    /// A wall-clock limit passed.
    #[error("{what}: not finished within {seconds} s")]
    TimeOut {
        /// What was waited for.
        what: String,
        /// The limit.
        seconds: u64,
    },
    /// A command inside a guest failed.
    #[error("`{command}` on {node} {status}{output}")]
    Command {
        /// The command.
        command: String,
        /// The node it ran on.
        node: String,
        /// How it ended.
        status: String,
        /// The end of what it printed, on lines of its own.
        output: String,
    },
    /// A test in a guest said of itself that it hung.
    #[error("{0}")]
    Hung(String),
    /// A guest's kernel printed a warning or worse.
    #[error("the kernel of {guest} complained: {line} (console: {})", .console.display())]
    Kernel {
        /// Which guest.
        guest: String,
        /// The first such line.
        line: String,
        /// Where to look.
        console: PathBuf,
    },
    /// A scenario failed at one of its steps.
    #[error("at the step \"{step}\": {source} (logs: {})", .logs.display())]
    Step {
        /// Which step.
        step: String,
        /// What failed.
        source: Box<Error>,
        /// Where to look.
        logs: PathBuf,
    },
    /// Another lab uses what this one would.
    #[error("another lab is running this and writes {}: wait for it, or name another folder with --logs", .logs.display())]
    Busy {
        /// The folder.
        logs: PathBuf,
    },
    /// A scenario's check did not hold, or what it was asked to do makes no sense.
    #[error("{0}")]
    Check(String),
    /// A message between host and guest, or to the emulator, that could not be understood.
    #[error("protocol error with {peer}: {why}")]
    Protocol {
        /// The other side.
        peer: String,
        /// What was wrong.
        why: String,
    },
}

/// What kind of failure a run ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Trouble {
    /// Something was not as it should be.
    Failed,
    /// A guest's kernel complained.
    Warning,
    /// Something did not end.
    Hang,
}

impl Error {
    /// What kind of failure this is.
    pub fn trouble(&self) -> Trouble {
        match self {
            Error::Kernel { .. } => Trouble::Warning,
            Error::TimeOut { .. } | Error::Hung(_) => Trouble::Hang,
            Error::Step { source, .. } => source.trouble(),
            _ => Trouble::Failed,
        }
    }

    /// Something missing on the host and what to do about it.
    pub fn missing(what: impl Into<String>, advice: impl Into<String>) -> Self {
        Error::Missing {
            what: what.into(),
            advice: advice.into(),
        }
    }

    /// A check of a scenario that did not hold.
    pub fn check(what: impl Into<String>) -> Self {
        Error::Check(what.into())
    }
}

/// Says what an operating-system error was met at.
pub trait At<T> {
    /// `what` is an infinitive: "cannot {what}: …".
    ///
    /// # Errors
    /// The error of `self`, with that.
    fn at(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { what: what(), source })
    }
}

impl<T> At<T> for std::result::Result<T, rustix::io::Errno> {
    fn at(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|errno| Error::Io {
            what: what(),
            source: errno.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Error, Trouble};

    #[test]
    fn a_failed_step_is_of_the_kind_of_what_failed_in_it() {
        let step = |source| Error::Step {
            step: "step 1".into(),
            source: Box::new(source),
            logs: "/logs".into(),
        };
        let late = Error::TimeOut {
            what: "`sleep 9`".into(),
            seconds: 1,
        };
        assert_eq!(step(late).trouble(), Trouble::Hang);
        assert_eq!(step(Error::check("no")).trouble(), Trouble::Failed);
    }
}
