//! What a kernel says first, which it does once.

use fuser::KernelConfig;
use serde::{Deserialize, Serialize};

use super::made_up::request;

/// What a kernel said in its INIT, and what was asked of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handshake {
    major: u32,
    minor: u32,
    can: u64,
    asked: u64,
}

impl Handshake {
    pub(super) fn new(config: &KernelConfig, asked: u64) -> Self {
        let version = config.kernel_abi();
        Self {
            major: version.0,
            minor: version.1,
            can: config.capabilities().bits(),
            asked,
        }
    }

    /// The INIT, once more (`fuse_init_in` of `linux/fuse.h`).
    pub(super) fn message(self) -> Vec<u8> {
        const INIT: u32 = 26;
        const READ_AHEAD: u32 = 128 << 10;
        /// There is a second word of flags (FUSE_INIT_EXT); the library keeps that to itself.
        const EXTENDED: u32 = 1 << 30;
        const SPARE: usize = 11;
        let words = [
            self.major,
            self.minor,
            READ_AHEAD,
            self.can as u32 | EXTENDED,
            (self.can >> 32) as u32,
        ];
        let spare = [0; SPARE];
        let body: Vec<u8> = words.iter().chain(&spare).flat_map(|w| w.to_ne_bytes()).collect();
        request(INIT, 0, &body)
    }
}
