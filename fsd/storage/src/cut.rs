//! Giving back what lies beyond the ends of files, once no mount is left that could make them longer.

use super::blocks::Blocks;
use super::error::StorageError;
use super::index::Entry;
use super::keeping::Wanted;
use fsd_proto::layout::BLOCK;
use fsd_proto::wire::BlockRange;

/// An inode and its size in bytes; none: it is no more.
pub type End = (u64, Option<u64>);

/// Frees the blocks beyond the ends of files, and zeroes what is beyond the end in the last one, durably; returns the
/// bytes freed. What has been set aside beyond the end and not been written to (`fallocate`) stays.
///
/// # Errors
/// The store's, or the disk's; what has been cut by then may come back after a power cut.
pub fn cut(blocks: &Blocks, ends: &[End]) -> Result<u64, StorageError> {
    let (mut freed, mut zeroed) = (0, Vec::new());
    for &(ino, size) in ends {
        let (gone, size) = (size.is_none(), size.unwrap_or(0));
        let entries: Vec<(u64, Entry)> = {
            let space = blocks.media.space.lock();
            let beyond = space
                .index
                .entries(ino)
                .filter(|((_, b), _)| (b + 1) * BLOCK > size);
            beyond.map(|((_, block), entry)| (block, entry)).collect()
        };
        for (block, entry) in entries {
            let inside = size.saturating_sub(block * BLOCK);
            if inside == 0 && (gone || entry.lost || !is_zero(blocks, &entry, 0)?) {
                freed += blocks.frames.free(&[BlockRange::one(ino, block)])?;
            } else if !entry.lost && !is_zero(blocks, &entry, inside)? {
                let (at, len) = (entry.frame.offset + inside, u64::from(entry.frame.size) - inside);
                blocks.media.pool.mem.zero(at as usize, len as usize)?;
                // Whatever the counter says: nobody has moved it for this.
                blocks
                    .media
                    .space
                    .lock()
                    .index
                    .note((ino, block), |e| (e.clean_at, e.kept_at) = (None, None));
                zeroed.push(ino);
            }
        }
    }
    blocks.flusher.flush(&Wanted {
        inos: zeroed,
        parts: Vec::new(),
    })?;
    Ok(freed)
}

/// Is a frame zero from a place in it on?
fn is_zero(blocks: &Blocks, entry: &Entry, from: u64) -> Result<bool, StorageError> {
    let size = u64::from(entry.frame.size);
    if from >= size {
        return Ok(true);
    }
    let mut bytes = vec![0; (size - from) as usize];
    blocks
        .media
        .pool
        .mem
        .read_at((entry.frame.offset + from) as usize, &mut bytes)?;
    Ok(bytes.iter().all(|&b| b == 0))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::super::crash_disk::FakeDisk;
    use super::super::crash_tests::{CONN, contents, open, put, scratch};
    use super::*;
    use fsd_node::fake_disk::FakeStore;
    use fsd_proto::wire::BlockWant;

    #[test]
    fn what_is_beyond_the_end_is_gone_for_good() {
        let (disk, store) = (Arc::new(FakeDisk::default()), Arc::new(FakeStore::default()));
        let start = |dir: &Path| open(dir, Arc::clone(&disk), Arc::clone(&store), None);
        let dir = scratch();
        let blocks = start(dir.path());
        for (ino, block) in [(1, 0), (1, 1), (2, 0), (4, 0)] {
            put(&blocks, (ino, block), &[7; 9000]).unwrap();
        }
        // Set aside, by `fallocate` beyond the end.
        let want = |ino, block| BlockWant {
            ino,
            block,
            size: 4096,
        };
        blocks
            .frames
            .allocate(CONN, &[want(2, 1), want(4, 2)], 0)
            .unwrap();
        blocks.flusher.flush_all().unwrap();
        assert_eq!(blocks.media.space.lock().index.inodes(0, 2), [1, 2]);
        assert_eq!(blocks.media.space.lock().index.inodes(2, 2), [4]);
        let freed = cut(&blocks, &[(1, Some(100)), (2, Some(BLOCK)), (4, None)]).unwrap();
        assert_eq!(freed, 2 * 16384 + 4096);
        // Whatever becomes of memory.
        drop(blocks);
        let dir = scratch();
        let blocks = start(dir.path());
        let bytes = |place: (u64, u64)| {
            let entry = blocks.media.space.lock().index.get(place.0, place.1);
            entry.map(|e| contents(&blocks, e.frame))
        };
        assert_eq!(bytes((1, 0)), Some(vec![7; 100]));
        assert_eq!(bytes((2, 0)), Some(vec![7; 9000]));
        assert_eq!(bytes((2, 1)), Some(Vec::new()));
        assert_eq!((bytes((1, 1)), bytes((4, 0)), bytes((4, 2))), (None, None, None));
    }
}
