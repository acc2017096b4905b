//! Crashes of the metadata server and of storage nodes at every point, with everything that power cuts can leave of what was
//! not synced. The mounts tell a server that has lost its end what they were answered; then everything is compared with
//! what they know.

pub mod cluster;
pub mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::journal::order::remember;
use crate::journal::records::{decode, key};
use crate::rules::Flaw;
use cluster::{Mount, World, inodes, names, new_inode, plain, scratch, visible};
use fsd_node::fake_conn::FakeConn;
use fsd_node::fake_disk::{Luck, Table};
use fsd_node::store::Store;
use fsd_proto::ino;
use fsd_proto::layout::BLOCK;
use fsd_proto::rpc::Errno;
use fsd_proto::wire::{BEHIND_ALL, Kind, Logged, MetaReply, MetaRequest};
use world::{Cuts, Disks, NODES, STORES, Server, block_of, join, node_of};

impl World {
    /// What is wrong after a crash.
    fn judge(&self, crash: &Crash) -> Result<(), String> {
        let at = crash.at;
        let (disks, memory) = (Disks::with(crash.tables.clone()), scratch());
        if !crash.cut {
            let place = disks.meta.get(&key::executed()).unwrap();
            let place = place.map_or(0, |v| decode::<u64>(&v).unwrap());
            remember(memory.path(), "u", place).unwrap();
        }
        let mut server = Server::start(&disks, memory.path(), crash.flaw);
        if crash.twice {
            drop(server);
            server = Server::start(&disks, memory.path(), crash.flaw);
        }
        let mut waiting = Vec::new();
        for (m, mount) in self.mounts.iter().enumerate() {
            let leaving = mount.left.is_some_and(|(from, _)| from < at);
            if !crash.come[m] || mount.born > at || mount.left.is_some_and(|(_, until)| until <= at) {
                continue;
            }
            let again = Some((mount.node, mount.incarnation));
            let joined = match plain(server.ask(&mount.conn, &join(again, mount.life))) {
                Ok((.., MetaReply::Joined(joined))) => joined,
                Err(_) if leaving => continue,
                other => return Err(format!("mount {m} cannot come back: {other:?}")),
            };
            let entries: Vec<Logged> = self
                .kept(mount, crash)
                .filter(|(order, _)| *order > joined.executed)
                .map(|(order, request)| Logged { order, request })
                .collect();
            if joined.awaited || !entries.is_empty() {
                let replay = MetaRequest::Replay { entries, last: true };
                waiting.push((m, server.send(&mount.conn, &replay)));
            }
        }
        server.bury();
        for (m, number) in waiting {
            match self.mounts[m].conn.taken(number) {
                Some(Ok(MetaReply::Replayed(failed))) if failed.is_empty() || !crash.all_come() => {}
                other => return Err(format!("what mount {m} tells is answered with {other:?}")),
            }
        }
        if let Some((m, request)) = &crash.unanswered
            && crash.come[*m]
        {
            let repeated = server.ask(&self.mounts[*m].conn, request);
            if let Err(error) = repeated
                && crash.all_come()
            {
                return Err(format!(
                    "{request:?} has been carried out, and fails now: {error}"
                ));
            }
        }
        for _ in 0..3 {
            server.keep_house();
        }
        let table = disks.meta.table();
        if crash.all_come() && visible(&table) != visible(&crash.full) {
            return Err(difference(&visible(&table), &visible(&crash.full)));
        }
        consistent(&table)?;
        self.check_synced(crash, &table)?;
        self.check_blocks(crash, &disks, &table)?;
        self.check_numbers(crash, &mut server, &table)
    }

