//! Telling the metadata server what has changed under exclusive leases: after a tenure, before a record
//! becomes free, and for fsync.

use std::sync::{Arc, Weak};
use std::time::Duration;

use lockmgr::RecordId;
use rt::sync::{Condvar, Mutex};
use rt::time::Instant;

use crate::cache::Cache;
use crate::cache::inode::Inode;
use crate::session::Session;
use crate::session::ctx::{Res, fail};
use fsd_proto::ask;
use fsd_proto::wire::AttrUpdate;

/// What is to be sent now, if nothing is under way; else it is sent after that.
fn begin(inode: &Inode) -> Option<AttrUpdate> {
    let mut push = inode.transit.push.lock();
    if push.sent.is_some() {
        push.next = true;
        return None;
    }
    let update = push.waiting.take()?;
    push.sent = Some(update.clone());
    Some(*update)
}

/// Attributes on their way to the metadata server.
pub struct Push {
    /// Counts answers, for those who wait for one.
    pub(crate) answers: Answers,
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
}

/// Those who wait for an answer of the metadata server to what another thread has sent.
#[derive(Debug, Default)]
pub struct Answers {
    waiting: Mutex<()>,
    came: Condvar,
}

impl Answers {
    fn tell(&self) {
        drop(self.waiting.lock());
        self.came.notify_all();
    }
}

impl Push {
    /// Tells the metadata server the attributes of leases given up, and the lease manager when it has them.
    pub fn push_attrs(self: &Arc<Self>, inode: &Arc<Inode>) {
        let Some(update) = begin(inode) else { return };
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
                if let Some(me) = Weak::upgrade(&me) {
                    me.answered(&inode, update, false);
                }
            },
        );
    }

    /// Nothing is under way any more. Where it is to be told `again`, it waits for that; else the lease manager need not.
    fn answered(self: &Arc<Self>, inode: &Arc<Inode>, update: AttrUpdate, again: bool) {
        let next = {
            let mut push = inode.transit.push.lock();
            push.sent = None;
            if again {
                // Unless later ones have come to wait.
                push.waiting.get_or_insert_with(|| Box::new(update));
            }
            std::mem::take(&mut push.next)
        };
        self.answers.tell();
        if !again {
            self.session.leases.confirmed(inode.record(), update.version);
        }
        if next {
            self.push_attrs(inode);
        }
    }

    /// Waits until nothing is under way that the metadata server might take in after what is sent next.
    ///
    /// # Errors
    /// `ETIMEDOUT`: it is away for longer than programs wait.
    pub(crate) fn settle(&self, inode: &Inode) -> Res<()> {
        const LOOK: Duration = Duration::from_millis(500);
        let began = Instant::now();
        let mut waiting = self.answers.waiting.lock();
        while inode.transit.push.lock().sent.is_some() {
            if self.session.net.ways.patience.is_over(began) {
                return fail(libc::ETIMEDOUT);
            }
            self.answers.came.wait_for(&mut waiting, LOOK);
        }
        Ok(())
    }

    /// The record is about to become free: the metadata server must have the attributes of this version.
    pub fn confirm(self: &Arc<Self>, id: RecordId, version: u64) {
        let Some(inode) = self.cache.inodes.by_record(id) else {
            return self.session.leases.confirmed(id, version);
        };
        let (waits, under_way) = {
            let mut push = inode.transit.push.lock();
            let is = |update: &Option<Box<AttrUpdate>>| update.as_ref().is_some_and(|u| u.version == version);
            let under_way = is(&push.sent);
            // Should that fail, it waits again.
            push.next |= under_way;
            (is(&push.waiting), under_way)
        };
        if waits {
            self.push_attrs(&inode);
        } else if !under_way {
            self.session.leases.confirmed(id, version);
        }
    }

    /// Has the metadata server told of what `push_attrs` has not, or has not been answered for, when it returns.
    ///
    /// # Errors
    /// The server cannot be reached, or refuses.
    pub fn push_attrs_now(self: &Arc<Self>, inode: &Arc<Inode>) -> Res<()> {
        let _order = inode.telling.lock();
        self.settle(inode)?;
        let Some(update) = begin(inode) else { return Ok(()) };
        let updates = vec![update];
        let result = self.session.net.meta.ask(ask::meta::Update { updates });
        self.answered(inode, update, result.is_err());
        Ok(result?)
    }
}
