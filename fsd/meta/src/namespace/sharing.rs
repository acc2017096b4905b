//! Commit on sharing: what a mount is told of names it can rely on, whatever dies.
//!
//! A transaction is answered when it has been carried out, and durable some time later; until then the mount that asked for it keeps it, and
//! tells it again to a server whose host has lost it. Another mount that was told of the change meanwhile would have seen what
//! never was, if that host and the first mount died together. So an answer to another mount that shows such a change is given when the
//! change is durable. Mounts learn of names by asking this server. How many names a file has they are shown with its lease, too, and the
//! mount that gives that up sees to it (`client/src/revoke/revocation.rs`).

use std::collections::{HashMap, HashSet};

use rt::sync::Mutex;

use fsd_proto::wire::{Attr, MetaReply, MetaRequest, NamespaceOp, Page};

/// So many changes are remembered before those that are durable are looked for.
const TIDY: usize = 4096;

/// What a change concerns, or an answer shows.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    /// A name in a directory.
    Name(u64, Vec<u8>),
    /// All names of a directory.
    Directory(u64),
    /// The extended attributes of an inode.
    Xattrs(u64),
    /// How many names an inode has.
    Links(u64),
}

/// The last change by each mount: its number, the place of the transaction in the order of all.
type Changes = Vec<(u16, u64)>;

/// What is not durable yet, as far as it can be shown to others.
#[derive(Debug, Default)]
pub struct Sharing(Mutex<HashMap<Key, Changes>>);

/// The names that an operation changes.
pub(super) fn names(op: &NamespaceOp) -> Vec<(u64, &[u8])> {
    match op {
        NamespaceOp::Create { parent, name, .. }
        | NamespaceOp::Link { parent, name, .. }
        | NamespaceOp::Unlink { parent, name, .. }
        | NamespaceOp::Rmdir { parent, name, .. } => vec![(*parent, name)],
        NamespaceOp::Rename {
            parent,
            name,
            new_parent,
            new_name,
            ..
        } => vec![(*parent, name), (*new_parent, new_name)],
        NamespaceOp::SetXattr { .. } | NamespaceOp::RemoveXattr { .. } => Vec::new(),
    }
}

fn xattrs(op: &NamespaceOp) -> Option<Key> {
    match op {
        NamespaceOp::SetXattr { ino, .. } | NamespaceOp::RemoveXattr { ino, .. } => Some(Key::Xattrs(*ino)),
        _ => None,
    }
}

/// The inodes whose number of names an operation changes; but for directories above, which nobody counts by.
fn links(op: &NamespaceOp) -> Vec<Key> {
    match op {
        NamespaceOp::Link { ino, .. } | NamespaceOp::Unlink { ino, .. } | NamespaceOp::Rmdir { ino, .. } => {
            vec![Key::Links(*ino)]
        }
        NamespaceOp::Rename { replaced, .. } => replaced.iter().map(|ino| Key::Links(*ino)).collect(),
        _ => Vec::new(),
    }
}

/// What the answer to a request shows, whatever it is: whether a change succeeds or not, it says whether a name was there.
fn asked(request: &MetaRequest) -> Vec<Key> {
    match request {
        MetaRequest::Lookup { parent, name } | MetaRequest::LookupAgain { parent, name, .. } => {
            vec![Key::Name(*parent, name.clone())]
        }
        // What is read ahead shows nothing of that kind (`Sharing::leave_out`).
        MetaRequest::ReadDir {
            ino, ahead: false, ..
        } => vec![Key::Directory(*ino)],
        MetaRequest::GetAttr { ino } => vec![Key::Links(*ino)],
        MetaRequest::GetXattrs { ino } => vec![Key::Xattrs(*ino)],
        MetaRequest::Namespace { op, .. } => {
            let name = |(parent, name): (u64, &[u8])| Key::Name(parent, name.to_vec());
            names(op).into_iter().map(name).chain(xattrs(op)).collect()
        }
        _ => Vec::new(),
    }
}

/// What an answer shows besides.
fn found(answer: &MetaReply) -> Vec<Key> {
    match answer {
        MetaReply::Found(Some((_, attr)))
        | MetaReply::FoundAgain {
            found: Some((_, attr)),
            ..
        } => vec![Key::Links(attr.ino)],
        MetaReply::Entries(page) => {
            let entries = page.entries.iter();
            entries.map(|(_, attr)| Key::Links(attr.ino)).collect()
        }
        _ => Vec::new(),
    }
}

/// What an answer would show.
#[derive(Debug, Default)]
pub struct Shown(Vec<Key>);

impl Shown {
    /// This as well.
    pub fn and(mut self, answer: &MetaReply) -> Self {
        if !self.0.is_empty() {
            self.0.extend(found(answer));
        }
        self
    }
}

