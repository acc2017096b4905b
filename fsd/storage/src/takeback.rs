//! Taking lease records back from mounts that are dead. Everything goes through the fabric, for the living change the same words.

use rdma_transport::{Connection, Op, RemoteAddr};

use super::error::StorageError;
use super::leases::LeaseTable;
use fsd_proto::ino;
use fsd_proto::wire::{DeadMount, Records};
use lockmgr::{NodeId, OwnerWord, RecordLayout};

/// Most records in an answer.
const RECORDS: usize = 8192;

/// Does the word name one of the dead as its owner?
fn is_theirs(word: OwnerWord, dead: &[DeadMount]) -> bool {
    let mut dead = dead.iter();
    word.writer
        .is_some_and(|w| dead.any(|d| d.node == w.0 && d.incarnation == word.incarnation))
}

/// A record as it was read.
struct Record<'a> {
    layout: RecordLayout,
    at: RemoteAddr,
    words: &'a [u64],
}

impl Record<'_> {
    fn has(&self, (offset, bit): (u64, u64)) -> bool {
        let word = self.words.get(offset as usize / 8).copied().unwrap_or(0);
        word & bit != 0
    }

    /// Do far nodes hold it that live?
    fn is_held_far(&self, dead: &[DeadMount]) -> bool {
        let start = RecordLayout::HOLDERS as usize / 8;
        let holders = self.layout.set(&self.words[start..]);
        holders.iter().any(|n| dead.iter().all(|d| d.node != n.0))
    }

    /// The word, once the dead that owns it does so no more and no dead is a near holder.
    fn freed(&self, word: OwnerWord, dead: &[DeadMount]) -> OwnerWord {
        let near = dead.iter().filter(|d| d.node < lockmgr::NEAR_NODES);
        let gone = near.fold(0, |bits, d| bits | 1u16 << d.node);
        // The owner would have said so when it let go of the word: far readers that it has let in look at the map themselves.
        let far = word.far || self.is_held_far(dead);
        word.freed_after_death().read_by(word.near & !gone, far)
    }

    /// Takes everything of the dead out; whether there was anything. The dead are fenced, so nobody else changes their parts; the
    /// near holders of the living, in the same word, may change at any time.
    fn take_back(&self, conn: &dyn Connection, dead: &[DeadMount]) -> Result<bool, StorageError> {
        let mut seen = self.words[0];
        let owned = is_theirs(OwnerWord::decode(seen), dead);
        while owned && is_theirs(OwnerWord::decode(seen), dead) {
            let new = self.freed(OwnerWord::decode(seen), dead).encode();
            let mut swap = [Op::Cas {
                at: self.at,
                expect: seen,
                new,
                old: 0,
            }];
            conn.execute(&mut swap)?;
            match swap {
                [Op::Cas { old, .. }] if old != seen => seen = old,
                _ => break,
            }
        }
        let mut ops = Vec::new();
        for node in dead.iter().map(|d| NodeId(d.node)) {
            let holder = self.layout.holder_bit(node);
            // A near one went with the owner.
            let holder = (holder.0 != RecordLayout::OWNER || !owned).then_some(holder);
            let bits = [self.layout.open_bit(node), self.layout.use_bit(node)];
            for (offset, bit) in holder.into_iter().chain(bits) {
                if self.has((offset, bit)) {
                    ops.push(Op::Faa {
                        at: self.at.plus(offset),
                        add: bit.wrapping_neg(),
                        old: 0,
                    });
                }
            }
        }
        let some = owned || !ops.is_empty();
        for part in ops.chunks_mut(32) {
            conn.execute(part)?;
        }
        Ok(some)
    }

    /// Has this inode of the record no name, and does nobody have it open or keep it? Nor own it: an owner may still have data of it to
    /// store, which must not come into frames that have been freed.
    fn is_unused(&self, ino: u64) -> bool {
        let maps = self.layout.opens() as usize / 8;
        OwnerWord::decode(self.words[0]).writer.is_none()
            && self.words[RecordLayout::FLAGS as usize / 8] == ino::unlinked_flag(ino)
            && self.words[maps..].iter().all(|&w| w == 0)
    }
}

