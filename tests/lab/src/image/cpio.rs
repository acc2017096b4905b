//! Writer of the archive format that the kernel unpacks at boot (cpio, "newc").

use std::io::{self, Write};

/// File-type bits of the mode field.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// Writes an archive, entry by entry; parents must come before what is in them.
#[derive(Debug)]
pub struct Cpio<W: Write> {
    out: W,
    inode: u32,
}

impl<W: Write> Cpio<W> {
    /// Starts an archive.
    pub fn new(out: W) -> Self {
        Cpio { out, inode: 0 }
    }

    /// Adds a folder.
    ///
    /// # Errors
    /// Those of writing.
    pub fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, DIRECTORY | 0o755, &[])
    }

    /// Adds a file.
    ///
    /// # Errors
    /// Those of writing; more than 4 GiB.
    pub fn file(&mut self, name: &str, permissions: u32, data: &[u8]) -> io::Result<()> {
        self.entry(name, REGULAR | permissions, data)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// Those of writing.
    pub fn symlink(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.entry(name, SYMLINK | 0o777, target.as_bytes())
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// Those of writing.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        let size = u32::try_from(data.len()).map_err(|_| io::Error::other(format!("{name} is too large")))?;
        let name = name.trim_start_matches('/');
        self.inode += 1;
        // magic, inode, mode, uid, gid, links, time, size, device ×2, device of a node ×2, name's length, checksum
        write!(
            self.out,
            "070701{:08x}{mode:08x}{:016x}{:08x}{:08x}",
            self.inode, 0, 1, 0
        )?;
        write!(self.out, "{size:08x}{:032x}{:08x}{:08x}", 0, name.len() + 1, 0)?;
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(110 + name.len() + 1)?;
        self.out.write_all(data)?;
        self.pad(data.len())
    }

    fn pad(&mut self, written: usize) -> io::Result<()> {
        let pad = [0; 3];
        self.out
            .write_all(pad.get(..written.wrapping_neg() % 4).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::Cpio;

    /// Reads an archive back: name, mode, data.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |i: usize| {
                u32::from_str_radix(std::str::from_utf8(&bytes[6 + 8 * i..14 + 8 * i]).unwrap(), 16).unwrap()
            };
            let (mode, size, length) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(bytes[110..110 + length - 1].to_vec()).unwrap();
            let data = (110 + length).next_multiple_of(4);
            if name == "TRAILER!!!" {
                return entries;
            }
            entries.push((name, mode, bytes[data..data + size].to_vec()));
            bytes = &bytes[(data + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn an_archive_reads_back() {
        let mut cpio = Cpio::new(Vec::new());
        cpio.directory("/etc").unwrap();
        for size in 0..9 {
            cpio.file(&format!("etc/{}", "n".repeat(size + 1)), 0o644, &vec![b'x'; size])
                .unwrap();
        }
        cpio.symlink("bin", "usr/bin").unwrap();
        let entries = read(&cpio.finish().unwrap());
        assert_eq!(entries[0], ("etc".into(), 0o040_755, vec![]));
        for size in 0..9 {
            assert_eq!(
                entries[size + 1],
                (
                    format!("etc/{}", "n".repeat(size + 1)),
                    0o100_644,
                    vec![b'x'; size]
                )
            );
        }
        assert_eq!(entries[10], ("bin".into(), 0o120_777, b"usr/bin".to_vec()));
    }
}
