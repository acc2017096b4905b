//! Files of cells, each of which says what it is: which file, which cell, which number.

use std::fs::File;
use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;

use rand::Rng;

use super::board::{Board, Count};
use super::life::{Step, Task, WRITE};
use super::oracle::Known;
use super::{CELLS, FILES_EACH, SHARED, SHARED_CELLS, TASKS_EACH, now};
use crate::sys;

/// Cells that lie beside each other; the others are in another block.
const BESIDE: usize = CELLS / 2;
/// Where the other block is.
const BLOCK: u64 = 256 << 10;
/// What is stored or lost as a whole.
const PAGE: u64 = 4096;

/// The name of a file.
#[must_use]
pub fn name(file: usize) -> String {
    format!("cells{file}")
}

/// The only mount that writes a file.
#[must_use]
pub fn owner(file: usize) -> Option<usize> {
    (file != SHARED).then_some(file / FILES_EACH / TASKS_EACH)
}

/// Cells of a file.
#[must_use]
pub fn count(file: usize) -> usize {
    if file == SHARED { SHARED_CELLS } else { CELLS }
}

/// Bytes of a cell: whole pages, or some that do not end where pages do.
fn size(file: usize) -> usize {
    if file.is_multiple_of(2) { 4096 } else { 1500 }
}

fn offset(file: usize, cell: usize) -> u64 {
    let beside = (cell % BESIDE * size(file)) as u64;
    if cell < BESIDE { beside } else { BLOCK + beside }
}

fn word(file: usize, cell: usize, number: u64, at: usize) -> u64 {
    let who = (file as u64) << 48 | (cell as u64) << 32 | at as u64;
    match at {
        0 => 0x5354_4f52_4d00_0000 | (file as u64) << 8 | cell as u64,
        1 => number,
        _ => (who ^ number.rotate_left(21)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
    }
}

/// The bytes of a cell; zeros for number 0.
fn bytes(file: usize, cell: usize, number: u64) -> Vec<u8> {
    let mut bytes = vec![0; size(file)];
    if number != 0 {
        for (at, part) in bytes.chunks_mut(8).enumerate() {
            let word = word(file, cell, number, at).to_le_bytes();
            part.copy_from_slice(&word[..part.len()]);
        }
    }
    bytes
}

/// The parts of a cell that lie in one page each.
fn parts(file: usize, cell: usize) -> impl Iterator<Item = Range<usize>> {
    let (start, len) = (offset(file, cell), size(file));
    let first = ((PAGE - start % PAGE) as usize).min(len);
    [0..first, first..len].into_iter().filter(|part| !part.is_empty())
}

/// What the bytes of a cell are.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    Whole(u64),
    /// Pages of different numbers.
    Torn(Vec<u64>),
    /// Pieces of different numbers, which end anywhere.
    Pieces(Vec<u64>),
    Garbage,
}

/// The numbers of the pieces that a cell consists of, if it is nothing but such pieces: one of them may end within a word.
fn pieces(file: usize, cell: usize, data: &[u8], candidates: &Range<u64>) -> Option<Vec<u64>> {
    let whole: Vec<(u64, Vec<u8>)> = candidates
        .clone()
        .chain([0])
        .map(|n| (n, bytes(file, cell, n)))
        .collect();
    let (mut numbers, mut at) = (Vec::new(), 0);
    while at < data.len() {
        // The longest piece from here on.
        let same = |is: &[u8]| {
            is[at..]
                .iter()
                .zip(&data[at..])
                .take_while(|(a, b)| a == b)
                .count()
        };
        let (len, number) = whole.iter().map(|(n, is)| (same(is), *n)).max()?;
        // Shorter ones may be anything.
        if len < 64.min(data.len() - at) {
            return None;
        }
        numbers.push(number);
        at += len;
    }
    Some(numbers)
}

fn content(file: usize, cell: usize, data: &[u8], candidates: Range<u64>) -> Content {
    let claimed = data
        .get(8..16)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_le_bytes);
    if data == bytes(file, cell, claimed) {
        return Content::Whole(claimed);
    }
    let of = |part: Range<usize>| {
        let same = |n: &u64| bytes(file, cell, *n)[part.clone()] == data[part.clone()];
        candidates.clone().chain([0]).find(same)
    };
    let numbers: Option<Vec<u64>> = parts(file, cell).map(of).collect();
    match numbers {
        Some(all) if all.iter().all(|n| *n == all[0]) => Content::Whole(all[0]),
        Some(all) => Content::Torn(all),
        None => pieces(file, cell, data, &candidates).map_or(Content::Garbage, Content::Pieces),
    }
}

fn read(file: &File, which: usize, cells: &Range<usize>) -> std::io::Result<Vec<Vec<u8>>> {
    let size = size(which);
    let mut data = sys::read_at(file, offset(which, cells.start), cells.len() * size)?;
    data.resize(cells.len() * size, 0);
    Ok(data.chunks(size).map(<[u8]>::to_vec).collect())
}

