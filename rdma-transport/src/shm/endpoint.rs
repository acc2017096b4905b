//! The endpoint as the application sees it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::event::EventfdFlags;
use rustix::fs::FlockOperation;

use super::core::Core;
use super::host::Host;
use super::layout::Directory;
use super::listen::listen;
use super::{progress, setup};
use crate::base::Base;
use crate::buffer::{Buffer, BufferPool};
use crate::common::LIMITS;
use crate::error::TransportError;
use crate::fabric::{Connection, Fabric, FabricConfig, Handler, Limits};
use crate::kind::FabricKind;
use crate::mem::SharedMem;
use crate::ops::{Access, RegionKey};
use crate::stats::FabricStats;
use crate::threads::Endpoint;

pub(crate) struct ShmFabric {
    pub(super) core: Arc<Core>,
    /// Held until the endpoint is shut down; says that the socket path is in use.
    lock: Mutex<Option<OwnedFd>>,
}

/// Opens an endpoint that listens on a Unix socket path.
pub(crate) fn open(
    config: FabricConfig,
    handler: Arc<dyn Handler>,
) -> Result<Arc<dyn Fabric>, TransportError> {
    let fabric = start(config, handler)?;
    Ok(Arc::new(fabric))
}

pub(super) fn start(config: FabricConfig, handler: Arc<dyn Handler>) -> Result<ShmFabric, TransportError> {
    let (listener, lock) = listen(&config.listen)?;
    let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|e| TransportError::os("create an eventfd", &e.into()))?;
    let host = Host {
        base: Base::new(config, handler, BufferPool::new(None))?,
        directory: Directory::create()?,
        bell,
    };
    let core = Core::new(host, listener)?;
    progress::start(&core)?;
    Ok(ShmFabric {
        core,
        lock: Mutex::new(Some(lock)),
    })
}

impl Fabric for ShmFabric {
    fn kind(&self) -> FabricKind {
        FabricKind::Shm
    }

    fn local_addr(&self) -> String {
        self.core.host.base.config.listen.clone()
    }

    fn limits(&self) -> Limits {
        LIMITS
    }

    fn set_identity(&self, identity: Vec<u8>) {
        self.core.host.base.set_identity(identity);
    }

    fn register(&self, mem: &Arc<SharedMem>, access: Access) -> Result<RegionKey, TransportError> {
        self.core.host.base.check_open()?;
        self.core.register(mem, access)
    }

    fn deregister(&self, key: RegionKey) -> Result<(), TransportError> {
        self.core.deregister(key)
    }

    fn buffer(&self, len: usize) -> Result<Buffer, TransportError> {
        self.core.host.base.buffers.take(len)
    }

    fn connect(&self, addr: &str) -> Result<Arc<dyn Connection>, TransportError> {
        self.core.host.base.check_open()?;
        let conn = setup::connect(&self.core, addr)?;
        Ok(conn)
    }

    fn left_behind(&self) -> Vec<Arc<dyn Connection>> {
        self.core.left_behind()
    }

    fn stats(&self) -> FabricStats {
        self.core.stats()
    }

    fn shutdown(&self) {
        if !self.core.host.base.begin_stop() {
            return;
        }
        let path = &self.core.host.base.config.listen;
        if let Err(e) = rustix::fs::unlink(path) {
            tracing::warn!("remove {path}: {e}");
        }
        self.core.end_threads(path);
        drop(self.core.listener.lock().take());
        if let Some(lock) = self.lock.lock().take()
            // Closing alone would not do while a child that has not yet executed its program holds a copy.
            && let Err(e) = rustix::fs::flock(&lock, FlockOperation::Unlock)
        {
            tracing::warn!("unlock {path}: {e}");
        }
        // The lock file stays: removing it would let two later processes lock different files.
    }
}

impl Drop for ShmFabric {
    fn drop(&mut self) {
        self.shutdown();
    }
}
