//! The socket between a mount and its successor.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::messages::Message;
use fsd_proto::wire::{FrameKind, FrameView, numbered, parse};

/// Version of the messages: one process may be of another program than the other.
const VERSION: u64 = 1;
/// Longest message: a mount that knows millions of inodes has one of some hundred MiB.
const LONGEST: u32 = 1 << 30;
/// Most descriptors that go in one message (`SCM_MAX_FD` of Linux).
const DESCRIPTORS: usize = 253;

/// One side of it.
#[derive(Debug)]
pub(crate) struct Talk(UnixStream);

fn odd(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// How long is waited; none would be for ever.
fn limit_of(limit: Duration) -> Option<Duration> {
    Some(limit.max(Duration::from_millis(1)))
}

impl Talk {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self(stream)
    }

    pub(super) fn send(&mut self, message: &Message, limit: Duration) -> io::Result<()> {
        let frame = numbered(FrameKind::Request, VERSION, message).map_err(|e| odd(&e.to_string()))?;
        self.0.set_write_timeout(limit_of(limit))?;
        self.0.write_all(&(frame.len() as u32).to_le_bytes())?;
        self.0.write_all(&frame)
    }

    /// The other side's message.
    ///
    /// # Errors
    /// It has ended, or says nothing in time, or something else; or that it cannot do what it was asked for.
    pub(super) fn hear(&mut self, limit: Duration) -> io::Result<Message> {
        self.0.set_read_timeout(limit_of(limit))?;
        let mut len = [0; 4];
        self.0.read_exact(&mut len)?;
        let len = u32::from_le_bytes(len);
        if len > LONGEST {
            return Err(odd("a message is too long"));
        }
        let mut frame = vec![0; len as usize];
        self.0.read_exact(&mut frame)?;
        let body = match parse(&frame) {
            Ok(FrameView::Request(VERSION, body)) => body,
            _ => return Err(odd("the two programs do not understand each other")),
        };
        match fsd_proto::wire::decode(body).map_err(|e| odd(&e.to_string()))? {
            Message::Failed(why) => Err(io::Error::other(why)),
            message => Ok(message),
        }
    }

    /// Waits until what was asked for is done.
    pub(super) fn done(&mut self, limit: Duration) -> io::Result<()> {
        match self.hear(limit)? {
            Message::Done => Ok(()),
            _ => Err(odd("an answer was expected")),
        }
    }

    /// Waits until the other side closes the socket.
    pub(super) fn end(&mut self) {
        let _ = self.0.set_read_timeout(None);
        while !matches!(self.0.read(&mut [0; 64]), Ok(0) | Err(_)) {}
    }

    pub(super) fn send_descriptors(&mut self, all: &[BorrowedFd<'_>]) -> io::Result<()> {
        if all.len() > DESCRIPTORS {
            return Err(odd("too many descriptors"));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(all));
        sendmsg(&self.0, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    pub(super) fn hear_descriptors(&mut self, limit: Duration) -> io::Result<Vec<OwnedFd>> {
        self.0.set_read_timeout(limit_of(limit))?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let heard = recvmsg(
            self.0.as_fd(),
            &mut [IoSliceMut::new(&mut byte)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        if heard.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut all = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                all.extend(rights);
            }
        }
        Ok(all)
    }

    /// Tells the other side why it cannot be done, if it still listens.
    pub(super) fn refuse(&mut self, why: &str) {
        let _ = self.send(&Message::Failed(why.to_owned()), Duration::from_secs(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    fn pair() -> (Talk, Talk) {
        let (a, b) = UnixStream::pair().unwrap();
        (Talk::new(a), Talk::new(b))
    }

    #[test]
    fn messages_and_descriptors_arrive() {
        let (mut a, mut b) = pair();
        let file = tempfile();
        a.send_descriptors(&[file.as_fd(), file.as_fd()]).unwrap();
        a.send(&Message::Ready(7), SOON).unwrap();
        assert_eq!(b.hear_descriptors(SOON).unwrap().len(), 2);
        assert_eq!(b.hear(SOON).unwrap(), Message::Ready(7));
        b.refuse("no");
        assert_eq!(a.hear(SOON).unwrap_err().to_string(), "no");
        drop(a);
        assert!(b.hear(SOON).is_err());
    }

    fn tempfile() -> OwnedFd {
        UnixStream::pair().unwrap().0.into()
    }

    #[test]
    fn another_version_is_not_understood() {
        let (mut a, mut b) = pair();
        let frame = numbered(FrameKind::Request, VERSION + 1, &Message::Go).unwrap();
        a.0.write_all(&(frame.len() as u32).to_le_bytes()).unwrap();
        a.0.write_all(&frame).unwrap();
        assert!(b.hear(SOON).is_err());
    }
}