    /// What a mount has kept: what it was answered, and has not heard to be durable.
    fn kept<'a>(
        &'a self,
        mount: &'a Mount,
        crash: &'a Crash,
    ) -> impl Iterator<Item = (u64, MetaRequest)> + 'a {
        // The answer that was under way did not come.
        let known = crash.at - usize::from(crash.unanswered.is_some());
        let heard = mount.heard.iter().take_while(move |(when, _)| *when <= known);
        let durable = heard.map(|(_, durable)| *durable).max().unwrap_or(0);
        let answered = mount.log.iter().take_while(move |(when, ..)| *when <= known);
        answered
            .filter(move |(_, order, _)| *order > durable)
            .map(|(_, order, request)| (*order, request.clone()))
    }

    /// What an `fsync` was answered for, and nobody has changed since, is there, whoever comes.
    fn check_synced(&self, crash: &Crash, table: &Table) -> Result<(), String> {
        let last = self.synced.iter().rev().find(|(when, _)| *when <= crash.at);
        for (k, v) in last.iter().flat_map(|(_, then)| then) {
            // An attribute goes with its file, whose last name may be gone where a dead mount's link was lost.
            let inode = key::inode(key::number(k));
            if k[0] == b'X'
                && !table.contains_key(&inode)
                && crash.full.get(&inode) != last.and_then(|l| l.1.get(&inode))
            {
                continue;
            }
            // Nobody who is left has it open.
            let orphan = crash.full.contains_key(&key::orphan(key::number(k)));
            if crash.full.get(k) == Some(v) && !orphan && table.get(k) != Some(v) {
                return Err(format!(
                    "{:?} was durable and is lost",
                    String::from_utf8_lossy(k)
                ));
            }
        }
        Ok(())
    }

    /// No file without its blocks, no block without its file.
    fn check_blocks(&self, crash: &Crash, disks: &Disks, table: &Table) -> Result<(), String> {
        let inodes = inodes(table);
        let mut blocks = BTreeSet::new();
        for store in &disks.nodes.0 {
            blocks.extend(store.table().keys().map(|k| block_of(k)));
        }
        let nobody = crash.come.iter().all(|come| !come);
        for &(ino, block) in &blocks {
            match inodes.get(&ino) {
                // While some mounts live, what a dead one has made and nobody knows of has to wait.
                None if nobody || crash.all_come() => {
                    return Err(format!("block {block} of {ino:#x}, which is gone, is not freed"));
                }
                Some(inode) if nobody && block * BLOCK >= inode.attr.size => {
                    return Err(format!("block {block} of {ino:#x} is beyond its end"));
                }
                _ => {}
            }
        }
        for &(when, ino, block) in self.written.iter().filter(|(when, ..)| *when <= crash.at) {
            let node = node_of(ino, block);
            let stored = |&(s, n): &(usize, usize)| n == node && s > when && s <= crash.at;
            let kept = !crash.lossy[node] || self.stored.iter().any(stored);
            let cut = |&(c, i, first): &(usize, u64, u64)| i == ino && first <= block && c > when;
            let cut = self.cut.iter().any(cut);
            let inside = inodes.get(&ino).is_some_and(|i| block * BLOCK < i.attr.size);
            if kept && !cut && inside && !blocks.contains(&(ino, block)) {
                return Err(format!("block {block} of {ino:#x} is lost"));
            }
        }
        Ok(())
    }

    /// What is given out now is nobody else's.
    fn check_numbers(&self, crash: &Crash, server: &mut Server, table: &Table) -> Result<(), String> {
        let conn = FakeConn::new(99);
        plain(server.ask(&conn, &join(None, 99))).map_err(|e| format!("nobody new can join: {e}"))?;
        let reply = plain(server.ask(&conn, &MetaRequest::ReserveInodes { count: 30 }));
        let Ok((.., MetaReply::Inodes(range))) = reply else {
            return Err(format!("{reply:?}"));
        };
        let inodes = inodes(table);
        for ino in range.inos {
            let used = self.created.iter().any(|&(when, i)| i == ino && when <= crash.at);
            let held = self.given.iter().any(|&(when, m, i)| {
                let gone = self.mounts[m].left.is_some_and(|(from, _)| from < crash.at);
                i == ino && when <= crash.at && crash.come[m] && !gone
            });
            if used || held || inodes.contains_key(&ino) {
                return Err(format!("the number {ino:#x} is given out twice"));
            }
        }
        Ok(())
    }
}

/// A crash, and what follows.
struct Crash {
    at: usize,
    /// What the stores have.
    tables: [Table; STORES],
    /// What the metadata server had.
    full: Table,
    /// The metadata server's host has lost its memory.
    cut: bool,
    /// Storage nodes that lost what they had not synced.
    lossy: [bool; NODES],
    /// The mounts that come back.
    come: Vec<bool>,
    /// The last transaction before the crash, if its answer did not reach its mount.
    unanswered: Option<(usize, MetaRequest)>,
    /// The process dies once more before the mounts have told anything.
    twice: bool,
    flaw: Option<Flaw>,
}

impl Crash {
    fn all_come(&self) -> bool {
        self.come.iter().all(|come| *come)
    }
}

fn difference(now: &Table, then: &Table) -> String {
    let lost = then.iter().find(|(k, v)| now.get(*k) != Some(v));
    let new = now.iter().find(|(k, v)| then.get(*k) != Some(v));
    let show =
        |pair: Option<(&Vec<u8>, &Vec<u8>)>| pair.map(|(k, _)| String::from_utf8_lossy(k).into_owned());
    format!(
        "what was acknowledged is not what is there: {:?} / {:?}",
        show(lost),
        show(new)
    )
}

