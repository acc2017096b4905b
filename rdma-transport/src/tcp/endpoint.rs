//! The endpoint: registered regions, setting up connections.

use std::sync::Arc;

use mio::Poll;

use super::conn::TcpConn;
use super::progress::Tcp;
use super::rx::Memory;
use crate::buffer::{Buffer, BufferPool};
use crate::common::LIMITS;
use crate::error::TransportError;
use crate::fabric::{Connection, Fabric, FabricConfig, Handler, Limits};
use crate::handshake::Provider;
use crate::kind::FabricKind;
use crate::mem::SharedMem;
use crate::ops::{Access, RegionKey};
use crate::stats::FabricStats;
use crate::stream::{self, Core, Host, Listening};

pub(crate) struct TcpFabric {
    core: Arc<Core<TcpConn>>,
    regions: Arc<Memory>,
}

/// Opens an endpoint that listens on `host:port`.
pub(crate) fn open(
    config: FabricConfig,
    handler: Arc<dyn Handler>,
) -> Result<Arc<dyn Fabric>, TransportError> {
    let poll = Poll::new().map_err(|e| TransportError::os("create an epoll instance", &e))?;
    let listening = Listening::on(&config.listen)?;
    let host = Host::new(config, handler, BufferPool::new(None), &poll)?;
    let core = Arc::new(Core::new(host, listening, Provider::Tcp));
    let regions = Arc::new(Memory::default());
    let drive = Tcp {
        core: Arc::clone(&core),
        regions: Arc::clone(&regions),
    };
    stream::start("fabric-tcp", drive, poll)?;
    Ok(Arc::new(TcpFabric { core, regions }))
}

impl Fabric for TcpFabric {
    fn kind(&self) -> FabricKind {
        FabricKind::Tcp
    }

    fn local_addr(&self) -> String {
        self.core.addr().to_string()
    }

    fn limits(&self) -> Limits {
        LIMITS
    }

    fn set_identity(&self, identity: Vec<u8>) {
        self.core.host.base.set_identity(identity);
    }

    fn register(&self, mem: &Arc<SharedMem>, access: Access) -> Result<RegionKey, TransportError> {
        self.core.host.base.check_open()?;
        self.regions.add(Arc::clone(mem), access)
    }

    fn deregister(&self, key: RegionKey) -> Result<(), TransportError> {
        // Operations look at the region as long as they are executed.
        self.regions.remove(key).map(drop)
    }

    fn buffer(&self, len: usize) -> Result<Buffer, TransportError> {
        self.core.host.base.buffers.take(len)
    }

    fn connect(&self, addr: &str) -> Result<Arc<dyn Connection>, TransportError> {
        self.core.host.base.check_open()?;
        let (base, sock) = self.core.greet(addr, None)?.base(false);
        let conn = TcpConn::new(base, &self.core.host, sock);
        self.core.add(&conn)?;
        Ok(conn)
    }

    fn stats(&self) -> FabricStats {
        self.core.stats()
    }

    fn shutdown(&self) {
        self.core.shutdown();
    }
}

impl Drop for TcpFabric {
    fn drop(&mut self) {
        self.shutdown();
    }
}
