//! Telling the metadata server what has changed under exclusive leases: after a tenure, before a record
//! becomes free, and for fsync.

use std::sync::{Arc, Weak};

use lockmgr::{Mode, RecordId};

use super::Client;
use super::ctx::{Ctx, Res};
use super::inode::Inode;
use fsd_proto::ask;
use fsd_proto::wire::AttrUpdate;

impl Client {
    /// Tells the metadata server the attributes of leases given up, and the lease manager when it has them.
    pub fn push_attrs(self: &Arc<Self>, inode: &Arc<Inode>) {
        let update = {
            let mut push = inode.push.lock();
            let Some(update) = push.waiting.take() else { return };
            push.sent = Some(update.clone());
            *update
        };
        let (me, inode) = (Arc::downgrade(self), Arc::clone(inode));
        self.net.meta_async(
            ask::meta::Update {
                updates: vec![update],
            },
            move |result| {
                if let Err(error) = result {
                    tracing::error!("attributes of {:#x} lost: {error}", inode.ino);
                    inode.errors.set(error.errno());
                }
                {
                    let mut push = inode.push.lock();
                    push.sent.take_if(|u| u.version == update.version);
                }
                if let Some(client) = Weak::upgrade(&me) {
                    client.leases.confirmed(inode.record(), update.version);
                }
            },
        );
    }

    /// The record is about to become free: the metadata server must have the attributes of this version.
    pub fn confirm(self: &Arc<Self>, id: RecordId, version: u64) {
        let Some(inode) = self.inodes.by_record(id) else {
            return self.leases.confirmed(id, version);
        };
        let (waiting, sent) = {
            let push = inode.push.lock();
            (
                push.waiting.as_ref().map(|u| u.version),
                push.sent.as_ref().map(|u| u.version),
            )
        };
        if waiting == Some(version) {
            self.push_attrs(&inode);
        } else if sent != Some(version) {
            self.leases.confirmed(id, version);
        }
    }

    /// Tells the metadata server what `push_attrs` has not, or has not been answered for.
    fn push_attrs_now(&self, inode: &Inode) -> Res<()> {
        let _order = self.attr_push.lock();
        let update = {
            let push = inode.push.lock();
            push.waiting.as_deref().or(push.sent.as_deref()).copied()
        };
        if let Some(update) = update {
            self.net.meta(ask::meta::Update {
                updates: vec![update],
            })?;
            {
                let mut push = inode.push.lock();
                push.waiting.take_if(|u| u.version == update.version);
            }
            self.leases.confirmed(inode.record(), update.version);
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
        let guard = match self.leases.try_enter(record, Mode::Exclusive) {
            Some(guard) => guard,
            None if wait && unsure() => self.lease(ctx, inode, Mode::Exclusive)?,
            None => return Ok(()),
        };
        let _order = self.attr_push.lock();
        let mut state = self.claim_to_change(ctx, inode, guard.version())?;
        if state.gone {
            return Ok(());
        }
        self.flush_pages(ctx, inode, &mut state)?;
        if state.attr_dirty
            && let Some(attr) = state.attr
        {
            // Under the version of before: the one after the tenure stands for its end only.
            let update = AttrUpdate {
                version: guard.version(),
                ..AttrUpdate::from(&attr)
            };
            let updates = vec![update];
            state.unlocked(|| self.net.meta(ask::meta::Update { updates }))?;
            state.told(&attr);
        }
        state.from_owner = false;
        if !state.is_dirty() {
            self.dirty.lock().remove(&inode.ino);
        }
        Ok(())
    }
}
