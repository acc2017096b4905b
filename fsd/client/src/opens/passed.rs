//! Open files that pass from one mount to its successor, which serves the same kernel: by the numbers that the kernel knows.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rt::sync::Mutex;
use serde::{Deserialize, Serialize};

use crate::cache::inode::Inode;
use crate::opens::handles::{Handle, OpenFiles};
use crate::session::ctx::{Ctx, Res};

/// An open file or directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassedHandle {
    /// Its number.
    pub number: u64,
    /// Its inode.
    pub ino: u64,
    /// Flags of `open`.
    pub flags: i32,
    /// As in [`Handle::cached`].
    pub cached: bool,
    /// As in [`Handle::writer`].
    pub writer: bool,
    /// As in [`Handle::page_writer`].
    pub page_writer: bool,
    /// As in [`Handle::seen`].
    pub seen: u64,
    /// It is no directory.
    pub is_file: bool,
}

impl OpenFiles {
    /// All that is open, and the number that was given last.
    #[must_use]
    pub fn passed(&self) -> (Vec<PassedHandle>, u64) {
        let (all, last) = self.handles.all();
        let passed = all.into_iter().map(|(number, handle)| PassedHandle {
            number,
            ino: handle.inode.ino,
            flags: handle.flags,
            cached: handle.cached,
            writer: handle.writer,
            page_writer: handle.page_writer,
            seen: handle.seen.load(Ordering::SeqCst),
            is_file: handle.is_file,
        });
        (passed.collect(), last)
    }

    /// Opens a file that a predecessor has open, before anybody knows of it here: so that it is this mount's as well, whatever the
    /// predecessor does with it from now on. Its lease is held.
    ///
    /// # Errors
    /// The storage node cannot be reached; the file is gone.
    pub fn open_ahead(&self, ctx: &Ctx<'_>, inode: &Arc<Inode>, writer: bool) -> Res<Handle> {
        self.records
            .patiently(ctx, inode, || self.count_open(inode, writer))?;
        Ok(Handle {
            inode: Arc::clone(inode),
            flags: 0,
            cached: false,
            writer,
            page_writer: false,
            seen: AtomicU64::new(0),
            listing: Mutex::default(),
            is_file: true,
        })
    }

    /// Ends what [`OpenFiles::open_ahead`] has begun.
    ///
    /// # Errors
    /// The storage node cannot be reached.
    pub fn close_ahead(self: &Arc<Self>, handle: &Handle) -> Res<()> {
        self.count_close(handle)
    }

    /// An open file is this mount's, under the number that the kernel has for it. A file's lease is held.
    ///
    /// # Errors
    /// As [`OpenFiles::open_ahead`].
    pub fn adopt(&self, ctx: &Ctx<'_>, inode: &Arc<Inode>, passed: &PassedHandle) -> Res<()> {
        if passed.is_file {
            self.records
                .patiently(ctx, inode, || self.count_open(inode, passed.writer))?;
            if passed.cached {
                inode.kernel.cached.fetch_add(1, Ordering::SeqCst);
            }
            inode.opens.lock().page_writers += u32::from(passed.page_writer);
        }
        let handle = Handle {
            inode: Arc::clone(inode),
            flags: passed.flags,
            cached: passed.cached,
            writer: passed.writer,
            page_writer: passed.page_writer,
            seen: AtomicU64::new(passed.seen),
            listing: Mutex::default(),
            is_file: passed.is_file,
        };
        self.handles.put(passed.number, handle);
        Ok(())
    }
}
