//! What the kernel's library says and what the file system says, turned into one another.

use std::time::SystemTime;

use fuser::{FileAttr, FileType, INodeNo, Request, TimeOrNow};

use crate::files::attrs::SetTime;
use crate::session::caller::Caller;
use fsd_proto::layout::BLOCK;
use fsd_proto::rpc::Errno;
use fsd_proto::wire::{Attr, Kind, Time};

pub(super) fn caller_of(req: &Request) -> Caller {
    Caller {
        pid: req.pid(),
        uid: req.uid(),
    }
}

pub(super) fn error_of(e: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(e.0)
}

pub(super) fn kind_of(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::Char => FileType::CharDevice,
        Kind::Block => FileType::BlockDevice,
    }
}

pub(super) fn attr_of(a: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(a.ino),
        size: a.size,
        blocks: a.blocks,
        atime: a.atime.to_system(),
        mtime: a.mtime.to_system(),
        ctime: a.ctime.to_system(),
        crtime: a.btime.to_system(),
        kind: kind_of(a.kind),
        perm: a.mode,
        nlink: a.nlink,
        uid: a.uid,
        gid: a.gid,
        rdev: a.rdev,
        blksize: BLOCK as u32,
        flags: 0,
    }
}

pub(super) fn time_of(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(t) => SetTime::At(from_library(t)),
    }
}

/// The FUSE library takes the nanoseconds of a time before 1970 for negative ones; they never are.
pub(super) fn from_library(time: SystemTime) -> Time {
    match SystemTime::UNIX_EPOCH.duration_since(time) {
        Ok(d) if !d.is_zero() => {
            let secs = i64::try_from(d.as_secs()).unwrap_or(i64::MAX);
            Time(
                secs.saturating_mul(-1_000_000_000)
                    .saturating_add(i64::from(d.subsec_nanos())),
            )
        }
        _ => Time::from_system(time),
    }
}
