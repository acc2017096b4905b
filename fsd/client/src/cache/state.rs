//! What a mount has cached of an inode for one version of its lease. Pure.

use std::collections::BTreeMap;

use crate::cache::claims::Claims;
use crate::cache::dir_cache::DirCache;
use crate::cache::durable::Durable;
use crate::cache::frames::FrameMap;
use crate::cache::lazy::Lazy;
use crate::cache::pages::Pages;
use crate::cache::suid::kill_suid_for;
use crate::session::caller::Caller;
use fsd_proto::wire::{Attr, Frame, Places, Time};

/// What is cached, valid for one version of the lease record.
#[derive(Debug, Default)]
pub struct State {
    /// The version all this belongs to.
    pub version: Option<u64>,
    /// Attributes.
    pub attr: Option<Attr>,
    /// The attributes have changed and the metadata server does not know yet.
    pub attr_dirty: bool,
    /// Something has changed during this exclusive tenure.
    pub modified: bool,
    /// Pages of the contents that are cached, clean or still to be stored.
    pub pages: Pages,
    /// Where the data is.
    pub frames: FrameMap,
    /// Names in a directory.
    pub dir: Lazy<DirCache>,
    /// Extended attributes.
    pub xattrs: Option<BTreeMap<Vec<u8>, Vec<u8>>>,
    /// The attributes came from another mount, which may not have told the metadata server yet.
    pub from_owner: bool,
    /// What another version changes nothing of.
    pub lasting: Lasting,
    /// Ranges that operations are at work on.
    pub(super) claims: Option<Box<Claims>>,
}

/// What is known of an inode whatever the version of its lease.
#[derive(Debug, Default)]
pub struct Lasting {
    /// Gone: last name and last open are no more.
    pub gone: bool,
    /// The last attributes known, where those of this version are not: what can still be said of an inode that is gone.
    pub last: Option<Box<Attr>>,
    /// Target of a symbolic link (never changes).
    pub target: Option<Box<[u8]>>,
    /// Where a directory was found: the directory above, and the name in it.
    pub place: Option<Box<(u64, Vec<u8>)>>,
    /// What of it is durable; none: nothing is known.
    pub durable: Option<Box<Durable>>,
    /// Names that were known when the lease of a directory was given up to others: known again once the server has said which of them
    /// were changed since.
    pub former: Option<Box<DirCache>>,
    /// Moves when something that a server had answered is no longer so: what was asked for before is not kept.
    changes: u64,
}

impl State {
    /// A transaction has changed names or attributes at the metadata server, or what is cached has been thrown away.
    pub fn changed(&mut self) {
        self.lasting.changes += 1;
        // It has not got this change.
        self.lasting.former = None;
    }

    /// Nothing is known any more of the names in a directory.
    pub fn forget_names(&mut self) {
        self.dir = Lazy::default();
        self.lasting.former = None;
    }

