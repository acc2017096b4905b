//! A log that many tasks append to: every record is there once, whole, and in the order of its task.

use anyhow::{bail, ensure};

const HEAD: usize = 16;
const MARK: u32 = 0x4c4f_4721;

/// A record of `task`, its `number`th, `len` bytes long in all.
#[must_use]
pub fn record(task: u32, number: u32, len: usize) -> Vec<u8> {
    let len = len.max(HEAD);
    let mut bytes = Vec::with_capacity(len);
    for word in [MARK, task, number, len as u32] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.resize(len, filler(task, number));
    bytes
}

fn filler(task: u32, number: u32) -> u8 {
    (task.wrapping_mul(37).wrapping_add(number.wrapping_mul(11)) % 251) as u8 + 1
}

/// How far a log has been read and found right.
#[derive(Debug)]
pub struct Reader {
    /// Up to here, bytes.
    pub offset: u64,
    next: Vec<u32>,
}

impl Reader {
    /// Of a log of so many tasks.
    #[must_use]
    pub fn new(tasks: usize) -> Self {
        Self {
            offset: 0,
            next: vec![0; tasks],
        }
    }

    /// How many records of a task have come.
    #[must_use]
    pub fn seen(&self, task: usize) -> u32 {
        self.next.get(task).copied().unwrap_or(0)
    }

    /// Goes on with what the log has from [`Self::offset`] on. The last record may be there in part only if its task is
    /// one that `writes_here`, through the same page cache: such a write may be seen page by page, as on any file system.
    ///
    /// # Errors
    /// A record that is torn, missing, there twice, or was never written.
    pub fn feed(&mut self, data: &[u8], writes_here: impl Fn(usize) -> bool) -> anyhow::Result<()> {
        let mut rest = data;
        while !rest.is_empty() {
            let at = self.offset;
            let word = |i: usize| -> Option<u32> {
                let bytes = rest.get(i * 4..i * 4 + 4)?;
                Some(u32::from_le_bytes(bytes.try_into().ok()?))
            };
            let (Some(mark), Some(task), Some(number), Some(len)) = (word(0), word(1), word(2), word(3))
            else {
                // Too little to tell whose it is.
                return Ok(());
            };
            ensure!(mark == MARK, "no record begins at {at}: {:02x?}", &rest[..HEAD]);
            let Some(next) = self.next.get_mut(task as usize) else {
                bail!("a record of nobody at {at}");
            };
            ensure!(
                number == *next,
                "task {task}: record {number} at {at} where {next} is due"
            );
            let Some(record) = rest.get(..len as usize) else {
                ensure!(writes_here(task as usize), "half a record of task {task} at {at}");
                return Ok(());
            };
            let wrong = record.iter().skip(HEAD).position(|&b| b != filler(task, number));
            if let Some(wrong) = wrong {
                let byte = record.get(HEAD + wrong).copied().unwrap_or(0);
                // Its size is known before all of its pages are filled.
                ensure!(
                    byte == 0 && writes_here(task as usize),
                    "task {task}, record {number} at {at}: byte {} is {byte:#x}",
                    HEAD + wrong
                );
                return Ok(());
            }
            *next += 1;
            self.offset += u64::from(len);
            rest = rest.get(len as usize..).unwrap_or(&[]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_log_is_right_and_a_broken_one_is_not() {
        let (a, b) = (record(0, 0, 100), record(1, 0, 20));
        let log = [a.clone(), b.clone(), record(0, 1, 16)].concat();
        let read = |log: &[u8], here: bool| {
            let mut reader = Reader::new(2);
            reader
                .feed(log, |_| here)
                .map(|()| (reader.seen(0), reader.seen(1)))
        };
        assert_eq!(read(&log, false).unwrap(), (2, 1));
        assert!(read(&[&a[..40], &b, &a[40..]].concat(), true).is_err(), "torn");
        assert!(read(&[a.clone(), a.clone()].concat(), true).is_err(), "twice");
        assert!(read(&record(0, 1, 16), true).is_err(), "one is missing");
        assert!(
            read(&a[..40], false).is_err() && read(&a[..40], true).is_ok(),
            "half"
        );
    }
}
