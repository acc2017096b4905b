//! Tests of the namespace transactions over a real store.

use super::*;
use crate::journal::records::new_root;
use crate::namespace::xattrs::XATTR_MAX;
use fsd_node::store::FjallStore;
use fsd_proto::ino::ROOT;
use fsd_proto::wire::Time;

const NODE: u16 = 3;

struct Server {
    store: FjallStore,
    next: u64,
    clock: i64,
    _dir: tempfile::TempDir,
}

impl Server {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = FjallStore::open(dir.path()).unwrap();
        let mut txn = Txn::new(&store);
        txn.set_inode(&new_root(Time(0), 0, 0));
        txn.commit().unwrap();
        Self {
            store,
            next: 10,
            clock: 0,
            _dir: dir,
        }
    }

    fn run(&mut self, op: NamespaceOp) -> Result<(Created, Effects), i32> {
        self.clock += 1;
        let change = Change::new(Txn::new(&self.store), NODE, Time(self.clock), 0, &[]);
        let (txn, created, effects) = run(change, &op).map_err(|r| r.errno().0)?;
        txn.commit().unwrap();
        Ok((created, effects))
    }

    fn create(&mut self, parent: u64, name: &str, kind: Kind) -> Result<u64, i32> {
        self.next += 1;
        let ino = self.next;
        let mut txn = Txn::new(&self.store);
        txn.put(key::reserved(NODE, ino), Vec::new());
        txn.commit().unwrap();
        self.run(NamespaceOp::Create {
            parent,
            name: name.into(),
            ino,
            version: 0,
            kind,
            mode: 0o644,
            uid: 1,
            gid: 2,
            rdev: 0,
            target: Vec::new(),
        })
        .map(|_| ino)
    }

    fn unlink(&mut self, parent: u64, name: &str, ino: u64, keep: bool) -> Result<Effects, i32> {
        self.run(NamespaceOp::Unlink {
            parent,
            name: name.into(),
            ino,
            keep,
        })
        .map(|(_, e)| e)
    }

    fn rename(
        &mut self,
        from: (u64, &str, u64),
        to: (u64, &str, Option<u64>),
        flags: u32,
    ) -> Result<Effects, i32> {
        self.run(NamespaceOp::Rename {
            parent: from.0,
            name: from.1.into(),
            ino: from.2,
            new_parent: to.0,
            new_name: to.1.into(),
            replaced: to.2,
            keep: false,
            flags,
        })
        .map(|(_, e)| e)
    }

    fn nlink(&self, ino: u64) -> u32 {
        Txn::new(&self.store).inode(ino).unwrap().attr.nlink
    }

    fn name(&self, parent: u64, name: &str) -> Option<u64> {
        Txn::new(&self.store)
            .dirent(parent, name.as_bytes())
            .unwrap()
            .map(|d| d.ino)
    }
}

#[test]
fn names_are_checked() {
    let mut s = Server::new();
    assert_eq!(
        s.create(ROOT, &"n".repeat(256), Kind::File),
        Err(libc::ENAMETOOLONG)
    );
    for bad in ["", ".", "..", "a/b", "a\0b"] {
        assert_eq!(s.create(ROOT, bad, Kind::File), Err(libc::EINVAL), "{bad:?}");
    }
    assert!(s.create(ROOT, &"n".repeat(255), Kind::File).is_ok());
}

#[test]
fn a_number_must_be_reserved_and_is_used_once() {
    let mut s = Server::new();
    let ino = s.create(ROOT, "a", Kind::File).unwrap();
    let again = NamespaceOp::Create {
        parent: ROOT,
        name: "b".into(),
        ino,
        version: 0,
        kind: Kind::File,
        mode: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        target: Vec::new(),
    };
    assert_eq!(s.run(again).map(|_| ()), Err(libc::ESTALE));
    assert_eq!(s.name(ROOT, "b"), None);
}

#[test]
fn links_are_counted_to_the_last() {
    let mut s = Server::new();
    let ino = s.create(ROOT, "a", Kind::File).unwrap();
    s.run(NamespaceOp::Link {
        ino,
        parent: ROOT,
        name: "b".into(),
    })
    .unwrap();
    assert_eq!(s.nlink(ino), 2);
    assert_eq!(s.unlink(ROOT, "a", ino, false).unwrap(), Effects::default());
    assert_eq!(s.unlink(ROOT, "b", ino + 1, false), Err(libc::ESTALE));
    assert_eq!(s.unlink(ROOT, "b", ino, false).unwrap().freed, vec![ino]);
    assert!(Txn::new(&s.store).inode(ino).is_err());
}

#[test]
fn an_open_file_becomes_an_orphan_and_is_reaped() {
    let mut s = Server::new();
    let ino = s.create(ROOT, "a", Kind::File).unwrap();
    assert_eq!(s.unlink(ROOT, "a", ino, true).unwrap().orphans, 1);
    assert_eq!(s.nlink(ino), 0);
    let link = NamespaceOp::Link {
        ino,
        parent: ROOT,
        name: "b".into(),
    };
    assert_eq!(s.run(link).map(|_| ()), Err(libc::ENOENT));
    let reap = |s: &Server| {
        super::reap(Change::new(Txn::new(&s.store), 0, Time(9), 0, &[]), ino)
            .unwrap()
            .map(|(t, e)| {
                t.commit().unwrap();
                e
            })
    };
    let effects = reap(&s).unwrap();
    assert_eq!((effects.freed, effects.orphans), (vec![ino], -1));
    assert_eq!(reap(&s), None);
}

