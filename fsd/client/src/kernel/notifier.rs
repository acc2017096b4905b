//! What the kernel is told to drop, on a descriptor of its own: what is written here is done when the call returns, whatever the
//! descriptors are used for that requests and answers go over (`fuse/loops.rs`).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Codes of notifications (`enum fuse_notify_code` of `linux/fuse.h`).
const INVAL_INODE: i32 = 2;
const DELETE: i32 = 6;
/// Length of `fuse_out_header`.
const HEADER: u32 = 16;

/// Tells the kernel to drop what it has cached.
#[derive(Debug, Clone)]
pub struct Notifier(Arc<OwnedFd>);

impl Notifier {
    /// Over a descriptor of the device.
    #[must_use]
    pub fn new(device: OwnedFd) -> Self {
        Self(Arc::new(device))
    }

    /// Drops the attributes of an inode and, for `offset >= 0`, pages. False: the kernel does not know the inode, and has nothing to drop.
    ///
    /// # Errors
    /// The connection to the kernel has ended.
    pub fn inval_inode(&self, ino: u64, offset: i64, len: i64) -> io::Result<bool> {
        let words = [ino.to_ne_bytes(), offset.to_ne_bytes(), len.to_ne_bytes()];
        self.send(INVAL_INODE, &[words.as_flattened()])
    }

    /// A name of a directory that is no more. False: the kernel does not know it.
    ///
    /// # Errors
    /// As [`Notifier::inval_inode`].
    pub fn delete(&self, above: u64, gone: u64, name: &[u8]) -> io::Result<bool> {
        let words = [
            above.to_ne_bytes(),
            gone.to_ne_bytes(),
            // The length of the name, and padding.
            length(name.len() as u32, 0),
        ];
        self.send(DELETE, &[words.as_flattened(), name, &[0]])
    }

    fn send(&self, code: i32, parts: &[&[u8]]) -> io::Result<bool> {
        let body = parts.concat();
        let mut message = Vec::with_capacity(HEADER as usize + body.len());
        message.extend(length(HEADER + body.len() as u32, code));
        message.extend([0; 8]);
        message.extend(body);
        match rustix::io::write(&*self.0, &message) {
            Ok(_) => Ok(true),
            Err(rustix::io::Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Two words of half the size.
fn length(first: u32, second: i32) -> [u8; 8] {
    let mut both = [0; 8];
    both[..4].copy_from_slice(&first.to_ne_bytes());
    both[4..].copy_from_slice(&second.to_ne_bytes());
    both
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn messages_have_the_kernels_form() {
        let (kept, mut heard) = {
            let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
            (Notifier::new(a.into()), b)
        };
        let mut bytes = [0; 44];
        assert!(kept.inval_inode(7, -1, 3).unwrap());
        heard.read_exact(&mut bytes[..40]).unwrap();
        assert_eq!(bytes[..4], 40u32.to_ne_bytes());
        assert_eq!(bytes[4..8], INVAL_INODE.to_ne_bytes());
        assert_eq!(bytes[16..24], 7u64.to_ne_bytes());
        assert_eq!(bytes[24..32], (-1i64).to_ne_bytes());
        assert!(kept.delete(7, 8, b"abc").unwrap());
        heard.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[..4], 44u32.to_ne_bytes());
        assert_eq!(bytes[32..36], 3u32.to_ne_bytes());
        assert_eq!(&bytes[40..], b"abc\0");
    }
}
