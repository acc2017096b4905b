//! A role's endpoint on the fabric.

use std::sync::Arc;
use std::time::Duration;

use rdma_transport::{Fabric, FabricConfig, TransportError, VerbsOptions};

use crate::config::{Config, FabricChoice};
use fsd_proto::rpc::{Calls, Router, Service};
use fsd_proto::wire::{Hello, Role};

/// An endpoint, and the calls made from it.
pub struct Endpoint {
    /// Connects, registers memory, shuts down.
    pub fabric: Arc<dyn Fabric>,
    /// Calls that wait for an answer.
    pub calls: Arc<Calls>,
    /// Names this life of the process.
    pub life: u64,
}

impl Endpoint {
    /// Opens an endpoint that is reached at `listen`; `service` gets what arrives.
    ///
    /// # Errors
    /// The address is in use, the key is too short, the system refuses.
    pub fn open(
        config: &Config,
        role: Role,
        listen: String,
        key: Vec<u8>,
        service: Arc<dyn Service>,
    ) -> Result<Self, TransportError> {
        let (calls, life) = (Arc::new(Calls::default()), rt::random());
        let fabric_config = FabricConfig {
            listen,
            key,
            identity: Hello::new(&config.cluster, role, life).encode(),
            spin: Duration::from_micros(config.spin_us),
            timeout: Duration::from_millis(config.timeout_ms),
        };
        let router = Router::new(&config.cluster, Arc::clone(&calls), service);
        let fabric = match config.fabric {
            FabricChoice::Verbs => {
                let options = VerbsOptions::from(config.verbs.clone()).with_env()?;
                rdma_transport::open_verbs(fabric_config, &options, router)?
            }
            other => rdma_transport::open(other.into(), fabric_config, router)?,
        };
        Ok(Self { fabric, calls, life })
    }
}
