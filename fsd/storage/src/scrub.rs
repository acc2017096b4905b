//! The background check of what is on disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rt::channel::{Receiver, RecvTimeoutError};
use rt::time::Instant;

use super::error::StorageError;
use super::flush::Flusher;
use super::index::{Entry, Place};
use super::load::read_stored;
use super::media::Media;

/// Pause between two steps.
const STEP: Duration = Duration::from_secs(1);
/// Longest sleep between two passes.
const SLEEP: Duration = Duration::from_secs(3600);

/// Where the scrub is: what is left of this pass.
#[derive(Debug, Default)]
pub struct Scrub {
    left: Vec<Place>,
}

/// What went wrong with the disk since the start.
#[derive(Debug, Default)]
pub struct Faults {
    /// Copies on disk found damaged or unreadable by the scrub.
    pub damaged: AtomicU64,
    /// Bytes the scrub has checked.
    pub scrubbed: AtomicU64,
}

/// Checks the backing file.
pub struct Scrubber {
    media: Arc<Media>,
    flusher: Arc<Flusher>,
    /// What went wrong.
    pub faults: Faults,
}

impl Scrubber {
    /// With no fault found.
    pub fn new(media: &Arc<Media>, flusher: &Arc<Flusher>) -> Self {
        Self {
            media: Arc::clone(media),
            flusher: Arc::clone(flusher),
            faults: Faults::default(),
        }
    }

    /// Checks so many bytes of the backing file (at least one block), going round.
    ///
    /// # Errors
    /// The store's. A damaged copy is none: it is made anew from memory, which still has the block.
    pub fn scrub(&self, state: &mut Scrub, bytes: u64) -> Result<(), StorageError> {
        if state.left.is_empty() {
            let mut all: Vec<(u64, Place)> = {
                let space = self.media.space.lock();
                let stored = |(place, e): (Place, Entry)| Some((e.stored?.extent.offset, place));
                space.index.all().filter_map(stored).collect()
            };
            all.sort_unstable_by(|a, b| b.cmp(a));
            state.left = all.into_iter().map(|(_, place)| place).collect();
        }
        let (mut done, mut buffer) = (0, Vec::new());
        while done < bytes {
            let Some(place) = state.left.pop() else { break };
            done += self.scrub_block(place, &mut buffer)?;
        }
        self.faults.scrubbed.fetch_add(done, Ordering::Relaxed);
        Ok(())
    }

    fn scrub_block(&self, place: Place, buffer: &mut Vec<u8>) -> Result<u64, StorageError> {
        let entry = self.media.space.lock().index.get(place.0, place.1);
        let Some((entry, stored)) = entry.and_then(|e| Some((e, e.stored?))) else {
            return Ok(0);
        };
        self.media
            .disk
            .uncache(stored.extent.offset, u64::from(stored.extent.size));
        let read = read_stored(self.media.disk.as_ref(), stored, buffer);
        let mut space = self.media.space.lock();
        // Stored anew meanwhile, or freed: then the extent may be another's.
        let now = space.index.get(place.0, place.1);
        if now.is_none_or(|now| now.id != entry.id || now.stored != Some(stored)) {
            return Ok(0);
        }
        match read {
            Ok(()) if entry.lost => {
                // Nobody uses its frame, and under the lock nobody can free it.
                self.media
                    .pool
                    .mem
                    .write_at(entry.frame.offset as usize, buffer)?;
                self.media.put_kept(place, entry.frame)?;
                let lost = false;
                space.index.set(&[(place, Entry { lost, ..entry })])?;
                tracing::info!("block {} of inode {:#x} can be read again", place.1, place.0);
            }
            Err(why) if !entry.lost => {
                space.index.note(place, |e| e.rewrite = true);
                self.flusher.is_needed();
                self.faults.damaged.fetch_add(1, Ordering::Relaxed);
                tracing::error!(
                    "the disk has lost block {} of inode {:#x} ({} bytes at {} of {}): {why}; memory still has it, and it is stored anew",
                    place.1,
                    place.0,
                    stored.extent.size,
                    stored.extent.offset,
                    self.media.disk_path.display()
                );
            }
            _ => {}
        }
        Ok(u64::from(stored.extent.size))
    }

    /// Checks the backing file at a rate of bytes a second, until told to stop. A pass begins so long after the one before; but at
    /// once where blocks are lost, for they may be readable again.
    pub fn run(&self, rate: u64, pause: Duration, stop: &Receiver<()>) {
        let mut state = Scrub::default();
        // When the last pass ended that left no block lost.
        let mut ended: Option<Instant> = None;
        let mut patience = if rate == 0 { SLEEP } else { STEP };
        while matches!(stop.recv_timeout(patience), Err(RecvTimeoutError::Timeout)) {
            if rate == 0 {
                continue;
            }
            let rest = ended.map_or(Duration::ZERO, |at| pause.saturating_sub(at.elapsed()));
            if state.left.is_empty() && !rest.is_zero() {
                patience = rest.clamp(STEP, SLEEP);
                continue;
            }
            patience = STEP;
            if let Err(error) = self.scrub(&mut state, rate) {
                tracing::error!("checking the backing file: {error}");
            }
            if state.left.is_empty() {
                let lost = self.media.space.lock().index.all().any(|(_, entry)| entry.lost);
                ended = (!lost).then(Instant::now);
            }
        }
    }
}
