//! Bringing the pool's memory up at start: what an earlier life of the process left there, or what is on disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rt::sync::Mutex;

use super::alloc::Allocator;
use super::error::StorageError;

use super::disk::{Disk, checksum};
use super::generation::{self, Generation};
use super::index::{Entry, Index, Place, Stored};
use super::media::{Flaw, Media, put_kept};
use super::pool::Pool;
use super::space::Space;
use fsd_node::store::Store;
use fsd_proto::layout::BLOCK;
use fsd_proto::layout::class_for;
use fsd_proto::wire::Frame;

/// So many blocks that cannot be read get a line of their own in the log.
const LINES: u64 = 20;
/// Slabs of the backing file for one of the pool that are taken for possible, which is far more than there ever are: the bookkeeping
/// is as large as the last extent that the index names, so a damaged entry must not ask for all memory.
const SPREAD: u64 = 1024;
/// Entries changed in one batch of the store.
const BATCH: usize = 10_000;

/// What blocks are made of.
pub struct Parts {
    /// The pool's file in a memory file system.
    pub memory: PathBuf,
    /// Number of the store, by which memory is known to belong to it.
    pub uuid: String,
    /// Bytes of the pool.
    pub bytes: u64,
    /// The backing file …
    pub disk: Arc<dyn Disk>,
    /// … and its name.
    pub disk_path: PathBuf,
    /// Where the index is kept.
    pub store: Arc<dyn Store>,
    /// The memory will be pinned by a device.
    pub pinned: bool,
    /// The store is taken as it is, though memory knows of a newer one.
    pub accept_older: bool,
    /// A rule to leave out; tests only.
    #[cfg(any(test, feature = "flaws"))]
    pub flaw: Option<Flaw>,
}

impl Parts {
    #[cfg(any(test, feature = "flaws"))]
    fn flawed(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }

    #[cfg(not(any(test, feature = "flaws")))]
    #[allow(clippy::unused_self)]
    const fn flawed(&self, _flaw: Flaw) -> bool {
        false
    }
}

/// Books the frames and extents of all entries.
pub(super) fn occupy(
    index: &Index,
    alloc: &mut Allocator,
    extents: &mut Allocator,
) -> Result<(), StorageError> {
    for ((ino, block), entry) in index.all() {
        let frame = entry.frame;
        if !class_for(frame.size).is_some_and(|class| alloc.occupy(frame.offset, class)) {
            return Err(StorageError::Damaged(format!(
                "block {block} of inode {ino:#x} has an impossible frame ({} bytes at {})",
                frame.size, frame.offset
            )));
        }
        let Some(Stored { extent, .. }) = entry.stored else {
            continue;
        };
        let slabs = extent.offset / BLOCK + 1;
        let more = u32::try_from(slabs.saturating_sub(extents.bytes() / BLOCK));
        let possible = slabs <= alloc.bytes() / BLOCK * SPREAD;
        if let (true, Ok(more)) = (possible, more) {
            extents.grow(more);
        }
        if !class_for(extent.size).is_some_and(|class| extents.occupy(extent.offset, class)) {
            return Err(StorageError::Damaged(format!(
                "block {block} of inode {ino:#x} has an impossible place on disk ({} bytes at {})",
                extent.size, extent.offset
            )));
        }
        extents.set_backed(extent.offset);
    }
    Ok(())
}

/// Why a block's copy on disk is not what was stored, if so; else `into` has it.
pub(super) fn read_stored(disk: &dyn Disk, stored: Stored, into: &mut Vec<u8>) -> Result<(), String> {
    into.resize(stored.extent.size as usize, 0);
    disk.read(stored.extent.offset, into).map_err(|e| e.to_string())?;
    if checksum(into) == stored.sum {
        Ok(())
    } else {
        Err("what is there is not what was stored (checksum)".into())
    }
}