/// Some cells of a file that lie beside each other.
pub fn some(task: &mut Task<'_>, file: usize) -> Range<usize> {
    if file == SHARED {
        return 0..SHARED_CELLS;
    }
    let half = task.rng.random_range(0..2) * BESIDE;
    let from = task.rng.random_range(0..BESIDE);
    let longest = if task.rng.random_range(0..4) == 0 {
        BESIDE
    } else {
        4
    };
    let to = task.rng.random_range(from + 1..=BESIDE.min(from + longest));
    // Now and then all of the half: 64 KiB go past the cache of a mount.
    if task.rng.random_range(0..8) == 0 {
        half..half + BESIDE
    } else {
        half + from..half + to
    }
}

/// What is known of cells.
fn known(board: &Board, file: usize, cells: &Range<usize>) -> Vec<Known> {
    let of = |cell| {
        let words = board.cell(file, cell);
        Known {
            synced: words.synced.load(SeqCst),
            gap: words.gap.load(SeqCst),
            acked: words.acked.map(|w| w.load(SeqCst)),
        }
    };
    cells.clone().map(of).collect()
}

/// Reads cells and compares them with what is known; their numbers, where each could be told.
///
/// # Errors
/// The read fails.
pub fn look(task: &Task<'_>, file: &File, which: usize, cells: Range<usize>) -> Step<Vec<u64>> {
    let before = task.board.safe();
    let known = known(task.board, which, &cells);
    let start = now();
    let data = task.must("read of cells", || read(file, which, &cells))?;
    task.trace(|| format!("file {which} cells {cells:?} read since {start}"));
    let issued: Vec<u64> = cells
        .clone()
        .map(|c| task.board.cell(which, c).issued.load(SeqCst))
        .collect();
    let own = task.still_safe(before);
    let safe = own.unwrap_or_default();
    let owner = owner(which);
    let mut numbers = Vec::new();
    for (i, cell) in cells.enumerate() {
        let (known, issued) = (&known[i], issued[i]);
        let trusted = owner.is_none_or(|m| safe[m]) && own.is_some();
        let seen = content(which, cell, &data[i], known.synced..issued + 1);
        let wrong = match &seen {
            Content::Garbage => Some("garbage"),
            // Only a death stores pages of a cell apart; and a kernel that sends a write through its page cache page by page.
            Content::Torn(_) if trusted && task.board.uncached().load(SeqCst) == 1 => Some("torn"),
            // A mount that is shut out in the middle of storing a page leaves it in part, also what it stores for another; nothing else
            // does, but for the page cache of a kernel while the write is under way.
            Content::Pieces(all) if trusted && !(task.board.forwards() && known.is_unfinished(all, safe)) => {
                Some("in pieces")
            }
            Content::Torn(all) | Content::Pieces(all) => {
                all.iter().find_map(|n| known.wrong(*n, issued, safe, owner))
            }
            Content::Whole(n) => known.wrong(*n, issued, safe, owner),
        };
        // A mount that is being shut out may show what is old, but nothing that never was.
        let excused = own.is_none() && wrong.is_some_and(|w| w.starts_with("older"));
        if let Some(wrong) = wrong.filter(|_| !excused) {
            let bytes = &data[i][..32];
            task.wrong(&format!(
                "cell {cell} of file {which} is {wrong}: {seen:?}, {known:?}, issued {issued}, safe {safe:?}, read since {start}, it begins {bytes:02x?}"
            ));
        }
        task.board
            .add(if trusted { Count::Strict } else { Count::Loose }, 1);
        numbers.push(if let Content::Whole(n) = seen { n } else { 0 });
    }
    Ok(numbers)
}

/// Writes cells in one call, with a number; `durable`: as with O_DSYNC.
///
/// # Errors
/// The write fails.
pub fn write(
    task: &Task<'_>,
    file: &File,
    which: usize,
    cells: Range<usize>,
    number: u64,
    durable: bool,
) -> Step<()> {
    let words = || cells.clone().map(|c| task.board.cell(which, c));
    let data: Vec<u8> = cells.clone().flat_map(|c| bytes(which, c, number)).collect();
    words().for_each(|w| {
        w.issued.fetch_max(number, SeqCst);
    });
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    let start = now();
    task.must(WRITE, || {
        sys::write_with(file, offset(which, cells.start), &data, flags)
    })?;
    task.trace(|| format!("file {which} cells {cells:?} number {number} durable {durable} since {start}"));
    for w in words() {
        w.acked[task.mount()].store(number, SeqCst);
        if durable {
            w.synced.fetch_max(number, SeqCst);
        }
    }
    task.board.add(Count::Writes, 1);
    if durable {
        task.board.add(Count::Fsyncs, 1);
    }
    Ok(())
}

