//! Taking lease records back from mounts that are dead. Everything goes through the fabric, for the living change the same words.

use rdma_transport::{Connection, Op, RemoteAddr};

use super::error::StorageError;
use super::leases::LeaseTable;
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

    /// Has the inode no name, and does nobody have it open or keep it?
    fn is_unused(&self) -> bool {
        let maps = self.layout.opens() as usize / 8;
        self.words[1] & RecordLayout::UNLINKED != 0 && self.words[maps..].iter().all(|&w| w == 0)
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

/// Which of these records are unused.
pub fn unused(table: &LeaseTable, conn: &dyn Connection, asked: &[u64]) -> Result<Records, StorageError> {
    let layout = layout(table)?;
    let mut records = Records::default();
    for &index in asked {
        let Some((at, words)) = table.read(conn, index)? else {
            continue;
        };
        let words = &words;
        if (Record { layout, at, words }).is_unused() {
            records.found.push(index);
        }
    }
    Ok(records)
}
