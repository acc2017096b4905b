//! A role's endpoint on the fabric.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rdma_transport::sim::SimNet;
use rdma_transport::{Fabric, FabricConfig, Handler, TransportError, VerbsOptions};

use crate::config::{Config, FabricChoice};
use fsd_proto::rpc::{Calls, Router, Service};
use fsd_proto::wire::{Hello, Role};

/// Where endpoints are made: the provider that a configuration names, or a simulated network.
pub trait Network: Send + Sync {
    /// Makes one.
    ///
    /// # Errors
    /// The address is in use, the key is too short, the system refuses.
    fn open(
        &self,
        config: FabricConfig,
        handler: Arc<dyn Handler>,
    ) -> Result<Arc<dyn Fabric>, TransportError>;
}

impl Network for Config {
    fn open(
        &self,
        config: FabricConfig,
        handler: Arc<dyn Handler>,
    ) -> Result<Arc<dyn Fabric>, TransportError> {
        match self.fabric {
            FabricChoice::Verbs => {
                let options = VerbsOptions::from(self.verbs.clone()).with_env()?;
                rdma_transport::open_verbs(config, &options, handler)
            }
            other => rdma_transport::open(other.into(), config, handler),
        }
    }
}

impl Network for SimNet {
    fn open(
        &self,
        config: FabricConfig,
        handler: Arc<dyn Handler>,
    ) -> Result<Arc<dyn Fabric>, TransportError> {
        self.endpoint(config, handler)
    }
}

/// Where an endpoint is.
pub struct Place {
    /// By which it is reached.
    pub listen: String,
    /// As in [`FabricConfig`]: for memory that outlives its process.
    pub keep: Option<PathBuf>,
}

impl From<String> for Place {
    fn from(listen: String) -> Self {
        Self { listen, keep: None }
    }
}

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
        Self::open_in(config, config, role, listen.into(), key, service)
    }

    /// As [`Endpoint::open`], in a network of the caller's choice.
    ///
    /// # Errors
    /// As [`Endpoint::open`].
    pub fn open_in(
        network: &dyn Network,
        config: &Config,
        role: Role,
        Place { listen, keep }: Place,
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
            keep,
        };
        let router = Router::new(&config.cluster, Arc::clone(&calls), service);
        let fabric = network.open(fabric_config, router)?;
        Ok(Self { fabric, calls, life })
    }
}
