//! Carrying out again what a crash of the server's host has undone.

use super::server::{Flaw, Inner};
use super::window::{Entry, in_order};
use fsd_proto::rpc::{Errno, Responder};
use fsd_proto::wire::{Logged, MetaReply};

impl Inner {
    /// A mount tells what it was answered and this server may not have.
    pub(super) fn replay(&self, entries: Vec<Logged>, last: bool, responder: Responder) {
        let node = self.state.lock().sessions.by_conn(responder.conn().id());
        let Some(node) = node else {
            return responder.reply::<MetaReply>(&Err(Errno(libc::ENOTCONN)));
        };
        let mut state = self.state.lock();
        if let Some(window) = state.window.as_mut() {
            // One that has told everything, and has come back since, tells nothing new.
            if window.awaits(node) {
                window.take(node, entries);
            }
            if last {
                window.complete(node, responder);
                drop(state);
                self.end_window();
            } else {
                drop(state);
                responder.reply(&Ok(MetaReply::Done));
            }
            return;
        }
        drop(state);
        let _serial = self.serial.lock();
        // Nobody has been waited for: others may have gone on without it, but what still can be done is.
        let entries = entries.into_iter().map(|logged| Entry { node, logged }).collect();
        let failed = self.carry_out_again(in_order(entries, self.order.executed()));
        responder.reply(&Ok(MetaReply::Replayed(
            failed
                .into_iter()
                .map(|(_, place, error)| (place, error))
                .collect(),
        )));
    }

    /// Ends the window if nobody is waited for any more: everything told is carried out again, then what was asked meanwhile.
    pub(super) fn end_window(&self) {
        let told = {
            let _serial = self.serial.lock();
            let mut state = self.state.lock();
            let executed = self.order.executed();
            let Some(window) = state.window.as_mut().filter(|w| w.is_over()) else {
                return;
            };
            let (mut entries, told) = window.finish(executed);
            drop(state);
            if self.flawed(Flaw::ReplayedAnyhow) {
                entries.sort_by_key(|entry| entry.node);
            }
            let again = entries.len();
            let last = entries.iter().map(|entry| entry.logged.order).max().unwrap_or(0);
            let failed = self.carry_out_again(entries);
            let last = if self.flawed(Flaw::PlacesAgain) { 0 } else { last };
            if let Err(error) = self.order.settle(last) {
                tracing::error!("{error}");
            }
            if let Err(error) = self.order.sync() {
                // What is not durable the mounts keep, and what asks for that is told.
                tracing::error!("{error}");
            }
            tracing::info!(
                "{again} transactions that were lost have been carried out again, {} could not be",
                failed.len()
            );
            told.into_iter()
                .map(|(node, responder)| {
                    let of = failed.iter().filter(|(n, ..)| *n == node);
                    (responder, of.map(|&(_, place, error)| (place, error)).collect())
                })
                .collect::<Vec<(Responder, Vec<(u64, Errno)>)>>()
        };
        for (responder, failed) in told {
            responder.reply(&Ok(MetaReply::Replayed(failed)));
        }
        loop {
            let parked = {
                let mut state = self.state.lock();
                let parked = state
                    .window
                    .as_mut()
                    .map(super::window::Window::take_parked)
                    .unwrap_or_default();
                if parked.is_empty() {
                    state.window = None;
                    return;
                }
                parked
            };
            for (request, responder) in parked {
                self.serve(request, responder);
            }
        }
    }

    /// What could not be: whose it was, its place, and why.
    fn carry_out_again(&self, entries: Vec<Entry>) -> Vec<(u16, u64, Errno)> {
        let mut failed = Vec::new();
        for Entry { node, logged } in entries {
            let place = logged.order;
            if let Err(refusal) = self.transaction(Some(node), logged.request, Some(place)) {
                let error = refusal.errno();
                tracing::error!(
                    "transaction {place} of mount {node} was lost and cannot be carried out again: {error}"
                );
                failed.push((node, place, error));
            }
        }
        failed
    }
}
