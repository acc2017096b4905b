//! Endpoints and connections of the simulator.

use std::sync::Arc;
use std::time::Duration;

use rt::channel::RecvTimeoutError;
use rt::sync::Mutex;
use rt::thread::JoinHandle;

use super::event::{After, End, EndpointId, Inbox, PairId, Parcel};
use super::netref::NetRef;
use super::room::Room;
use super::state::State;
use super::travel::travel;
use crate::common::{self, LIMITS, disconnected};
use crate::handshake::Peer;
use crate::mem::SharedMem;
use crate::stats;
use crate::stats::Counters;
use crate::{
    Access, AsyncOp, BatchError, Buffer, Completion, ConnId, Connection, Fabric, FabricConfig, FabricKind,
    FabricStats, Handler, Limits, Op, RegionKey, TransportError,
};

/// From when one is let in until the connection is there.
const HANDSHAKE: Duration = Duration::from_secs(5);

pub(super) struct SimFabric {
    net: NetRef,
    id: EndpointId,
    instance: u64,
    addr: String,
    key: Vec<u8>,
    timeout: Duration,
    counters: Arc<Counters>,
    thread: Mutex<Option<(Inbox, JoinHandle<()>)>>,
}

impl SimFabric {
    pub(super) fn new(
        net: NetRef,
        (id, instance): (EndpointId, u64),
        counters: Arc<Counters>,
        config: FabricConfig,
        thread: Option<(Inbox, JoinHandle<()>)>,
    ) -> Self {
        Self {
            thread: Mutex::new(thread),
            net,
            id,
            instance,
            addr: config.listen,
            key: config.key,
            timeout: config.timeout,
            counters,
        }
    }
}

fn no_link(addr: &str) -> TransportError {
    TransportError::Unreachable {
        addr: addr.to_owned(),
        reason: "no link".to_owned(),
    }
}

impl SimFabric {
    /// Without a link one is told so at once, or nothing is heard.
    fn look_for_link(&self, net: &Mutex<State>, addr: &str) -> Result<(), TransportError> {
        let mut state = net.lock();
        if !state.are_apart([&self.addr, addr]) {
            return Ok(());
        }
        let cut_off = state.are_cut_off([&self.addr, addr]);
        let schedule = &mut state.lanes.schedule;
        if schedule.clock.is_none() || (cut_off && schedule.toss()) {
            return Err(no_link(addr));
        }
        drop(state);
        // Nothing is heard until the link is back.
        let (mut pause, mut waited) = (LOOK / 1000, Duration::ZERO);
        while waited < self.timeout {
            rt::thread::sleep(pause);
            waited += pause;
            pause = (pause * 2).min(LOOK);
            if !net.lock().are_apart([&self.addr, addr]) {
                return Ok(());
            }
        }
        Err(common::timed_out(addr, self.timeout))
    }
}

impl Fabric for SimFabric {
    fn kind(&self) -> FabricKind {
        FabricKind::Sim
    }

    fn local_addr(&self) -> String {
        self.addr.clone()
    }

    fn limits(&self) -> Limits {
        LIMITS
    }

    fn set_identity(&self, identity: Vec<u8>) {
        if let Ok(net) = self.net.get() {
            net.lock().set_identity(self.id, identity);
        }
    }

    fn register(&self, mem: &Arc<SharedMem>, access: Access) -> Result<RegionKey, TransportError> {
        self.net.get()?.lock().register(self.id, mem, access)
    }

    fn deregister(&self, key: RegionKey) -> Result<(), TransportError> {
        if self.net.get()?.lock().deregister(self.id, key) {
            return Ok(());
        }
        Err(TransportError::Invalid(format!(
            "region {:#x} is not registered",
            key.0
        )))
    }

    fn buffer(&self, len: usize) -> Result<Buffer, TransportError> {
        if len > LIMITS.max_transfer {
            return Err(TransportError::Invalid(format!("a buffer of {len} bytes")));
        }
        Ok(vec![0; len].into())
    }

