//! The answer to CREATE in the kernel's own form (`fuse_entry_out` and `fuse_open_out` of `linux/fuse.h`). The library would give the
//! name and the attributes one time to live; names have none here, and without attributes a stock kernel asks for them at once, to see whether the
//! file may be opened that it has just made.

use std::cell::Cell;
use std::os::fd::RawFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::FileAttr;
use rustix::io::Errno;

use super::descriptors::{answer, devices};

/// `fuse_out_header`.
const HEADER: usize = 16;
/// With `fuse_entry_out` and `fuse_open_out`.
const LENGTH: usize = HEADER + 128 + 16;

thread_local! {
    /// The number of the descriptor that this thread reads requests from, once it is known.
    static MINE: Cell<Option<RawFd>> = const { Cell::new(None) };
}

/// A file that was made and opened.
pub(super) struct Created<'a> {
    /// Which request that answers.
    pub unique: u64,
    /// Its attributes.
    pub attr: &'a FileAttr,
    /// For so long the kernel may keep them.
    pub ttl: Duration,
    /// The generation of its inode.
    pub generation: u64,
    /// Number of the open file.
    pub handle: u64,
    /// `FOPEN_…`.
    pub flags: u32,
}

/// Seconds and nanoseconds, also before 1970.
fn parts(time: SystemTime) -> (i64, u32) {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => (since.as_secs() as i64, since.subsec_nanos()),
        Err(error) => {
            let before = error.duration();
            match before.subsec_nanos() {
                0 => (-(before.as_secs() as i64), 0),
                nanos => (-(before.as_secs() as i64) - 1, 1_000_000_000 - nanos),
            }
        }
    }
}

impl Created<'_> {
    fn message(&self) -> Vec<u8> {
        let attr = self.attr;
        let [(atime, atime_nanos), (mtime, mtime_nanos), (ctime, ctime_nanos)] =
            [attr.atime, attr.mtime, attr.ctime].map(parts);
        let mut out = Vec::with_capacity(LENGTH);
        let long = |out: &mut Vec<u8>, words: &[u64]| words.iter().for_each(|w| out.extend(w.to_ne_bytes()));
        let short = |out: &mut Vec<u8>, words: &[u32]| words.iter().for_each(|w| out.extend(w.to_ne_bytes()));
        // No error.
        short(&mut out, &[LENGTH as u32, 0]);
        long(&mut out, &[self.unique]);
        // The name has no time to live.
        long(&mut out, &[attr.ino.0, self.generation, 0, self.ttl.as_secs()]);
        short(&mut out, &[0, self.ttl.subsec_nanos()]);
        long(&mut out, &[attr.ino.0, attr.size, attr.blocks]);
        long(&mut out, &[atime as u64, mtime as u64, ctime as u64]);
        short(&mut out, &[atime_nanos, mtime_nanos, ctime_nanos]);
        short(
            &mut out,
            &[
                libc::S_IFREG | u32::from(attr.perm),
                attr.nlink,
                attr.uid,
                attr.gid,
            ],
        );
        short(&mut out, &[attr.rdev, attr.blksize, 0]);
        long(&mut out, &[self.handle]);
        short(&mut out, &[self.flags, 0]);
        out
    }

    /// Sends it, from a thread that reads requests, to one of which it is the answer. False: nothing was answered.
    ///
    /// A request is answered over the descriptor that it was read from, and the kernel refuses to take its answer over another one.
    pub(super) fn send(&self) -> bool {
        let message = self.message();
        if let Some(number) = MINE.get() {
            return answer(number, &message).is_ok();
        }
        let Ok(all) = devices(&[]) else { return false };
        for number in all {
            match answer(number, &message) {
                Ok(()) => {
                    MINE.set(Some(number));
                    return true;
                }
                Err(Errno::NOENT) => {}
                Err(_) => return false,
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fuser::{FileType, INodeNo};

    #[test]
    fn it_has_the_kernels_form() {
        let at = UNIX_EPOCH + Duration::new(7, 8);
        let attr = FileAttr {
            ino: INodeNo(0x11),
            size: 0x22,
            blocks: 0x33,
            atime: at,
            mtime: UNIX_EPOCH - Duration::new(0, 1),
            ctime: at,
            crtime: at,
            kind: FileType::RegularFile,
            perm: 0o640,
            nlink: 1,
            uid: 0x44,
            gid: 0x55,
            rdev: 0,
            blksize: 0x66,
            flags: 0,
        };
        let created = Created {
            unique: 0x77,
            attr: &attr,
            ttl: Duration::from_millis(5),
            generation: 0x88,
            handle: 0x99,
            flags: 0xaa,
        };
        let message = created.message();
        assert_eq!(message.len(), LENGTH);
        let long = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().unwrap());
        let short = |at: usize| u32::from_ne_bytes(message[at..at + 4].try_into().unwrap());
        assert_eq!((short(0), short(4), long(8)), (160, 0, 0x77));
        // nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec
        assert_eq!((long(16), long(24), long(32), long(40)), (0x11, 0x88, 0, 0));
        assert_eq!((short(48), short(52)), (0, 5_000_000));
        // ino, size, blocks; atime, mtime, ctime
        assert_eq!((long(56), long(64), long(72)), (0x11, 0x22, 0x33));
        assert_eq!((long(80), long(88) as i64, long(96)), (7, -1, 7));
        assert_eq!((short(104), short(108), short(112)), (8, 999_999_999, 8));
        // mode, nlink, uid, gid, rdev, blksize, flags
        assert_eq!((short(116), short(120)), (0o100640, 1));
        assert_eq!((short(124), short(128), short(132)), (0x44, 0x55, 0));
        assert_eq!((short(136), short(140)), (0x66, 0));
        // fh, open_flags, backing_id
        assert_eq!((long(144), short(152), short(156)), (0x99, 0xaa, 0));
    }
}
