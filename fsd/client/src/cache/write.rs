//! A write, as the operations pass it on.

/// What a write is besides its data.
#[derive(Debug, Clone, Copy, Default)]
pub struct WriteFlags {
    /// At the end of the file, wherever that is now.
    pub append: bool,
    /// Clear set-user-id bits.
    pub kill_suid: bool,
    /// The kernel has put the data into its page cache.
    pub cached: bool,
}

/// What one request writes; the data is the request's.
#[derive(Debug, Clone, Copy)]
pub struct Write<'a> {
    /// Where, in bytes; of an append where the kernel thinks that the file ends.
    pub offset: u64,
    /// The bytes to be written.
    pub data: &'a [u8],
    /// What else belongs to it.
    pub flags: WriteFlags,
}

/// A [`Write`] that outlives its request, and so has the data to itself.
#[derive(Debug)]
pub struct Queued {
    /// Where in the file, bytes.
    pub offset: u64,
    /// The bytes to be written.
    pub data: Vec<u8>,
    /// What else belongs to the write.
    pub flags: WriteFlags,
}

impl From<&Write<'_>> for Queued {
    fn from(write: &Write<'_>) -> Self {
        Self {
            offset: write.offset,
            data: write.data.to_vec(),
            flags: write.flags,
        }
    }
}

impl Queued {
    /// The same, with the data borrowed.
    #[must_use]
    pub fn write(&self) -> Write<'_> {
        Write {
            offset: self.offset,
            data: &self.data,
            flags: self.flags,
        }
    }
}
