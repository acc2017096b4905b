//! The examination of a stopped node's directory: `fsd check`.

use std::path::Path;

use super::alloc::Allocator;
use super::disk::{Disk, FileDisk};
use super::error::StorageError;
use super::index::{Entry, Index, Place, Stored};
use super::label::{self, Label};
use super::load::{occupy, read_stored};

/// What an examination has found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Findings {
    /// Blocks with a copy on disk.
    pub stored: u64,
    /// Bytes of those copies.
    pub bytes: u64,
    /// Blocks that have none: they are lost if the machine's memory is.
    pub unstored: u64,
    /// What is wrong, one sentence each.
    pub problems: Vec<String>,
}

/// Examines a storage node's directory: label, index, and every block against its checksum. Changes nothing.
///
/// # Errors
/// The node is running, or the directory cannot be read at all.
pub fn examine(dir: &Path) -> Result<(Label, Findings), StorageError> {
    let mut label = Label::read(dir)?;
    // One that has not been made has nothing to examine.
    let store = label::open_index(dir, &mut label)?;
    let path = dir.join(label::BACKING);
    let disk = FileDisk::open_to_read(&path).map_err(|error| StorageError::Io {
        what: "cannot open the backing file",
        path: path.clone(),
        error,
    })?;
    let index = Index::load(store)?;
    let mut findings = examine_index(&index, &disk);
    let mut alloc = Allocator::new(label.pool);
    if let Err(StorageError::Damaged(what)) = occupy(&index, &mut alloc, &mut Allocator::new(0)) {
        findings.problems.push(what);
    }
    Ok((label, findings))
}

fn examine_index(index: &Index, disk: &dyn Disk) -> Findings {
    let mut findings = Findings::default();
    let mut blocks: Vec<(Place, Entry, Stored)> = Vec::new();
    for (place, entry) in index.all() {
        match entry.stored {
            Some(stored) => blocks.push((place, entry, stored)),
            // Those of its pages that are not zeros are.
            None if index.kept().has(place) => findings.stored += 1,
            None => findings.unstored += 1,
        }
    }
    blocks.sort_unstable_by_key(|(_, _, stored)| stored.extent.offset);
    let mut buffer = Vec::new();
    for ((ino, block), _, stored) in blocks {
        findings.stored += 1;
        findings.bytes += u64::from(stored.extent.size);
        disk.uncache(stored.extent.offset, u64::from(stored.extent.size));
        if let Err(why) = read_stored(disk, stored, &mut buffer) {
            findings.problems.push(format!(
                "block {block} of inode {ino:#x} ({} bytes at {}): {why}",
                stored.extent.size, stored.extent.offset
            ));
        }
    }
    findings
}
