//! Set-user-id bits that a change by somebody unprivileged clears.

use crate::session::caller::Caller;
use fsd_proto::wire::{Attr, Kind};

/// Set-user-id, set-group-id.
pub const SUID_SGID: u16 = (libc::S_ISUID | libc::S_ISGID) as u16;

/// Clears what must not survive a change by somebody unprivileged.
pub fn kill_suid(attr: &mut Attr) {
    if attr.kind != Kind::File {
        return;
    }
    attr.mode &= !(libc::S_ISUID as u16);
    // Set-group-id without group execution marks mandatory locking and stays.
    if attr.mode & libc::S_IXGRP as u16 != 0 {
        attr.mode &= !(libc::S_ISGID as u16);
    }
}

/// The same after a change by this caller, who may be privileged.
pub fn kill_suid_for(attr: &mut Attr, caller: Caller) {
    if attr.mode & SUID_SGID != 0 && !caller.keeps_suid() {
        kill_suid(attr);
    }
}