/// Every name has an inode, every inode its names, every record one use.
fn consistent(table: &Table) -> Result<(), String> {
    let inodes = inodes(table);
    let mut links: BTreeMap<u64, u32> = BTreeMap::new();
    for (parent, name, entry) in names(table) {
        if !inodes.contains_key(&entry.ino) || !inodes.contains_key(&parent) {
            return Err(format!("{:?} names nothing", String::from_utf8_lossy(&name)));
        }
        let directory = entry.kind == Kind::Directory;
        *links.entry(entry.ino).or_default() += if directory { 2 } else { 1 };
        if directory {
            *links.entry(parent).or_default() += 1;
        }
    }
    *links.entry(ino::ROOT).or_default() += 2;
    let mut records: BTreeMap<(u16, u64), u8> = BTreeMap::new();
    let mut used = |shard, index, by: u8| match records.insert((shard, index), by) {
        Some(before) => Err(format!(
            "record {index} of shard {shard} is both {} and {}",
            char::from(before),
            char::from(by)
        )),
        None => Ok(()),
    };
    for (number, inode) in &inodes {
        if links.get(number).copied().unwrap_or(0) != inode.attr.nlink {
            return Err(format!(
                "{number:#x} has {} links, and not as many names",
                inode.attr.nlink
            ));
        }
        if (inode.attr.nlink == 0) != table.contains_key(&key::orphan(*number)) {
            return Err(format!("{number:#x} is an orphan, and is not"));
        }
        used(ino::shard(*number), ino::index(*number), b'I')?;
    }
    for k in table.keys() {
        match k[0] {
            b'F' => used(ino::shard(key::number(k)), ino::index(key::number(k)), b'F')?,
            b'V' => used(ino::shard(key::second(k)), ino::index(key::second(k)), b'V')?,
            b'U' | b'W' => used(key::number(k) as u16, key::second(k), k[0])?,
            _ => {}
        }
    }
    Ok(())
}

/// Lets a cluster work, and looks at what crashes leave; how many states, or what was wrong with one.
fn crashes(seed: u64, steps: usize, flaw: Option<Flaw>) -> Result<usize, String> {
    let mut world = World::new(seed, flaw);
    for _ in 0..steps {
        world.step();
    }
    let mut rng = StdRng::seed_from_u64(seed ^ 0x5eed);
    let mut cuts = Cuts::new(world.disks.journal.events());
    // Mounts are made when the file system is.
    let first = world.mounts[2].born;
    let mut states = 0;
    while let Some(at) = cuts.step() {
        if at < first {
            continue;
        }
        let full = cuts.left(0, Luck::All, &mut rng);
        for lucks in [
            [Luck::None; STORES],
            [Luck::Some; STORES],
            [Luck::None, Luck::All, Luck::All],
            [Luck::Some, Luck::All, Luck::Some],
            [Luck::All, Luck::None, Luck::Some],
        ] {
            let tables = std::array::from_fn(|which| cuts.left(which, lucks[which], &mut rng));
            let all = vec![true; world.mounts.len()];
            let come = match rng.random_range(0..5) {
                0 => vec![false; world.mounts.len()],
                1 => all.iter().map(|_| rng.random()).collect(),
                _ => all,
            };
            let mut last = world.mounts.iter().enumerate().flat_map(|(m, mount)| {
                let answers = mount.log.iter().filter(|(when, ..)| *when == at);
                answers.map(move |(.., request)| (m, request.clone()))
            });
            let delayed = world.mounts.iter().enumerate().find_map(|(m, mount)| {
                let then = mount.delayed.iter().find(|(then, _)| then.contains(&at));
                then.map(|(_, request)| (m, request.clone()))
            });
            let unanswered = delayed.or_else(|| last.next().filter(|_| rng.random()));
            let crash = Crash {
                at,
                tables,
                full: full.clone(),
                cut: lucks[0] != Luck::All,
                lossy: std::array::from_fn(|node| lucks[node + 1] != Luck::All),
                come,
                unanswered,
                twice: rng.random_range(0..4) == 0,
                flaw,
            };
            world.judge(&crash).map_err(|what| {
                format!(
                    "seed {seed}, after {at} events, {lucks:?}, {:?}: {what}",
                    crash.come
                )
            })?;
            states += 1;
        }
    }
    Ok(states)
}

/// How many workloads: more with `FSD_CRASHES`.
fn seeds() -> u64 {
    let told = std::env::var("FSD_CRASHES").ok();
    told.and_then(|n| n.parse().ok()).unwrap_or(40)
}

#[test]
fn a_crash_loses_nothing_that_was_acknowledged() {
    let states: usize = (0..seeds()).map(|seed| crashes(seed, 120, None).unwrap()).sum();
    assert!(states > 10_000, "{states} states");
}

