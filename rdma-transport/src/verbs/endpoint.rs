//! The endpoint as the application sees it.

use std::sync::Arc;
use std::time::Instant;

use mio::Poll;

use super::adapter::Adapter;
use super::conn::{LINGER, VerbsConn};
use super::progress::{self, Verbs};
use super::wire::Control;
use super::{region, setup};
use crate::buffer::Buffer;
use crate::common::{self, LIMITS};
use crate::error::TransportError;
use crate::fabric::{Connection, Fabric, FabricConfig, Handler, Limits};
use crate::handshake::Provider;
use crate::kind::FabricKind;
use crate::mem::SharedMem;
use crate::ops::{Access, RegionKey};
use crate::options::VerbsOptions;
use crate::stats::FabricStats;
use crate::stream::{self, Core, Host, Listening};

pub(crate) struct VerbsFabric {
    core: Arc<Core<VerbsConn>>,
    adapter: Arc<Adapter>,
}

/// Opens an endpoint that listens on `host:port`.
pub(crate) fn open(
    config: FabricConfig,
    options: &VerbsOptions,
    handler: Arc<dyn Handler>,
) -> Result<Arc<dyn Fabric>, TransportError> {
    let listening = Listening::on(&config.listen)?;
    let adapter = Adapter::open(listening.addr(), options)?;
    let poll = Poll::new().map_err(|e| TransportError::os("create an epoll instance", &e))?;
    let host = Host::new(config, handler, adapter.buffers(), &poll)?;
    let core = Arc::new(Core::new(host, listening, Provider::Verbs));
    progress::watch(&adapter, &poll)?;
    let drive = Verbs {
        core: Arc::clone(&core),
        adapter: Arc::clone(&adapter),
    };
    stream::start("fabric-verbs", drive, poll)?;
    Ok(Arc::new(VerbsFabric { core, adapter }))
}

impl Fabric for VerbsFabric {
    fn kind(&self) -> FabricKind {
        FabricKind::Verbs
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
        let mr = region::remote(&self.adapter.device, mem, access)?;
        self.adapter.regions.add(mr, access)
    }

    fn deregister(&self, key: RegionKey) -> Result<(), TransportError> {
        // The adapter lets go of the memory here, after what it is just doing with it.
        drop(self.adapter.regions.remove(key)?);
        // The adapter's own key may be given to another region: peers must not go on using it.
        for conn in self.core.conns.lock().iter() {
            if let Err(e) = conn.stream.send(&Control::Nowhere(key.0)) {
                conn.fail(conn.lost(&e));
            }
        }
        Ok(())
    }

    fn buffer(&self, len: usize) -> Result<Buffer, TransportError> {
        self.core.host.base.buffers.take(len)
    }

    fn connect(&self, addr: &str) -> Result<Arc<dyn Connection>, TransportError> {
        self.core.host.base.check_open()?;
        let conn = setup::connect(&self.core, &self.adapter, addr)?;
        Ok(conn)
    }

    fn stats(&self) -> FabricStats {
        self.core.stats()
    }

    fn shutdown(&self) {
        if !common::on_progress_thread() {
            let deadline = Instant::now() + LINGER;
            let conns = self.core.conns.lock().clone();
            conns.iter().for_each(|conn| conn.drain(deadline));
        }
        if self.core.shutdown() {
            self.adapter.regions.clear();
        }
    }
}

impl Drop for VerbsFabric {
    fn drop(&mut self) {
        self.shutdown();
    }
}
