//! Registering memory, and why it may fail.

use std::io;
use std::sync::Arc;

use rustix::process::{Resource, getrlimit};

use super::device::Device;
use super::ffi::{Mr, Pd, access};
use crate::mem::SharedMem;
use crate::{Access, TransportError};

/// Memory that only this side's adapter uses.
pub(super) fn local(pd: &Arc<Pd>, mem: &Arc<SharedMem>) -> Result<Mr, TransportError> {
    Mr::new(pd, mem, access::LOCAL_WRITE).map_err(|e| refused(mem, &pd.context.name, &e))
}

/// Memory that peers reach.
pub(super) fn remote(device: &Device, mem: &Arc<SharedMem>, rights: Access) -> Result<Mr, TransportError> {
    let name = &device.pd.context.name;
    if mem.len() as u64 > device.limits.max_mr_size {
        return Err(TransportError::Os {
            what: format!("register {} with {name}", mem.name()),
            reason: format!(
                "it has {} bytes, the device takes {} in a region",
                mem.len(),
                device.limits.max_mr_size
            ),
        });
    }
    let mut flags = 0;
    if rights.read {
        flags |= access::REMOTE_READ;
    }
    // Remote writes and atomics require local ones.
    if rights.write {
        flags |= access::REMOTE_WRITE | access::LOCAL_WRITE;
    }
    if rights.atomic {
        flags |= access::REMOTE_ATOMIC | access::LOCAL_WRITE;
    }
    if device.limits.on_demand {
        // Nothing is pinned then. Some devices say they can and do not for every kind of memory.
        match Mr::new(&device.pd, mem, flags | access::ON_DEMAND) {
            Ok(mr) => return Ok(mr),
            Err(e) => tracing::debug!("register {} on demand with {name}: {e}", mem.name()),
        }
    }
    Mr::new(&device.pd, mem, flags).map_err(|e| refused(mem, name, &e))
}

fn refused(mem: &SharedMem, device: &str, e: &io::Error) -> TransportError {
    let what = format!("register {} ({} bytes) with {device}", mem.name(), mem.len());
    let limit = getrlimit(Resource::Memlock).current;
    TransportError::Os {
        what,
        reason: reason(mem.len() as u64, limit, locked(), e),
    }
}

/// Bytes that this process has locked, as far as the kernel says.
fn locked() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let pages = status
        .lines()
        .find_map(|l| l.strip_prefix("VmPin:").or_else(|| l.strip_prefix("VmLck:")))
        .and_then(|l| l.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    pages.unwrap_or(0) * 1024
}

fn reason(need: u64, limit: Option<u64>, locked: u64, e: &io::Error) -> String {
    match limit {
        Some(limit) if e.raw_os_error() == Some(libc::ENOMEM) => {
            let kib = |bytes: u64| bytes.div_ceil(1024);
            let total = kib(locked.saturating_add(need));
            format!(
                "the limit of locked memory is {} KiB, {total} KiB are needed: raise it with `ulimit -l {total}` \
                 (or more) before starting, or LimitMEMLOCK=infinity in the systemd unit",
                kib(limit)
            )
        }
        _ => e.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_low_limit_is_told_with_the_remedy() {
        let full = io::Error::from_raw_os_error(libc::ENOMEM);
        let text = reason(1 << 20, Some(64 << 10), 4096, &full);
        for part in ["64 KiB", "1028 KiB", "ulimit -l 1028", "LimitMEMLOCK"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!reason(1, None, 0, &full).contains("ulimit"));
        let other = io::Error::from_raw_os_error(libc::EINVAL);
        assert!(!reason(1, Some(0), 0, &other).contains("ulimit"));
    }
}