impl Sharing {
    /// A mount has changed something, at a place behind `durable` in the order of all.
    pub fn note(&self, node: u16, op: &NamespaceOp, place: u64, durable: u64) {
        let mut keys: Vec<Key> = xattrs(op).into_iter().chain(links(op)).collect();
        for (parent, name) in names(op) {
            keys.extend([Key::Name(parent, name.to_vec()), Key::Directory(parent)]);
        }
        let mut changes = self.0.lock();
        if changes.len() >= TIDY {
            changes.retain(|_, of| of.iter().any(|(_, at)| *at > durable));
        }
        for key in keys {
            let of = changes.entry(key).or_default();
            of.retain(|(by, at)| *by != node && *at > durable);
            of.push((node, place));
        }
    }

    /// What the answer to a request shows that there may be something to wait for.
    pub fn asked(&self, request: &MetaRequest) -> Shown {
        let none = self.0.lock().is_empty();
        Shown(if none { Vec::new() } else { asked(request) })
    }

    /// Would this show a mount what another one has changed behind `durable`?
    pub fn holds_back(&self, node: impl FnOnce() -> Option<u16>, shown: &Shown, durable: u64) -> bool {
        let changes = self.0.lock();
        let mut others = shown
            .0
            .iter()
            .filter_map(|key| changes.get(key))
            .flatten()
            .filter(|(_, at)| *at > durable)
            .map(|(by, _)| *by)
            .peekable();
        // Whose the request is takes a while to find out.
        others.peek().is_some() && {
            let node = node();
            others.any(|by| Some(by) != node)
        }
    }

    /// Leaves out of a part of a directory what another mount has changed behind `durable`.
    pub fn leave_out(&self, node: impl FnOnce() -> Option<u16>, (dir, page): (u64, &mut Page), durable: u64) {
        let changes = self.0.lock();
        let is_recent = |of: &Changes| of.iter().any(|(_, at)| *at > durable);
        let links = |attr: &Attr| changes.get(&Key::Links(attr.ino));
        let names = changes.get(&Key::Directory(dir)).is_some_and(is_recent);
        if !names
            && !page
                .entries
                .iter()
                .filter_map(|(_, attr)| links(attr))
                .any(is_recent)
        {
            return;
        }
        let node = node();
        let hides = |of: &Changes| of.iter().any(|(by, at)| *at > durable && Some(*by) != node);
        let changed = changes.iter().filter(|(_, of)| hides(of));
        let names: HashSet<Vec<u8>> = changed
            .filter_map(|(key, _)| match key {
                Key::Name(parent, name) if *parent == dir => Some(name.clone()),
                _ => None,
            })
            .collect();
        page.left_out.extend(names.iter().cloned());
        let Page {
            entries, left_out, ..
        } = page;
        entries.retain(|(entry, attr)| {
            if names.contains(&entry.name) {
                return false;
            }
            let hidden = links(attr).is_some_and(hides);
            if hidden {
                left_out.push(entry.name.clone());
            }
            !hidden
        });
    }

    /// How much is remembered.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.0.lock().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsd_proto::ino::ROOT;
    use fsd_proto::wire::{DirEntry, Kind};

    fn unlink(name: &str) -> NamespaceOp {
        NamespaceOp::Unlink {
            parent: ROOT,
            name: name.into(),
            ino: 7,
            keep: false,
        }
    }

    fn rename(name: &str, new_parent: u64, new_name: &str) -> NamespaceOp {
        NamespaceOp::Rename {
            parent: ROOT,
            name: name.into(),
            ino: 7,
            new_parent,
            new_name: new_name.into(),
            replaced: None,
            keep: false,
            flags: 0,
        }
    }

    fn lookup(parent: u64, name: &str) -> MetaRequest {
        let name = name.into();
        MetaRequest::Lookup { parent, name }
    }

    fn list(ino: u64) -> MetaRequest {
        MetaRequest::ReadDir {
            ino,
            after: Vec::new(),
            most: 100,
            ahead: false,
        }
    }

    #[test]
    fn others_see_what_is_durable_and_a_mount_its_own() {
        let sharing = Sharing::default();
        let shows = |node: u16, request: &MetaRequest, durable| {
            sharing.holds_back(|| Some(node), &sharing.asked(request), durable)
        };
        sharing.note(1, &rename("a", 9, "b"), 5, 4);
        for seen in [lookup(ROOT, "a"), lookup(9, "b"), list(ROOT), list(9)] {
            assert!(shows(2, &seen, 4), "{seen:?}");
            assert!(!shows(1, &seen, 4), "{seen:?}: its own");
            assert!(!shows(2, &seen, 5), "{seen:?}: durable");
            assert!(
                sharing.holds_back(|| None, &sharing.asked(&seen), 4),
                "{seen:?}: somebody's"
            );
        }
        for other in [lookup(ROOT, "b"), lookup(9, "a"), list(10), MetaRequest::StatFs] {
            assert!(!shows(2, &other, 4), "{other:?}");
        }
    }

