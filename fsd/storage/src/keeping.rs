//! FLUSH: what is small is kept in the index's store, and durable with one sync; the rest is stored.

use super::error::{StorageError, errno};
use super::flush::{Flusher, Target};
use super::index::{Entry, Place};
use super::kept::{PAGE, Page};
use super::media::Media;
use super::space::Space;
use fsd_proto::rpc::Errno;
use fsd_proto::wire::Part;

/// Blocks with frames up to this are kept as a whole where it is not known what of them has been written.
const SMALL: u32 = 16 << 10;
/// Most pages that one flush keeps: others wait for the lock meanwhile.
const PAGES: usize = 64;

/// What is to be durable.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Inodes of which all is.
    pub inos: Vec<u64>,
    /// Parts of others, of which all else is durable.
    pub parts: Vec<Part>,
}

/// What a flush does with each block.
#[derive(Default)]
struct Plan {
    pages: Vec<Page>,
    /// Blocks all of which is kept, and what `Media::count` was before they were read.
    whole: Vec<(Place, u64)>,
    /// To be stored.
    rest: Vec<Target>,
}

impl Plan {
    /// Keeps pages of a block, or has it stored.
    fn take(
        &mut self,
        media: &Media,
        space: &Space,
        (place, entry): (Place, Entry),
        pages: &[u32],
    ) -> Result<bool, StorageError> {
        let more = self.pages.len() + pages.len();
        if more > PAGES || !space.index.kept().has_room(more) {
            self.rest.push(Target {
                place,
                id: entry.id,
                bytes: entry.frame.size,
            });
            return Ok(false);
        }
        for &page in pages {
            let at = page * PAGE;
            let mut bytes = vec![0; PAGE as usize];
            let from = entry.frame.offset as usize + at as usize;
            media.pool.mem.read_at(from, &mut bytes)?;
            self.pages.push((place, at, bytes));
        }
        Ok(true)
    }
}

impl Flusher {
    /// Writes to parts of blocks, as a mount does that writes one-sided.
    ///
    /// # Errors
    /// `EIO`: one is not there, or not as large; `EINVAL`: it is not as much as they are.
    pub fn take_in(&self, parts: &[Part], mut data: &[u8]) -> Result<(), Errno> {
        let pool = &self.media.pool;
        // Under it no frame becomes another block's.
        let mut space = self.media.space.lock();
        // Whatever the counters of the slabs say.
        self.is_needed();
        for part in parts {
            let Some((bytes, rest)) = data.split_at_checked(part.len as usize) else {
                return Err(Errno(libc::EINVAL));
            };
            data = rest;
            let end = u64::from(part.at) + u64::from(part.len);
            let entry = space.index.get(part.ino, part.block);
            let Some(entry) = entry.filter(|e| !e.lost && end <= u64::from(e.frame.size)) else {
                return Err(Errno(libc::EIO));
            };
            let at = entry.frame.offset as usize + part.at as usize;
            pool.mem.write_at(at, bytes).map_err(|e| errno(&e.into()))?;
            space.index.note((part.ino, part.block), |e| e.taken += 1);
        }
        if data.is_empty() {
            Ok(())
        } else {
            Err(Errno(libc::EINVAL))
        }
    }

    /// Makes what was written durable.
    pub fn flush(&self, wanted: &Wanted) -> Result<(), StorageError> {
        let rest = self.keep(wanted)?;
        self.store_durably(rest)
    }

