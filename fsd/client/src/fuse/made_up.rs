//! Requests that no kernel has sent, for the FUSE library to read.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

/// An inode that does not exist: numbers have a bit less.
pub(super) const NOBODY: u64 = u64::MAX;
/// Longest answer: what a READ may bring, and its header.
pub(super) const LONGEST: usize = (1 << 20) + (64 << 10);

/// A pair of sockets that keep messages apart, the second one with room for the longest answers.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (near, far) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::sockopt::set_socket_send_buffer_size_force(&far, 4 * LONGEST)?;
    Ok((near, far))
}

/// A request as the kernel sends it (`fuse_in_header` of `linux/fuse.h`, and a body).
pub(super) fn request(opcode: u32, inode: u64, body: &[u8]) -> Vec<u8> {
    const HEADER: usize = 40;
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    bytes.extend(opcode.to_ne_bytes());
    bytes.extend(1u64.to_ne_bytes());
    bytes.extend(inode.to_ne_bytes());
    // User, group, process, and padding.
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

/// A FORGET of an inode that does not exist, which is not answered; `count` is how often that is forgotten.
pub(super) fn forget(count: u64) -> Vec<u8> {
    const FORGET: u32 = 2;
    request(FORGET, NOBODY, &count.to_ne_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{RecvFlags, SendFlags, recv, send};

    #[test]
    fn a_forget_has_the_kernels_form() {
        let bytes = forget(5);
        assert_eq!((bytes.len(), &bytes[..4]), (48, &48u32.to_ne_bytes()[..]));
        assert_eq!(bytes[16..24], NOBODY.to_ne_bytes());
        assert_eq!(bytes[40..], 5u64.to_ne_bytes());
    }

    #[test]
    fn the_longest_answer_goes_through_a_pair() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let (near, far) = pair().unwrap();
        let sent = vec![7; LONGEST];
        send(&far, &sent, SendFlags::NOSIGNAL).unwrap();
        let mut got = vec![0; LONGEST];
        assert_eq!(recv(&near, &mut got[..], RecvFlags::empty()).unwrap().0, LONGEST);
        assert_eq!(got, sent);
    }
}
