//! The lease table in registered memory, in segments made on demand.
//!
//! After a segment is registered its words are touched through the fabric only, by this node as well
//! (atomics of a network card are not atomic with those of a processor).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rdma_transport::{Access, Connection, Fabric, Op, RegionKey, RemoteAddr, mem::SharedMem};
use rt::sync::Mutex;

use super::error::{StorageError, errno};
use fsd_node::files;
use fsd_node::store::{Batch, Store};
use fsd_proto::rpc::Errno;

/// Records in a segment (4 MiB at 64 bytes a record).
pub const SEGMENT_RECORDS: u32 = 1 << 16;
/// Inode numbers are given out one after the other, so nobody needs a segment that lies further than this beyond those
/// that were needed before.
const AHEAD: u32 = 16;
/// Bytes of the table that are looked at together.
const CHUNK: usize = 64 << 10;
/// Key in the store of the number of segments that were ever needed.
const NEEDED: &[u8] = b"s";

/// A segment's memory and the key it is registered under.
type Segment = (Arc<SharedMem>, RegionKey);

/// The lease table of one storage node.
pub struct LeaseTable {
    /// Random number given when the table was made; kept with it in memory.
    pub id: u64,
    prefix: PathBuf,
    record_bytes: u32,
    segments: Mutex<Vec<Segment>>,
    /// Knows how many segments were ever needed: the memory may have been lost since.
    store: Arc<dyn Store>,
}

/// How many records are held, for `fsd status`.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Held {
    /// Records with an exclusive owner.
    pub exclusive: u64,
    /// Records with shared holders.
    pub shared: u64,
    /// For each mount: records that it holds, or may hold.
    pub holders: BTreeMap<u16, u64>,
}

impl Held {
    /// Counts the record of these words in.
    fn count(&mut self, record: &[u64]) {
        let end = 2 + (record.len() - 2) / 3;
        let word = lockmgr::OwnerWord::decode(record[0]);
        let mut holders = lockmgr::NodeSet::from_words(&record[2..end]);
        if word.near != 0 || record[2..end].iter().any(|&w| w != 0) {
            self.shared += 1;
        }
        for node in word.near_holders().iter() {
            holders.insert(node);
        }
        if let Some(writer) = word.writer {
            self.exclusive += 1;
            holders.insert(writer);
        }
        for node in holders.iter() {
            *self.holders.entry(node.0).or_default() += 1;
        }
    }
}

/// The words of a record's bytes.
fn words(bytes: &[u8]) -> Vec<u64> {
    let words = bytes.chunks_exact(8);
    words
        .map(|w| u64::from_ne_bytes(w.try_into().unwrap_or_default()))
        .collect()
}

fn label_of(prefix: &Path) -> PathBuf {
    prefix.with_extension("leases-id")
}

fn file_of(prefix: &Path, segment: u32) -> PathBuf {
    let mut name = prefix.to_owned().into_os_string();
    name.push(format!(".{segment}"));
    PathBuf::from(name)
}

/// Can an inode need a segment, if so many were ever needed?
fn is_near(segment: u32, needed: u32) -> bool {
    segment < needed.saturating_add(AHEAD)
}

/// What a table's file says: its number, and the boot of the host in which it was made. Words that are left of another boot,
/// where the memory file system is none, are of nobody knows when.
fn written(id: u64) -> String {
    format!("{id} {}\n", files::boot())
}

/// The number of the table that is there, if it is whole and of this boot.
fn read_id(label: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(label).ok()?;
    let id = text.split_whitespace().next()?.parse().ok()?;
    (text == written(id)).then_some(id)
}

impl LeaseTable {
    /// A table whose segments are files `PREFIX.N` (they outlive the process, as leases must).
    ///
    /// # Errors
    /// The memory file system refuses.
    pub fn open(prefix: PathBuf, record_bytes: u32, store: Arc<dyn Store>) -> Result<Self, StorageError> {
        let label = label_of(&prefix);
        let id = match read_id(&label) {
            Some(id) => id,
            None => {
                let id = rt::random();
                // Segments without their number are nobody's; they go before there is a new one.
                files::remove_numbered(&prefix)
                    .and_then(|()| files::replace(&label, &written(id)))
                    .map_err(|error| StorageError::Io {
                        what: "cannot make a new lease table at",
                        path: prefix.clone(),
                        error,
                    })?;
                id
            }
        };
        Ok(Self {
            id,
            prefix,
            record_bytes,
            segments: Mutex::default(),
            store,
        })
    }

    fn file(&self, segment: u32) -> PathBuf {
        file_of(&self.prefix, segment)
    }

    fn segment_bytes(&self) -> u64 {
        u64::from(SEGMENT_RECORDS) * u64::from(self.record_bytes)
    }

