//! What to access: files, offsets, reads or writes. Pure, and the same for the same seed.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A workload, the same on every node.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// Random offsets instead of one after the other.
    pub random: bool,
    /// Percent of operations that read.
    pub reads: u32,
    /// Bytes an operation.
    pub block: usize,
    /// Percent of each node's files that all nodes use.
    pub contention: u32,
    /// Nodes.
    pub nodes: usize,
    /// Threads a node.
    pub threads: usize,
    /// Files each node uses.
    pub files: usize,
    /// Bytes a file.
    pub file_size: u64,
}

impl Workload {
    /// How many of each node's files all nodes use.
    pub fn shared_files(&self) -> usize {
        (self.files * self.contention as usize).div_ceil(100)
    }

    /// Name of file `n` of a node; all nodes call a shared file the same.
    pub fn file_name(&self, node: usize, n: usize) -> String {
        if n < self.shared_files() {
            format!("shared{n}")
        } else {
            format!("node{node}-{n}")
        }
    }
}

/// One operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Which file of the node.
    pub file: usize,
    /// Where.
    pub offset: u64,
    /// Read, or write.
    pub read: bool,
}

/// The operations of one thread, without end.
pub struct Accesses {
    workload: Workload,
    rng: StdRng,
    file: usize,
    block: u64,
}

impl Accesses {
    /// Of a thread of a node.
    pub fn new(workload: Workload, node: usize, thread: usize) -> Self {
        let mut rng = StdRng::seed_from_u64((node * 1000 + thread) as u64);
        let file = rng.random_range(0..workload.files);
        Self {
            workload,
            rng,
            file,
            block: 0,
        }
    }
}

impl Iterator for Accesses {
    type Item = Access;

    fn next(&mut self) -> Option<Access> {
        let w = &self.workload;
        let blocks = (w.file_size / w.block as u64).max(1);
        let (file, block) = if w.random {
            (
                self.rng.random_range(0..w.files),
                self.rng.random_range(0..blocks),
            )
        } else {
            let here = (self.file, self.block);
            self.block += 1;
            if self.block == blocks {
                self.block = 0;
                self.file = self.rng.random_range(0..w.files);
            }
            here
        };
        let read = self.rng.random_range(0..100) < w.reads;
        Some(Access {
            file,
            offset: block * w.block as u64,
            read,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload() -> Workload {
        Workload {
            random: true,
            reads: 25,
            block: 4096,
            contention: 30,
            nodes: 2,
            threads: 1,
            files: 10,
            file_size: 1 << 20,
        }
    }

    #[test]
    fn the_share_of_reads_is_as_asked() {
        for reads in [0, 25, 50, 75, 100] {
            let w = Workload { reads, ..workload() };
            let n = Accesses::new(w, 0, 0).take(20_000).filter(|a| a.read).count() as f64 / 200.0;
            assert!((n - f64::from(reads)).abs() < 2.0, "{n} % of {reads} %");
        }
    }

    #[test]
    fn accesses_stay_inside_and_are_aligned() {
        for random in [false, true] {
            let w = Workload { random, ..workload() };
            for a in Accesses::new(w, 1, 2).take(5_000) {
                assert!(a.file < w.files && a.offset + w.block as u64 <= w.file_size);
                assert_eq!(a.offset % w.block as u64, 0);
            }
        }
    }

    #[test]
    fn sequential_goes_through_whole_files() {
        let w = Workload {
            random: false,
            ..workload()
        };
        let all: Vec<Access> = Accesses::new(w, 0, 0).take(512).collect();
        for (i, a) in all.iter().enumerate() {
            assert_eq!(a.offset, i as u64 % 256 * 4096);
        }
        assert!(all[..256].iter().all(|a| a.file == all[0].file));
    }

    #[test]
    fn contention_decides_which_files_are_shared() {
        let w = workload();
        assert_eq!(w.shared_files(), 3);
        assert_eq!(w.file_name(0, 2), w.file_name(1, 2));
        assert_ne!(w.file_name(0, 3), w.file_name(1, 3));
        assert_eq!(Workload { contention: 0, ..w }.shared_files(), 0);
        assert_eq!(Workload { contention: 100, ..w }.shared_files(), 10);
    }

    #[test]
    fn same_seed_same_accesses() {
        let take = || Accesses::new(workload(), 3, 1).take(100).collect::<Vec<_>>();
        assert_eq!(take(), take());
    }
}
