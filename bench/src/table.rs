//! Tables: for people on stdout, for programs as CSV.

use std::fmt;
use std::path::Path;

use anyhow::Context;

/// A titled table of text cells.
#[derive(Debug, Clone)]
pub struct Table {
    title: String,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub fn new<S: AsRef<str>>(title: impl Into<String>, header: &[S]) -> Self {
        Self {
            title: title.into(),
            header: header.iter().map(|h| h.as_ref().to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// As RFC 4180 says.
    pub fn csv(&self) -> String {
        std::iter::once(&self.header)
            .chain(&self.rows)
            .map(|row| csv_line(row))
            .collect()
    }

    /// Writes the CSV form.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_csv(&self, path: &Path) -> anyhow::Result<()> {
        std::fs::write(path, self.csv()).with_context(|| format!("cannot write {}", path.display()))
    }
}

fn csv_line(cells: &[String]) -> String {
    let quoted: Vec<String> = cells
        .iter()
        .map(|c| {
            if c.contains(['"', ',', '\n', '\r']) {
                format!("\"{}\"", c.replace('"', "\"\""))
            } else {
                c.clone()
            }
        })
        .collect();
    quoted.join(",") + "\r\n"
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |col: usize| {
            std::iter::once(&self.header)
                .chain(&self.rows)
                .filter_map(|r| r.get(col))
                .map(|c| c.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.header.len()).map(width).collect();
        writeln!(f, "\n## {}", self.title)?;
        let line = |f: &mut fmt::Formatter<'_>, cells: &[String]| {
            for (i, w) in widths.iter().enumerate() {
                let cell = cells.get(i).map_or("", String::as_str);
                // Names to the left, numbers to the right.
                if i == 0 {
                    write!(f, "| {cell:<w$} ")?
                } else {
                    write!(f, "| {cell:>w$} ")?
                }
            }
            writeln!(f, "|")
        };
        line(f, &self.header)?;
        let rule: Vec<String> = widths.iter().map(|w| "-".repeat(*w)).collect();
        line(f, &rule)?;
        self.rows.iter().try_for_each(|row| line(f, row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_quotes_what_it_must() {
        let mut t = Table::new("t", &["a", "b"]);
        t.row(vec!["1,5".into(), "say \"x\"".into()]);
        t.row(vec!["plain".into(), "two\nlines".into()]);
        assert_eq!(
            t.csv(),
            "a,b\r\n\"1,5\",\"say \"\"x\"\"\"\r\nplain,\"two\nlines\"\r\n"
        );
    }

    #[test]
    fn text_is_aligned() {
        let mut t = Table::new("t", &["name", "n"]);
        t.row(vec!["x".into(), "1234".into()]);
        let text = t.to_string();
        assert!(
            text.contains("| x    | 1234 |") && text.contains("| name |    n |"),
            "{text}"
        );
        assert_eq!(t.rows.len(), 1);
    }
}
