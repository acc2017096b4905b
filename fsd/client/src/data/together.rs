//! Bringing small files to the storage nodes together: many of them with one batch of operations.

use std::collections::BTreeMap;

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
    /// All of them are among what is written.
    goes: bool,
}

impl Writing {
    /// Brings the dirty pages of several files into their frames, under the exclusive leases of these versions. Files stay dirty that
    /// somebody is busy with, that are large, that lack frames, or whose storage node does not answer: each is then stored by itself.
    pub fn store_together(&self, files: &[(&Inode, u64)]) {
        // One storage node after the other: who is silent keeps no files claimed that are others'.
        let mut by_node: BTreeMap<u16, Vec<(&Inode, u64)>> = BTreeMap::new();
        for &(inode, version) in files {
            let node = self.session.storage_of(inode.ino, 0);
            by_node.entry(node).or_default().push((inode, version));
        }
        for (node, files) in by_node {
            self.store_at(node, &files);
        }
    }

    /// Can the dirty pages of a file go with those of others? There are few, all on one storage node, and each has its frame.
    fn is_small_at(&self, node: u16, inode: &Inode, state: &mut State) -> bool {
        if state.lasting.gone || !(1..=SMALL).contains(&state.pages.dirty()) {
            return false;
        }
        state.check_layout();
        let frames = &state.frames;
        let has_frame = |(block, size): (u64, u32)| {
            self.session.storage_of(inode.ino, block) == node
                && frames.known().get(&block).is_some_and(|frame| frame.size >= size)
                && !frames.any_lost(block, block)
        };
        frames.loaded.contains(&node) && frames_wanted(state).into_iter().all(has_frame)
    }

    fn store_at(&self, node: u16, files: &[(&Inode, u64)]) {
        let mut together: Vec<File<'_>> = Vec::with_capacity(files.len());
        for (inode, version) in files {
            let Some(mut state) = inode.try_claim_raw() else {
                continue;
            };
            inode.sync(&mut state, *version);
            if self.is_small_at(node, inode, &mut state) {
                together.push(File {
                    pages: dirty_pages(&state),
                    claimed: state.away(),
                    goes: false,
                });
            }
        }
        let mut writes = Transfers::default();
        for file in &mut together {
            let inode = file.claimed.inode();
            let parts = parts_of(&file.pages);
            let added = file
                .claimed
                .with(|state| self.stored.add_writes(inode, state, parts, &mut writes));
            file.goes = added.is_ok();
        }
        if !self.stored.transfer.once(writes) {
            return;
        }
        for mut file in together.into_iter().filter(|file| file.goes) {
            drop(file.pages);
            file.claimed.with(|state| self.are_stored(state));
        }
    }
}