/// Each rule is there for something that the test above finds.
#[test]
fn without_a_rule_a_crash_loses_something() {
    for flaw in [
        Flaw::NumbersEarly,
        Flaw::FreedEarly,
        Flaw::FreedForgotten,
        Flaw::ReplayedAnyhow,
        Flaw::LeftEarly,
        Flaw::WindowForgotten,
        Flaw::EndsNotCut,
    ] {
        let found = (0..40).find_map(|seed| crashes(seed, 120, Some(flaw)).err());
        assert!(found.is_some(), "{flaw:?} makes no difference");
    }
}

/// The power of the metadata server's host goes, and with it all that was not synced. Returns the memory of the next life.
fn lose_power(world: &mut World, flaw: Option<Flaw>) -> tempfile::TempDir {
    let mut cuts = Cuts::new(world.disks.journal.events());
    while cuts.step().is_some() {}
    let left = cuts.left(0, Luck::None, &mut world.rng);
    world.disks = Disks::with([left, Table::new(), Table::new()]);
    let memory = scratch();
    world.server = Server::start(&world.disks, memory.path(), flaw);
    memory
}

/// A mount finds the server that was started again.
fn back(world: &mut World, mount: usize) -> Arc<FakeConn> {
    let mount = &world.mounts[mount];
    let again = join(Some((mount.node, mount.incarnation)), mount.life);
    world.server.ask(&mount.conn, &again).unwrap();
    Arc::clone(&mount.conn)
}

/// A power cut in the middle of what is told does not leave a server that takes itself to have a transaction which it has not: what
/// mounts tell besides, before and after that, takes no place.
#[test]
fn what_is_told_besides_takes_no_place() {
    let mut world = World::new(0, None);
    world.reserve(1);
    let file = new_inode(ino::ROOT, world.mounts[1].numbers[0], Kind::File, "f");
    world.namespace(1, file).unwrap();
    let (_, place, request) = world.mounts[1].log.pop().unwrap();
    let _memory = lose_power(&mut world, None);
    let besides = |request| Logged {
        order: BEHIND_ALL,
        request,
    };
    let attributes = || besides(MetaRequest::Update { updates: Vec::new() });
    let transaction = Logged {
        order: place,
        request,
    };
    for (mount, entries) in [(0, vec![attributes()]), (1, vec![attributes(), transaction])] {
        let conn = back(&mut world, mount);
        world
            .server
            .send(&conn, &MetaRequest::Replay { entries, last: true });
    }
    world.server.bury();
    let mut cuts = Cuts::new(world.disks.journal.events());
    let mut last = 0;
    while cuts.step().is_some() {
        let table = cuts.left(0, Luck::All, &mut world.rng);
        last = table
            .get(&key::executed())
            .map_or(0, |v| decode::<u64>(v).unwrap());
        assert!(
            last < place || table.contains_key(&key::dirent(ino::ROOT, b"f")),
            "place {last}"
        );
    }
    assert_eq!(last, place);
}

/// One mount makes a directory, another a file in it; the power goes, and only the second comes back. Returns the place of
/// the file, which cannot be made again, and that of what the mount does next.
fn next_place(flaw: Option<Flaw>) -> (u64, u64) {
    let mut world = World::new(0, flaw);
    world.reserve(0);
    world.reserve(1);
    let (dir, file) = (world.mounts[0].numbers[0], world.mounts[1].numbers[0]);
    let directory = new_inode(ino::ROOT, dir, Kind::Directory, "d");
    world.namespace(0, directory).unwrap();
    world.namespace(1, new_inode(dir, file, Kind::File, "f")).unwrap();
    let (_, failed, request) = world.mounts[1].log.pop().unwrap();
    let _memory = lose_power(&mut world, flaw);
    let conn = back(&mut world, 1);
    let logged = Logged {
        order: failed,
        request,
    };
    let entries = vec![logged];
    let replay = MetaRequest::Replay { entries, last: true };
    let number = world.server.send(&conn, &replay);
    world.server.bury();
    let told = conn.taken(number).unwrap();
    assert_eq!(told, Ok(MetaReply::Replayed(vec![(failed, Errno(libc::ENOENT))])));
    let next = world.mounts[1].numbers[1];
    world
        .namespace(1, new_inode(ino::ROOT, next, Kind::File, "g"))
        .unwrap();
    (failed, world.mounts[1].log.pop().unwrap().1)
}

/// A mount keeps what could not be carried out until something behind it is durable; nobody else may get its place.
#[test]
fn no_place_is_given_twice() {
    let (failed, next) = next_place(None);
    assert!(next > failed);
    let (failed, next) = next_place(Some(Flaw::PlacesAgain));
    assert!(next <= failed, "the rule makes no difference");
}