    /// Keeps what can be, which the next sync of the index makes durable; the rest is to be stored.
    fn keep(&self, wanted: &Wanted) -> Result<Vec<Target>, StorageError> {
        let media = self.media.as_ref();
        let mut space = media.space.lock();
        let mut plan = Plan::default();
        let parts = wanted.parts.iter().filter(|part| part.len > 0);
        for part in parts.filter(|part| !wanted.inos.contains(&part.ino)) {
            let place = (part.ino, part.block);
            // Freed since: then nothing of it is to be there.
            let Some(entry) = space.index.get(place.0, place.1).filter(|e| !e.lost) else {
                continue;
            };
            let end = part.at.saturating_add(part.len).min(entry.frame.size);
            let pages: Vec<u32> = (part.at / PAGE..end.div_ceil(PAGE)).collect();
            plan.take(media, &space, (place, entry), &pages)?;
        }
        let mut inos = wanted.inos.clone();
        inos.sort_unstable();
        inos.dedup();
        for ino in inos {
            let found: Vec<(Place, Entry)> = space
                .index
                .entries(ino)
                .filter(|(_, e)| media.is_unsafe(e))
                .collect();
            for (place, entry) in found {
                // As of before memory is read.
                let count = media.count(&entry);
                let size = entry.frame.size;
                let pages: Vec<u32> = (0..size / PAGE).collect();
                if size > SMALL {
                    plan.rest.push(Target {
                        place,
                        id: entry.id,
                        bytes: size,
                    });
                } else if plan.take(media, &space, (place, entry), &pages)? {
                    plan.whole.push((place, count));
                }
            }
        }
        space.index.keep(plan.pages)?;
        for (place, count) in plan.whole {
            space.index.note(place, |e| e.kept_at = Some(count));
        }
        Ok(plan.rest)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::blocks::Blocks;
    use super::super::crash_disk::{Event, FakeDisk, Journal, recording_store};
    use super::super::crash_tests::{change_page, contents, open, put, scratch};
    use super::*;
    use fsd_node::fake_disk::{FakeStore, Image, Table};
    use fsd_proto::layout::BLOCK;

    fn all(ino: u64) -> Wanted {
        Wanted {
            inos: vec![ino],
            parts: Vec::new(),
        }
    }

    fn part(ino: u64, block: u64, at: u32) -> Wanted {
        let part = Part {
            ino,
            block,
            at,
            len: PAGE,
        };
        Wanted {
            inos: Vec::new(),
            parts: vec![part],
        }
    }

    struct Node {
        blocks: Blocks,
        journal: Arc<Journal>,
        _dir: tempfile::TempDir,
    }

    impl Node {
        fn new() -> Self {
            let (journal, dir) = (Arc::new(Journal::default()), scratch());
            let disk = Arc::new(FakeDisk::recording(&journal));
            let blocks = open(dir.path(), disk, Arc::new(recording_store(&journal)), None);
            Self {
                blocks,
                journal,
                _dir: dir,
            }
        }

        /// Syncs of the backing file and of the store, and bytes that both are given, by a flush.
        fn costs(&self, wanted: &Wanted) -> (usize, usize, usize) {
            let before = self.journal.len();
            self.blocks.flusher.flush(wanted).unwrap();
            let (mut disk, mut store, mut bytes) = (0, 0, 0);
            for event in &self.journal.events()[before..] {
                match event {
                    Event::DiskSync => disk += 1,
                    Event::StoreSync => store += 1,
                    Event::Disk(fsd_node::fake_disk::Change::Write(_, data)) => bytes += data.len(),
                    Event::Batch(batch) => {
                        bytes += batch
                            .ops()
                            .iter()
                            .map(|(k, v)| k.len() + v.as_ref().map_or(0, Vec::len))
                            .sum::<usize>();
                    }
                    Event::Disk(_) => {}
                }
            }
            (disk, store, bytes)
        }

        /// What a power cut now leaves of what was synced.
        fn lasting(&self) -> (Image, Table) {
            let mut cuts = super::super::crash_disk::Cuts::new(self.journal.events());
            while cuts.step().is_some() {}
            let mut rng = rand::SeedableRng::seed_from_u64(0);
            cuts.state(fsd_node::fake_disk::Luck::None, &mut rng)
        }
    }

    fn reopened((image, table): (Image, Table)) -> (Blocks, tempfile::TempDir) {
        let dir = scratch();
        let (disk, store) = (FakeDisk::with(image), FakeStore::with(table));
        (open(dir.path(), Arc::new(disk), Arc::new(store), None), dir)
    }

    fn of(blocks: &Blocks, ino: u64) -> Option<Vec<u8>> {
        let entry = blocks.media.space.lock().index.get(ino, 0)?;
        Some(contents(blocks, entry.frame))
    }

    #[test]
    fn a_page_of_a_large_block_is_one_sync_and_its_bytes() {
        let node = Node::new();
        put(&node.blocks, (10, 0), &[1; BLOCK as usize]).unwrap();
        let (disk, store, bytes) = node.costs(&all(10));
        assert_eq!((disk, store), (1, 1));
        assert!(bytes > BLOCK as usize);
        change_page(&node.blocks, (10, 0), 8192, 7);
        let (disk, store, bytes) = node.costs(&part(10, 0, 8192));
        assert_eq!((disk, store), (0, 1));
        assert!(bytes < 4300, "{bytes}");
        let mut expected = vec![1; BLOCK as usize];
        expected[8192..8192 + 4096].fill(7);
        assert_eq!(of(&reopened(node.lasting()).0, 10).unwrap(), expected);
        // Stored anew it is no more.
        node.blocks.flusher.flush_all().unwrap();
        assert!(node.lasting().1.keys().all(|k| k[0] != b'l'));
        assert_eq!(of(&reopened(node.lasting()).0, 10).unwrap(), expected);
    }

    #[test]
    fn what_comes_with_a_flush_is_written_first() {
        let node = Node::new();
        put(&node.blocks, (10, 0), &[1; 8192]).unwrap();
        node.costs(&all(10));
        let (wanted, flusher) = (part(10, 0, 4096), &node.blocks.flusher);
        flusher.take_in(&wanted.parts, &[9; 4096]).unwrap();
        assert_eq!(node.costs(&wanted).1, 1);
        let expected = [[1; 4096], [9; 4096]].concat();
        assert_eq!(of(&node.blocks, 10).unwrap(), expected);
        assert_eq!(of(&reopened(node.lasting()).0, 10).unwrap(), expected);
        // Nobody has moved the counter but the one who wrote: it is stored in the background.
        node.blocks.flusher.flush_all().unwrap();
        assert_eq!(of(&reopened(node.lasting()).0, 10).unwrap(), expected);
        // What is not there, is not as large, or is not as much.
        for (at, block, bytes, error) in [
            (0, 1, 4096, libc::EIO),
            (16384, 0, 4096, libc::EIO),
            (0, 0, 4095, libc::EINVAL),
            (0, 0, 4097, libc::EINVAL),
        ] {
            let parts = part(10, block, at).parts;
            assert_eq!(flusher.take_in(&parts, &vec![5; bytes]), Err(Errno(error)));
        }
    }

    #[test]
    fn a_small_new_file_is_one_sync() {
        let node = Node::new();
        put(&node.blocks, (10, 0), &[3; 5000]).unwrap();
        let (disk, store, _) = node.costs(&all(10));
        assert_eq!((disk, store), (0, 1));
        assert_eq!(of(&reopened(node.lasting()).0, 10).unwrap(), [3; 5000]);
        // Nothing has been written since.
        assert!(node.costs(&all(10)).2 < 100);
        // It is freed: nothing of it comes back in another's block.
        let range = fsd_proto::wire::BlockRange::all(10);
        node.blocks.frames.free(&[range]).unwrap();
        node.costs(&Wanted::default());
        assert!(node.lasting().1.keys().all(|k| k[0] != b'l'));
    }

    #[test]
    fn what_is_too_much_to_be_kept_is_stored() {
        let node = Node::new();
        for ino in 0..20 {
            put(&node.blocks, (ino, 0), &[3; 16000]).unwrap();
        }
        let wanted = Wanted {
            inos: (0..20).collect(),
            parts: Vec::new(),
        };
        let (disk, store, _) = node.costs(&wanted);
        assert_eq!((disk, store), (1, 1));
        let (blocks, _dir) = reopened(node.lasting());
        assert!((0..20).all(|ino| of(&blocks, ino).is_some_and(|bytes| bytes == [3; 16000])));
    }
}
