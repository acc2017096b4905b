//! Taking over what dead mounts had: has the storage nodes shut them out, the living tell when they have got there, the lease
//! records freed. `plan` says what is next, `remains` does what takes the storage nodes.

pub mod plan;
pub mod remains;
pub mod tables;

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rdma_transport::ConnId;
use rt::channel::{Either, Receiver, Sender, recv_either};
use rt::sync::Mutex;
use rt::time::Instant;

use super::members::Members;
use crate::error::MetaError;
use crate::nodes::Nodes;
use crate::rules::Flaw;
use fsd_proto::ask;
use fsd_proto::rpc::{Errno, Responder, RpcError};
use fsd_proto::wire::{MetaReply, View};
use plan::{Need, Plan};
use remains::Remains;

/// Pause before something is tried again that did not work, or waits for somebody.
const RETRY: Duration = Duration::from_millis(200);
/// As long while nothing is to be done.
const IDLE: Duration = Duration::from_secs(10);

/// Which view a mount was told of, on which connection: its epoch, and whether dead were named in it.
type Told = (ConnId, u64, bool);

/// An operator waits for a mount to be dead and gone.
struct Eviction {
    node: u16,
    /// Its life, once it has been declared dead.
    life: Option<u64>,
    responder: Responder,
}

#[derive(Default)]
struct State {
    plan: Option<Plan>,
    told: HashMap<u16, Told>,
    /// Mounts that could not take what they were told, and since when: they are told again.
    failed: HashMap<u16, Instant>,
    evictions: Vec<Eviction>,
    /// What a recovery waits for, one sentence each.
    waits: Vec<String>,
    /// When orphans are looked at once more.
    sweep: Option<Instant>,
    /// There may be new lease tables.
    new_tables: bool,
}

/// Takes over what the dead had.
pub struct Takeover {
    me: Weak<Self>,
    members: Arc<Members>,
    nodes: Nodes,
    remains: Remains,
    state: Mutex<State>,
    wake: Sender<()>,
}

