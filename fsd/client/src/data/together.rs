//! Bringing small files to the storage nodes together: many of them with one batch of operations to each node.

use std::collections::BTreeSet;

use crate::cache::inode::{Claimed, Inode};
use crate::cache::state::State;
use crate::data::transfer::Transfers;
use crate::data::writing::{Numbered, Writing, dirty_pages, frames_wanted, parts_of};

/// A file with more dirty pages fills batches of its own.
const SMALL: usize = 16;

/// A file that goes with others.
struct File<'a> {
    claimed: Claimed<'a>,
    pages: Vec<Numbered>,
    /// The storage nodes of its dirty pages.
    nodes: BTreeSet<u16>,
}

impl Writing {
    /// The storage nodes of a file's dirty pages, if they can go with those of others: there are few, and each has its frame.
    fn nodes_of_small(&self, inode: &Inode, state: &mut State) -> Option<BTreeSet<u16>> {
        if state.lasting.gone || !(1..=SMALL).contains(&state.pages.dirty()) {
            return None;
        }
        state.check_layout();
        let frames = &state.frames;
        let node_of = |(block, size): (u64, u32)| {
            let node = self.session.storage_of(inode.ino, block);
            let has = frames.known().get(&block).is_some_and(|frame| frame.size >= size);
            (has && frames.loaded.contains(&node) && !frames.any_lost(block, block)).then_some(node)
        };
        frames_wanted(state).into_iter().map(node_of).collect()
    }

    /// Brings the dirty pages of several files into their frames, under the exclusive leases of these versions. Files stay dirty that
    /// somebody is busy with, that are large, that lack frames, or whose storage node does not answer: each is then stored by itself.
    pub fn store_together(&self, files: &[(&Inode, u64)]) {
        let mut together: Vec<File<'_>> = Vec::with_capacity(files.len());
        for (inode, version) in files {
            let Some(mut state) = inode.try_claim_raw() else {
                continue;
            };
            inode.sync(&mut state, *version);
            if let Some(nodes) = self.nodes_of_small(inode, &mut state) {
                let pages = dirty_pages(&state);
                let claimed = state.away();
                together.push(File {
                    claimed,
                    pages,
                    nodes,
                });
            }
        }
        let mut writes = Transfers::default();
        for File { claimed, pages, .. } in &mut together {
            let inode = claimed.inode();
            let added =
                claimed.with(|state| self.stored.add_writes(inode, state, parts_of(pages), &mut writes));
            debug_assert!(added.is_ok(), "a claimed file has lost a frame");
        }
        let failed = self.stored.transfer.once(writes);
        for mut file in together {
            if file.nodes.iter().all(|node| !failed.contains(node)) {
                drop(file.pages);
                file.claimed.with(|state| self.are_stored(state));
            }
        }
    }
}