/// Brings everything up.
pub fn open(parts: Parts) -> Result<Media, StorageError> {
    let dir = parts.disk_path.parent().unwrap_or(&parts.disk_path);
    let checked = generation::check(parts.store.as_ref(), &parts.memory, dir);
    if parts.accept_older && checked.is_err() {
        tracing::warn!(
            "an older copy of the store is accepted: what is in memory does not fit, and is given up"
        );
        Pool::forget(&parts.memory)?;
    } else {
        checked?;
    }
    let pool = Pool::open(&parts.memory, &parts.uuid, parts.bytes)?;
    let mut index = Index::load(Arc::clone(&parts.store))?;
    if !pool.inherited {
        // What was never stored is gone with the memory.
        let gone: Vec<Place> = index
            .all()
            .filter(|(place, e)| e.stored.is_none() && !index.kept().has(*place))
            .map(|(place, _)| place)
            .collect();
        for part in gone.chunks(BATCH) {
            index.drop_all(part)?;
        }
    }
    let mut alloc = Allocator::new(parts.bytes);
    let mut extents = Allocator::new(0);
    occupy(&index, &mut alloc, &mut extents)?;
    if pool.inherited {
        clean_unused(&pool, &index)?;
    }
    back_used(&pool, &index, &mut alloc)?;
    if parts.flawed(Flaw::MarkedEarly) {
        pool.loaded()?;
    }
    load(&parts, &pool, &mut index)?;
    pool.loaded()?;
    let generation = Generation::open(Arc::clone(&parts.store), &parts.memory)?;
    Ok(Media {
        generation,
        pool,
        disk: parts.disk,
        disk_path: parts.disk_path,
        store: parts.store,
        space: Mutex::new(Space {
            alloc,
            index,
            reserved: std::collections::HashMap::new(),
            extents,
            retired: Vec::new(),
        }),
        pinned: parts.pinned,
        #[cfg(any(test, feature = "flaws"))]
        flaw: parts.flaw,
    })
}

/// After the death of the process, frames it had freed but not yet cleaned may hold old bytes.
fn clean_unused(pool: &Pool, index: &Index) -> Result<(), StorageError> {
    let mut used: Vec<(u64, u64)> = index
        .all()
        .map(|(_, e)| (e.frame.offset, e.frame.offset + u64::from(e.frame.size)))
        .collect();
    used.sort_unstable();
    let (mut from, len) = (0, pool.mem.len() as u64);
    for (start, end) in used.into_iter().chain([(len, len)]) {
        if start > from {
            pool.mem.give_back(from as usize, (start - from) as usize)?;
        }
        from = from.max(end);
    }
    Ok(())
}

/// Has the system allocate the memory of all slabs in use.
fn back_used(pool: &Pool, index: &Index, alloc: &mut Allocator) -> Result<(), StorageError> {
    for (_, entry) in index.all() {
        let offset = entry.frame.offset;
        if !alloc.is_backed(offset) {
            pool.back(offset)?;
            alloc.set_backed(offset);
        }
    }
    Ok(())
}

/// Reads what memory does not have: everything, or what could not be read the last time.
fn load(parts: &Parts, pool: &Pool, index: &mut Index) -> Result<(), StorageError> {
    let mut wanted: Vec<(Place, Entry, Stored)> = index
        .all()
        .filter(|(_, e)| e.lost || !pool.inherited)
        .filter_map(|(place, e)| Some((place, e, e.stored?)))
        .collect();
    wanted.sort_unstable_by_key(|(_, _, stored)| stored.extent.offset);
    if !pool.inherited {
        // Of these there is no copy yet: the rest of them is zeros.
        for (place, entry) in index.all().filter(|(_, e)| e.stored.is_none()) {
            put_kept(parts.store.as_ref(), pool, place, entry.frame)?;
        }
    }
    let mut bytes = Vec::new();
    let mut changed: Vec<(Place, Entry)> = Vec::new();
    let mut lost = 0;
    for (place, entry, stored) in wanted {
        let read = match read_stored(parts.disk.as_ref(), stored, &mut bytes) {
            Err(_) if parts.flawed(Flaw::LostAsZeros) => {
                bytes.fill(0);
                Ok(())
            }
            Err(_) if parts.flawed(Flaw::NoChecksums) => Ok(()),
            other => other,
        };
        if read.is_err() != entry.lost {
            let lost = read.is_err();
            changed.push((place, Entry { lost, ..entry }));
        }
        match read {
            Ok(()) => {
                pool.mem.write_at(entry.frame.offset as usize, &bytes)?;
                if index.kept().has(place) {
                    put_kept(parts.store.as_ref(), pool, place, entry.frame)?;
                }
            }
            Err(why) => {
                lost += 1;
                if lost <= LINES {
                    report_lost(&parts.disk_path, place, stored.extent, &why);
                }
            }
        }
    }
    if lost > 0 {
        tracing::error!(
            "{lost} blocks cannot be read from {} and are I/O errors until they can be, or are freed",
            parts.disk_path.display()
        );
    }
    for part in changed.chunks(BATCH) {
        index.set(part)?;
    }
    Ok(())
}

fn report_lost(path: &Path, (ino, block): Place, extent: Frame, why: &str) {
    tracing::error!(
        "block {block} of inode {ino:#x} cannot be read ({} bytes at {} of {}): {why}",
        extent.size,
        extent.offset,
        path.display()
    );
}
