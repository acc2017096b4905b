//! The registered regions of an endpoint, by their keys.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use parking_lot::RwLock;

use crate::common::{self, remote_access};
use crate::error::TransportError;
use crate::mem::SharedMem;
use crate::ops::{Access, RegionKey, RemoteAddr};

/// `M` is the memory as the provider keeps it.
pub(crate) struct Regions<M>(RwLock<HashMap<u64, (M, Access)>>);

impl<M> Default for Regions<M> {
    fn default() -> Self {
        Self(RwLock::default())
    }
}

impl<M> Regions<M> {
    /// Adds one under a new key.
    pub(crate) fn add(&self, mem: M, access: Access) -> Result<RegionKey, TransportError> {
        let mut regions = self.0.write();
        loop {
            let key = common::region_key(0)?;
            if let Entry::Vacant(entry) = regions.entry(key.0) {
                entry.insert((mem, access));
                return Ok(key);
            }
        }
    }

    /// Takes one out. Who looks at it in [`Regions::with`] is waited for.
    pub(crate) fn remove(&self, key: RegionKey) -> Result<M, TransportError> {
        match self.0.write().remove(&key.0) {
            Some((mem, _)) => Ok(mem),
            None => Err(TransportError::Invalid(format!(
                "region {:#x} is not registered",
                key.0
            ))),
        }
    }

    /// Looks at one, if it is there, which stays as long as this takes.
    pub(crate) fn with<R>(&self, key: RegionKey, look: impl FnOnce(Option<&(M, Access)>) -> R) -> R {
        look(self.0.read().get(&key.0))
    }

    #[cfg(feature = "verbs")]
    pub(crate) fn clear(&self) {
        self.0.write().clear();
    }
}

/// Where an operation's memory begins in a region, or why the region refuses it.
#[inline]
pub(crate) fn place_in(
    (mem, access): (&SharedMem, Access),
    at: RemoteAddr,
    len: usize,
    permits: impl Fn(Access) -> bool,
) -> Result<usize, TransportError> {
    if !permits(access) {
        return Err(remote_access(at, len as u64, "the region does not permit this"));
    }
    match usize::try_from(at.offset) {
        Ok(off) if mem.contains(off, len) => Ok(off),
        _ => Err(remote_access(at, len as u64, "outside of the region")),
    }
}
