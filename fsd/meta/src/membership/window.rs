//! The recovery window of a server that may have lost transactions: the mounts of its last life tell what they were answered
//! and it may not have; everything is carried out again in the order in which it was; then requests are served.
//!
//! Whoever does not come within its term is dead: his part is left out, and what depended on it fails.

use std::collections::BTreeSet;

use fsd_proto::rpc::Responder;
use fsd_proto::wire::{Logged, MetaRequest};

/// A request that waits for the end of the window.
pub type Parked = (MetaRequest, Responder);

/// A transaction to be carried out again, and whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub node: u16,
    pub logged: Logged,
}

/// An open window.
#[derive(Default)]
pub struct Window {
    /// Who has not told everything yet.
    awaited: BTreeSet<u16>,
    entries: Vec<Entry>,
    /// Who waits for the end.
    told: Vec<(u16, Responder)>,
    parked: Vec<Parked>,
}

impl Window {
    /// Waits for these mounts; none is needed without any.
    pub fn open(mounts: impl IntoIterator<Item = u16>) -> Option<Self> {
        let awaited: BTreeSet<u16> = mounts.into_iter().collect();
        (!awaited.is_empty()).then(|| Self {
            awaited,
            ..Self::default()
        })
    }

    /// Is this one waited for?
    pub fn awaits(&self, node: u16) -> bool {
        self.awaited.contains(&node)
    }

    /// May this be answered before the end?
    pub fn admits(request: &MetaRequest) -> bool {
        matches!(
            request,
            MetaRequest::Clock
                | MetaRequest::Join { .. }
                | MetaRequest::Replay { .. }
                | MetaRequest::Peer { .. }
                | MetaRequest::Status
                | MetaRequest::Cluster
        )
    }

    /// Keeps a request for later.
    pub fn park(&mut self, parked: Parked) {
        self.parked.push(parked);
    }

    /// A part of what a mount was answered.
    pub fn take(&mut self, node: u16, entries: Vec<Logged>) {
        let entries = entries.into_iter().map(|logged| Entry { node, logged });
        self.entries.extend(entries);
    }

    /// A mount has told everything.
    pub fn complete(&mut self, node: u16, responder: Responder) {
        self.awaited.remove(&node);
        self.told.push((node, responder));
    }

    /// A mount will not come: what it has told is left out, too, for it may be only the beginning.
    pub fn give_up(&mut self, node: u16) {
        if self.awaited.remove(&node) {
            self.entries.retain(|entry| entry.node != node);
        }
    }

    /// Has everybody told everything, or been given up?
    pub fn is_over(&self) -> bool {
        self.awaited.is_empty()
    }

    /// What is to be carried out again behind `executed`, in order, and who waits for that.
    pub fn finish(&mut self, executed: u64) -> (Vec<Entry>, Vec<(u16, Responder)>) {
        (
            in_order(std::mem::take(&mut self.entries), executed),
            std::mem::take(&mut self.told),
        )
    }

    /// The requests that wait.
    pub fn take_parked(&mut self) -> Vec<Parked> {
        std::mem::take(&mut self.parked)
    }
}

/// Entries behind a place, in the order in which they were carried out.
pub fn in_order(mut entries: Vec<Entry>, executed: u64) -> Vec<Entry> {
    entries.retain(|entry| entry.logged.order > executed);
    entries.sort_by_key(|entry| entry.logged.order);
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(order: u64) -> Logged {
        Logged {
            order,
            request: MetaRequest::Reap { ino: order },
        }
    }

    #[test]
    fn what_everybody_tells_is_merged_in_order() {
        assert!(Window::open([]).is_none());
        let mut window = Window::open([1, 2, 3]).unwrap();
        window.take(1, vec![logged(5), logged(9)]);
        window.take(2, vec![logged(4), logged(7)]);
        window.take(2, vec![logged(8)]);
        window.take(3, vec![logged(6)]);
        assert!(!window.is_over() && window.awaits(3));
        window.give_up(3);
        // Who had told everything is heard, whatever becomes of it then.
        window.awaited.clear();
        window.give_up(1);
        assert!(window.is_over());
        let (entries, _) = window.finish(4);
        let places: Vec<(u16, u64)> = entries.iter().map(|e| (e.node, e.logged.order)).collect();
        assert_eq!(places, [(1, 5), (2, 7), (2, 8), (1, 9)]);
    }

    #[test]
    fn nothing_is_served_before_the_end_but_what_it_takes() {
        assert!(Window::admits(&MetaRequest::Clock));
        for refused in [
            MetaRequest::Sync,
            MetaRequest::GetAttr { ino: 1 },
            MetaRequest::Leave,
        ] {
            assert!(!Window::admits(&refused));
        }
    }
}
