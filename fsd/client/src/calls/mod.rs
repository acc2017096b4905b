//! Calls of the kernel extension, and what else it asks of the mount.

pub mod forward;
pub mod grants;
pub mod here;
pub mod space;

use crate::kernel::extension::from_kernel;
use crate::cache::Cache;
use crate::data::Data;
use crate::kernel::Kernel;
use crate::namespace::Namespace;
use crate::session::Session;
use rt::sync::Mutex;
use forward::{Away, Forward};
use grants::Grants;
use here::Here;
use space::SpaceCalls;
use crate::Client;
use crate::kernel::extension::Extension;
use crate::kernel::extension::Flushed;
use distfuse_abi::Event;
use rt::time::Instant;
use std::sync::Arc;
use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::Duration;
use distfuse_abi::Answer;
/// What the kernel extension asks for.
pub struct Calls {
    /// Space.
    pub space_calls: Arc<SpaceCalls>,
    /// Leases.
    pub grants: Arc<Grants>,
    /// Reads and writes that are carried out here.
    pub here: Arc<Here>,
    /// Reads and writes that are forwarded to the owner of a lease, or from it.
    pub forward: Arc<Forward>,
}

impl Calls {
    /// The room.
    #[must_use]
    pub fn new(
        session: &Arc<Session>,
        cache: &Arc<Cache>,
        kernel: &Kernel,
        data: &Data,
        namespace: &Namespace,
    ) -> Self {
        let space_calls = Arc::new(SpaceCalls {
            recalling: Mutex::default(),
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            delegations: Arc::clone(&kernel.delegations),
            recalls: Arc::clone(&kernel.recalls),
            space: Arc::clone(&data.space),
            stored: Arc::clone(&data.stored),
            reservations: Arc::clone(&data.reservations),
        });
        let grants = Arc::new(Grants {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            delegations: Arc::clone(&kernel.delegations),
            recalls: Arc::clone(&kernel.recalls),
            space: Arc::clone(&data.space),
            reservations: Arc::clone(&data.reservations),
            space_calls: Arc::clone(&space_calls),
        });
        let here = Arc::new(Here {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            delegations: Arc::clone(&kernel.delegations),
            space: Arc::clone(&data.space),
            reads: Arc::clone(&data.reads),
            writing: Arc::clone(&data.writing),
            xattrs: Arc::clone(&namespace.xattrs),
        });
        let forward = Arc::new(Forward {
            away: Away::default(),
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            delegations: Arc::clone(&kernel.delegations),
            stored: Arc::clone(&data.stored),
            reads: Arc::clone(&data.reads),
            writing: Arc::clone(&data.writing),
            xattrs: Arc::clone(&namespace.xattrs),
            space_calls: Arc::clone(&space_calls),
            here: Arc::clone(&here),
        });
        Self {
            space_calls,
            grants,
            here,
            forward,
        }
    }
}

/// How long the thread for events sleeps at most, so that it ends with its mount.
const LOOK: Duration = Duration::from_secs(5);

/// Answers the kernel until its mount has ended.
pub fn run(client: &Weak<Client>, ext: &Arc<Extension>) {
    let mut looked = Instant::now();
    loop {
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            if let Some(client) = client.upgrade() {
                client.calls.forward.give_up_calls(ext);
                client.calls.space_calls.share_space(ext);
            }
        }
        let event = match ext.attachment.next_event(Some(LOOK)) {
            Ok(Some(event)) => event,
            Ok(None) if client.strong_count() > 0 => continue,
            Ok(None) | Err(distfuse_abi::Error::Gone) => break,
            Err(error) => {
                tracing::error!("the kernel extension: {error}: this mount ends");
                if let Some(client) = client.upgrade() {
                    client.session.fate.doomed.store(true, Ordering::SeqCst);
                }
                break;
            }
        };
        match event {
            Event::Need { ino, mode } => match client.upgrade() {
                Some(client) => client.calls.grants.lend_to_waiters(ext, ino, mode),
                None => ext.wake(ino, Some(libc::ENOTCONN)),
            },
            Event::Call(call) => match client.upgrade() {
                Some(client) => client.calls.forward.answer_call(ext, call),
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
    // Whoever waits for an answer finds that there is nothing left to be taken back.
    ext.note(None);
}