fn layout(table: &LeaseTable) -> Result<RecordLayout, StorageError> {
    let record_bytes = table.record_bytes();
    RecordLayout::new(record_bytes)
        .map_err(|_| StorageError::Damaged(format!("lease records of {record_bytes} bytes")))
}

/// The records that one of the dead owns, from one on; a part of them.
pub fn owned(
    table: &LeaseTable,
    conn: &dyn Connection,
    (dead, from): (&[DeadMount], u64),
) -> Result<Records, StorageError> {
    let mut records = Records::default();
    table.for_each(conn, from, |index, _, words| {
        if records.found.len() == RECORDS {
            records.next = Some(index);
            return Ok(false);
        }
        if is_theirs(OwnerWord::decode(words[0]), dead) {
            records.found.push(index);
        }
        Ok(true)
    })?;
    Ok(records)
}

/// Frees what the dead own, and clears their bits; in how many records there was anything.
pub fn take_back(table: &LeaseTable, conn: &dyn Connection, dead: &[DeadMount]) -> Result<u64, StorageError> {
    let layout = layout(table)?;
    let dead: Vec<DeadMount> = dead
        .iter()
        .filter(|d| d.node < layout.max_nodes())
        .copied()
        .collect();
    let mut records = 0;
    table.for_each(conn, 0, |_, at, words| {
        let record = Record { layout, at, words };
        records += u64::from(record.take_back(conn, &dead)?);
        Ok(true)
    })?;
    Ok(records)
}

