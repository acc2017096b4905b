//! Times of files.

use serde::{Deserialize, Serialize};

/// Nanoseconds since the epoch, negative before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Time(pub i64);

impl Time {
    /// The node's clock, now.
    #[must_use]
    pub fn now() -> Self {
        Self::from_system(rt::time::system_now())
    }

    /// From the standard library's type; saturates at the ends (years 1677 and 2262).
    #[must_use]
    pub fn from_system(time: std::time::SystemTime) -> Self {
        match time.duration_since(std::time::UNIX_EPOCH) {
            Ok(d) => Self(i64::try_from(d.as_nanos()).unwrap_or(i64::MAX)),
            Err(e) => Self(i64::try_from(e.duration().as_nanos()).map_or(i64::MIN, |n| -n)),
        }
    }

    /// To the standard library's type.
    #[must_use]
    pub fn to_system(self) -> std::time::SystemTime {
        let distance = std::time::Duration::from_nanos(self.0.unsigned_abs());
        if self.0 >= 0 {
            std::time::UNIX_EPOCH + distance
        } else {
            std::time::UNIX_EPOCH - distance
        }
    }
}
