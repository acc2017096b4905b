//! What a file has in it, in cells of eight bytes: each write stamps those it covers, so that what is torn, lost or another file's shows.

/// Bytes of a cell.
pub const CELL: u64 = 8;

/// So many cells with one stamp; zero: nothing was written there.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Run {
    /// Cells.
    pub cells: u64,
    /// Stamp of each.
    pub stamp: u64,
}

/// All of a file.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Content(Vec<Run>);

impl Content {
    /// These runs.
    #[must_use]
    pub fn of(runs: Vec<Run>) -> Self {
        let mut content = Self::default();
        runs.into_iter().for_each(|run| content.push(run));
        content
    }

    fn push(&mut self, run: Run) {
        match self.0.last_mut() {
            _ if run.cells == 0 => {}
            Some(last) if last.stamp == run.stamp => last.cells += run.cells,
            _ => self.0.push(run),
        }
    }

    /// Cells.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.iter().map(|run| run.cells).sum()
    }

    /// Nothing in it?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What is in a range, as far as the file goes.
    #[must_use]
    pub fn range(&self, from: u64, cells: u64) -> Self {
        let (mut at, mut found) = (0, Self::default());
        let end = from.saturating_add(cells);
        for run in &self.0 {
            let (first, last) = (at.max(from), (at + run.cells).min(end));
            if first < last {
                found.push(Run {
                    cells: last - first,
                    stamp: run.stamp,
                });
            }
            at += run.cells;
        }
        found
    }

    /// Writes.
    pub fn write(&mut self, from: u64, cells: u64, stamp: u64) {
        let mut next = self.range(0, from);
        let gap = from - next.len();
        next.push(Run { cells: gap, stamp: 0 });
        next.push(Run { cells, stamp });
        let rest = self.range(from + cells, u64::MAX);
        rest.0.into_iter().for_each(|run| next.push(run));
        *self = next;
    }

    /// Cuts off, or makes longer.
    pub fn truncate(&mut self, cells: u64) {
        let mut next = self.range(0, cells);
        let gap = cells - next.len();
        next.push(Run { cells: gap, stamp: 0 });
        *self = next;
    }

    /// What bytes say.
    ///
    /// # Errors
    /// A cell that is half of one write and half of another.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        if !bytes.len().is_multiple_of(CELL as usize) {
            return Err(format!("{} bytes are no whole cells", bytes.len()));
        }
        let mut content = Self::default();
        for cell in bytes.chunks(CELL as usize) {
            let mut word = [0; CELL as usize];
            word.copy_from_slice(cell);
            content.push(Run {
                cells: 1,
                stamp: u64::from_le_bytes(word),
            });
        }
        Ok(content)
    }

    /// The bytes of a write.
    #[must_use]
    pub fn bytes(cells: u64, stamp: u64) -> Vec<u8> {
        stamp.to_le_bytes().repeat(cells as usize)
    }

    /// The stamps, cell by cell as runs.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_and_truncations_are_those_of_a_file() {
        let mut content = Content::default();
        content.write(3, 2, 7);
        assert_eq!((content.len(), content.runs().len()), (5, 2));
        content.write(4, 4, 8);
        content.truncate(6);
        let run = |cells, stamp| Run { cells, stamp };
        assert_eq!(content.runs(), [run(3, 0), run(1, 7), run(2, 8)]);
        content.truncate(9);
        assert_eq!(content.range(5, 100).runs(), [run(1, 8), run(3, 0)]);
        let bytes = [Content::bytes(2, 5), Content::bytes(1, 6)].concat();
        assert_eq!(
            Content::parse(&bytes),
            Ok(Content::of(vec![run(2, 5), run(1, 6)]))
        );
    }
}
