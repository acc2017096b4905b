//! The cluster's key.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use super::error::ConfigError;

/// Reads a key file: it must be its reader's alone.
///
/// # Errors
/// [`ConfigError`] with the file and what to do.
pub fn read_key(path: &Path) -> Result<Vec<u8>, ConfigError> {
    let read = |error| ConfigError::Read {
        path: path.to_owned(),
        error,
    };
    let meta = match fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(ConfigError::Value {
                path: path.to_owned(),
                detail: format!(
                    "there is no cluster key: make one with fsd keygen {}, and copy it to every host",
                    path.display()
                ),
            });
        }
        meta => meta.map_err(read)?,
    };
    let mode = meta.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(ConfigError::KeyExposed {
            path: path.to_owned(),
            mode,
        });
    }
    let me = rustix::process::geteuid().as_raw();
    if me != 0 && meta.uid() != me {
        let detail = format!(
            "belongs to uid {}, not to the user running fsd ({me})",
            meta.uid()
        );
        return Err(ConfigError::Value {
            path: path.to_owned(),
            detail,
        });
    }
    let key = fs::read(path).map_err(read)?;
    if key.len() < 16 {
        let detail = format!(
            "the key has {} bytes, at least 16 are needed: run fsd keygen",
            key.len()
        );
        return Err(ConfigError::Value {
            path: path.to_owned(),
            detail,
        });
    }
    Ok(key)
}
