//! What can be wrong with a configuration.

use std::path::PathBuf;

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {error}")]
    Read {
        /// File.
        path: PathBuf,
        /// The system's answer.
        error: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{path}: {detail}")]
    Syntax {
        /// File.
        path: PathBuf,
        /// Where and what.
        detail: String,
    },
    /// The values contradict each other or a limit.
    #[error("{path}: {detail}")]
    Value {
        /// File.
        path: PathBuf,
        /// What, and what to do.
        detail: String,
    },
    /// The key file is not protected.
    #[error("the key file {path} can be read by others (mode {mode:o}): run chmod 600 {path}")]
    KeyExposed {
        /// File.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
}
