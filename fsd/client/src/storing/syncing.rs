//! `fsync`: data, the storage nodes' making them durable, attributes and names are on their way at the same time.
//!
//! A few pages go along with the request to make them durable, which is answered when they are; more are written one-sided, followed by
//! that request on the same connection: one trip either way. The metadata server is told a new size meanwhile. It may be durable before
//! the data is, for what a file has beyond its end is zero in every frame: after a crash zeros are found, which nobody was told to be more.
//! What is written one-sided has come before the metadata server is told.

use std::sync::Arc;

use lockmgr::{Guard, Mode};

use crate::cache::Cache;
use crate::cache::durable::Durable;
use crate::cache::inode::Inode;
use crate::cache::state::State;
use crate::data::stored::{Flushes, Stored};
use crate::data::writing::Writing;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res};
use crate::storing::push::Push;
use fsd_proto::ask;
use fsd_proto::rpc::RpcError;
use fsd_proto::wire::{AttrUpdate, Kind, MetaRequest};

/// What is to be durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Data, and all attributes: `fsync`.
    All,
    /// Data, and what is needed to read it, which times are not: `fdatasync`.
    Data,
}

impl Scope {
    /// What a call asks for that is either `fdatasync` or `fsync`.
    #[must_use]
    pub fn of_datasync(datasync: bool) -> Self {
        if datasync { Self::Data } else { Self::All }
    }
}

/// Making files durable.
pub struct Syncing {
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) stored: Arc<Stored>,
    pub(crate) writing: Arc<Writing>,
    pub(crate) push: Arc<Push>,
}

/// What is durable when all have answered.
struct Goal {
    version: Option<u64>,
    /// Of the file, where the metadata server is asked.
    size: Option<u64>,
    /// Of `Durable::changes`, when the storage nodes were asked.
    changes: u64,
}

impl Syncing {
    /// Brings a file's data and attributes to the servers and makes them durable; gets the lease back if it is being given up.
    ///
    /// # Errors
    /// The servers cannot be reached, or cannot take it; it stays dirty.
    pub fn sync(&self, ctx: &Ctx<'_>, inode: &Arc<Inode>, scope: Scope) -> Res<()> {
        ctx.may_wait()?;
        if let Some(mapped) = inode.waiting.mapped.get() {
            mapped.drain();
        }
        self.push.push_attrs_now(inode)?;
        let unsure = || {
            let state = inode.lock_raw();
            state.is_dirty() || state.from_owner
        };
        match self.session.leases.try_enter(inode.record(), Mode::Exclusive) {
            Some(guard) => self.sync_held(ctx, inode, guard, scope),
            None if unsure() => {
                let guard = self.cache.lease(ctx, inode, Mode::Exclusive)?;
                self.sync_held(ctx, inode, guard, scope)
            }
            None => self.sync_clean(ctx, inode),
        }
    }

    /// Makes durable what this mount has told the servers, or others have.
    fn sync_clean(&self, ctx: &Ctx<'_>, inode: &Inode) -> Res<()> {
        let flushes = match self.session.leases.try_enter(inode.record(), Mode::Shared) {
            Some(guard) => self.flushes(inode, &*inode.lock(ctx, guard.version())?),
            // How long it is by now is not known.
            None => match inode.lock_raw().attr {
                Some(attr) if attr.kind != Kind::File => Flushes::new(),
                _ => self.flushes(inode, &State::default()),
            },
        };
        let flushed = self.session.net.storage.begin_each(&flushes);
        let mut told = self.session.net.meta.begin_in_order(vec![MetaRequest::Sync]);
        all_of(flushed.answers())?;
        Ok(told.next::<ask::meta::Sync>()?)
    }

    /// As [`Syncing::sync`], under the exclusive lease.
    fn sync_held(&self, ctx: &Ctx<'_>, inode: &Arc<Inode>, guard: Guard, scope: Scope) -> Res<()> {
        let order = inode.telling.lock();
        self.push.settle(inode)?;
        let mut state = self.stored.claim_to_change(ctx, inode, guard.version())?;
        if state.lasting.gone {
            return Ok(());
        }
        let durable = state
            .lasting
            .durable
            .as_deref()
            .map_or_else(Vec::new, Durable::nodes);
        self.writing.find_frames(ctx, inode, &mut state)?;
        let mut flushes = self.flushes(inode, &state);
        let carried = self.stored.carry(inode, &state, &durable, &mut flushes);
        let storage = &self.session.net.storage;
        let mut begun = if carried {
            Some(state.unlocked(|| storage.begin_each(&flushes)))
        } else {
            let begin = || storage.begin_each(&flushes);
            self.writing.store_pages(ctx, inode, &mut state, begin)?
        };
        let known = state.lasting.durable.get_or_insert_default();
        let changes = known.changes();
        let needless = scope == Scope::Data && state.attr.is_some_and(|a| state.is_told(a.size));
        let dirty = state.attr.filter(|_| state.attr_dirty && !needless);
        let mut requests = Vec::with_capacity(2);
        if let Some(attr) = &dirty {
            // Under the version of before: the one after the tenure is for its end.
            let updates = vec![AttrUpdate::midway(attr, guard.version())];
            requests.push(MetaRequest::Update { updates });
        }
        if !needless {
            requests.push(MetaRequest::Sync);
        }
        let mut told = state.unlocked(|| self.session.net.meta.begin_in_order(requests));
        let goal = Goal {
            version: state.version,
            size: state.attr.filter(|_| !needless).map(|attr| attr.size),
            changes,
        };
        if let Some(begun) = begun.take_if(|_| carried) {
            // Whoever is given the lease, or changes the file next, has to find there what was on its way.
            state.unlocked(|| all_of(begun.answers()))?;
            self.writing.are_stored(&mut state);
        }
        drop(state);
        if let Some(attr) = dirty {
            told.next::<ask::meta::Update>()?;
            inode.lock_raw().told(&attr);
        }
        {
            let mut state = inode.lock_raw();
            state.from_owner &= needless;
            if !state.is_dirty() {
                self.cache.dirty.lock().remove(&inode.ino);
            }
        }
        drop(order);
        drop(guard);
        if !carried {
            all_of(begun.map_or_else(|| storage.ask_each(&flushes), |begun| begun.answers()))?;
        }
        if !needless {
            told.next::<ask::meta::Sync>()?;
        }
        note(inode, &goal, &flushes);
        Ok(())
    }

    /// What the storage nodes are to be asked.
    fn flushes(&self, inode: &Inode, state: &State) -> Flushes {
        if state.attr.is_some_and(|attr| attr.kind != Kind::File) {
            return Flushes::new();
        }
        self.stored.flushes(inode, state)
    }
}

/// Keeps in mind what is durable now.
fn note(inode: &Inode, goal: &Goal, flushes: &Flushes) {
    let mut state = inode.lock_raw();
    if state.version != goal.version {
        return;
    }
    if let Some(durable) = state.lasting.durable.as_deref_mut() {
        durable.stored(goal.changes, flushes.iter().map(|(node, _)| *node));
        if let Some(size) = goal.size {
            durable.told(size);
        }
    }
}

fn all_of(answers: Vec<Result<(), RpcError>>) -> Result<(), RpcError> {
    answers.into_iter().collect()
}