#[test]
fn directories_are_removed_only_when_empty() {
    let mut s = Server::new();
    let dir = s.create(ROOT, "d", Kind::Directory).unwrap();
    assert_eq!(s.nlink(ROOT), 3);
    let file = s.create(dir, "f", Kind::File).unwrap();
    let rmdir = NamespaceOp::Rmdir {
        parent: ROOT,
        name: "d".into(),
        ino: dir,
    };
    assert_eq!(s.run(rmdir.clone()).map(|_| ()), Err(libc::ENOTEMPTY));
    assert_eq!(s.unlink(ROOT, "d", dir, false), Err(libc::EISDIR));
    s.unlink(dir, "f", file, false).unwrap();
    s.run(rmdir).unwrap();
    assert_eq!(s.nlink(ROOT), 2);
}

#[test]
fn renames_keep_the_rules_of_the_system_call() {
    let mut s = Server::new();
    let (a, b) = (
        s.create(ROOT, "a", Kind::Directory).unwrap(),
        s.create(ROOT, "b", Kind::Directory).unwrap(),
    );
    let (f, g) = (
        s.create(a, "f", Kind::File).unwrap(),
        s.create(b, "g", Kind::File).unwrap(),
    );
    assert_eq!(s.rename((a, "f", f), (b, "g", Some(g)), 1), Err(libc::EEXIST));
    assert_eq!(s.rename((a, "f", f), (ROOT, "b", Some(b)), 0), Err(libc::EISDIR));
    assert_eq!(s.rename((ROOT, "a", a), (b, "g", Some(g)), 0), Err(libc::ENOTDIR));
    assert_eq!(
        s.rename((ROOT, "a", a), (ROOT, "b", Some(b)), 0),
        Err(libc::ENOTEMPTY)
    );
    assert_eq!(
        s.rename((ROOT, "a", a), (a, "x", None), 0),
        Err(libc::EINVAL),
        "into itself"
    );
    assert_eq!(
        s.rename((a, "f", f), (b, "h", None), 2),
        Err(libc::ENOENT),
        "exchange with nothing"
    );
    assert_eq!(
        s.rename((a, "f", f), (b, "g", Some(g)), 0).unwrap().freed,
        vec![g]
    );
    assert_eq!((s.name(a, "f"), s.name(b, "g")), (None, Some(f)));
    s.rename((ROOT, "b", b), (a, "b", None), 0).unwrap();
    assert_eq!((s.nlink(ROOT), s.nlink(a)), (3, 3));
    s.rename((a, "b", b), (ROOT, "a", Some(a)), 2).unwrap_err();
}

#[test]
fn an_exchange_swaps_names_and_link_counts() {
    let mut s = Server::new();
    let dir = s.create(ROOT, "d", Kind::Directory).unwrap();
    let file = s.create(dir, "f", Kind::File).unwrap();
    let sub = s.create(ROOT, "s", Kind::Directory).unwrap();
    s.rename((dir, "f", file), (ROOT, "s", Some(sub)), 2).unwrap();
    assert_eq!((s.name(dir, "f"), s.name(ROOT, "s")), (Some(sub), Some(file)));
    assert_eq!((s.nlink(dir), s.nlink(ROOT)), (3, 3));
}

#[test]
fn attributes_of_an_older_version_are_ignored() {
    let mut s = Server::new();
    let ino = s.create(ROOT, "a", Kind::File).unwrap();
    let attr = Txn::new(&s.store).inode(ino).unwrap().attr;
    let push = |version, midway, size, era| {
        let mut txn = Txn::new(&s.store);
        update(
            &mut txn,
            era,
            &AttrUpdate {
                version,
                midway,
                size,
                ..AttrUpdate::from(&attr)
            },
        )
        .unwrap();
        txn.commit().unwrap();
        Txn::new(&s.store).inode(ino).unwrap().attr.size
    };
    assert_eq!(push(5, false, 100, 0), 100);
    assert_eq!(push(4, true, 50, 0), 100);
    assert_eq!(push(5, true, 60, 0), 60, "the tenure after that of the 100");
    assert_eq!(push(5, false, 100, 0), 60, "its end, told late");
    assert_eq!(push(5, true, 65, 0), 65);
    assert_eq!(push(6, false, 66, 0), 66);
    assert_eq!(push(0, false, 70, 1), 70, "versions begin again in a new era");
}

#[test]
fn xattrs_obey_their_flags_and_limits() {
    let mut s = Server::new();
    let ino = s.create(ROOT, "a", Kind::File).unwrap();
    let mut set = |name: &str, len: usize, flags: i32| {
        s.run(NamespaceOp::SetXattr {
            ino,
            name: name.into(),
            value: vec![1; len],
            flags,
        })
        .map(|_| ())
    };
    assert_eq!(set("user.a", 5, libc::XATTR_REPLACE), Err(libc::ENODATA));
    assert_eq!(set("user.a", 5, libc::XATTR_CREATE), Ok(()));
    assert_eq!(set("user.a", 5, libc::XATTR_CREATE), Err(libc::EEXIST));
    assert_eq!(set("user.b", XATTR_MAX + 1, 0), Err(libc::E2BIG));
    assert_eq!(set("user.b", XATTR_MAX, 0), Ok(()));
    assert_eq!(set("user.c", XATTR_MAX, 0), Err(libc::ENOSPC));
    let remove = NamespaceOp::RemoveXattr {
        ino,
        name: "user.x".into(),
    };
    assert_eq!(s.run(remove).map(|_| ()), Err(libc::ENODATA));
    assert!(Txn::new(&s.store).inode(ino).unwrap().attr.has_xattr);
}