    /// Registers the segments an earlier life of this node left.
    ///
    /// # Errors
    /// Mapping or registering failed.
    pub fn adopt(&self, fabric: &dyn Fabric) -> Result<u32, StorageError> {
        let mut found = 0;
        while self.file(found).exists() {
            self.open_up_to(fabric, found)?;
            found += 1;
        }
        Ok(found)
    }

    /// The region key of a segment; makes the segment if need be (and those before it, so that
    /// `adopt` finds all).
    ///
    /// # Errors
    /// `EINVAL` for one that no inode can need yet; `ENOSPC` where the memory is full; the store's.
    pub fn key(&self, fabric: &dyn Fabric, segment: u32) -> Result<RegionKey, Errno> {
        if let Some((_, key)) = self.segments.lock().get(segment as usize) {
            return Ok(*key);
        }
        let needed = self.needed().map_err(|e| errno(&e))?;
        if !is_near(segment, needed) {
            tracing::warn!(
                "segment {segment} of the lease table is asked for, but no inode can need it: refused"
            );
            return Err(Errno(libc::EINVAL));
        }
        if segment >= needed {
            let mut batch = Batch::default();
            batch.put(NEEDED.to_vec(), (segment + 1).to_le_bytes().to_vec());
            self.store.apply(batch).map_err(|e| errno(&e.into()))?;
        }
        self.open_up_to(fabric, segment).map_err(|error| {
            tracing::error!("the lease table cannot grow: {error}");
            Errno(libc::ENOSPC)
        })
    }

    /// Number of segments that were ever needed.
    fn needed(&self) -> Result<u32, StorageError> {
        let stored = self.store.get(NEEDED)?;
        let stored = stored.and_then(|v| Some(u32::from_le_bytes(v.try_into().ok()?)));
        Ok(stored.unwrap_or(0).max(self.segments.lock().len() as u32))
    }

    fn open_up_to(&self, fabric: &dyn Fabric, segment: u32) -> Result<RegionKey, StorageError> {
        let mut segments = self.segments.lock();
        let wanted = segment as usize;
        while segments.len() <= wanted {
            let path = self.file(segments.len() as u32);
            let mem = Arc::new(SharedMem::open_file(&path, self.segment_bytes() as usize, true)?);
            let key = fabric.register(&mem, Access::ALL)?;
            segments.push((mem, key));
        }
        Ok(segments[wanted].1)
    }

    /// Bytes of a record.
    pub fn record_bytes(&self) -> u32 {
        self.record_bytes
    }

    /// A record by its index: where it is, and its words. None: nobody has ever needed it.
    ///
    /// # Errors
    /// The fabric failed.
    pub fn read(
        &self,
        conn: &dyn Connection,
        index: u64,
    ) -> Result<Option<(RemoteAddr, Vec<u64>)>, StorageError> {
        let records = u64::from(SEGMENT_RECORDS);
        let segment = usize::try_from(index / records).unwrap_or(usize::MAX);
        let Some(key) = self.segments.lock().get(segment).map(|(_, key)| *key) else {
            return Ok(None);
        };
        let offset = index % records * u64::from(self.record_bytes);
        let at = RemoteAddr { key, offset };
        let mut bytes = vec![0u8; self.record_bytes as usize];
        conn.execute(&mut [Op::Read { at, into: &mut bytes }])?;
        Ok(Some((at, words(&bytes))))
    }

    /// Visits the records from one on that are not zero, with their indices, until `visit` says false.
    ///
    /// # Errors
    /// The fabric failed; those of `visit`.
    pub fn for_each(
        &self,
        conn: &dyn Connection,
        from: u64,
        mut visit: impl FnMut(u64, RemoteAddr, &[u64]) -> Result<bool, StorageError>,
    ) -> Result<(), StorageError> {
        let keys: Vec<RegionKey> = self.segments.lock().iter().map(|(_, key)| *key).collect();
        let record_bytes = u64::from(self.record_bytes);
        let zero = vec![0u8; CHUNK];
        let mut chunk = vec![0u8; CHUNK];
        for (segment, key) in (0..).zip(keys) {
            let first = segment * u64::from(SEGMENT_RECORDS);
            let start = from.saturating_sub(first) * record_bytes / CHUNK as u64 * CHUNK as u64;
            let mut offset = start;
            while offset < self.segment_bytes() {
                let base = RemoteAddr { key, offset };
                conn.execute(&mut [Op::Read {
                    at: base,
                    into: &mut chunk,
                }])?;
                let some = if chunk == zero { &[] } else { chunk.as_slice() };
                for (i, bytes) in (0..).zip(some.chunks_exact(record_bytes as usize)) {
                    let index = first + offset / record_bytes + i;
                    let record = words(bytes);
                    let counts = index >= from && record.iter().any(|&w| w != 0);
                    if counts && !visit(index, base.plus(i * record_bytes), &record)? {
                        return Ok(());
                    }
                }
                offset += CHUNK as u64;
            }
        }
        Ok(())
    }

