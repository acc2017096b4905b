//! The simulated network as the test sees it.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::config::SimConfig;
use super::endpoint::SimFabric;
use super::netref::NetRef;
use super::state::{State, What, nanos};
use crate::error::TransportError;
use crate::fabric::{Fabric, FabricConfig, Handler};

/// A deterministic network of endpoints in one process. Clones are the same network.
#[derive(Clone)]
pub struct SimNet(Arc<Mutex<State>>);

impl std::fmt::Debug for SimNet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimNet")
            .field("now", &self.now())
            .finish_non_exhaustive()
    }
}

impl SimNet {
    /// A network without endpoints. The same seed and the same calls give the same run.
    #[must_use]
    pub fn new(seed: u64, config: SimConfig) -> Self {
        Self(Arc::new(Mutex::new(State::new(seed, config))))
    }

    /// Adds an endpoint; `config.listen` is its name.
    ///
    /// # Errors
    /// [`TransportError::Invalid`] for a useless configuration, [`TransportError::Os`] if the name is taken.
    pub fn endpoint(
        &self,
        config: FabricConfig,
        handler: Arc<dyn Handler>,
    ) -> Result<Arc<dyn Fabric>, TransportError> {
        crate::open::check(&config)?;
        let mut state = self.0.lock();
        if state.find(&config.listen).is_some() {
            return Err(TransportError::Os {
                what: format!("listen on {}", config.listen),
                reason: "address in use by a running endpoint".to_owned(),
            });
        }
        let (id, instance, counters) = state.add(&config, handler);
        drop(state);
        Ok(Arc::new(SimFabric::new(
            NetRef::of(&self.0),
            id,
            instance,
            counters,
            config,
        )))
    }

    /// Virtual time since the beginning.
    #[must_use]
    pub fn now(&self) -> Duration {
        Duration::from_nanos(self.0.lock().now)
    }

    /// Lets the next event happen; false if there is none. Must not be called from a callback.
    pub fn step(&self) -> bool {
        let after = self.0.lock().step();
        let Some(after) = after else { return false };
        after.run();
        true
    }

    /// Steps until nothing is left to happen.
    pub fn run_until_idle(&self) {
        while self.step() {}
    }

    /// Has `call` called from [`SimNet::step`] when `delay` of virtual time has passed.
    pub fn after(&self, delay: Duration, call: impl FnOnce() + Send + 'static) {
        let mut state = self.0.lock();
        let at = state.now.saturating_add(nanos(delay));
        state.schedule(at, What::Call(Box::new(call)));
    }

    /// The endpoint of that name dies: no callback of it is called any more, its memory is gone. Of what it
    /// had sent, a random first part of each connection still takes effect; then its peers see the end.
    pub fn crash(&self, addr: &str) {
        self.0.lock().crash(addr);
    }
}
