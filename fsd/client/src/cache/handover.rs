//! What goes along with an exclusive lease that is given up.

use lockmgr::Relinquish;

use crate::cache::inode::Inode;
use crate::cache::state::State;
use fsd_proto::wire::{AttrUpdate, Places};

impl Inode {
    /// How to give up the exclusive lease, whose data is stored. Attributes that the metadata server does not have are left
    /// to be pushed.
    ///
    /// `version` is that of the data under the lease. Nobody need have looked at anything under it: a task may have been too
    /// late, or have had to come again on another thread. Then what is known here is of an earlier tenure, and what the
    /// lease came with goes on with it.
    pub fn hand_over(&self, state: &mut State, version: Option<u64>) -> Relinquish {
        match version {
            Some(version) => self.sync(state, version),
            None => self.reclaim_push(state),
        }
        let dirty = std::mem::take(&mut state.attr_dirty) && !state.lasting.gone;
        let before = state.version;
        let mut how = Self::to_give(state);
        if let (Some(before), Some(after), Some(lent)) = (before, state.version, self.delegation.get()) {
            lent.carry(before, after);
        }
        let mut push = self.transit.push.lock();
        push.waiting = state
            .attr
            .filter(|_| dirty)
            .map(|attr| Box::new(AttrUpdate::from(&attr)));
        let under_way = push
            .sent
            .as_ref()
            .is_some_and(|u| Some(u.version) == state.version);
        how.needs_confirm = push.waiting.is_some() || under_way;
        how
    }

    /// Moves the version if something was changed, and gives the attributes as they are now.
    fn to_give(state: &mut State) -> Relinquish {
        let modified = std::mem::take(&mut state.modified);
        let Some(version) = state.version else {
            return Relinquish {
                modified,
                ..Relinquish::default()
            };
        };
        let next = if modified {
            (version + 1) & lockmgr::OwnerWord::MAX_VERSION
        } else {
            version
        };
        state.version = Some(next);
        let payload = match state.attr.as_mut() {
            Some(attr) if !state.lasting.gone => {
                attr.version = next;
                let attr = *attr;
                Places::encode_behind(&attr, state.places().as_ref())
            }
            _ => Vec::new(),
        };
        Relinquish {
            modified,
            needs_confirm: false,
            payload,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::inode::{Granted, Source};
    use super::super::inode_table::InodeTable;
    use super::*;
    use crate::session::ctx::Ctx;
    use fsd_proto::wire::{Attr, Frame};

    fn attr(version: u64, size: u64) -> Attr {
        Attr::of_file(5, version, size)
    }

    fn given(how: &Relinquish) -> Option<(u64, u64)> {
        Attr::decode(&how.payload).map(|a| (a.version, a.size))
    }

    /// An inode that this mount had a lease on, of version 6.
    fn known() -> Arc<Inode> {
        let inode = InodeTable::default().get(5);
        inode.lock(&Ctx::on_worker(), 6).unwrap().attr = Some(attr(6, 16));
        inode
    }

    #[test]
    fn what_was_changed_moves_the_version() {
        let inode = known();
        let mut state = inode.lock_raw();
        state.attr = Some(attr(6, 24));
        state.touch();
        let how = inode.hand_over(&mut state, Some(6));
        assert_eq!(given(&how), Some((7, 24)));
        assert!(how.modified && how.needs_confirm);
        let again = inode.hand_over(&mut state, Some(7));
        assert_eq!((given(&again), again.modified), (Some((7, 24)), false));
    }

    #[test]
    fn a_lease_that_nobody_looked_under_goes_on_as_it_came() {
        let inode = known();
        *inode.transit.granted.lock() = Some(Box::new(Granted {
            attr: attr(8, 32),
            places: None,
            source: Source::Handed,
        }));
        let how = inode.hand_over(&mut inode.lock_raw(), Some(8));
        assert_eq!(given(&how), Some((8, 32)));
        // Whoever it came from need not have told the metadata server.
        assert!(how.needs_confirm && !how.modified);
        assert_eq!(
            inode.transit.push.lock().waiting.as_ref().map(|u| u.size),
            Some(32)
        );
    }

    #[test]
    fn where_the_blocks_are_goes_along() {
        let frame = Frame {
            offset: 8192,
            size: 4096,
        };
        let inode = known();
        let mut state = inode.lock_raw();
        state.check_layout();
        state.take_frame(0, frame);
        // Of no storage node is all known.
        let how = inode.hand_over(&mut state, Some(6));
        assert_eq!(Places::decode_behind(&how.payload), None);
        state.frames.loaded.insert(1);
        let how = inode.hand_over(&mut state, Some(7));
        let places = Places::decode_behind(&how.payload).unwrap();
        assert_eq!(
            (&places.nodes[..], &places.frames[..]),
            (&[1][..], &[(0, frame)][..])
        );

        let there = InodeTable::default().get(5);
        *there.transit.granted.lock() = Attr::decode(&how.payload).map(|attr| {
            Box::new(Granted {
                attr,
                places: Some(places),
                source: Source::Owner,
            })
        });
        {
            let state = there.lock(&Ctx::on_worker(), 7).unwrap();
            let loaded = state.frames.loaded.contains(&1);
            assert_eq!((state.frames.known().get(&0), loaded), (Some(&frame), true));
        }
        // Blocks that cannot be read are for the storage node to tell of.
        state.frames.lost.insert(0);
        let how = inode.hand_over(&mut state, Some(7));
        assert_eq!(Places::decode_behind(&how.payload), None);
    }

    #[test]
    fn attributes_of_an_earlier_tenure_do_not_go_on() {
        let inode = known();
        let how = inode.hand_over(&mut inode.lock_raw(), Some(8));
        assert_eq!((given(&how), how.needs_confirm), (None, false));
    }
}
