//! What the paper reports, read off its figures (within a percent), as WT+OCC and DFUSE.

/// Values of both modes.
#[derive(Debug, Clone, Copy)]
pub struct Pair {
    /// Write-through, optimistic revocation.
    pub wt: f64,
    /// Write-back.
    pub wb: f64,
}

impl Pair {
    /// Write-back by write-through.
    pub fn ratio(self) -> f64 {
        self.wb / self.wt
    }
}

const fn pair(wt: f64, wb: f64) -> Pair {
    Pair { wt, wb }
}

/// Figure 2: µs of a 4 KiB write on a null file system.
pub const WRITE_US: Pair = pair(24.9, 4.7);

/// Read shares of figure 6, percent.
pub const READS: [u32; 5] = [0, 25, 50, 75, 100];
/// Figure 6a, MiB/s.
pub const RANDOM: [Pair; 5] = [
    pair(54.3, 91.2),
    pair(56.1, 68.4),
    pair(55.8, 60.8),
    pair(55.6, 56.5),
    pair(54.5, 54.1),
];
/// Figure 6c, ms.
pub const RANDOM_MS: [Pair; 5] = [
    pair(1.14, 0.68),
    pair(1.11, 0.90),
    pair(1.11, 1.02),
    pair(1.12, 1.10),
    pair(1.14, 1.15),
];
/// Figure 6b, MiB/s.
pub const SEQUENTIAL: [Pair; 5] = [
    pair(54.4, 88.4),
    pair(72.4, 117.8),
    pair(98.9, 108.7),
    pair(86.5, 88.4),
    pair(55.8, 57.0),
];
/// Figure 6d, ms.
pub const SEQUENTIAL_MS: [Pair; 5] = [
    pair(1.14, 0.70),
    pair(0.86, 0.53),
    pair(0.63, 0.57),
    pair(0.72, 0.71),
    pair(1.10, 1.09),
];

/// Contention of figure 7, percent.
pub const CONTENTION: [u32; 5] = [0, 25, 50, 75, 100];
/// Figure 7, MiB/s.
pub const BY_CONTENTION: [Pair; 5] = [
    pair(55.8, 60.8),
    pair(46.9, 54.2),
    pair(39.3, 47.4),
    pair(31.0, 37.7),
    pair(5.6, 9.7),
];

/// Figure 8: nodes, MiB/s.
const BY_NODES: [(usize, Pair); 8] = [
    (2, pair(19.6, 23.2)),
    (4, pair(39.5, 47.8)),
    (6, pair(58.4, 71.0)),
    (8, pair(76.2, 91.0)),
    (10, pair(91.8, 109.8)),
    (12, pair(109.8, 126.1)),
    (14, pair(123.3, 139.4)),
    (16, pair(138.6, 150.5)),
];

/// The ratio of figure 8 at a number of nodes, between two of the paper's if need be.
pub fn nodes_ratio(nodes: usize) -> Option<f64> {
    let below = BY_NODES.iter().rev().find(|(n, _)| *n <= nodes)?;
    let above = BY_NODES.iter().find(|(n, _)| *n >= nodes)?;
    Some(f64::midpoint(below.1.ratio(), above.1.ratio()))
}

/// Figure 9, at 0 and at 100 % contention, MB/s.
pub const FILESERVER: [Pair; 2] = [pair(173.8, 218.4), pair(117.9, 172.0)];
/// As above.
pub const WEBSERVER: [Pair; 2] = [pair(85.2, 75.8), pair(84.3, 82.6)];
/// As above.
pub const NETSFS: [Pair; 2] = [pair(106.4, 126.1), pair(106.1, 126.6)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratios_are_those_the_paper_speaks_of() {
        let near = |a: f64, b: f64| (a - b).abs() < 0.01;
        assert!(near(RANDOM[0].ratio(), 1.68) && near(SEQUENTIAL[1].ratio(), 1.63));
        assert!(near(BY_CONTENTION[4].ratio(), 1.73) && near(WEBSERVER[0].ratio(), 0.89));
        assert!(near(RANDOM_MS[0].ratio(), 0.60) && near(WRITE_US.ratio(), 0.19));
    }

    #[test]
    fn between_nodes() {
        assert_eq!(nodes_ratio(1), None);
        assert_eq!(nodes_ratio(17), None);
        let at = |n| nodes_ratio(n).unwrap();
        assert!((at(2) - 23.2 / 19.6).abs() < 1e-9);
        assert!(at(2) < at(3) && at(3) < at(4));
    }
}
