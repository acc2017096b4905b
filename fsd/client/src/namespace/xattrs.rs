//! Extended attributes.

use std::collections::BTreeMap;
use std::sync::Arc;

use lockmgr::Mode;

use crate::cache::Cache;
use crate::cache::inode::Inode;
use crate::namespace::transactions::Transactions;
use crate::session::ctx::{Ctx, Res, Stop, fail};
use crate::session::{Session, Versions};
use fsd_proto::ask;
use fsd_proto::rpc::Errno;
use fsd_proto::wire::NamespaceOp;

/// What an executable file may do beyond its caller, capabilities(7).
const CAPABILITY: &[u8] = b"security.capability";

/// Name spaces that can be stored; POSIX ACLs are not supported and say so.
fn supported(name: &[u8]) -> bool {
    [&b"user."[..], b"trusted.", b"security."]
        .iter()
        .any(|p| name.starts_with(p) && name.len() > p.len())
}

/// Extended attributes.
pub struct Xattrs {
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) transactions: Arc<Transactions>,
}

impl Xattrs {
    /// All attributes, asked for if need be (not while the state is locked: reads of the file must not
    /// have to wait for an answer).
    fn xattrs<T>(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        look: impl FnOnce(&BTreeMap<Vec<u8>, Vec<u8>>) -> T,
    ) -> Res<T> {
        let guard = self.cache.lease(ctx, inode, Mode::Shared)?;
        self.xattrs_held(ctx, inode, &guard, look)
    }

    /// As [`Xattrs::xattrs`], with the lease held.
    fn xattrs_held<T>(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        guards: &dyn Versions,
        look: impl FnOnce(&BTreeMap<Vec<u8>, Vec<u8>>) -> T,
    ) -> Res<T> {
        let changes = {
            let mut state = inode.lock(ctx, guards.version_of(inode.ino))?;
            if state.xattrs.is_none() && !self.cache.load_attr(ctx, inode, &mut state)?.has_xattr {
                state.xattrs = Some(BTreeMap::new());
            }
            if let Some(known) = &state.xattrs {
                return Ok(look(known));
            }
            state.changes()
        };
        ctx.may_wait()?;
        let pairs = self
            .session
            .net
            .meta
            .ask(ask::meta::GetXattrs { ino: inode.ino })?;
        let loaded: BTreeMap<_, _> = pairs.into_iter().collect();
        let found = look(&loaded);
        // Nobody else has changed them under our lease, but another request of this mount may have.
        let mut state = inode.lock(ctx, guards.version_of(inode.ino))?;
        if state.changes() == changes {
            state.xattrs = Some(loaded);
        }
        Ok(found)
    }

    /// The value of an attribute.
    ///
    /// # Errors
    /// Park; `ENODATA`, `EOPNOTSUPP`.
    pub fn getxattr(&self, ctx: &Ctx<'_>, inode: &Inode, name: &[u8]) -> Res<Vec<u8>> {
        if !supported(name) {
            return fail(libc::EOPNOTSUPP);
        }
        match self.xattrs(ctx, inode, |all| all.get(name).cloned())? {
            Some(value) => Ok(value),
            None => fail(libc::ENODATA),
        }
    }

    /// The names, each followed by a zero byte.
    ///
    /// # Errors
    /// Park.
    pub fn listxattr(&self, ctx: &Ctx<'_>, inode: &Inode, privileged: bool) -> Res<Vec<u8>> {
        self.xattrs(ctx, inode, |all| {
            let mut names = Vec::new();
            for name in all.keys() {
                if privileged || !name.starts_with(b"trusted.") {
                    names.extend_from_slice(name);
                    names.push(0);
                }
            }
            names
        })
    }

    /// Sets an attribute.
    ///
    /// # Errors
    /// Park; `EEXIST`, `ENODATA`, `ENOSPC`, `E2BIG`, `EOPNOTSUPP`.
    pub fn setxattr(&self, ctx: &Ctx<'_>, inode: &Inode, name: &[u8], value: &[u8], flags: i32) -> Res<()> {
        if !supported(name) {
            return fail(libc::EOPNOTSUPP);
        }
        let op = NamespaceOp::SetXattr {
            ino: inode.ino,
            name: name.to_vec(),
            value: value.to_vec(),
            flags,
        };
        self.change_xattr(ctx, inode, op)
    }

    /// Removes an attribute.
    ///
    /// # Errors
    /// Park; `ENODATA`, `EOPNOTSUPP`.
    pub fn removexattr(&self, ctx: &Ctx<'_>, inode: &Inode, name: &[u8]) -> Res<()> {
        if !supported(name) {
            return fail(libc::EOPNOTSUPP);
        }
        self.change_xattr(
            ctx,
            inode,
            NamespaceOp::RemoveXattr {
                ino: inode.ino,
                name: name.to_vec(),
            },
        )
    }

    /// Takes the capabilities of a file away that is about to be written to. The kernel leaves that to the file system
    /// (FUSE_HANDLE_KILLPRIV_V2): it may have seen that there are none before another mount gave it some.
    ///
    /// # Errors
    /// Park (nothing has changed then); as [`Xattrs::removexattr`].
    pub fn drop_capability(&self, ctx: &Ctx<'_>, inode: &Inode, exclusive: &dyn Versions) -> Res<()> {
        let mut state = inode.lock(ctx, exclusive.version_of(inode.ino))?;
        if !self.cache.load_attr(ctx, inode, &mut state)?.has_xattr {
            return Ok(());
        }
        drop(state);
        if !self.xattrs_held(ctx, inode, exclusive, |all| all.contains_key(CAPABILITY))? {
            return Ok(());
        }
        ctx.may_wait()?;
        let op = NamespaceOp::RemoveXattr {
            ino: inode.ino,
            name: CAPABILITY.to_vec(),
        };
        match self.change_xattr_held(ctx, inode, exclusive, op) {
            // Another task of this mount has.
            Err(Stop::Errno(Errno(libc::ENODATA))) => Ok(()),
            done => done,
        }
    }

    fn change_xattr(&self, ctx: &Ctx<'_>, inode: &Inode, op: NamespaceOp) -> Res<()> {
        ctx.may_wait()?;
        let guards = self.cache.lease_all(ctx, &[(inode, Mode::Exclusive)])?;
        self.change_xattr_held(ctx, inode, &guards, op)
    }

    fn change_xattr_held(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        guards: &dyn Versions,
        op: NamespaceOp,
    ) -> Res<()> {
        match self.transactions.namespace(ctx, &[inode], guards, op) {
            // The inode is gone: its name may have got another one, which the kernel finds out.
            Err(Stop::Errno(Errno(libc::ENOENT))) => return fail(libc::ESTALE),
            changed => changed?,
        };
        // The server has them now; what was cached is asked for again.
        let mut state = inode.lock(ctx, guards.version_of(inode.ino))?;
        state.xattrs = None;
        Ok(())
    }
}
