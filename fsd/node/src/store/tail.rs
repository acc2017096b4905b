//! The end of the engine's journal after a power cut.
//!
//! The journal is a file that was made larger beforehand, so a power cut may leave any pages of what was written since the
//! last sync, and zeros for the rest. The engine ends at a batch that is not complete, but takes one that has its end and
//! not its middle for damage, and does not open. Nothing from the first batch on that is not whole was synced if the host
//! has crashed: it is cut off. If it has not, the disk is to blame, and somebody has to look.

use std::fs::OpenOptions;
use std::hash::Hasher;
use std::path::{Path, PathBuf};

use twox_hash::XxHash3_64;

use crate::files;

/// What ends a batch.
const TRAILER: [u8; 4] = [b'F', b'J', b'L', 3];
const START: u8 = 1;
const ITEM: u8 = 2;
const END: u8 = 3;
const CLEAR: u8 = 4;

/// Takes numbers from the front of bytes.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(bytes)
    }

    fn number(&mut self, len: usize) -> Option<u64> {
        let bytes = self.bytes(len)?;
        Some(bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)))
    }

    fn tag(&mut self) -> Option<u8> {
        Some(self.number(1)? as u8)
    }
}

/// Length of the batch that bytes begin with, if it is whole.
fn batch(bytes: &[u8]) -> Option<usize> {
    let mut at = Reader(bytes);
    if at.tag()? != START {
        return None;
    }
    let (items, _order) = (at.number(4)?, at.number(8)?);
    let mut sum = XxHash3_64::new();
    for _ in 0..items {
        let item = at.0;
        match at.tag()? {
            ITEM => {
                let _kind_compression_keyspace = at.bytes(10)?;
                let (key, _value, stored) = (at.number(2)?, at.number(4)?, at.number(4)?);
                at.bytes(key as usize)?;
                at.bytes(stored as usize)?;
            }
            CLEAR => {
                at.bytes(8)?;
            }
            _ => return None,
        }
        sum.write(&item[..item.len() - at.0.len()]);
    }
    let whole = at.tag()? == END && at.number(8)? == sum.finish() && at.bytes(4)? == TRAILER;
    whole.then(|| bytes.len() - at.0.len())
}

/// Length of the whole batches that bytes begin with.
fn whole(bytes: &[u8]) -> usize {
    let mut len = 0;
    while let Some(more) = batch(&bytes[len..]) {
        len += more;
    }
    len
}

/// The journal in use: the one with the largest number. The others were synced when they were full.
fn journal(dir: &Path) -> std::io::Result<Option<PathBuf>> {
    let mut last = None;
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let number = path
            .extension()
            .is_some_and(|e| e == "jnl")
            .then(|| path.file_stem());
        let number = number.flatten().and_then(|n| n.to_str()?.parse::<u64>().ok());
        last = last.max(number.map(|n| (n, path)));
    }
    Ok(last.map(|(_, path)| path))
}

/// Name of the journal after the one in use.
///
/// # Errors
/// The directory cannot be read.
pub fn next_journal(dir: &Path) -> std::io::Result<Option<PathBuf>> {
    let last = journal(dir)?;
    let number = last.and_then(|p| p.file_stem()?.to_str()?.parse::<u64>().ok());
    Ok(number.map(|n| dir.join(format!("{}.jnl", n + 1))))
}

fn boot_file(dir: &Path) -> PathBuf {
    dir.join("boot")
}

/// Cuts off what of the journal's end is not whole, if this host has crashed or restarted since the store was last opened;
/// the bytes that were written there, none where it has not.
///
/// # Errors
/// The disk's.
pub fn cut(dir: &Path) -> std::io::Result<Option<usize>> {
    let here = files::boot();
    let crashed =
        std::fs::read_to_string(boot_file(dir)).map_or(true, |then| then != here || here.is_empty());
    let Some(path) = journal(dir)?.filter(|_| crashed) else {
        return Ok(None);
    };
    let bytes = std::fs::read(&path)?;
    let len = whole(&bytes);
    let used = bytes.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
    let file = OpenOptions::new().write(true).open(&path)?;
    file.set_len(len as u64)?;
    file.sync_all()?;
    Ok(Some(used.saturating_sub(len)))
}

/// Notes that the store was opened in this boot of the host, durably.
///
/// # Errors
/// The disk's.
pub fn opened(dir: &Path) -> std::io::Result<()> {
    let (here, path) = (files::boot(), boot_file(dir));
    if std::fs::read_to_string(&path).is_ok_and(|then| then == here) {
        return Ok(());
    }
    files::replace_durably(&path, &here)
}

#[cfg(test)]
#[path = "tail_tests.rs"]
mod tests;
