//! What the metadata server will make of a change of names. Pure.
//!
//! A mount that holds the exclusive leases of everything that a change concerns knows what comes of it: it does what the server
//! is going to do (`fsd/meta/src/namespace`), answers its program, and tells the server later. Where it does not know enough, or the server
//! might refuse for a reason that is not known here, nothing is foreseen, and the server is asked.

use crate::cache::dir_cache::DirCache;
use fsd_proto::layout::is_name;
use fsd_proto::wire::{Attr, Created, Kind, NamespaceOp, Time};

/// A directory with as many links takes no further one; the server's limit is not reached by what is foreseen.
const LINKS: u32 = 1 << 20;

/// What is known of an inode that a change concerns.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// Its attributes.
    pub attr: Attr,
    /// A directory that has not got the name that is to be made.
    absent: bool,
    /// A directory without names.
    empty: bool,
}

impl Known {
    /// Of attributes, and names if there are any.
    #[must_use]
    pub fn of(attr: Attr, names: Option<&DirCache>, op: &NamespaceOp) -> Self {
        let absent = match op {
            NamespaceOp::Create { name, .. } => names.is_some_and(|dir| dir.lookup(name) == Some(None)),
            _ => false,
        };
        let empty = names.is_some_and(|dir| dir.is_complete() && dir.entries.is_empty());
        Self {
            attr,
            absent,
            empty: empty && attr.kind == Kind::Directory,
        }
    }
}

/// Looks an inode up among those that are known.
fn find(known: &[Known], ino: u64) -> Option<Known> {
    known.iter().find(|k| k.attr.ino == ino).copied()
}

/// A directory in which a name has changed.
fn touched(dir: Attr, now: Time) -> Attr {
    Attr {
        mtime: now,
        ctime: now,
        ..dir
    }
}

/// A directory with one entry more, and the cookie of that.
fn with_entry(dir: Attr) -> (Attr, u64) {
    let cookie = dir.layout;
    let layout = cookie + 1;
    (Attr { layout, ..dir }, cookie)
}

/// What is left of an inode that loses a name: nothing, unless it has another one or is to be kept.
fn without_name(attr: Attr, keep: bool, now: Time) -> Option<Attr> {
    let nlink = attr.nlink.saturating_sub(1);
    (nlink > 0 || keep).then_some(Attr {
        nlink,
        ctime: now,
        ..attr
    })
}

/// What comes of a change, of inodes that are all known: the attributes of those that are still there afterwards, and the cookie of the
/// entry that is made.
#[must_use]
pub fn foresee(op: &NamespaceOp, now: Time, known: &[Known]) -> Option<Created> {
    match op {
        NamespaceOp::Create { .. } => create(op, now, known),
        NamespaceOp::Unlink {
            parent, ino, keep, ..
        } => {
            let (dir, victim) = (find(known, *parent)?.attr, find(known, *ino)?.attr);
            if victim.kind == Kind::Directory {
                return None;
            }
            let rest = without_name(victim, *keep, now);
            Some(made(rest.into_iter().chain([touched(dir, now)]), 0))
        }
        NamespaceOp::Rmdir { parent, ino, .. } => {
            let (dir, victim) = (find(known, *parent)?.attr, find(known, *ino)?);
            if !victim.empty {
                return None;
            }
            let nlink = dir.nlink.saturating_sub(1);
            Some(made([touched(Attr { nlink, ..dir }, now)], 0))
        }
        NamespaceOp::Rename { .. } => rename(op, now, known),
        // The server has to see whether it has room.
        NamespaceOp::Link { .. } | NamespaceOp::SetXattr { .. } | NamespaceOp::RemoveXattr { .. } => None,
    }
}

fn made(attrs: impl IntoIterator<Item = Attr>, cookie: u64) -> Created {
    Created {
        attrs: attrs.into_iter().collect(),
        cookie,
        second_cookie: 0,
    }
}

fn create(op: &NamespaceOp, now: Time, known: &[Known]) -> Option<Created> {
    let NamespaceOp::Create {
        parent, name, kind, ..
    } = op
    else {
        return None;
    };
    let above = find(known, *parent)?;
    if !above.absent || !is_name(name) || above.attr.nlink == 0 || above.attr.nlink >= LINKS {
        return None;
    }
    let (mut dir, cookie) = with_entry(above.attr);
    dir.nlink += u32::from(*kind == Kind::Directory);
    let new = op.new_inode(now)?;
    Some(made([touched(dir, now), new], cookie))
}

