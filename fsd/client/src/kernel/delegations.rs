//! Delegating what the mount holds.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use distfuse_abi::{Error, Grant, Revoked};
use lockmgr::Mode;
use rt::time::Instant;

use crate::cache::inode::Inode;
use crate::cache::range::range_of;
use crate::cache::state::State;
use crate::kernel::extension::{Extension, attributes};
use crate::session::ctx::{Res, fail};
use fsd_proto::wire::{Attr, Kind};

pub(crate) fn to_kernel_mode(mode: Option<Mode>) -> distfuse_abi::Mode {
    match mode {
        None => distfuse_abi::Mode::None,
        Some(Mode::Shared) => distfuse_abi::Mode::Shared,
        Some(Mode::Exclusive) => distfuse_abi::Mode::Exclusive,
    }
}

/// How long tasks may be inside a directory: they look at its attributes.
const INSIDE: Duration = Duration::from_micros(50);

/// What the kernel can have a lease on.
fn is_delegated(kind: Kind) -> bool {
    matches!(kind, Kind::File | Kind::Directory)
}

/// What became of an attempt.
pub(crate) enum Delegating {
    /// The kernel has it, or more.
    Done { wake: bool },
    /// It is being recalled, or something is done here that the kernel must not take part in.
    Taking,
    /// There is no room: this inode's must be recalled first.
    Full { victim: u64 },
}

/// What of its leases a mount has delegated to the kernel extension.
pub struct Delegations {
    /// The kernel extension.
    pub ext: Arc<Extension>,
}

impl Delegations {
    /// Delegates a part of a lease of which a guard is held: `attr` are the attributes under it, and what is written to `space`
    /// can be stored.
    pub(crate) fn lend(
        &self,
        inode: &Inode,
        mode: Mode,
        version: u64,
        (attr, space): (&Attr, (u64, u64)),
        asked: bool,
    ) -> Res<Delegating> {
        let ext = &self.ext;
        let mut lent = inode.delegation.state.lock();
        if (lent.recalling && lent.arranging == 0) || lent.calling > 0 {
            return Ok(Delegating::Taking);
        }
        let caches = lent
            .caches
            .filter(|c| c.0 == version)
            .unwrap_or_else(|| (version, ext.stamp.fetch_add(1, Ordering::Relaxed) + 1));
        let grant = Grant {
            version: caches.1,
            since: caches.1,
            attributes: attributes(attr),
            space,
        };
        let table = ext.attachment.table();
        match table.grant(inode.ino, to_kernel_mode(Some(mode)), &grant) {
            Ok(wake) => {
                lent.caches = Some(caches);
                if asked {
                    lent.asked = Some(Instant::now());
                }
                Ok(Delegating::Done { wake })
            }
            // As much is delegated already.
            Err(Error::NotNow(_)) => {
                if mode == Mode::Exclusive {
                    table.set_space(inode.ino, space);
                }
                Ok(Delegating::Done { wake: false })
            }
            Err(Error::Full(_)) => {
                // Whoever has neither dirty pages nor anybody inside costs least.
                let cost = |word: &distfuse_abi::Word| (!word.clean(distfuse_abi::Mode::None), word.count());
                let neighbours = table.neighbours(inode.ino).into_iter();
                match neighbours.min_by_key(|(_, word)| cost(word)) {
                    Some((victim, _)) => Ok(Delegating::Full { victim }),
                    None => Ok(Delegating::Taking),
                }
            }
            Err(error) => {
                tracing::error!("the kernel extension: {error}");
                fail(libc::EIO)
            }
        }
    }

    /// Delegates what the kernel is about to want, if that costs nothing: `held` of a file whose attributes these are, or a
    /// directory, for the names in it. With the inode locked, so that they are the last ones.
    pub fn delegate_ahead(&self, inode: &Inode, held: Mode, version: u64, attr: &Attr, state: &State) {
        let ext = &self.ext;
        if !is_delegated(attr.kind) {
            return;
        }
        // Names are changed by requests, under the mount's own lease: the kernel never needs more than to share it.
        let held = if attr.kind == Kind::Directory {
            Mode::Shared
        } else {
            held
        };
        let word = ext.attachment.table().word(inode.ino);
        if word.is_some_and(|word| word.mode() >= to_kernel_mode(Some(held))) {
            // The kernel may have dropped its inode and learns of it again: then it starts with what the entry says.
            return self.attributes_changed(inode, attr);
        }
        if let Ok(Delegating::Done { wake: true }) =
            self.lend(inode, held, version, (attr, range_of(state)), false)
            && word.is_some()
        {
            ext.wake(inode.ino, None);
        }
    }

    /// Would the kernel keep names of a directory in which one has been looked up, if that were delegated to it?
    pub fn wants_names(&self, dir: &Inode) -> bool {
        let word = self.ext.attachment.table().word(dir.ino);
        word.is_none_or(|word| word.mode() < to_kernel_mode(Some(Mode::Shared)))
    }

    /// What names a directory has is not known: what the kernel knows of them goes. Under the mount's lease.
    pub fn forget_names(&self, dir: &Inode) {
        let ext = &self.ext;
        // The next grant is of another version, whatever the record says.
        dir.delegation.state.lock().caches = None;
        // Besides whoever may be recalling it, too, and waits for the mount's lease meanwhile. Nobody is inside for long.
        let table = ext.attachment.table();
        let mut revoked = table.revoke(dir.ino, distfuse_abi::Mode::None, true);
        while !matches!(revoked, Revoked::Done { .. }) && !ext.attachment.is_gone() {
            rt::thread::sleep(INSIDE);
            revoked = table.finish(dir.ino, distfuse_abi::Mode::None);
        }
        if matches!(revoked, Revoked::Done { wake: true }) {
            ext.wake(dir.ino, None);
        }
    }

    /// The attributes, which have been changed here: the kernel, if the inode is delegated to it, gets them with the answer,
    /// and from the entry should it begin anew. With the inode locked.
    pub fn attributes_changed(&self, inode: &Inode, attr: &Attr) {
        if is_delegated(attr.kind) {
            // What has no entry is not delegated.
            let _ = self
                .ext
                .attachment
                .table()
                .set_attributes(inode.ino, &attributes(attr));
        }
    }

    pub(crate) fn may_write(&self, inode: &Inode) -> bool {
        let word = self.ext.attachment.table().word(inode.ino);
        word.is_some_and(|word| word.mode() == distfuse_abi::Mode::Exclusive)
    }

    pub(crate) fn tell_space(&self, inode: &Inode, range: (u64, u64)) {
        self.ext.attachment.table().set_space(inode.ino, range);
    }

    /// After blocks of a file have got or lost their frames.
    pub fn space_settled(&self, inode: &Inode, state: &State) {
        if self.may_write(inode) {
            self.tell_space(inode, range_of(state));
        }
    }
}
