//! How the verbs provider uses its device; also there in builds without it, so that configurations can name it.

use crate::TransportError;

/// Choices of the verbs provider. What is not said is found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerbsOptions {
    /// Device, as `ibv_devices` lists it; else the one that has the address listened on, or the first active one.
    pub device: Option<String>,
    /// Port of the device, from 1.
    pub port: Option<u8>,
    /// Index in the port's table of addresses; needed with RoCE only, and only where several fit.
    pub gid_index: Option<u8>,
    /// How long the adapter waits for an acknowledgement before it sends again: 4.096 µs · 2^this; 1 to 31.
    pub timeout: u8,
    /// How often it sends again before it gives the peer up; 0 to 6, as 7 means for ever on some adapters.
    pub retry: u8,
}

impl Default for VerbsOptions {
    fn default() -> Self {
        Self {
            device: None,
            port: None,
            gid_index: None,
            // 2 s: with less, hosts that are merely busy send again, which some adapters answer with false errors.
            timeout: 19,
            retry: 6,
        }
    }
}

impl VerbsOptions {
    /// These, changed by `DISTFUSE_VERBS_DEVICE`, `_PORT`, `_GID_INDEX`, `_TIMEOUT` and `_RETRY` in the
    /// environment: what differs between nodes need not be in a file that they share.
    ///
    /// # Errors
    /// [`TransportError::Invalid`] for a variable that is not a number.
    pub fn with_env(mut self) -> Result<Self, TransportError> {
        self.device = std::env::var("DISTFUSE_VERBS_DEVICE").ok().or(self.device);
        self.port = number("DISTFUSE_VERBS_PORT")?.or(self.port);
        self.gid_index = number("DISTFUSE_VERBS_GID_INDEX")?.or(self.gid_index);
        self.timeout = number("DISTFUSE_VERBS_TIMEOUT")?.unwrap_or(self.timeout);
        self.retry = number("DISTFUSE_VERBS_RETRY")?.unwrap_or(self.retry);
        Ok(self)
    }

    #[cfg_attr(not(feature = "verbs"), allow(dead_code))]
    pub(crate) fn check(&self) -> Result<(), TransportError> {
        if !(1..=31).contains(&self.timeout) {
            return Err(TransportError::Invalid(format!(
                "verbs timeout {}: 1 to 31 are possible",
                self.timeout
            )));
        }
        if self.retry > 6 {
            return Err(TransportError::Invalid(format!(
                "verbs retry {}: 0 to 6 are possible (7 means for ever on some adapters)",
                self.retry
            )));
        }
        Ok(())
    }
}

fn number(name: &str) -> Result<Option<u8>, TransportError> {
    match std::env::var(name) {
        Ok(value) => value
            .parse()
            .map(Some)
            .map_err(|_| TransportError::Invalid(format!("{name}={value} is not a number up to 255"))),
        Err(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn useless_options_are_refused() {
        assert!(VerbsOptions::default().check().is_ok());
        for (timeout, retry) in [(0, 6), (32, 6), (19, 7)] {
            let options = VerbsOptions {
                timeout,
                retry,
                ..VerbsOptions::default()
            };
            assert!(matches!(options.check(), Err(TransportError::Invalid(_))));
        }
    }
}
