//! Transactions: changes that the metadata server makes, under leases that are held.

use std::collections::BTreeSet;
use std::sync::Arc;

use rt::sync::Mutex;
use rt::time::Instant;

use crate::cache::Cache;
use crate::cache::inode::Inode;
use crate::kernel::caches::KernelCaches;
use crate::kernel::front::Front;
use crate::namespace::foresee::{Known, foresee};
use crate::session::ctx::{Ctx, Res};
use crate::session::{Session, Versions};
use fsd_proto::ask;
use fsd_proto::wire::{Attr, Carried, Created, Kind, NamespaceOp, Touched};

/// Numbers of transactions, and which are still unanswered.
#[derive(Debug, Default)]
pub struct Sequence(Mutex<(u64, BTreeSet<u64>)>);

impl Sequence {
    fn begin(&self) -> (u64, u64) {
        let mut s = self.0.lock();
        s.0 += 1;
        let number = s.0;
        s.1.insert(number);
        (number, s.1.first().copied().unwrap_or(number))
    }

    fn end(&self, number: u64) {
        self.0.lock().1.remove(&number);
    }
}

/// Changes of the namespace.
pub struct Transactions {
    /// Numbers of transactions.
    pub seqs: Sequence,
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) kernel: Arc<KernelCaches>,
    pub(crate) front: Arc<Front>,
}

impl Transactions {
    /// Carries out a transaction under leases that are held, and brings the caches up to date with it.
    ///
    /// # Errors
    /// The metadata server's refusal.
    pub fn namespace(
        &self,
        ctx: &Ctx<'_>,
        held: &[&Inode],
        guards: &dyn Versions,
        op: NamespaceOp,
    ) -> Res<Created> {
        let touched = held
            .iter()
            .map(|i| Touched {
                ino: i.ino,
                version: guards.version_of(i.ino),
            })
            .collect();
        let (op, touched) = match self.carry_out(ctx, held, guards, op, touched)? {
            Ok(created) => return Ok(created),
            Err(unforeseen) => unforeseen,
        };
        let links = matches!(
            op,
            NamespaceOp::Link { .. } | NamespaceOp::Unlink { .. } | NamespaceOp::Rename { .. }
        );
        let (seq, acknowledged) = self.seqs.begin();
        let request = ask::meta::Namespace {
            seq,
            acknowledged,
            now: self.session.net.meta.now(),
            touched,
            op,
        };
        let reply = self.session.net.meta.ask(request);
        self.seqs.end(seq);
        let created = match reply {
            Ok(created) => created,
            Err(error) => {
                // It may have been done all the same.
                for inode in held {
                    let mut state = inode.lock(ctx, guards.version_of(inode.ino))?;
                    state.forget_names();
                    state.changed();
                    // An inode whose attributes were never known here has no delegation: there is nothing to recall.
                    if state
                        .attr
                        .or(state.lasting.last.as_deref().copied())
                        .is_some_and(|a| a.kind == Kind::Directory)
                    {
                        self.front.forget_names(inode);
                    }
                }
                return Err(error.into());
            }
        };
        let place = links.then(|| self.session.net.meta.last_place());
        self.take_over(ctx, held, guards, &created, place)?;
        Ok(created)
    }

    /// Carries out a transaction by itself, if all is known that decides what comes of it: the server is told later. Else what was asked
    /// for is given back.
    ///
    /// # Errors
    /// The metadata server has been away for too long: there are too many of them already.
    fn carry_out(
        &self,
        ctx: &Ctx<'_>,
        held: &[&Inode],
        guards: &dyn Versions,
        op: NamespaceOp,
        touched: Vec<Touched>,
    ) -> Res<Result<Created, (NamespaceOp, Vec<Touched>)>> {
        let meta = &self.session.net.meta;
        meta.make_room()?;
        // One after the other: the kernel makes one change in a directory at a time, and of a file's names.
        let mut known = Vec::with_capacity(held.len());
        for inode in held {
            let mut state = inode.lock(ctx, guards.version_of(inode.ino))?;
            if self.cache.load_attr(ctx, inode, &mut state).is_err() {
                return Ok(Err((op, touched)));
            }
            known.extend(state.attr.map(|attr| Known::of(attr, state.dir.get(), &op)));
        }
        let now = meta.now();
        let Some(created) = foresee(&op, now, &known) else {
            return Ok(Err((op, touched)));
        };
        let cookie = created.cookie;
        let change = Carried {
            now,
            touched,
            op,
            cookie,
        };
        if let Err(change) = meta.carry(change) {
            return Ok(Err((change.op, change.touched)));
        }
        self.take_over(ctx, held, guards, &created, None)?;
        Ok(Ok(created))
    }

    /// Brings the caches up to date with what a transaction has changed. `links`: its place, where it has changed how many names files
    /// have.
    fn take_over(
        &self,
        ctx: &Ctx<'_>,
        held: &[&Inode],
        guards: &dyn Versions,
        created: &Created,
        links: Option<u64>,
    ) -> Res<()> {
        for inode in held {
            self.kernel.invalidate_attrs(inode);
            let mut state = inode.lock(ctx, guards.version_of(inode.ino))?;
            if let Some(place) = links
                && state.attr.is_some_and(|attr| attr.kind != Kind::Directory)
            {
                inode.transit.push.lock().linked = (place as u32).max(1);
            }
            state.modified = true;
            state.changed();
            match created.attrs.iter().find(|a| a.ino == inode.ino) {
                Some(new) => {
                    merge(&mut state.attr, new);
                    if new.kind == Kind::Directory {
                        inode.hints.turns.lock().change(Instant::now());
                    }
                    if let Some(attr) = &state.attr {
                        self.front.attributes_changed(inode, attr);
                    }
                }
                None if inode_kept(created, inode.ino) => {}
                None => {
                    if let Some(gone) = state.attr.take() {
                        state.lasting.last = Some(Box::new(gone));
                        self.front.attributes_changed(inode, &Attr { nlink: 0, ..gone });
                    }
                }
            }
        }
        Ok(())
    }
}

fn inode_kept(created: &Created, number: u64) -> bool {
    // An inode that the transaction did not report has either not changed or is gone; attributes are then
    // asked for again.
    created.attrs.iter().any(|a| a.ino == number)
}

/// Takes over what the metadata server decides; what the holder of the lease decides stays.
fn merge(attr: &mut Option<Attr>, new: &Attr) {
    match attr {
        Some(old) if old.kind == Kind::File || old.kind == Kind::Symlink => {
            old.nlink = new.nlink;
            old.ctime = old.ctime.max(new.ctime);
            old.has_xattr = new.has_xattr;
        }
        Some(old) => {
            old.nlink = new.nlink;
            old.size = new.size;
            old.layout = new.layout;
            // A change of the names sets both times; anything else leaves a time set here alone.
            if new.mtime == new.ctime {
                old.mtime = new.mtime;
            }
            old.ctime = old.ctime.max(new.ctime);
            old.has_xattr = new.has_xattr;
        }
        None => *attr = Some(*new),
    }
}
