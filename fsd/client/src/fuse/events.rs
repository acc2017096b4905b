//! What the kernel extension asks for and tells.

use std::sync::{Arc, Weak};
use std::time::Duration;

use distfuse_abi::{Answer, Event};
use rt::time::Instant;

use crate::client::Client;
use crate::kernel::extension::{Extension, Flushed, from_kernel};

/// How long the thread for events sleeps at most, so that it ends with its mount.
const LOOK: Duration = Duration::from_secs(5);

/// Answers the kernel until its mount has ended.
pub fn run(client: &Weak<Client>, ext: &Arc<Extension>) {
    let mut looked = Instant::now();
    loop {
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            if let Some(client) = client.upgrade()
                && let Some(calls) = client.calls.get()
            {
                calls.forward.give_up_calls(ext);
                calls.space_calls.share_space();
            }
        }
        let event = match ext.attachment.next_event(Some(LOOK)) {
            Ok(Some(event)) => event,
            Ok(None) if client.strong_count() > 0 => continue,
            Ok(None) | Err(distfuse_abi::Error::Gone) => break,
            Err(error) => {
                tracing::error!("the kernel extension: {error}: this mount ends");
                if let Some(client) = client.upgrade() {
                    client.session.fate.doom();
                }
                break;
            }
        };
        match event {
            Event::Need { ino, mode } => match client.upgrade().as_ref().and_then(|c| c.calls.get()) {
                Some(calls) => calls.grants.delegate_to_waiters(ext, ino, mode),
                None => ext.wake(ino, Some(libc::ENOTCONN)),
            },
            Event::Call(call) => match client.upgrade().as_ref().and_then(|c| c.calls.get()) {
                Some(calls) => calls.forward.answer_call(ext, call),
                None => ext.answer(&call, Answer::Failed(libc::ENOTCONN)),
            },
            Event::Drained { .. } => ext.note(None),
            Event::Flushed {
                cookie,
                error,
                inode,
                no_file,
                ..
            } => {
                let flushed = Flushed {
                    error,
                    last: inode.map(|(size, mtime, ctime)| (size, from_kernel(mtime), from_kernel(ctime))),
                    no_file,
                };
                ext.note(Some((cookie, flushed)));
            }
        }
    }
    // Whoever waits for an answer finds that there is nothing left to be recalled.
    ext.note(None);
}