    fn connect(&self, addr: &str) -> Result<Arc<dyn Connection>, TransportError> {
        let net = self.net.get()?;
        travel(&net);
        self.look_for_link(&net, addr)?;
        let (target, key, handler, inbox, identity) = {
            let state = net.lock();
            if !state.is_up(self.id) {
                return Err(TransportError::Shutdown);
            }
            let Some(target) = state.find(addr) else {
                return Err(TransportError::Unreachable {
                    addr: addr.to_owned(),
                    reason: "no endpoint of this name".to_owned(),
                });
            };
            let (key, handler) = state.target(target);
            let inbox = state.endpoints[target].inbox.clone();
            (target, key, handler, inbox, state.identity(self.id))
        };
        if key != self.key {
            net.lock().wrong_key(target);
            return Err(TransportError::WrongKey {
                addr: addr.to_owned(),
            });
        }
        let admitted = admission(inbox.as_ref(), (handler, identity.clone()), (addr, self.timeout))?;
        let mut state = net.lock();
        // Whoever was stopped in the middle of a handshake finds that the other end has given it up.
        if rt::time::for_all().saturating_sub(admitted) > HANDSHAKE {
            return Err(common::timed_out(addr, HANDSHAKE));
        }
        if state.are_apart([&self.addr, addr]) {
            return Err(no_link(addr));
        }
        let serial = state.unique();
        let alive = state.lanes.links(self.id, target);
        let peer = Peer {
            identity: identity.clone(),
            instance: self.instance,
            serial,
            alive,
        };
        let theirs = state.identity(target);
        let here = ConnId(serial);
        let there = ConnId(state.unique());
        stats::count(&self.counters.connections, 1);
        let pair = state.unique();
        let messages = state.lanes.schedule.room();
        let conn = |end: End, id: ConnId, identity: Vec<u8>, addr: &str| {
            let conn = SimConn {
                net: self.net.clone(),
                pair,
                end,
                id,
                identity,
                addr: addr.to_owned(),
                counters: Arc::default(),
                room: Arc::new(Room::new(messages)),
                timeout: self.timeout,
            };
            let (counters, room) = (Arc::clone(&conn.counters), Arc::clone(&conn.room));
            (Arc::new(conn) as Arc<dyn Connection>, counters, room)
        };
        let connecting = conn(0, here, theirs, addr);
        let listening = conn(1, there, identity, &self.addr);
        let ours = Arc::clone(&connecting.0);
        state.pair(pair, (self.id, connecting), (target, listening), peer);
        Ok(ours)
    }

    fn stats(&self) -> FabricStats {
        self.counters.snapshot()
    }

    fn is_deserted(&self, addr: &str) -> bool {
        let Ok(net) = self.net.get() else { return false };
        let state = net.lock();
        state.find(addr).is_none() && !state.are_apart([&self.addr, addr])
    }

    fn shutdown(&self) {
        let Ok(net) = self.net.get() else { return };
        let after = net.lock().shutdown(self.id);
        let Some((inbox, thread)) = self.thread.lock().take() else {
            return after.into_iter().for_each(After::run);
        };
        for after in after.into_iter().chain([After::Stop]) {
            // Nobody hears it if the thread has been ended.
            let _ = inbox.send(((0, 0), after));
        }
        if !common::on_progress_thread() {
            let _ = thread.join();
        }
    }
}

/// Asks the other end whether it lets one in, on its thread if it has one: one that is stopped does not answer. When it did.
fn admission(
    inbox: Option<&Inbox>,
    (handler, identity): (Arc<dyn Handler>, Vec<u8>),
    (addr, timeout): (&str, Duration),
) -> Result<Duration, TransportError> {
    let (answer, answered) = rt::channel::bounded(1);
    let ask = move || {
        // Nobody hears it who has waited for too long.
        let _ = answer.send((handler.admit(&identity), rt::time::for_all()));
    };
    match inbox {
        Some(inbox) => drop(inbox.send(((0, 0), After::Call(Box::new(ask))))),
        None => ask(),
    }
    match answered.recv_timeout(timeout) {
        Ok((Ok(()), at)) => Ok(at),
        Ok((Err(reason), _)) => Err(TransportError::Refused {
            addr: addr.to_owned(),
            reason,
        }),
        Err(RecvTimeoutError::Disconnected) => Err(no_link(addr)),
        Err(RecvTimeoutError::Timeout) => Err(common::timed_out(addr, timeout)),
    }
}

/// Longest pause between two looks for a link.
const LOOK: Duration = Duration::from_millis(100);

/// Waits until there is a link in the direction from this end, or breaks the connection.
fn wait_for_link(
    net: &Mutex<State>,
    (pair, end): (PairId, End),
    (addr, timeout): (&str, Duration),
) -> Result<(), TransportError> {
    let (mut pause, mut waited) = (Duration::from_micros(50), Duration::ZERO);
    loop {
        {
            let mut state = net.lock();
            if state.lanes.schedule.clock.is_none() || !state.lanes.is_held(pair, end) {
                return Ok(());
            }
            if waited > timeout {
                let why = common::timed_out(addr, timeout);
                state.lanes.down_both(pair, &why);
                return Err(why);
            }
        }
        rt::thread::sleep(pause);
        waited += pause;
        pause = (pause * 2).min(LOOK);
    }
}