/// Which of these inodes are unused.
pub fn unused(table: &LeaseTable, conn: &dyn Connection, asked: &[u64]) -> Result<Vec<u64>, StorageError> {
    let layout = layout(table)?;
    let mut found = Vec::new();
    for &ino in asked {
        let Some((at, words)) = table.read(conn, ino::index(ino))? else {
            continue;
        };
        let words = &words;
        if (Record { layout, at, words }).is_unused(ino) {
            found.push(ino);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use rdma_transport::{Fabric, FabricConfig, FabricKind, Handler, TransportError};

    use super::*;
    use crate::crash_tests::scratch;
    use fsd_node::fake_disk::FakeStore;
    use lockmgr::NEAR_NODES;

    struct Nobody;

    impl Handler for Nobody {
        fn admit(&self, _: &[u8]) -> Result<(), String> {
            Ok(())
        }
        fn connected(&self, _: &Arc<dyn Connection>) {}
        fn message(&self, _: &Arc<dyn Connection>, _: &[u8]) {}
        fn disconnected(&self, _: &Arc<dyn Connection>, _: &TransportError) {}
    }

    /// A lease table, and a connection to it.
    struct Bench {
        table: LeaseTable,
        layout: RecordLayout,
        conn: Arc<dyn Connection>,
        fabric: Arc<dyn Fabric>,
        _dir: tempfile::TempDir,
    }

    impl Bench {
        fn new(record_bytes: u32) -> Self {
            let dir = scratch();
            let config = FabricConfig {
                listen: dir.path().join("s.sock").display().to_string(),
                key: vec![7; 32],
                identity: Vec::new(),
                spin: Duration::ZERO,
                timeout: Duration::from_secs(5),
                keep: None,
            };
            let fabric = rdma_transport::open(FabricKind::Shm, config, Arc::new(Nobody)).unwrap();
            let store = Arc::new(FakeStore::default());
            let table = LeaseTable::open(dir.path().join("x.leases"), record_bytes, store).unwrap();
            table.key(fabric.as_ref(), 0).unwrap();
            Self {
                layout: RecordLayout::new(record_bytes).unwrap(),
                conn: fabric.connect(&fabric.local_addr()).unwrap(),
                table,
                fabric,
                _dir: dir,
            }
        }

        /// Adds bits to a record, as their nodes do.
        fn set(&self, index: u64, bits: &[(u64, u64)]) {
            let (at, _) = self.table.read(self.conn.as_ref(), index).unwrap().unwrap();
            for &(offset, add) in bits {
                let at = at.plus(offset);
                self.conn.execute(&mut [Op::Faa { at, add, old: 0 }]).unwrap();
            }
        }

        fn own(&self, index: u64, word: OwnerWord) {
            self.set(index, &[(RecordLayout::OWNER, word.encode())]);
        }

        fn words(&self, index: u64) -> Vec<u64> {
            self.table.read(self.conn.as_ref(), index).unwrap().unwrap().1
        }

        fn word(&self, index: u64) -> OwnerWord {
            OwnerWord::decode(self.words(index)[0])
        }

        fn holders(&self, index: u64) -> Vec<u16> {
            let words = self.words(index);
            let far = self.layout.set(&words[RecordLayout::HOLDERS as usize / 8..]);
            let near = self.word(index).near_holders();
            near.iter().chain(far.iter()).map(|n| n.0).collect()
        }

        fn map(&self, index: u64, offset: u64) -> Vec<u16> {
            let set = self.layout.set(&self.words(index)[offset as usize / 8..]);
            set.iter().map(|n| n.0).collect()
        }

        fn take_back(&self, dead: &[DeadMount]) -> u64 {
            take_back(&self.table, self.conn.as_ref(), dead).unwrap()
        }
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            self.fabric.shutdown();
        }
    }

    fn dead(node: u16) -> DeadMount {
        DeadMount {
            node,
            incarnation: 3,
            life: u64::from(node),
        }
    }

    const FAR: u16 = NEAR_NODES + 60;

    #[test]
    fn what_the_dead_own_is_free_and_what_the_living_hold_stays() {
        for record_bytes in [64, 256] {
            let bench = Bench::new(record_bytes);
            let layout = bench.layout;
            let holds = |n: u16| layout.holder_bit(NodeId(n));
            // Near and far readers that the owner, who is dead, has let in without saying so in the word.
            bench.own(1, OwnerWord::owned(NodeId(2), 3, 70));
            bench.set(1, &[holds(0), holds(2), holds(9), holds(FAR), holds(FAR + 1)]);
            // Another life of the same number, and somebody else.
            bench.own(2, OwnerWord::owned(NodeId(2), 4, 70));
            bench.own(3, OwnerWord::owned(NodeId(1), 3, 70).read_by(0b110, false));
            // Free, and read by the dead of both kinds and by others.
            bench.own(5, OwnerWord::free(9).read_by(0b101, true));
            bench.set(5, &[holds(FAR), holds(FAR + 2)]);
            let gone = [dead(2), dead(FAR)];
            let owned = owned(&bench.table, bench.conn.as_ref(), (&gone, 0)).unwrap();
            assert_eq!((owned.found, owned.next), (vec![1], None));
            assert_eq!(bench.take_back(&gone), 3);
            let freed = bench.word(1);
            assert_eq!(
                (freed.writer, freed.version, freed.far),
                (None, 70 + OwnerWord::RECOVERY_STEP, true)
            );
            assert_eq!(bench.holders(1), [0, 9, FAR + 1]);
            assert_eq!(bench.word(2), OwnerWord::owned(NodeId(2), 4, 70));
            let others = OwnerWord::owned(NodeId(1), 3, 70).read_by(0b010, false);
            assert_eq!(bench.word(3), others);
            assert_eq!(bench.word(5), OwnerWord::free(9).read_by(0b001, true));
            assert_eq!(bench.holders(5), [0, FAR + 2]);
            // Again, as after a restart.
            assert_eq!(bench.take_back(&gone), 0);
            assert_eq!(bench.word(1), freed);
        }
    }

    #[test]
    fn far_is_not_said_where_only_the_dead_read_far() {
        let bench = Bench::new(64);
        bench.own(7, OwnerWord::owned(NodeId(FAR), 3, 1));
        bench.set(7, &[bench.layout.holder_bit(NodeId(FAR))]);
        bench.take_back(&[dead(FAR)]);
        assert_eq!(
            (bench.word(7), bench.holders(7)),
            (OwnerWord::free(1 + OwnerWord::RECOVERY_STEP), vec![])
        );
    }

    #[test]
    fn opens_and_uses_of_the_dead_are_over_and_only_then_an_inode_is_unused() {
        let bench = Bench::new(64);
        let layout = bench.layout;
        let (opens, uses) = (|n| layout.open_bit(NodeId(n)), |n| layout.use_bit(NodeId(n)));
        let number = |index| ino::compose(0, 3, index);
        let flag = (RecordLayout::FLAGS, ino::unlinked_flag(number(1)));
        let earlier = (RecordLayout::FLAGS, ino::unlinked_flag(ino::compose(0, 2, 6)));
        bench.set(1, &[flag, opens(2), uses(2), uses(FAR)]);
        bench.set(2, &[flag, opens(2), opens(4)]);
        bench.set(3, &[flag, uses(4)]);
        bench.set(4, &[opens(2)]);
        bench.set(6, &[earlier]);
        let unused = || {
            let asked = [1, 2, 3, 4, 5, 6, ino::MAX_INDEX].map(number);
            unused(&bench.table, bench.conn.as_ref(), &asked).unwrap()
        };
        assert!(unused().is_empty());
        assert_eq!(bench.take_back(&[dead(2), dead(FAR)]), 3);
        assert_eq!(unused(), [number(1)]);
        assert_eq!(bench.map(2, layout.opens()), [4]);
        assert_eq!(bench.map(3, layout.uses()), [4]);
        assert!(bench.map(4, layout.opens()).is_empty());
    }

    #[test]
    fn more_records_than_an_answer_holds_come_in_parts() {
        let bench = Bench::new(64);
        let all: Vec<u64> = (0..RECORDS as u64 * 2 + 5).map(|n| n * 3 + 1).collect();
        for &index in &all {
            bench.own(index, OwnerWord::owned(NodeId(2), 3, 1));
        }
        let (mut found, mut from, mut parts) = (Vec::new(), Some(0), 0);
        while let Some(first) = from {
            let part = owned(&bench.table, bench.conn.as_ref(), (&[dead(2)], first)).unwrap();
            assert!(part.found.len() <= RECORDS);
            found.extend(part.found);
            (from, parts) = (part.next, parts + 1);
        }
        assert!(found == all && parts == 3);
    }

    /// A living near node sets and clears its bit all the while: nothing of that is lost, and nothing of the dead stays.
    #[test]
    fn the_living_go_on_in_the_same_word() {
        let bench = Bench::new(64);
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let other = bench.fabric.connect(&bench.fabric.local_addr()).unwrap();
        let (at, _) = bench.table.read(bench.conn.as_ref(), 1).unwrap().unwrap();
        bench.own(1, OwnerWord::owned(NodeId(2), 3, 1));
        let toggling = {
            let stop = Arc::clone(&stop);
            rt::thread::spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    for add in [1, 1u64.wrapping_neg()] {
                        other.execute(&mut [Op::Faa { at, add, old: 0 }]).unwrap();
                    }
                }
            })
        };
        for round in 0..200u64 {
            assert_eq!(bench.take_back(&[dead(2)]), 1, "round {round}");
            let mut word = bench.words(1)[0];
            loop {
                let free = OwnerWord::decode(word);
                assert!(free.writer.is_none() && free.near & !1 == 0);
                let new = OwnerWord::owned(NodeId(2), 3, free.version).read_by(free.near, false);
                let mut swap = [Op::Cas {
                    at,
                    expect: word,
                    new: new.encode(),
                    old: 0,
                }];
                bench.conn.execute(&mut swap).unwrap();
                match swap {
                    [Op::Cas { old, .. }] if old != word => word = old,
                    _ => break,
                }
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        toggling.join().unwrap();
        bench.take_back(&[dead(2)]);
        assert!(bench.holders(1).is_empty() && bench.word(1).writer.is_none());
    }
}
