//! Carrying out again what a crash of the server's host has undone.

use std::sync::Arc;

use rt::sync::Mutex;

use super::window::{Entry, Parked, Window, in_order};
use crate::error::MetaError;
use crate::journal::Journal;
use crate::journal::order::Order;
use crate::namespace::transactions::Transactions;
use crate::rules::{Flaw, Rules};
use fsd_proto::rpc::{Errno, Responder};
use fsd_proto::wire::{BEHIND_ALL, Logged, MetaReply, MetaRequest};

/// Transactions that were lost. What is carried out here is so while no request is: its caller sees to that.
pub struct Recovery {
    order: Arc<Order>,
    transactions: Arc<Transactions>,
    rules: Rules,
    /// Open while the mounts of the last life tell what may be missing.
    window: Mutex<Option<Window>>,
}

impl Recovery {
    /// Waits for `mounts`, which may know what is missing.
    pub fn open(
        journal: &Journal,
        transactions: &Arc<Transactions>,
        mounts: impl Iterator<Item = u16>,
        rules: Rules,
    ) -> Result<Self, MetaError> {
        let window = Window::open(mounts);
        if window.is_none() || rules.lack(Flaw::WindowForgotten) {
            // There is nobody to ask.
            journal.order.settle(0)?;
        } else {
            tracing::warn!(
                "the last life of this server did not end in order, and its host has forgotten it: the mounts are asked for what may be missing"
            );
        }
        Ok(Self {
            order: Arc::clone(&journal.order),
            transactions: Arc::clone(transactions),
            rules,
            window: Mutex::new(window),
        })
    }

    /// Is somebody waited for?
    pub fn is_open(&self) -> bool {
        self.window.lock().is_some()
    }

    /// Is this mount waited for?
    pub fn awaits(&self, node: u16) -> bool {
        self.window.lock().as_ref().is_some_and(|w| w.awaits(node))
    }

    /// A mount is dead: nobody waits for what it could tell.
    pub fn give_up(&self, node: u16) {
        if let Some(window) = &mut *self.window.lock() {
            window.give_up(node);
        }
    }

    /// A request that may be served now; another one is kept.
    pub fn admit(&self, request: MetaRequest, responder: Responder) -> Option<Parked> {
        if !Window::admits(&request)
            && let Some(window) = &mut *self.window.lock()
        {
            window.park((request, responder));
            return None;
        }
        Some((request, responder))
    }

    /// A mount tells what it was answered and this server may not have. It comes back if nobody is waited for.
    pub fn hear(
        &self,
        node: u16,
        entries: Vec<Logged>,
        last: bool,
        responder: Responder,
    ) -> Option<(Vec<Logged>, Responder)> {
        let mut open = self.window.lock();
        let Some(window) = open.as_mut() else {
            return Some((entries, responder));
        };
        // One that has told everything, and has come back since, tells nothing new.
        if window.awaits(node) {
            window.take(node, entries);
        }
        if last {
            window.complete(node, responder);
        } else {
            drop(open);
            responder.reply(&Ok(MetaReply::Done));
        }
        None
    }

    /// Carries out what a mount tells for which nobody has waited: others may have gone on without it, but what still can be
    /// done is.
    pub fn carry_out_late(&self, node: u16, entries: Vec<Logged>) -> MetaReply {
        let entries = entries.into_iter().map(|logged| Entry { node, logged }).collect();
        let failed = self.carry_out_again(in_order(entries, self.order.executed()));
        MetaReply::Replayed(
            failed
                .into_iter()
                .map(|(_, place, error)| (place, error))
                .collect(),
        )
    }

    /// Carries out what was told, if nobody is waited for any more; the answers to the mounts.
    pub fn finish(&self) -> Option<Vec<(Responder, MetaReply)>> {
        let executed = self.order.executed();
        let mut open = self.window.lock();
        let window = open.as_mut().filter(|w| w.is_over())?;
        let (mut entries, told) = window.finish(executed);
        drop(open);
        if self.rules.lack(Flaw::ReplayedAnyhow) {
            entries.sort_by_key(|entry| entry.node);
        }
        let again = entries.len();
        let places = entries.iter().map(|entry| entry.logged.order);
        let last = places.filter(|place| *place != BEHIND_ALL).max().unwrap_or(0);
        let failed = self.carry_out_again(entries);
        let last = if self.rules.lack(Flaw::PlacesAgain) {
            0
        } else {
            last
        };
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
        let answers = told.into_iter().map(|(node, responder)| {
            let of = failed.iter().filter(|(n, ..)| *n == node);
            let of = of.map(|&(_, place, error)| (place, error));
            (responder, MetaReply::Replayed(of.collect()))
        });
        Some(answers.collect())
    }

    /// The requests that were kept until now; without any the window is closed.
    pub fn take_parked(&self) -> Vec<Parked> {
        let mut window = self.window.lock();
        let parked = window.as_mut().map(Window::take_parked).unwrap_or_default();
        if parked.is_empty() {
            *window = None;
        }
        parked
    }

    /// What could not be: whose it was, its place, and why.
    fn carry_out_again(&self, entries: Vec<Entry>) -> Vec<(u16, u64, Errno)> {
        let mut failed = Vec::new();
        for Entry { node, logged } in entries {
            // What takes no place leaves the last one as it is.
            let place = if logged.order == BEHIND_ALL {
                0
            } else {
                logged.order
            };
            if let Err(refusal) = self
                .transactions
                .carry_out(Some(node), logged.request, Some(place))
            {
                let error = refusal.errno();
                tracing::error!(
                    "transaction {place} of mount {node} was lost and cannot be carried out again: {error}"
                );
                failed.push((node, logged.order, error));
            }
        }
        failed
    }
}
