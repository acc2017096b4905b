//! Keys as text.

use anyhow::{Context, ensure};

/// Bytes as text.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, b| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{b:02x}");
        text
    })
}

/// The opposite of [`hex`].
///
/// # Errors
/// The text is not hexadecimal.
pub fn unhex(text: &str) -> anyhow::Result<Vec<u8>> {
    let text = text.trim();
    ensure!(
        text.is_ascii() && text.len().is_multiple_of(2),
        "the key is not hexadecimal"
    );
    (0..text.len() / 2)
        .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).context("the key is not hexadecimal"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_as_text() {
        let key: Vec<u8> = (0..32).map(|i| i * 7).collect();
        assert_eq!(unhex(&format!("{}\n", hex(&key))).unwrap(), key);
        for bad in ["abc", "zz", "ä"] {
            assert!(unhex(bad).is_err(), "{bad}");
        }
    }
}
