//! The folder of a run: its logs, and what was done when.

use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use crate::error::{At, Error, Result};
use crate::process::lock;
use crate::tools;

/// Room for the logs and results of a run, in MiB.
const LOG_SPACE: u64 = 100;

/// The folder of a run.
#[derive(Debug)]
pub(crate) struct Journal {
    logs: PathBuf,
    step: Mutex<String>,
    /// What was done and how it ended, with times.
    file: Mutex<File>,
    started: Instant,
    /// Held as long as the run lasts.
    _lock: File,
}

impl Journal {
    /// Makes the folder anew, for one run at a time.
    pub(crate) fn begin(logs: &Path) -> Result<Self> {
        let held = lock_logs(logs)?;
        match fs::remove_dir_all(logs) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::Io {
                    what: format!("empty the folder {}", logs.display()),
                    source: error,
                });
            }
            _ => {}
        }
        let job = logs.join("job");
        fs::create_dir_all(&job).at(|| format!("make the folder {}", job.display()))?;
        tools::require_space(logs, LOG_SPACE)?;
        let path = logs.join("journal");
        let file = File::create(&path).at(|| format!("write {}", path.display()))?;
        Ok(Self {
            logs: logs.to_owned(),
            step: Mutex::new("boot".into()),
            file: Mutex::new(file),
            started: Instant::now(),
            _lock: held,
        })
    }

    /// The folder.
    pub(crate) fn logs(&self) -> &Path {
        &self.logs
    }

    /// The folder in it that guests have as /job.
    pub(crate) fn job(&self) -> PathBuf {
        self.logs.join("job")
    }

    /// What is being done.
    pub(crate) fn step(&self) -> String {
        lock(&self.step).clone()
    }

    /// This is done from here on.
    pub(crate) fn enter(&self, what: &str) {
        self.write_down(what);
        what.clone_into(&mut lock(&self.step));
    }

    /// Writes a line, or several.
    pub(crate) fn write_down(&self, what: &str) {
        let time = self.started.elapsed().as_secs_f64();
        // A full disk fails a run where its results are written.
        let _ = writeln!(
            lock(&self.file),
            "{time:8.2} {}",
            what.trim_end().replace('\n', "\n         ")
        );
    }
}

/// Keeps others from using the same folder: they would empty it.
fn lock_logs(logs: &Path) -> Result<File> {
    let mut name = logs.as_os_str().to_owned();
    name.push(".lock");
    let doing = || format!("lock {}", Path::new(&name).display());
    fs::create_dir_all(logs.parent().unwrap_or(logs)).at(doing)?;
    let file = File::create(&name).at(doing)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Busy {
            logs: logs.to_owned(),
        }),
        Err(TryLockError::Error(source)) => Err(Error::Io {
            what: doing(),
            source,
        }),
    }
}
