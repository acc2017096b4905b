//! Numbers that tests leave to chance, but for whoever wants the same ones again.

use anyhow::Context;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// So many seeds for a test: drawn from the number in `FSD_CHANCE`, the same ones each time, or without it by chance.
///
/// # Errors
/// That is no number.
pub fn seeds(count: usize) -> anyhow::Result<Vec<u64>> {
    seeds_from(std::env::var("FSD_CHANCE").ok().as_deref(), count)
}

fn seeds_from(chance: Option<&str>, count: usize) -> anyhow::Result<Vec<u64>> {
    let mut rng = match chance {
        Some(text) => StdRng::seed_from_u64(text.parse().with_context(|| format!("FSD_CHANCE: {text}"))?),
        None => StdRng::from_os_rng(),
    };
    Ok((0..count).map(|_| rng.random()).collect())
}

#[cfg(test)]
mod tests {
    use super::seeds_from;

    #[test]
    fn the_same_number_gives_the_same_seeds() {
        let seeds = |chance| seeds_from(chance, 3).unwrap();
        assert_eq!(seeds(Some("12")), seeds(Some("12")));
        assert_ne!(seeds(Some("12")), seeds(Some("13")));
        assert_ne!(seeds(None), seeds(None));
        assert!(seeds_from(Some("twelve"), 3).is_err());
    }
}
