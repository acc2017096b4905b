//! Samples to numbers: percentiles, medians, and how they are written.

use std::time::Duration;

use anyhow::Context;
use hdrhistogram::Histogram;

/// Latencies of one operation.
pub struct Latency {
    hist: Histogram<u64>,
    sum: f64,
    count: u64,
}

impl Latency {
    /// No samples yet.
    ///
    /// # Errors
    /// Never for the bounds used here.
    pub fn new() -> anyhow::Result<Self> {
        // In units of 0.1 ns, up to 100 s.
        let hist = Histogram::new_with_bounds(1, 1_000_000_000_000, 3).context("histogram")?;
        Ok(Self {
            hist,
            sum: 0.0,
            count: 0,
        })
    }

    /// One sample.
    pub fn add(&mut self, took: Duration) {
        self.add_mean(took, 1);
    }

    /// `calls` calls that took this long together; counts as one sample, their mean.
    pub fn add_mean(&mut self, took: Duration, calls: u32) {
        let ns = took.as_secs_f64() * 1e9 / f64::from(calls.max(1));
        self.sum += ns;
        self.count += 1;
        self.hist.saturating_record((ns * 10.0) as u64);
    }

    /// Takes over the samples of another thread.
    pub fn merge(&mut self, other: &Self) {
        // Same bounds, so this cannot fail.
        let _ = self.hist.add(&other.hist);
        self.sum += other.sum;
        self.count += other.count;
    }

    /// Samples.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Arithmetic mean, ns.
    pub fn mean(&self) -> f64 {
        if self.count == 0 {
            0.0
        } else {
            self.sum / self.count as f64
        }
    }

    /// The quantile (0 to 1), ns.
    pub fn at(&self, q: f64) -> f64 {
        self.hist.value_at_quantile(q) as f64 / 10.0
    }

    /// The columns of [`Self::HEADER`], µs.
    pub fn row(&self) -> Vec<String> {
        [
            self.at(0.5),
            self.at(0.9),
            self.at(0.99),
            self.at(0.999),
            self.hist.max() as f64 / 10.0,
            self.mean(),
        ]
        .iter()
        .map(|ns| micros(*ns))
        .collect()
    }

    /// Column titles of [`Self::row`].
    pub const HEADER: [&'static str; 6] = ["p50 us", "p90 us", "p99 us", "p99.9 us", "max us", "mean us"];
}

/// The median; 0 of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Nanoseconds as microseconds, three significant digits or so.
pub fn micros(ns: f64) -> String {
    sig(ns / 1000.0)
}

/// A number with about three significant digits.
pub fn sig(x: f64) -> String {
    let a = x.abs();
    if a == 0.0 {
        "0".into()
    } else if a < 0.1 {
        format!("{x:.4}")
    } else if a < 10.0 {
        format!("{x:.2}")
    } else if a < 100.0 {
        format!("{x:.1}")
    } else {
        format!("{x:.0}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_a_ramp() {
        let mut l = Latency::new().unwrap();
        (1..=1000).for_each(|n| l.add(Duration::from_micros(n)));
        for (q, want) in [(0.5, 500e3), (0.9, 900e3), (0.99, 990e3)] {
            assert!((l.at(q) - want).abs() / want < 0.01, "{q}: {}", l.at(q));
        }
        assert!((l.mean() - 500_500.0).abs() < 1.0);
        assert_eq!((l.count(), l.row().len()), (1000, Latency::HEADER.len()));
    }

    #[test]
    fn means_of_groups_and_merging() {
        let (mut a, mut b) = (Latency::new().unwrap(), Latency::new().unwrap());
        a.add_mean(Duration::from_nanos(640), 16);
        b.add(Duration::from_nanos(80));
        a.merge(&b);
        assert_eq!(a.count(), 2);
        assert!((a.mean() - 60.0).abs() < 0.1, "{}", a.mean());
        assert_eq!(Latency::new().unwrap().mean(), 0.0);
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn digits() {
        assert_eq!(
            [sig(0.0), sig(0.0412), sig(3.2491), sig(32.491), sig(3249.1)],
            ["0", "0.0412", "3.25", "32.5", "3249"]
        );
    }
}