    /// What one mount has changed is under what another one changes later.
    #[test]
    fn a_later_change_hides_no_earlier_one() {
        let sharing = Sharing::default();
        sharing.note(1, &unlink("a"), 5, 4);
        sharing.note(2, &unlink("b"), 6, 4);
        assert!(sharing.holds_back(|| Some(2), &sharing.asked(&list(ROOT)), 4));
        assert!(sharing.holds_back(|| Some(1), &sharing.asked(&list(ROOT)), 4));
        assert!(!sharing.holds_back(|| Some(2), &sharing.asked(&list(ROOT)), 5));
        assert!(sharing.holds_back(|| Some(1), &sharing.asked(&list(ROOT)), 5));
    }

    #[test]
    fn attributes_and_changes_show_it_too() {
        let sharing = Sharing::default();
        let op = NamespaceOp::RemoveXattr {
            ino: 7,
            name: b"user.a".to_vec(),
        };
        sharing.note(1, &op, 5, 4);
        assert!(sharing.holds_back(|| Some(2), &sharing.asked(&MetaRequest::GetXattrs { ino: 7 }), 4));
        assert!(!sharing.holds_back(|| Some(2), &sharing.asked(&MetaRequest::GetXattrs { ino: 8 }), 4));
        sharing.note(1, &unlink("a"), 6, 4);
        let request = MetaRequest::Namespace {
            seq: 1,
            acknowledged: 1,
            now: fsd_proto::wire::Time(0),
            touched: Vec::new(),
            op: unlink("a"),
        };
        assert!(sharing.holds_back(|| Some(2), &sharing.asked(&request), 4));
    }

    #[test]
    fn how_many_names_there_are_is_shown_with_attributes() {
        let sharing = Sharing::default();
        sharing.note(1, &unlink("a"), 5, 4);
        let (attr, other) = (Attr::of_file(7, 1, 0), Attr::of_file(8, 1, 0));
        let shows = |request: &MetaRequest, answer: &MetaReply| {
            sharing.holds_back(|| Some(2), &sharing.asked(request).and(answer), 4)
        };
        for (attr, shown) in [(attr, true), (other, false)] {
            let get = MetaRequest::GetAttr { ino: attr.ino };
            assert_eq!(shows(&get, &MetaReply::Attr(attr)), shown);
            let found = MetaReply::Found(Some((3, attr)));
            assert_eq!(shows(&lookup(9, "elsewhere"), &found), shown);
        }
    }

    #[test]
    fn what_is_read_ahead_shows_nothing_that_a_crash_undoes() {
        let sharing = Sharing::default();
        let all = |names: &[(&str, u64)]| {
            let entries = names.iter().map(|&(name, ino)| {
                let entry = DirEntry {
                    name: name.into(),
                    ino,
                    kind: Kind::File,
                    cookie: ino,
                };
                (entry, Attr::of_file(ino, 1, 0))
            });
            Page {
                entries: entries.collect(),
                ..Page::default()
            }
        };
        let told = |node: u16, durable: u64| {
            let mut page = all(&[("a", 1), ("b", 2), ("c", 7)]);
            sharing.leave_out(|| Some(node), (ROOT, &mut page), durable);
            let names: Vec<Vec<u8>> = page.entries.into_iter().map(|(entry, _)| entry.name).collect();
            page.left_out.sort();
            (names.concat(), page.left_out.concat())
        };
        let pair = |told: &str, left_out: &str| (told.as_bytes().to_vec(), left_out.as_bytes().to_vec());
        assert_eq!(told(2, 4), pair("abc", ""));
        // One name is new, one has gone, and one's inode has lost another name elsewhere.
        sharing.note(1, &rename("gone", ROOT, "b"), 5, 4);
        let elsewhere = NamespaceOp::Unlink {
            parent: 9,
            name: b"other".to_vec(),
            ino: 7,
            keep: false,
        };
        sharing.note(1, &elsewhere, 6, 4);
        assert_eq!(told(2, 4), pair("a", "bcgone"));
        assert_eq!(told(1, 4), pair("abc", ""), "its own");
        assert_eq!(told(2, 5), pair("ab", "c"));
        assert_eq!(told(2, 6), pair("abc", ""), "durable");
        let ahead = MetaRequest::ReadDir {
            ino: ROOT,
            after: Vec::new(),
            most: 100,
            ahead: true,
        };
        assert!(!sharing.holds_back(|| Some(2), &sharing.asked(&ahead), 4));
        assert!(sharing.holds_back(|| Some(2), &sharing.asked(&list(ROOT)), 4));
    }

    #[test]
    fn what_is_durable_is_forgotten() {
        let sharing = Sharing::default();
        for place in 1..=3 * TIDY as u64 {
            sharing.note(1, &unlink(&place.to_string()), place, place.saturating_sub(10));
        }
        assert!(sharing.len() <= TIDY + 2, "{}", sharing.len());
    }
}
