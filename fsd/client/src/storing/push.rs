//! Telling the metadata server what has changed under exclusive leases: after a tenure, before a record
//! becomes free, and for fsync.

use std::sync::{Arc, Weak};

use lockmgr::{Mode, RecordId};
use rt::sync::Mutex;

use crate::cache::Cache;
use crate::cache::inode::Inode;
use crate::data::stored::Stored;
use crate::data::writing::Writing;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res};
use fsd_proto::ask;
use fsd_proto::wire::AttrUpdate;

/// Attributes on their way to the metadata server.
pub struct Push {
    /// Held from looking at attributes until the metadata server has them, so that later ones come later.
    pub attr_push: Mutex<()>,
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) stored: Arc<Stored>,
    pub(crate) writing: Arc<Writing>,
}

impl Push {
    /// Tells the metadata server the attributes of leases given up, and the lease manager when it has them.
    pub fn push_attrs(self: &Arc<Self>, inode: &Arc<Inode>) {
        let update = {
            let mut push = inode.transit.push.lock();
            let Some(update) = push.waiting.take() else { return };
            push.sent = Some(update.clone());
            *update
        };
        let (me, inode) = (Arc::downgrade(self), Arc::clone(inode));
        self.session.net.meta.ask_async(
            ask::meta::Update {
                updates: vec![update],
            },
            move |result| {
                if let Err(error) = result {
                    tracing::error!("attributes of {:#x} lost: {error}", inode.ino);
                    inode.errors.set(error.errno());
                }
                {
                    let mut push = inode.transit.push.lock();
                    push.sent.take_if(|u| u.version == update.version);
                }
                if let Some(client) = Weak::upgrade(&me) {
                    client.session.leases.confirmed(inode.record(), update.version);
                }
            },
        );
    }

    /// The record is about to become free: the metadata server must have the attributes of this version.
    pub fn confirm(self: &Arc<Self>, id: RecordId, version: u64) {
        let Some(inode) = self.cache.inodes.by_record(id) else {
            return self.session.leases.confirmed(id, version);
        };
        let (waiting, sent) = {
            let push = inode.transit.push.lock();
            (
                push.waiting.as_ref().map(|u| u.version),
                push.sent.as_ref().map(|u| u.version),
            )
        };
        if waiting == Some(version) {
            self.push_attrs(&inode);
        } else if sent != Some(version) {
            self.session.leases.confirmed(id, version);
        }
    }

    /// Tells the metadata server what `push_attrs` has not, or has not been answered for.
    ///
    /// # Errors
    /// The server cannot be reached, or refuses.
    pub fn push_attrs_now(&self, inode: &Inode) -> Res<()> {
        let _order = self.attr_push.lock();
        let update = {
            let push = inode.transit.push.lock();
            push.waiting.as_deref().or(push.sent.as_deref()).copied()
        };
        if let Some(update) = update {
            self.session.net.meta.ask(ask::meta::Update {
                updates: vec![update],
            })?;
            {
                let mut push = inode.transit.push.lock();
                push.waiting.take_if(|u| u.version == update.version);
            }
            self.session.leases.confirmed(inode.record(), update.version);
        }
        Ok(())
    }

    /// Brings an inode's dirty data and attributes to the servers while the lease stays. With `wait`, gets
    /// the lease back if it is being given up (then there is nothing left to do).
    ///
    /// # Errors
    /// The servers cannot take it; it stays dirty.
    pub fn write_back(&self, ctx: &Ctx<'_>, inode: &Inode, wait: bool) -> Res<()> {
        ctx.may_wait()?;
        let record = inode.record();
        if wait {
            self.push_attrs_now(inode)?;
        }
        let unsure = || {
            let state = inode.lock_raw();
            state.is_dirty() || state.from_owner
        };
        let guard = match self.session.leases.try_enter(record, Mode::Exclusive) {
            Some(guard) => guard,
            None if wait && unsure() => self.cache.lease(ctx, inode, Mode::Exclusive)?,
            None => return Ok(()),
        };
        let _order = self.attr_push.lock();
        let mut state = self.stored.claim_to_change(ctx, inode, guard.version())?;
        if state.lasting.gone {
            return Ok(());
        }
        self.writing.flush_pages(ctx, inode, &mut state)?;
        if state.attr_dirty
            && let Some(attr) = state.attr
        {
            // Under the version of before: the one after the tenure stands for its end only.
            let update = AttrUpdate {
                version: guard.version(),
                ..AttrUpdate::from(&attr)
            };
            let updates = vec![update];
            state.unlocked(|| self.session.net.meta.ask(ask::meta::Update { updates }))?;
            state.told(&attr);
        }
        state.from_owner = false;
        if !state.is_dirty() {
            self.cache.dirty.lock().remove(&inode.ino);
        }
        Ok(())
    }
}
