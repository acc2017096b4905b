//! What pages say of themselves, so that a lost, torn or foreign one is noticed: a consistency that is broken must
//! not look like speed.

/// Bytes that carry stamps of their own.
pub const PAGE: usize = 4096;
/// A page has one this often: writes of several may end between any two bytes.
const EVERY: usize = 1024;

/// Who wrote a page, and what for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stamp {
    /// The file's [`file_id`].
    pub file: u64,
    /// Number of the page in its file.
    pub page: u64,
    /// Thread.
    pub writer: u64,
    /// Moves with everything that this thread writes.
    pub count: u64,
}

/// A number for a file of this name, which is the same on all nodes. Never zero, so that no hole looks like a stamp.
pub fn file_id(name: &str) -> u64 {
    // FNV-1a.
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    }) | 1
}

impl Stamp {
    /// Stamps all pages of a block; their numbers go up from this stamp's, if `number` says so.
    pub fn put(self, block: &mut [u8], number: bool) {
        for (n, page) in block.chunks_mut(PAGE).enumerate() {
            let page_number = if number { self.page + n as u64 } else { self.page };
            for place in page.chunks_mut(EVERY) {
                for (word, at) in [self.file, page_number, self.writer, self.count].iter().zip(0..) {
                    if let Some(bytes) = place.get_mut(at * 8..at * 8 + 8) {
                        bytes.copy_from_slice(&word.to_le_bytes());
                    }
                }
            }
        }
    }

    /// The first one of a page.
    pub fn first(page: &[u8]) -> Option<Self> {
        let word = |at: usize| -> Option<u64> {
            Some(u64::from_le_bytes(page.get(at * 8..at * 8 + 8)?.try_into().ok()?))
        };
        Some(Self {
            file: word(0)?,
            page: word(1)?,
            writer: word(2)?,
            count: word(3)?,
        })
    }

    /// The stamp of a page, if all of it is of one write.
    pub fn of(page: &[u8]) -> Option<Self> {
        let first = Self::first(page)?;
        page.chunks(EVERY)
            .all(|place| Self::first(place) == Some(first))
            .then_some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_page_is_noticed() {
        let stamp = Stamp {
            file: file_id("a"),
            page: 7,
            writer: 2,
            count: 9,
        };
        let mut block = vec![0; 2 * PAGE];
        stamp.put(&mut block, true);
        assert_eq!(Stamp::of(&block[..PAGE]), Some(stamp));
        assert_eq!(Stamp::of(&block[PAGE..]), Some(Stamp { page: 8, ..stamp }));
        block[3 * EVERY + 24] ^= 1;
        assert_eq!(Stamp::of(&block[..PAGE]), None);
        assert_eq!(Stamp::first(&block[..PAGE]), Some(stamp));
    }

    #[test]
    fn files_have_numbers_of_their_own() {
        assert_ne!(file_id("node0-1"), file_id("node1-0"));
        assert_ne!(file_id(""), 0);
    }
}
