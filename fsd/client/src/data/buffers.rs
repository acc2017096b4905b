//! Memory in which reads are put together: fresh memory would be zeroed and faulted in for each of them.

use std::ops::{Deref, DerefMut};

use rt::sync::Mutex;

/// Buffers that are kept while nobody reads. No more are: every thread that has ever read something large would hold on to as much.
const SPARE: usize = 4;
/// Largest buffer kept, bytes.
const KEEP: usize = 2 << 20;

/// Buffers that were used before.
#[derive(Default)]
pub struct Buffers {
    spare: Mutex<Vec<Vec<u8>>>,
}

impl Buffers {
    /// A buffer of `len` bytes with unspecified contents.
    #[must_use]
    pub fn lend(&self, len: usize) -> Lent<'_> {
        let used = {
            let mut spare = self.spare.lock();
            let fits = spare.iter().rposition(|memory| memory.len() >= len);
            fits.map(|at| spare.remove(at))
        };
        Lent {
            owner: self,
            memory: used.unwrap_or_else(|| vec![0; len]),
            len,
        }
    }

    fn take_back(&self, memory: Vec<u8>) {
        if memory.len() > KEEP {
            return;
        }
        let mut spare = self.spare.lock();
        spare.push(memory);
        if spare.len() > SPARE {
            // The last one used is the one that a processor's cache knows; the smallest serves the fewest reads.
            let smallest = spare.iter().enumerate().min_by_key(|(_, memory)| memory.len());
            if let Some(at) = smallest.map(|(at, _)| at) {
                spare.remove(at);
            }
        }
    }
}

/// A buffer that goes back when it is dropped.
pub struct Lent<'a> {
    owner: &'a Buffers,
    memory: Vec<u8>,
    len: usize,
}

impl Deref for Lent<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[..self.len]
    }
}

impl DerefMut for Lent<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.len]
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.owner.take_back(std::mem::take(&mut self.memory));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_used_again_for_what_fits() {
        let buffers = Buffers::default();
        let first = buffers.lend(4096);
        let at = first.as_ptr();
        drop(first);
        assert_eq!(buffers.lend(100).as_ptr(), at);
        assert_eq!(buffers.lend(100).len(), 100);
        assert_eq!(buffers.lend(8192).len(), 8192);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let buffers = Buffers::default();
        let many: Vec<_> = (1..100).map(|i| buffers.lend(i * 4096)).collect();
        drop(many);
        let spare = buffers.spare.lock();
        let kept: Vec<_> = spare.iter().map(|memory| memory.len() / 4096).collect();
        assert_eq!(kept, [96, 97, 98, 99]);
        drop(spare);
        drop(buffers.lend(KEEP + 1));
        assert_eq!(buffers.spare.lock().len(), SPARE);
    }
}
