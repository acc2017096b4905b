//! Error numbers.

use serde::{Deserialize, Serialize};

/// A POSIX error number as it travels and as FUSE wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[error("{}", std::io::Error::from_raw_os_error(*.0))]
pub struct Errno(pub i32);
