//! The blocks of a storage node: which frame each has in memory, which extent on disk, and in what order things happen
//! so that neither the death of the process nor a power cut loses what was promised.
//!
//! - A block is stored *elsewhere* than its last copy, which stays until the index durably names the new one: an entry of
//!   the index always names a whole copy, and its checksum is that of what lies there.
//! - An extent that the index does not name any longer is used again only when that is durable, too. Else a power cut
//!   could bring back an entry that names what belongs to another file by now.
//! - Frames in memory need none of that: when memory is lost all of it is loaded anew.
//!
//! Nothing here knows about connections. Locks: `flushing`, then `space`; no disk is waited for under `space`.

use std::sync::Arc;

use super::cleaner::Cleaner;
use super::error::StorageError;
use super::flush::Flusher;
use super::frames::Frames;
use super::load::{self, Parts};
use super::media::Media;
use super::scrub::Scrubber;

pub use super::media::Flaw;

/// The blocks of a storage node, and what is done with them.
pub struct Blocks {
    pub(super) media: Arc<Media>,
    pub(super) cleaner: Arc<Cleaner>,
    pub(super) frames: Frames,
    pub(super) flusher: Arc<Flusher>,
    pub(super) scrubber: Scrubber,
}

impl Blocks {
    /// Opens the blocks of a node.
    ///
    /// # Errors
    /// Not enough memory; the store or the memory file system fails; the index is damaged. A block that cannot be read is
    /// none: it is lost until it is freed, or can be read at a later start.
    pub fn open(parts: Parts) -> Result<Self, StorageError> {
        let media = Arc::new(load::open(parts)?);
        let cleaner = Arc::new(Cleaner::new(&media));
        cleaner.stock()?;
        let flusher = Arc::new(Flusher::new(&media));
        Ok(Self {
            frames: Frames {
                media: Arc::clone(&media),
                cleaner: Arc::clone(&cleaner),
            },
            scrubber: Scrubber::new(&media, &flusher),
            media,
            cleaner,
            flusher,
        })
    }
}