impl Takeover {
    /// Of these mounts; woken by `wake`.
    pub fn new(members: &Arc<Members>, nodes: &Nodes, remains: Remains, wake: Sender<()>) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            members: Arc::clone(members),
            nodes: nodes.clone(),
            remains,
            state: Mutex::default(),
            wake,
        })
    }

    /// There may be something to do.
    pub fn wake(&self) {
        let _ = self.wake.send(());
    }

    /// Until it is stopped.
    pub fn run(&self, woken: &Receiver<()>, stop: &Receiver<()>) {
        let mut pause = Duration::ZERO;
        loop {
            if let Either::First(_) = recv_either(stop, woken, pause) {
                return;
            }
            while woken.try_recv().is_ok() {}
            pause = self.advance();
        }
    }

    /// What a recovery waits for, for people.
    pub fn waits(&self) -> Vec<String> {
        self.state.lock().waits.clone()
    }

    /// An operator wants a mount to be declared dead; answered when nothing of it is left.
    pub fn evict(&self, node: u16, responder: Responder) {
        let eviction = Eviction {
            node,
            life: None,
            responder,
        };
        self.state.lock().evictions.push(eviction);
        self.wake();
    }

    /// Does what can be done now; how long until it is worth trying again.
    pub fn advance(&self) -> Duration {
        self.declare_evicted();
        loop {
            let (view, alive) = self.members.view();
            if view.dead.is_empty() {
                self.tell(&view);
                let pause = self.rest();
                return match self.begin_era() {
                    Ok(true) => pause,
                    Ok(false) => RETRY,
                    Err(error) => {
                        tracing::warn!("lease tables are new, or may be: {error}");
                        RETRY
                    }
                };
            }
            // Mounts that are told of a death lease nothing new before everything has been taken back. That needs every storage node:
            // while one of them is away, only what the dead had is blocked.
            let fenced = self.plan(&view, |plan| plan.is_fenced());
            if let Some(published) = self.members.publish(&view, fenced) {
                self.tell(&published);
            }
            if fenced {
                // Only now: the dead may have written to the file that a lock is for.
                for dead in &view.dead {
                    self.members.locks.release_node(dead.node);
                }
            }
            let window = self.members.recovery.is_open();
            let need = self.plan(&view, |plan| plan.need(&alive, window));
            match self.meet(&view, &need) {
                Ok(true) => {}
                Ok(false) => return RETRY,
                Err(error) => {
                    tracing::error!("recovery of {}: {error}", self.names(&view));
                    self.note(vec![format!("recovery of {}: {error}", self.names(&view))]);
                    return RETRY;
                }
            }
        }
    }

    /// Looks at the plan for the dead of a view, or changes it.
    fn plan<T>(&self, view: &View, act: impl FnOnce(&mut Plan) -> T) -> T {
        let mut state = self.state.lock();
        let storage = self.nodes.ids();
        let plan = state.plan.get_or_insert_with(|| Plan::new(view.clone(), storage));
        plan.declared(view);
        act(plan)
    }

    fn names(&self, view: &View) -> String {
        let names: Vec<String> = view.dead.iter().map(|d| self.members.name(d)).collect();
        names.join(", ")
    }

    fn note(&self, waits: Vec<String>) {
        self.state.lock().waits = waits;
    }

    /// Does what is needed; false: it has to wait for somebody.
    fn meet(&self, view: &View, need: &Need) -> Result<bool, MetaError> {
        match need {
            Need::Fence(storage) => {
                return Ok(self.ask_all(view, storage, |node| {
                    for &dead in view
                        .dead
                        .iter()
                        .filter(|_| !self.remains.rules.lack(Flaw::NotFenced))
                    {
                        self.nodes.asks.asked(node, ask::storage::Fence { dead })?;
                    }
                    self.plan(view, |plan| plan.fenced(view.epoch, node));
                    Ok(())
                }));
            }
            Need::Answers(mounts) => {
                let who = mounts.iter().map(|n| format!("mount {n}"));
                let who = who.collect::<Vec<_>>().join(", ");
                self.note(vec![format!("recovery of {} waits for {who}", self.names(view))]);
                return Ok(false);
            }
            Need::Window => return Ok(false),
            Need::Reset => {
                self.remains.reset()?;
                tracing::info!("every mount was dead: all leases have been reset");
            }
            Need::Cut => self.remains.cut_owned(&view.dead)?,
            Need::Free(storage) => {
                return Ok(self.ask_all(view, storage, |node| {
                    let dead = view.dead.clone();
                    self.nodes.asks.asked(node, ask::storage::Recover { dead })?;
                    self.plan(view, |plan| plan.freed(view.epoch, node));
                    Ok(())
                }));
            }
            Need::Reap => self.reap_unused()?,
            Need::Forget => {
                let names = self.names(view);
                if self.members.bury(view)? {
                    tracing::info!("what {names} had is free again (epoch {})", view.epoch);
                    let term = Duration::from_millis(self.members.terms.term_ms);
                    let mut state = self.state.lock();
                    state.plan = None;
                    state.waits.clear();
                    state.sweep = Some(Instant::now() + term);
                }
                return Ok(true);
            }
        }
        self.plan(view, |plan| plan.done(view.epoch, need));
        Ok(true)
    }

    /// Asks storage nodes; whether all of them have done it.
    fn ask_all(&self, view: &View, storage: &[u16], ask: impl Fn(u16) -> Result<(), RpcError>) -> bool {
        let mut waits = Vec::new();
        for &node in storage {
            if let Err(error) = ask(node) {
                waits.push(format!(
                    "recovery of {} waits for storage node {node}: {error}",
                    self.names(view)
                ));
            }
        }
        let all = waits.is_empty();
        let mut state = self.state.lock();
        for wait in waits.iter().filter(|w| !state.waits.contains(w)) {
            tracing::warn!("{wait}");
        }
        state.waits = waits;
        all
    }

    /// Tells the mounts that live of a view, each once on each of its connections.
    fn tell(&self, view: &View) {
        if view.epoch == 0 {
            return;
        }
        let listeners = self.members.listeners();
        let is_there = |node: &u16| listeners.iter().any(|(n, _)| n == node);
        self.state.lock().failed.retain(|node, _| is_there(node));
        for (node, conn) in listeners {
            let told = (conn.id(), view.epoch, !view.dead.is_empty());
            let mut state = self.state.lock();
            let failed = state.failed.get(&node);
            let waits = failed.is_none_or(|since| since.elapsed() < RETRY);
            if state.told.insert(node, told) == Some(told) && waits {
                continue;
            }
            state.failed.remove(&node);
            drop(state);
            let me = Weak::clone(&self.me);
            let done = Box::new(move |answer| {
                if let Some(me) = me.upgrade() {
                    me.answered(node, told, answer);
                }
            });
            self.nodes.mounts.tell(&conn, view.clone(), done);
        }
    }

    /// A mount has got to a view that it was told of, or cannot be told on that connection.
    fn answered(&self, node: u16, told: Told, answer: Result<(), RpcError>) {
        let (_, epoch, dead) = told;
        let mut state = self.state.lock();
        match answer {
            Ok(()) => {
                if dead && let Some(plan) = &mut state.plan {
                    plan.answered(epoch, node);
                }
                if !dead {
                    return;
                }
            }
            // Nobody waits for what comes after a recovery, except for a mount that has just begun and does not listen yet.
            Err(error) if dead || error.is_transport() || error.errno() == Errno(libc::EAGAIN) => {
                tracing::debug!("mount {node} does not take epoch {epoch} yet: {error}");
                // On another connection it is told at once, on this one after a while.
                state.failed.insert(node, Instant::now());
            }
            Err(_) => return,
        }
        drop(state);
        self.wake();
    }

    /// Nobody is dead, or everybody has been buried: what else there is to do, and how long it is worth waiting then.
    fn rest(&self) -> Duration {
        let (done, pause) = {
            let mut state = self.state.lock();
            state.plan = None;
            state.waits.clear();
            let (done, left) = std::mem::take(&mut state.evictions)
                .into_iter()
                .partition::<Vec<_>, _>(|e| e.life.is_some());
            state.evictions = left;
            let due = state.sweep.filter(|at| *at <= Instant::now());
            let busy = !state.failed.is_empty() || due.is_some();
            let pause = if busy { RETRY } else { IDLE };
            let sweep = state.sweep.map(|at| at.saturating_duration_since(Instant::now()));
            (done, pause.min(sweep.filter(|_| due.is_none()).unwrap_or(pause)))
        };
        for eviction in done {
            eviction.responder.reply(&Ok(MetaReply::Done));
        }
        self.sweep();
        pause
    }

    fn reap_unused(&self) -> Result<(), MetaError> {
        let known = self.remains.reap_unused()?;
        self.state.lock().new_tables |= !known;
        Ok(())
    }

    /// Looks at orphans once more, a while after a recovery: a removal that was under way may have made one for a dead mount's sake.
    fn sweep(&self) {
        let due = self.state.lock().sweep.is_some_and(|at| at <= Instant::now());
        if !due || self.members.recovery.is_open() {
            return;
        }
        match self.reap_unused() {
            // One that somebody owns is left to him, and may come free later.
            Ok(()) => {
                let term = Duration::from_millis(self.members.terms.term_ms);
                let left = self.remains.transactions.orphans() > 0;
                self.state.lock().sweep = left.then(|| Instant::now() + term);
            }
            Err(error) => tracing::debug!("orphans are looked at later: {error}"),
        }
    }

    /// Declares dead whom an operator wants to be.
    fn declare_evicted(&self) {
        let wanted: Vec<u16> = {
            let state = self.state.lock();
            let new = state.evictions.iter().filter(|e| e.life.is_none());
            new.map(|e| e.node).collect()
        };
        for node in wanted {
            let life = self.members.check_alive(node);
            let declared = life.and_then(|life| {
                let declared = self.members.declare(&[node], "an operator has evicted it");
                declared.map(|()| life).map_err(|refusal| refusal.errno())
            });
            let mut state = self.state.lock();
            let all = std::mem::take(&mut state.evictions).into_iter();
            let (mut theirs, others): (Vec<_>, Vec<_>) =
                all.partition(|e| e.node == node && e.life.is_none());
            state.evictions = others;
            match declared {
                Ok(life) => {
                    theirs.iter_mut().for_each(|e| e.life = Some(life));
                    state.evictions.extend(theirs);
                }
                Err(error) => {
                    drop(state);
                    for eviction in theirs {
                        eviction.responder.reply::<MetaReply>(&Err(error));
                    }
                }
            }
        }
    }
}
