//! Files that all tasks append records to.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;

use super::board::{Board, Count};
use super::life::{Step, Task};
use super::{RECORDS, TASKS, TASKS_EACH};
use crate::sys;

/// Bytes of a record.
const LEN: usize = 64;

/// The name of a log.
#[must_use]
pub fn name(log: usize) -> String {
    format!("log{log}")
}

fn record(log: usize, task: usize, number: u64) -> Vec<u8> {
    let mut text = format!("log {log} task {task} record {number} ").into_bytes();
    let seal = (log as u64 + 3) * 31 + (task as u64 + 7) * 131 + number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    text.resize(LEN - 17, b'.');
    text.extend(format!("{seal:016x}\n").bytes());
    text
}

fn parse(log: usize, data: &[u8]) -> Option<(usize, u64)> {
    let text = std::str::from_utf8(data).ok()?;
    let mut words = text.split(' ');
    let task = words.nth(3)?.parse().ok()?;
    let number = words.nth(1)?.parse().ok()?;
    (task < TASKS && data == record(log, task, number)).then_some((task, number))
}

/// The records of each task in their order, what is no record, and records that are all zeros.
#[derive(Debug, Default)]
struct Contents {
    of: Vec<Vec<u64>>,
    garbage: Vec<usize>,
    zeros: usize,
}

fn contents(log: usize, data: &[u8]) -> Contents {
    let mut found = Contents {
        of: vec![Vec::new(); TASKS],
        ..Contents::default()
    };
    for (i, part) in data.chunks(LEN).enumerate() {
        match parse(log, part) {
            Some((task, number)) => found.of[task].push(number),
            None if part.len() == LEN && part.iter().all(|b| *b == 0) => found.zeros += 1,
            None => found.garbage.push(i),
        }
    }
    found
}

/// What must be there of a task.
struct Due {
    durable: Vec<u64>,
    acked: Range<u64>,
}

fn due(board: &Board, log: usize, task: usize) -> Due {
    let words = board.log(log, task);
    let base = words.base.load(SeqCst);
    let acked = words.acked.load(SeqCst);
    let set = |n: usize| {
        let word = board.durable(log, task, n).load(SeqCst);
        (0..64)
            .filter(move |bit| word >> bit & 1 == 1)
            .map(move |bit| (n * 64 + bit) as u64)
    };
    Due {
        durable: (0..RECORDS / 64).flat_map(set).collect(),
        acked: base + 1..acked.max(base) + 1,
    }
}

fn mark_durable(board: &Board, log: usize, task: usize, numbers: impl Iterator<Item = u64>) {
    for n in numbers {
        let word = board.durable(log, task, n as usize / 64);
        word.fetch_or(1 << (n % 64), SeqCst);
    }
}

/// Reads a log and compares it with what was acknowledged.
///
/// # Errors
/// A call fails.
pub fn look(task: &Task<'_>, log: usize) -> Step<()> {
    let before = task.board.safe();
    let due: Vec<Due> = (0..TASKS).map(|t| due(task.board, log, t)).collect();
    let data = task.must("read of a log", || {
        let file = task.life.open(&name(log), libc::O_RDONLY)?;
        sys::read_at(&file, 0, TASKS * RECORDS * LEN)
    })?;
    let issued: Vec<u64> = (0..TASKS)
        .map(|t| task.board.log(log, t).issued.load(SeqCst))
        .collect();
    let own = task.still_safe(before);
    let found = contents(log, &data);
    if let Some(first) = found.garbage.first() {
        let text = String::from_utf8_lossy(&data[first * LEN..data.len().min((first + 1) * LEN)]);
        task.wrong(&format!(
            "log {log} has garbage in {} records of {}, the first at {first}: {text:?}",
            found.garbage.len(),
            data.len() / LEN
        ));
    }
    if found.zeros > 0 && !task.board.ever() {
        task.wrong(&format!(
            "log {log} has {} records of zeros, though nobody has died",
            found.zeros
        ));
    }
    for (t, numbers) in found.of.iter().enumerate() {
        if !numbers.is_sorted_by(|a, b| a < b) {
            task.wrong(&format!(
                "records of task {t} in log {log} are not in their order: {numbers:?}"
            ));
        }
        if numbers.last().is_some_and(|last| *last > issued[t]) {
            task.wrong(&format!(
                "log {log} has a record of task {t} that was never written"
            ));
        }
        let Some(safe) = own else { continue };
        let missing = |n: &u64| numbers.binary_search(n).is_err();
        let lost: Vec<u64> = due[t].durable.iter().copied().filter(missing).collect();
        let stale: Vec<u64> = due[t].acked.clone().filter(missing).collect();
        let what = if !lost.is_empty() {
            "fsynced"
        } else if safe[t / TASKS_EACH] && !stale.is_empty() {
            "acknowledged"
        } else {
            task.board.add(Count::Records, numbers.len());
            continue;
        };
        // Another's record in its place, zeros, or an end that is too early?
        let first = lost.iter().chain(&stale).min().copied().unwrap_or(0);
        let before = numbers.iter().rev().find(|n| **n < first).copied().unwrap_or(0);
        let all: Vec<_> = data.chunks(LEN).map(|part| parse(log, part)).collect();
        let at = all.iter().position(|r| *r == Some((t, before))).unwrap_or(0);
        let next: Vec<_> = all.iter().skip(at).take(12).collect();
        task.wrong(&format!(
            "log {log} lacks records of task {t} that were {what}: {lost:?} {stale:?}; of {} records {} are zeros; from {at} on: {next:?}",
            all.len(),
            found.zeros
        ));
    }
    Ok(())
}

