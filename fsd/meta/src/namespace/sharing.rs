//! Commit on sharing: what a mount is told of names it can rely on, whatever dies.
//!
//! A transaction is answered when it has been carried out, and durable some time later; until then the mount that asked for it keeps it, and
//! tells it again to a server whose host has lost it. Another mount that was told of the change meanwhile would have seen what
//! never was, if that host and the first mount died together. So an answer to another mount that shows such a change is given when the
//! change is durable. Mounts learn of names by asking this server. How many names a file has they are shown with its lease, too, and the
//! mount that gives that up sees to it (`client/src/revoke/revocation.rs`).

use std::collections::HashMap;

use rt::sync::Mutex;

use fsd_proto::wire::{MetaReply, MetaRequest, NamespaceOp};

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
        MetaRequest::ReadDir { ino, .. } => vec![Key::Directory(*ino)],
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
        MetaReply::Entries(entries, _) => entries.iter().map(|(_, attr)| Key::Links(attr.ino)).collect(),
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
    use fsd_proto::wire::Attr;

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
        let after = Vec::new();
        MetaRequest::ReadDir { ino, after }
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
    fn what_is_durable_is_forgotten() {
        let sharing = Sharing::default();
        for place in 1..=3 * TIDY as u64 {
            sharing.note(1, &unlink(&place.to_string()), place, place.saturating_sub(10));
        }
        assert!(sharing.len() <= TIDY + 2, "{}", sharing.len());
    }
}
