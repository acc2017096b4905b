//! What the metadata server asks of mounts, over the connections that they have made: behind a trait, so that tests can answer.

use std::sync::{Arc, OnceLock};

use rdma_transport::{Connection, TransportError};

use fsd_proto::ask::{self, Request as _};
use fsd_proto::rpc::{Calls, RpcError};
use fsd_proto::wire::{MountRequest, View};

/// Called when a mount has done what it was asked, or cannot be asked any more.
pub type Done = Box<dyn FnOnce(Result<(), RpcError>) + Send>;

/// What the server asks of mounts. None of it waits.
pub trait Mounts: Send + Sync {
    /// Tells one who takes part.
    fn tell(&self, conn: &Arc<dyn Connection>, view: View, done: Done);
    /// Tells one which lease tables there are.
    fn tables(&self, conn: &Arc<dyn Connection>, tables: Vec<u64>, done: Done);
    /// Passes a frame of lease messages on, of the mount and the life that it is `from`.
    fn relay(&self, conn: &Arc<dyn Connection>, from: (u16, u64), frame: Vec<u8>, done: Done);
}

/// The mounts, by the fabric.
#[derive(Default)]
pub struct FabricMounts(OnceLock<Arc<Calls>>);

impl FabricMounts {
    /// They can be asked from now on.
    pub fn attach(&self, calls: Arc<Calls>) {
        let _ = self.0.set(calls);
    }

    fn ask(&self, conn: &Arc<dyn Connection>, request: &MountRequest, done: Done) {
        match self.0.get() {
            Some(calls) => calls.call_async(conn, request, done),
            None => done(Err(TransportError::Shutdown.into())),
        }
    }
}

impl Mounts for FabricMounts {
    fn tell(&self, conn: &Arc<dyn Connection>, view: View, done: Done) {
        self.ask(conn, &ask::mount::View { view }.message(), done);
    }

    fn tables(&self, conn: &Arc<dyn Connection>, tables: Vec<u64>, done: Done) {
        self.ask(conn, &MountRequest::Tables(tables), done);
    }

    fn relay(&self, conn: &Arc<dyn Connection>, (from, life): (u16, u64), frame: Vec<u8>, done: Done) {
        self.ask(conn, &MountRequest::Relay { from, life, frame }, done);
    }
}
