//! The simulated network as the test sees it.

use std::sync::Arc;
use std::time::Duration;

use rt::sync::{Condvar, Mutex};
use rt::thread::JoinHandle;
use rt::time::Instant;

use super::config::SimConfig;
use super::endpoint::SimFabric;
use super::event::{After, EndpointId, Inbox, Parcel, What};
use super::netref::NetRef;
use super::place::Clock;
use super::schedule::nanos;
use super::state::State;
use crate::common::mark_progress_thread;
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
        let threaded = state.lanes.schedule.clock.is_some();
        drop(state);
        let thread = if threaded { Some(self.attend(id)?) } else { None };
        let fabric = SimFabric::new(NetRef::of(&self.0), (id, instance), counters, config, thread);
        Ok(Arc::new(fabric))
    }

    /// A network whose time is that of `rt`: one thread has events happen when they are due, and each endpoint has one
    /// that its handler is called on, as with other providers. For whole programs in simulation; the threads end with it.
    ///
    /// # Errors
    /// The system has no threads left.
    pub fn threaded(seed: u64, config: SimConfig) -> Result<Self, TransportError> {
        let net = Self::new(seed, config);
        let clock = Arc::new(Clock {
            began: Instant::now(),
            origin: rt::time::for_all(),
            changed: Condvar::new(),
        });
        net.0.lock().lanes.schedule.clock = Some(Arc::clone(&clock));
        let events = net.clone();
        start("net", move || events.run(&clock))?;
        Ok(net)
    }

    /// Has events happen when they are due.
    fn run(&self, clock: &Clock) {
        let mut state = self.0.lock();
        loop {
            let now = state.lanes.schedule.look();
            match state.lanes.schedule.next() {
                Some(at) if at <= now => {
                    let after = state.step();
                    drop(state);
                    after.into_iter().for_each(After::run);
                    state = self.0.lock();
                }
                Some(at) => {
                    let until = clock.began + Duration::from_nanos(at);
                    clock.changed.wait_until(&mut state, until);
                }
                None => clock.changed.wait(&mut state),
            }
        }
    }

    /// Starts the thread of an endpoint.
    fn attend(&self, id: EndpointId) -> Result<(Inbox, JoinHandle<()>), TransportError> {
        let (inbox, incoming) = rt::channel::unbounded();
        self.0.lock().endpoints[id].inbox = Some(inbox.clone());
        let net = NetRef::of(&self.0);
        let thread = start("fabric", move || {
            mark_progress_thread();
            while let Ok(((pair, end), after)) = incoming.recv() {
                let message = matches!(after, After::Message(..));
                let ended = message && !net.get().is_ok_and(|net| net.lock().lanes.alive(pair, end));
                if let After::Stop = after {
                    return;
                }
                if !ended {
                    after.run();
                }
                if message && let Ok(net) = net.get() {
                    net.lock().lanes.ship(pair, end, Parcel::Credit);
                }
            }
        })?;
        Ok((inbox, thread))
    }

    /// Virtual time since the beginning.
    #[must_use]
    pub fn now(&self) -> Duration {
        Duration::from_nanos(self.0.lock().lanes.schedule.now())
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
        let schedule = &mut state.lanes.schedule;
        let at = schedule.now().saturating_add(nanos(delay));
        schedule.add(at, What::Call(Box::new(call)));
    }

    /// The endpoint of that name dies: no callback of it is called any more, its memory is gone. Of what it
    /// had sent, a random first part of each connection still takes effect; then its peers see the end.
    pub fn crash(&self, addr: &str) {
        self.0.lock().crash(addr);
    }

    /// The connections between these two endpoints break; of what was under way a random first part of each direction arrives.
    pub fn cut(&self, addrs: [&str; 2]) {
        let mut state = self.0.lock();
        if let [Some(a), Some(b)] = addrs.map(|addr| state.find(addr)) {
            state.lanes.cut([a, b]);
        }
    }

    /// Nothing goes between these two addresses any more, and nobody is told: connections are silent, new ones cannot be made.
    pub fn separate(&self, addrs: [&str; 2]) {
        let [a, b] = addrs;
        self.silence([a, b]);
        self.silence([b, a]);
    }

    /// Nothing comes from the first of these addresses to the second any more, and nobody is told: what is sent is kept. What goes the
    /// other way arrives. New connections cannot be made.
    pub fn silence(&self, way: [&str; 2]) {
        self.0.lock().set_silent(way, true);
    }

    /// Ends [`SimNet::silence`].
    pub fn hear(&self, way: [&str; 2]) {
        self.0.lock().set_silent(way, false);
    }

    /// Does something while no thread is in the middle of what it does with this network.
    pub fn still(&self, act: impl FnOnce()) {
        let _state = self.0.lock();
        act();
    }

    /// Ends [`SimNet::separate`]; what was sent meanwhile over connections that are still there arrives.
    pub fn join(&self, addrs: [&str; 2]) {
        let [a, b] = addrs;
        self.hear([a, b]);
        self.hear([b, a]);
    }
}

fn start(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, TransportError> {
    rt::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(|error| TransportError::os("start a thread", &error))
}