/// Runs what this end has under way towards the other, then `ops` at once.
fn execute(
    net: &Mutex<State>,
    (pair, end): (PairId, End),
    ops: &mut [Op<'_>],
    peer: (&str, Duration),
) -> Result<(), TransportError> {
    travel(net);
    wait_for_link(net, (pair, end), peer)?;
    loop {
        let after = net.lock().pull(pair, end);
        match after {
            Some(after) => after.run(),
            None => break,
        }
    }
    for op in ops {
        // Between two of them others may come.
        let mut state = net.lock();
        if let Err(error) = state.execute_one(pair, end, op) {
            if !matches!(error, TransportError::Disconnected { .. }) {
                state.lanes.down_both(pair, &error);
            }
            return Err(error);
        }
    }
    travel(net);
    wait_for_link(net, (pair, 1 - end), peer)
}

pub(super) struct SimConn {
    net: NetRef,
    pair: PairId,
    end: End,
    id: ConnId,
    identity: Vec<u8>,
    addr: String,
    counters: Arc<Counters>,
    room: Arc<Room>,
    timeout: Duration,
}

impl SimConn {
    /// Sends a message, waiting for room at most for `patience`; without that it goes without room.
    fn send_message(&self, message: &[u8], patience: Option<Duration>) -> Result<(), TransportError> {
        common::check_message(message)?;
        let net = self.net.get()?;
        let patience = patience.filter(|_| net.lock().lanes.schedule.clock.is_some());
        if self.room.take(patience).is_err() {
            let why = common::timed_out(&self.addr, self.timeout);
            net.lock().lanes.down_both(self.pair, &why);
            return Err(why);
        }
        let mut state = net.lock();
        if !state.lanes.alive(self.pair, self.end) {
            return Err(state.dead(self.pair, self.end));
        }
        self.counters.sent(message.len());
        if let Some(counters) = state.counters(self.pair, self.end) {
            counters.sent(message.len());
        }
        state
            .lanes
            .ship(self.pair, self.end, Parcel::Message(message.into()));
        Ok(())
    }
}

impl Connection for SimConn {
    fn id(&self) -> ConnId {
        self.id
    }

    fn peer_identity(&self) -> &[u8] {
        &self.identity
    }

    fn peer_addr(&self) -> String {
        self.addr.clone()
    }

    fn is_alive(&self) -> bool {
        self.net
            .get()
            .is_ok_and(|net| net.lock().lanes.alive(self.pair, self.end))
    }

    fn execute(&self, ops: &mut [Op<'_>]) -> Result<(), TransportError> {
        let bytes = common::check_ops(ops)?;
        let net = self.net.get()?;
        execute(&net, (self.pair, self.end), ops, (&self.addr, self.timeout))?;
        if let Some(counters) = net.lock().counters(self.pair, self.end) {
            counters.did_ops(ops.len(), bytes);
        }
        self.counters.did_ops(ops.len(), bytes);
        Ok(())
    }

    fn submit(&self, batch: Vec<AsyncOp>, done: Completion) {
        let bytes = match common::check_batch(&batch) {
            Ok(bytes) => bytes,
            Err(invalid) => return done(Err(BatchError::unstarted(invalid, batch))),
        };
        let net = match self.net.get() {
            Ok(net) => net,
            Err(gone) => return done(Err(BatchError::unstarted(gone, batch))),
        };
        let mut state = net.lock();
        if !state.lanes.alive(self.pair, self.end) {
            let dead = state.dead(self.pair, self.end);
            drop(state);
            return done(Err(BatchError::unstarted(dead, batch)));
        }
        self.counters.did_ops(batch.len(), bytes);
        if let Some(counters) = state.counters(self.pair, self.end) {
            counters.did_ops(batch.len(), bytes);
        }
        state.ship_batch((self.pair, self.end), batch, done);
    }

    fn send(&self, message: &[u8]) -> Result<(), TransportError> {
        let waits = !common::on_progress_thread();
        self.send_message(message, waits.then_some(self.timeout))
    }

    fn queue(&self, message: &[u8]) -> Result<(), TransportError> {
        self.send_message(message, None)
    }

    fn close(&self) {
        let why = disconnected(&self.addr, "closed on this side");
        if let Ok(net) = self.net.get() {
            net.lock().close_end(self.pair, self.end, why);
        }
    }

    fn stats(&self) -> FabricStats {
        self.counters.snapshot()
    }
}
