//! Ranges of seeds.

use std::str::FromStr;

/// From the first to the last.
#[derive(Debug, Clone)]
pub struct Seeds(std::ops::RangeInclusive<u64>);

impl FromStr for Seeds {
    type Err = std::num::ParseIntError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (first, last) = text.split_once("..").unwrap_or((text, text));
        Ok(Self(first.parse()?..=last.trim_start_matches('=').parse()?))
    }
}

impl Iterator for Seeds {
    type Item = u64;
    fn next(&mut self) -> Option<u64> {
        self.0.next()
    }
}