/// Fsyncs what this mount has acknowledged of a file.
///
/// # Errors
/// The fsync fails.
pub fn sync(task: &Task<'_>, file: &File, which: usize) -> Step<()> {
    let words = || (0..count(which)).map(|c| task.board.cell(which, c));
    let acked: Vec<u64> = words().map(|w| w.acked[task.mount()].load(SeqCst)).collect();
    let start = now();
    task.must("fsync of cells", || file.sync_all())?;
    task.trace(|| format!("file {which} fsynced since {start}"));
    for (w, acked) in words().zip(acked) {
        w.synced.fetch_max(acked, SeqCst);
    }
    task.board.add(Count::Fsyncs, 1);
    Ok(())
}

/// The next number of a file that one task has to itself.
#[must_use]
pub fn next(board: &Board, file: usize) -> u64 {
    let all = (0..CELLS).map(|c| board.cell(file, c).issued.load(SeqCst));
    all.max().unwrap_or(0) + 1
}

/// In a new life: what the former one has left of a file of this task's own. From now on that counts.
///
/// # Errors
/// A call fails.
pub fn recover(task: &Task<'_>, which: usize) -> Step<File> {
    let flags = libc::O_RDWR | libc::O_CREAT;
    let file = task.must("open of cells", || task.life.open(&name(which), flags))?;
    let known = known(task.board, which, &(0..CELLS));
    let mut torn = Vec::new();
    for half in [0..BESIDE, BESIDE..CELLS] {
        let data = task.must("read of cells after a death", || read(&file, which, &half))?;
        for (cell, data) in half.zip(data) {
            let (known, words) = (&known[cell], task.board.cell(which, cell));
            let issued = words.issued.load(SeqCst);
            let seen = content(which, cell, &data, known.synced..issued + 1);
            let (wrong, left) = match &seen {
                Content::Garbage => (Some("garbage"), 0),
                Content::Torn(all) | Content::Pieces(all) => {
                    torn.push(cell);
                    (
                        all.iter().find_map(|n| known.wrong(*n, issued, [false; 3], None)),
                        known.synced,
                    )
                }
                Content::Whole(n) => (known.wrong(*n, issued, [false; 3], None), *n),
            };
            if let Some(wrong) = wrong {
                task.wrong(&format!("cell {cell} of file {which} is {wrong} after a death: {seen:?}, {known:?}, issued {issued}"));
            }
            words.acked[task.mount()].store(left, SeqCst);
            words.gap.store(issued, SeqCst);
            task.board.add(Count::Recovered, 1);
        }
    }
    for cell in torn {
        write(task, &file, which, cell..cell + 1, next(task.board, which), false)?;
    }
    task.must("fsync of cells", || file.sync_all())?;
    for cell in 0..CELLS {
        let words = task.board.cell(which, cell);
        words
            .synced
            .fetch_max(words.acked[task.mount()].load(SeqCst), SeqCst);
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::{Content, bytes, content, parts};

    #[test]
    fn a_cell_says_what_it_is() {
        for file in [0, 1] {
            assert_eq!(content(file, 5, &bytes(file, 5, 7), 0..9), Content::Whole(7));
            assert_eq!(content(file, 5, &bytes(file, 5, 0), 0..9), Content::Whole(0));
            // Another cell's, another file's, one byte that is wrong.
            assert_eq!(content(file, 5, &bytes(file, 6, 7), 0..9), Content::Garbage);
            assert_eq!(content(file, 5, &bytes(file + 2, 5, 7), 0..9), Content::Garbage);
            let mut damaged = bytes(file, 5, 7);
            damaged[700] ^= 1;
            assert_eq!(content(file, 5, &damaged, 0..9), Content::Garbage);
        }
    }

    #[test]
    fn pages_of_different_numbers_are_told() {
        let (file, cell) = (1, 2);
        let split = parts(file, cell).next().unwrap().end;
        assert_eq!(split, 4096 - 3000);
        let mut mixed = bytes(file, cell, 7);
        mixed[split..].copy_from_slice(&bytes(file, cell, 6)[split..]);
        assert_eq!(content(file, cell, &mixed, 5..9), Content::Torn(vec![7, 6]));
        assert_eq!(content(file, cell, &mixed, 7..9), Content::Garbage);
    }

    #[test]
    fn pieces_end_anywhere_and_are_of_what_was_written() {
        let (file, cell) = (0, 2);
        let mut mixed = bytes(file, cell, 7);
        mixed[1503..].copy_from_slice(&bytes(file, cell, 6)[1503..]);
        assert_eq!(content(file, cell, &mixed, 5..9), Content::Pieces(vec![7, 6]));
        assert_eq!(content(file, cell, &mixed, 7..9), Content::Garbage);
        mixed[2000..2030].fill(9);
        assert_eq!(content(file, cell, &mixed, 5..9), Content::Garbage);
    }
}