    /// How often that was so: an answer may be kept if the number is what it was when the question was asked.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.lasting.changes
    }

    /// Forgets where the file's blocks are.
    pub(super) fn forget_frames(&mut self) {
        self.frames = FrameMap::default();
    }

    /// Forgets everything that depends on the version.
    pub(super) fn forget(&mut self) {
        let last = self.attr.map(|attr| Box::new(self.shown(&attr)));
        let mut lasting = std::mem::take(&mut self.lasting);
        lasting.last = last.or(lasting.last);
        let names = std::mem::take(&mut self.dir).into_made();
        lasting.former = names.filter(|dir| dir.heard.is_some()).or(lasting.former);
        lasting.changes += 1;
        if let Some(durable) = lasting.durable.as_mut() {
            durable.forget();
        }
        // Frames have a number of their own; space was set aside for pages that are gone.
        let mut frames = std::mem::take(&mut self.frames);
        frames.reserved.clear();
        *self = Self {
            lasting,
            frames,
            claims: self.claims.take(),
            ..Self::default()
        };
    }

    /// This mount changes something of the file at a storage node.
    pub fn changed_at(&mut self, node: u16) {
        if let Some(durable) = self.lasting.durable.as_mut() {
            durable.changed(node);
        }
    }

    /// Is everything durable at the metadata server that reading a file of this size needs?
    #[must_use]
    pub fn is_told(&self, size: u64) -> bool {
        self.lasting.durable.as_ref().is_some_and(|d| d.is_told(size))
    }

    /// This mount frees blocks up to `last`: that is to be made durable even where the file does not reach there any more.
    pub fn frees_up_to(&mut self, last: u64) {
        self.lasting.durable.get_or_insert_default().freed(last + 1);
    }

    /// What `stat` is told: the storage that dirty data is going to take counts already, for programs take a file without any for
    /// one that is all hole (`tar -S`).
    #[must_use]
    pub fn shown(&self, attr: &Attr) -> Attr {
        let due = self.frames.reserved.iter().map(|(block, &bytes)| {
            let has = self.frames.known().get(block).map_or(0, |f| f.size);
            u64::from(bytes.saturating_sub(has)) / 512
        });
        let mut due: u64 = due.sum();
        if self.pages.dirty() == 0 {
            // Set aside for what the kernel may yet write, which may be far more than it has.
            due = due.min(attr.size.div_ceil(4096) * 8);
        }
        Attr {
            blocks: attr.blocks + due,
            ..*attr
        }
    }

    /// Something has been changed under the exclusive lease.
    pub fn touch(&mut self) {
        self.modified = true;
        self.attr_dirty = true;
    }

    /// The data has been changed now, by this caller: so says the file's times, and set-user-id bits may go.
    pub fn data_changed(&mut self, now: Time, caller: Caller) {
        if let Some(attr) = self.attr.as_mut() {
            attr.mtime = now;
            attr.ctime = now;
            kill_suid_for(attr, caller);
        }
        self.touch();
    }

    /// The metadata server has been told attributes; others, if they have been changed since.
    pub fn told(&mut self, attr: &Attr) {
        self.attr_dirty &= self.attr != Some(*attr);
    }

    /// A block has got a frame, whose space was perhaps set aside before.
    pub fn take_frame(&mut self, block: u64, frame: Frame) {
        self.frames.unreserve(block);
        let old = self.frames.learn(block, frame);
        if let Some(attr) = self.attr.as_mut() {
            attr.blocks += u64::from(frame.size.saturating_sub(old)) / 512;
        }
        self.new_layout();
        self.touch();
    }

    /// A block has lost its frame.
    pub fn drop_frame(&mut self, block: u64) {
        self.frames.lost.remove(&block);
        let old = self.frames.unlearn(block);
        if let Some(attr) = self.attr.as_mut() {
            attr.blocks = attr.blocks.saturating_sub(u64::from(old) / 512);
        }
        self.new_layout();
        self.touch();
    }

    /// A storage node may have moved or freed the frames of these blocks, and has not said so: it is asked again where they are
    /// before anything is read or written there. The attribute `blocks` stays as it was, whatever is found.
    pub fn doubt_frames(&mut self, node: u16, blocks: impl IntoIterator<Item = u64>) {
        for block in blocks {
            self.frames.unlearn(block);
        }
        self.frames.loaded.remove(&node);
        self.new_layout();
        self.touch();
    }

    fn new_layout(&mut self) {
        if let Some(attr) = self.attr.as_mut() {
            attr.layout += 1;
            self.frames.layout = Some(attr.layout);
        }
    }

    /// Drops frames that belong to another layout than the attributes (which must be loaded).
    pub fn check_layout(&mut self) {
        let layout = self.attr.map(|a| a.layout);
        if self.frames.layout != layout || layout.is_none() {
            self.frames.forget_places(layout);
        }
    }

    /// Where the blocks are, if they are few, for whoever gets the lease next: the number of the layout, which goes with the attributes,
    /// says as long as it stays the same that this is so.
    #[must_use]
    pub fn places(&self) -> Option<Places> {
        let frames = &self.frames;
        let known = self.attr.is_some_and(|attr| frames.layout == Some(attr.layout));
        let few = frames.known().len() <= Places::MOST && frames.loaded.len() <= Places::MOST;
        (known && few && !frames.loaded.is_empty() && frames.lost.is_empty()).then(|| Places {
            nodes: frames.loaded.iter().copied().collect(),
            frames: frames
                .known()
                .iter()
                .map(|(&block, &frame)| (block, frame))
                .collect(),
        })
    }

    /// Where the blocks are, as whoever had the lease has told with the attributes that are now here.
    pub(super) fn learn_places(&mut self, places: Places) {
        self.check_layout();
        for (block, frame) in places.frames {
            self.frames.learn(block, frame);
        }
        self.frames.loaded.extend(places.nodes);
    }

    /// Is everything here that reading any part of the file needs, of `nodes` storage nodes?
    #[must_use]
    pub fn is_mapped(&self, nodes: u16) -> bool {
        let Some(attr) = &self.attr else { return false };
        let blocks = attr.size.div_ceil(fsd_proto::layout::BLOCK);
        self.version.is_some()
            && self.frames.layout == Some(attr.layout)
            && self.frames.loaded.len() as u64 >= blocks.min(u64::from(nodes))
    }

    /// Anything not yet given to the servers?
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.attr_dirty || self.pages.dirty() > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirty_data_counts_as_storage_once() {
        let mut state = State {
            attr: Some(Attr::of_file(5, 1, 5000)),
            ..State::default()
        };
        state.pages.insert(0, vec![1; 4096].into(), true);
        state.frames.reserved.insert(0, 16_384);
        let blocks = |state: &State| state.attr.map(|a| state.shown(&a).blocks);
        assert_eq!(blocks(&state), Some(32));
        let frame = Frame {
            offset: 0,
            size: 16_384,
        };
        state.take_frame(0, frame);
        assert_eq!(blocks(&state), Some(32));
        // A block that grows.
        state.frames.reserved.insert(0, 65_536);
        assert_eq!(blocks(&state), Some(128));
    }
}