    /// Counts the records held.
    ///
    /// # Errors
    /// The fabric failed.
    pub fn held(&self, conn: &dyn Connection) -> Result<Held, StorageError> {
        let mut held = Held::default();
        self.for_each(conn, 0, |_, _, record| {
            held.count(record);
            Ok(true)
        })?;
        Ok(held)
    }

    /// Clears every record: no owner, no holder, nothing open; versions move on, so that no cache of an
    /// earlier life can be taken for valid. Only for a cluster without a living mount.
    ///
    /// # Errors
    /// The fabric failed.
    pub fn reset(&self, conn: &dyn Connection) -> Result<u64, StorageError> {
        let mut cleared = 0;
        self.for_each(conn, 0, |_, at, record| {
            let new = lockmgr::OwnerWord::decode(record[0]).freed_after_death();
            let mut bytes = Vec::with_capacity(record.len() * 8);
            bytes.extend_from_slice(&new.encode().to_ne_bytes());
            bytes.resize(record.len() * 8, 0);
            conn.execute(&mut [Op::Write { at, from: &bytes }])?;
            cleared += 1;
            Ok(true)
        })?;
        Ok(cleared)
    }

    /// Removes the segment files (the node leaves for good), the number first: whenever that is interrupted, the rest is
    /// nobody's.
    pub fn remove_files(&self) {
        // A file that is gone already is as good.
        let _ = std::fs::remove_file(label_of(&self.prefix));
        let _ = files::remove_numbered(&self.prefix);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsd_node::fake_disk::FakeStore;

    #[test]
    fn records_are_counted_for_each_who_holds_them() {
        let word = |writer: Option<u16>, near| {
            let word = lockmgr::OwnerWord {
                writer: writer.map(lockmgr::NodeId),
                near,
                ..lockmgr::OwnerWord::free(7)
            };
            word.encode()
        };
        let mut held = Held::default();
        held.count(&[word(Some(3), 0), 0, 0, 0, 0, 0, 0, 0]);
        held.count(&[word(None, 0b1010), 0, 1 << 20, 0, 0, 0, 0, 0]);
        held.count(&[word(None, 0), 0, 0, 0, 0, 1 << 5, 0, 0]);
        assert_eq!((held.exclusive, held.shared), (1, 1));
        assert_eq!(Vec::from_iter(held.holders), [(1, 1), (3, 2), (20, 1)]);
    }

    #[test]
    fn one_request_makes_few_segments() {
        assert!(is_near(0, 0) && is_near(AHEAD - 1, 0) && !is_near(AHEAD, 0));
        assert!(is_near(50, 50) && !is_near(1 << 20, 50) && !is_near(u32::MAX, 50));
    }

    #[test]
    fn what_was_needed_once_is_known_when_memory_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(FakeStore::default());
        let open = || LeaseTable::open(dir.path().join("x.leases"), 64, Arc::clone(&store)).unwrap();
        let table = open();
        assert_eq!(table.needed().unwrap(), 0);
        let mut batch = Batch::default();
        batch.put(NEEDED.to_vec(), 70u32.to_le_bytes().to_vec());
        store.apply(batch).unwrap();
        assert_eq!((open().id, open().needed().unwrap()), (table.id, 70));
    }

    /// The number is of this boot and whole, or the segments are nobody's, all of them, whatever is left.
    #[test]
    fn what_is_left_in_part_is_nobodys() {
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(FakeStore::default());
        let open = || LeaseTable::open(dir.path().join("x.leases"), 64, Arc::clone(&store)).unwrap();
        let label = dir.path().join("x.leases-id");
        let segments = |of: &[u32]| {
            for n in of {
                std::fs::write(dir.path().join(format!("x.leases.{n}")), b"old").unwrap();
            }
        };
        let left = || {
            let all = std::fs::read_dir(dir.path()).unwrap();
            all.filter(|e| e.as_ref().unwrap().path() != label).count()
        };
        let table = open();
        let text = std::fs::read_to_string(&label).unwrap();
        segments(&[0, 1]);
        assert_eq!((open().id, left()), (table.id, 2));
        let torn = (0..text.len()).map(|len| text[..len].to_owned());
        let zeros = (0..=text.len()).map(|len| text[..len].to_owned() + &"\0".repeat(text.len() - len));
        let other = text.replace(&files::boot(), "another-boot");
        let number = format!("{}\n", table.id);
        for bad in torn.chain(zeros).filter(|t| *t != text).chain([other, number]) {
            // Some were removed before the process died.
            segments(&[1, 3]);
            std::fs::write(&label, &bad).unwrap();
            let new = open();
            assert!(new.id != table.id && left() == 0, "{bad:?}");
            assert_eq!(open().id, new.id);
        }
        // Also when it goes, and dies in the middle of that.
        let table = open();
        segments(&[0, 1, 2]);
        table.remove_files();
        assert!(left() == 0 && !label.exists());
    }
}
