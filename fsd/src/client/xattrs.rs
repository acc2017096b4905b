//! Extended attributes.

use std::collections::BTreeMap;

use lockmgr::Mode;

use super::Client;
use super::ctx::{Ctx, Res, Stop, fail};
use super::inode::{Inode, State};
use crate::rpc::Errno;
use crate::wire::{MetaReply, MetaRequest, NamespaceOp};

/// Name spaces that can be stored; POSIX ACLs are not supported and say so.
fn supported(name: &[u8]) -> bool {
    [&b"user."[..], b"trusted.", b"security."]
        .iter()
        .any(|p| name.starts_with(p) && name.len() > p.len())
}

impl Client {
    fn load_xattrs<'s>(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &'s mut State,
    ) -> Res<&'s mut BTreeMap<Vec<u8>, Vec<u8>>> {
        if state.xattrs.is_none() {
            let loaded = if self.load_attr(ctx, inode, state)?.has_xattr {
                ctx.may_wait()?;
                match self.net.meta(&MetaRequest::GetXattrs { ino: inode.ino })? {
                    MetaReply::Xattrs(pairs) => pairs.into_iter().collect(),
                    _ => return fail(libc::EPROTO),
                }
            } else {
                BTreeMap::new()
            };
            state.xattrs = Some(loaded);
        }
        state.xattrs.as_mut().ok_or(Stop::Errno(Errno(libc::EIO)))
    }

    /// The value of an attribute.
    ///
    /// # Errors
    /// Park; `ENODATA`, `EOPNOTSUPP`.
    pub fn getxattr(&self, ctx: &Ctx<'_>, inode: &Inode, name: &[u8]) -> Res<Vec<u8>> {
        if !supported(name) {
            return fail(libc::EOPNOTSUPP);
        }
        let guard = self.lease(ctx, inode, Mode::Shared)?;
        let mut state = inode.lock(ctx, guard.version())?;
        match self.load_xattrs(ctx, inode, &mut state)?.get(name) {
            Some(value) => Ok(value.clone()),
            None => fail(libc::ENODATA),
        }
    }

    /// The names, each followed by a zero byte.
    ///
    /// # Errors
    /// Park.
    pub fn listxattr(&self, ctx: &Ctx<'_>, inode: &Inode, privileged: bool) -> Res<Vec<u8>> {
        let guard = self.lease(ctx, inode, Mode::Shared)?;
        let mut state = inode.lock(ctx, guard.version())?;
        let mut names = Vec::new();
        for name in self.load_xattrs(ctx, inode, &mut state)?.keys() {
            if privileged || !name.starts_with(b"trusted.") {
                names.extend_from_slice(name);
                names.push(0);
            }
        }
        Ok(names)
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

    fn change_xattr(&self, ctx: &Ctx<'_>, inode: &Inode, op: NamespaceOp) -> Res<()> {
        ctx.may_wait()?;
        let guards = self.lease_all(ctx, &[(inode, Mode::Exclusive)])?;
        self.namespace(ctx, &[inode], &guards, op)?;
        // The server has them now; what was cached is asked for again.
        inode.lock(ctx, guards.version(inode.ino))?.xattrs = None;
        Ok(())
    }
}
