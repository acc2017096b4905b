//! A mount is replaced by another process, while programs go on.
//!
//! The successor is another mount of the cluster, with a number of its own. It is started by the mount that it replaces ([`control`]), which tells it
//! everything over a socket ([`messages`]): one side is [`giving`], the other [`taking`].

pub mod control;
mod giving;
mod messages;
pub(crate) mod standing;
pub(crate) mod taking;
mod talk;

use std::os::unix::net::UnixStream;

/// Tells a mount, whose successor this process was to be, why it is not.
pub fn refuse(stream: UnixStream, why: &str) {
    talk::Talk::new(stream).refuse(why);
}