fn rename(op: &NamespaceOp, now: Time, known: &[Known]) -> Option<Created> {
    let NamespaceOp::Rename {
        parent,
        ino,
        new_parent,
        new_name,
        replaced,
        keep,
        flags,
        ..
    } = op
    else {
        return None;
    };
    let (moved, to) = (find(known, *ino)?.attr, find(known, *new_parent)?.attr);
    let other = match replaced {
        Some(other) => Some(find(known, *other)?),
        None => None,
    };
    let directory = moved.kind == Kind::Directory;
    // Whether a directory would come to lie below itself only the server can tell.
    let elsewhere = parent != new_parent;
    let simple = *flags == 0 || (*flags == libc::RENAME_NOREPLACE && other.is_none());
    if !simple || !is_name(new_name) || to.nlink == 0 || (directory && elsewhere) || *replaced == Some(*ino) {
        return None;
    }
    if let Some(other) = &other
        && (directory != (other.attr.kind == Kind::Directory) || (directory && !other.empty))
    {
        return None;
    }
    let mut attrs = Vec::with_capacity(4);
    if elsewhere {
        attrs.push(touched(find(known, *parent)?.attr, now));
    }
    let (mut to, cookie) = with_entry(to);
    if directory && other.is_some() {
        to.nlink = to.nlink.saturating_sub(1);
    }
    attrs.push(touched(to, now));
    attrs.push(Attr { ctime: now, ..moved });
    if let Some(other) = other.filter(|_| !directory) {
        attrs.extend(without_name(other.attr, *keep, now));
    }
    Some(made(attrs, cookie))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsd_proto::ino::ROOT;
    use fsd_proto::layout::FIRST_COOKIE;

    const NOW: Time = Time(1000);

    fn directory(ino: u64, layout: u64) -> Attr {
        Attr {
            kind: Kind::Directory,
            nlink: 2,
            layout,
            ..Attr::of_file(ino, 1, 4096)
        }
    }

    fn file(ino: u64) -> Attr {
        Attr {
            nlink: 1,
            ..Attr::of_file(ino, 1, 10)
        }
    }

    fn known(attr: Attr, names: &DirCache, op: &NamespaceOp) -> Known {
        Known::of(attr, Some(names), op)
    }

    fn rename(ino: u64, to: u64, replaced: Option<u64>) -> NamespaceOp {
        NamespaceOp::Rename {
            parent: ROOT,
            name: b"a".to_vec(),
            ino,
            new_parent: to,
            new_name: b"b".to_vec(),
            replaced,
            keep: false,
            flags: 0,
        }
    }

    #[test]
    fn a_name_is_made_where_it_is_known_not_to_be() {
        let op = NamespaceOp::Create {
            parent: ROOT,
            name: b"d".to_vec(),
            ino: 9,
            version: 4,
            kind: Kind::Directory,
            mode: 0o755,
            uid: 1,
            gid: 2,
            rdev: 0,
            target: Vec::new(),
        };
        let mut names = DirCache::default();
        let root = directory(ROOT, 7);
        assert_eq!(foresee(&op, NOW, &[known(root, &names, &op)]), None);
        names.remove(b"d");
        let created = foresee(&op, NOW, &[known(root, &names, &op)]).unwrap();
        let (above, new) = (created.attrs[0], created.attrs[1]);
        assert_eq!(
            (created.cookie, above.layout, above.nlink, above.mtime),
            (7, 8, 3, NOW)
        );
        assert_eq!(
            (new.ino, new.version, new.nlink, new.layout),
            (9, 4, 2, FIRST_COOKIE)
        );
        names.add(b"d", 9, Kind::Directory, 7);
        assert_eq!(foresee(&op, NOW, &[known(root, &names, &op)]), None);
    }

    #[test]
    fn only_a_directory_known_to_be_empty_is_removed() {
        let op = NamespaceOp::Rmdir {
            parent: ROOT,
            name: b"d".to_vec(),
            ino: 9,
        };
        let (root, mut names) = (directory(ROOT, 7), DirCache::default());
        let of = |names: &DirCache| {
            let known = [Known::of(root, None, &op), known(directory(9, 3), names, &op)];
            foresee(&op, NOW, &known).map(|c| c.attrs.len())
        };
        assert_eq!(of(&names), None);
        names.completed(Vec::new());
        assert_eq!(of(&names), Some(1));
        names.add(b"x", 5, Kind::File, 3);
        assert_eq!(of(&names), None);
    }

    #[test]
    fn what_only_the_server_can_tell_is_not_foreseen() {
        let all = [
            directory(ROOT, 7),
            directory(20, 3),
            directory(9, 3),
            file(5),
            file(6),
        ]
        .map(|attr| Known::of(attr, None, &rename(5, ROOT, None)));
        let of = |op: &NamespaceOp| foresee(op, NOW, &all);
        // A file goes anywhere, a directory to where it was.
        assert_eq!(of(&rename(5, 20, None)).unwrap().attrs.len(), 3);
        assert_eq!(of(&rename(9, ROOT, None)).unwrap().cookie, 7);
        assert_eq!(of(&rename(9, 20, None)), None);
        // What is replaced is gone.
        let replaced = of(&rename(5, ROOT, Some(6))).unwrap();
        assert!(replaced.attrs.iter().all(|attr| attr.ino != 6));
        assert_eq!(of(&rename(5, ROOT, Some(9))), None);
        assert_eq!(of(&rename(5, 77, None)), None);
    }
}
