//! The log of this mount's transactions: what the metadata server has answered is kept until a crash of its host can no
//! longer undo it, and told again to a server that has lost it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use rt::sync::Mutex;

use fsd_proto::wire::{Logged, Mark, MetaRequest};

/// Bytes of transactions told in one message.
const PART: usize = 48 << 10;

/// Transactions by their place in the server's order.
#[derive(Debug, Default)]
pub struct Log {
    pub(super) entries: Mutex<BTreeMap<u64, MetaRequest>>,
    /// Up to here the server has said that its order is durable.
    pub(super) durable: AtomicU64,
    /// The last one heard.
    mark: Mutex<Option<Mark>>,
}

impl Log {
    /// A transaction has been answered; those up to `durable` need not be kept any more.
    pub(super) fn note(&self, order: u64, durable: u64, request: &MetaRequest) {
        self.heard(durable);
        let mut entries = self.entries.lock();
        if order > durable {
            entries.insert(order, request.clone());
        }
        if entries
            .first_key_value()
            .is_some_and(|(first, _)| *first <= durable)
        {
            *entries = entries.split_off(&(durable + 1));
        }
    }

    /// The server has said how far its order is durable.
    pub(super) fn heard(&self, durable: u64) {
        self.durable.fetch_max(durable, Ordering::AcqRel);
    }

    /// Up to here the server has said that its order is durable.
    pub(super) fn durable(&self) -> u64 {
        self.durable.load(Ordering::Acquire)
    }

    /// The server has carried out everything up to a mark.
    pub(super) fn heard_mark(&self, mark: Mark) {
        let mut known = self.mark.lock();
        let newer = |known: Mark| known.life != mark.life || known.number < mark.number;
        if known.is_none_or(newer) {
            *known = Some(mark);
        }
    }

    /// The last mark that was heard.
    pub(super) fn mark(&self) -> Option<Mark> {
        *self.mark.lock()
    }

    /// Place of the last one that is kept.
    pub(super) fn last(&self) -> u64 {
        self.entries
            .lock()
            .last_key_value()
            .map_or(0, |(place, _)| *place)
    }

    pub(super) fn get(&self, order: u64) -> Option<MetaRequest> {
        self.entries.lock().get(&order).cloned()
    }

    /// All behind a place, in parts that fit into messages.
    pub(super) fn parts_after(&self, executed: u64) -> Vec<Vec<Logged>> {
        let (mut parts, mut bytes) = (vec![Vec::new()], 0);
        for (&order, request) in self.entries.lock().range(executed + 1..) {
            let logged = Logged {
                order,
                request: request.clone(),
            };
            let len = fsd_proto::wire::encoded_len(&logged);
            if bytes + len > PART && bytes > 0 {
                parts.push(Vec::new());
                bytes = 0;
            }
            bytes += len;
            if let Some(part) = parts.last_mut() {
                part.push(logged);
            }
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reap(ino: u64) -> MetaRequest {
        MetaRequest::Reap { ino }
    }

    fn places(log: &Log, executed: u64) -> Vec<u64> {
        let parts = log.parts_after(executed);
        parts.iter().flatten().map(|logged| logged.order).collect()
    }

    #[test]
    fn what_is_durable_is_not_kept() {
        let log = Log::default();
        log.note(5, 3, &reap(1));
        log.note(7, 3, &reap(2));
        log.note(6, 3, &reap(3));
        assert_eq!(places(&log, 0), [5, 6, 7]);
        assert_eq!(places(&log, 5), [6, 7]);
        assert_eq!(log.get(6), Some(reap(3)));
        // Answers may overtake each other.
        log.note(4, 6, &reap(4));
        assert_eq!(places(&log, 0), [7]);
        log.note(0, 9, &MetaRequest::Sync);
        assert!(places(&log, 0).is_empty());
    }

    #[test]
    fn what_is_told_fits_into_messages() {
        let log = Log::default();
        let big = MetaRequest::Lookup {
            parent: 1,
            name: vec![7; PART / 3],
        };
        for order in 1..=7 {
            log.note(order, 0, &big);
        }
        let parts = log.parts_after(0);
        assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 2, 1]);
        assert_eq!(Log::default().parts_after(0), [vec![]]);
    }
}