/// Appends a record; nothing where there are enough.
///
/// # Errors
/// A call fails. Then nobody knows which of the records since the last death are there.
pub fn append(task: &Task<'_>, file: &mut File, log: usize) -> Step<()> {
    let words = task.board.log(log, task.number);
    let number = words.issued.load(SeqCst) + 1;
    if number as usize >= RECORDS {
        return Ok(());
    }
    words.issued.store(number, SeqCst);
    let data = record(log, task.number, number);
    if let Err(stop) = task.must("append", || file.write_all(&data)) {
        // Of what was not acknowledged nothing is due.
        words.base.store(number, SeqCst);
        return Err(stop);
    }
    task.trace(|| format!("log {log} record {number}"));
    words.acked.store(number, SeqCst);
    task.board.add(Count::Appends, 1);
    Ok(())
}

/// Fsyncs a log: what this task has appended in this life is durable.
///
/// # Errors
/// A call fails.
pub fn sync(task: &Task<'_>, file: &File, log: usize) -> Step<()> {
    let due = due(task.board, log, task.number);
    task.must("fsync of a log", || file.sync_all())?;
    mark_durable(task.board, log, task.number, due.acked);
    task.board.add(Count::Fsyncs, 1);
    Ok(())
}

/// In a new life: what is left of this task's records. From now on that counts.
///
/// # Errors
/// A call fails.
pub fn recover(task: &Task<'_>, log: usize) -> Step<File> {
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_APPEND;
    let file = task.must("open of a log", || task.life.open(&name(log), flags))?;
    let words = task.board.log(log, task.number);
    let due = due(task.board, log, task.number);
    let data = task.must("read of a log after a death", || {
        sys::read_at(&file, 0, TASKS * RECORDS * LEN)
    })?;
    let found = contents(log, &data);
    let there = &found.of[task.number];
    let lost: Vec<u64> = due
        .durable
        .iter()
        .copied()
        .filter(|n| !there.contains(n))
        .collect();
    if !lost.is_empty() {
        task.wrong(&format!(
            "log {log} lacks records after a death that were fsynced: {lost:?}"
        ));
    }
    task.must("fsync of a log", || file.sync_all())?;
    mark_durable(task.board, log, task.number, there.iter().copied());
    words.base.store(words.issued.load(SeqCst), SeqCst);
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::{LEN, contents, parse, record};

    #[test]
    fn records_say_whose_they_are() {
        let one = record(1, 4, 77);
        assert_eq!((one.len(), parse(1, &one)), (LEN, Some((4, 77))));
        assert_eq!(parse(0, &one), None);
        let mut damaged = one.clone();
        damaged[LEN - 3] ^= 1;
        let all = [one, vec![0; LEN], damaged, record(1, 4, 78), vec![b'l'; 3]].concat();
        let found = contents(1, &all);
        assert_eq!((found.of[4].as_slice(), found.zeros), ([77, 78].as_slice(), 1));
        assert_eq!(found.garbage, [2, 4]);
    }
}
