//! A metadata store: how it is made, and what a server reads of it when it starts.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Instant;

use super::locks::LockTable;
use super::records::{LAYOUT, Member, Superblock, Txn, decode, encode, key, new_root};
use super::server::State;
use super::sessions::{Session, Sessions};
use super::{MetaError, Refusal};
use crate::config::Config;
use crate::ino;
use crate::store::{FjallStore, Store};
use crate::wire::Time;

pub(super) fn load<T>(result: Result<T, Refusal>) -> Result<T, MetaError> {
    result.map_err(|refusal| match refusal {
        Refusal::Store(error) => MetaError::Store(error),
        Refusal::Errno(e) => MetaError::Io {
            what: "the metadata store is damaged".into(),
            error: std::io::Error::from_raw_os_error(e.0),
        },
    })
}

/// Makes a metadata store with an empty root directory.
///
/// # Errors
/// It is formatted already, or the disk refuses.
pub fn format(config: &Config, uuid: &str) -> Result<(), MetaError> {
    let dir = &config.meta.dir;
    // Its owner's alone, whatever the umask.
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::create_dir_all(dir)
        .and_then(|()| std::fs::set_permissions(dir, private))
        .map_err(|error| MetaError::Io {
            what: format!("cannot make {}", dir.display()),
            error,
        })?;
    let store = FjallStore::open(dir)?;
    if store.get(&key::superblock())?.is_some() {
        return Err(MetaError::Format {
            path: dir.clone(),
            detail: "is formatted already: remove it first if its contents are not wanted".into(),
        });
    }
    make(&store, config, uuid)
}

/// Writes what every store begins with.
pub(super) fn make(store: &dyn Store, config: &Config, uuid: &str) -> Result<(), MetaError> {
    let superblock = Superblock {
        layout: LAYOUT,
        cluster: config.cluster.clone(),
        uuid: uuid.to_owned(),
        record_bytes: config.lease.record_bytes,
        shards: config.storage.len() as u16,
        era: 0,
        tables: Vec::new(),
    };
    let mut txn = Txn::new(store);
    txn.put(key::superblock(), encode(&superblock));
    txn.set_inode(&new_root(
        Time::now(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    ));
    txn.commit()?;
    Ok(store.sync()?)
}

pub(super) fn read_superblock(
    store: &dyn Store,
    config: &Config,
    dir: &Path,
) -> Result<Superblock, MetaError> {
    let format = |detail: String| MetaError::Format {
        path: dir.to_owned(),
        detail,
    };
    let bytes = store
        .get(&key::superblock())?
        .ok_or_else(|| format("is not a formatted metadata directory: run fsd format first".into()))?;
    let superblock: Superblock = load(decode(&bytes))?;
    if superblock.layout != LAYOUT {
        return Err(format(format!(
            "has layout version {}, this build reads {LAYOUT}: use the release that made it",
            superblock.layout
        )));
    }
    if superblock.cluster != config.cluster {
        return Err(format(format!(
            "belongs to cluster '{}', not '{}'",
            superblock.cluster, config.cluster
        )));
    }
    if usize::from(superblock.shards) != config.storage.len() {
        return Err(format(format!(
            "was formatted for {} storage nodes, the configuration has {}",
            superblock.shards,
            config.storage.len()
        )));
    }
    if superblock.record_bytes != config.lease.record_bytes {
        return Err(format(format!(
            "was formatted with lease.record_bytes = {}, the configuration says {}",
            superblock.record_bytes, config.lease.record_bytes
        )));
    }
    Ok(superblock)
}

fn count(store: &dyn Store, tag: u8) -> Result<u64, MetaError> {
    let (mut from, mut n) = (vec![tag], 0);
    loop {
        let pairs = store.scan(&from, &[tag + 1], 4096)?;
        let Some((last, _)) = pairs.last() else {
            return Ok(n);
        };
        from.clone_from(last);
        from.push(0);
        n += pairs.len() as u64;
    }
}

pub(super) fn load_state(store: &dyn Store, superblock: &Superblock) -> Result<State, MetaError> {
    let mut sessions = Sessions::default();
    for (k, v) in store.scan(b"C", b"D", usize::MAX)? {
        let node = key::number(&k) as u16;
        let member: Member = load(decode(&v))?;
        if member.life == 0 {
            sessions.incarnations.insert(node, member.incarnation);
        } else {
            // It may still run and come back; until then it counts as lost.
            let lost = Some(Instant::now());
            sessions.nodes.insert(
                node,
                Session {
                    member,
                    conn: None,
                    lost,
                    dead: false,
                },
            );
        }
    }
    let mut answers: HashMap<u16, BTreeMap<u64, Vec<u8>>> = HashMap::new();
    for (k, v) in store.scan(b"L", b"M", usize::MAX)? {
        answers
            .entry(key::number(&k) as u16)
            .or_default()
            .insert(key::second(&k), v);
    }
    let mut next_index = Vec::new();
    for shard in 0..superblock.shards {
        let stored = store.get(&key::next_index(shard))?;
        let first = if shard == 0 { ino::ROOT + 1 } else { 1 };
        next_index.push(
            stored
                .map(|v| load(decode::<u64>(&v)))
                .transpose()?
                .unwrap_or(first),
        );
    }
    Ok(State {
        sessions,
        locks: LockTable::default(),
        lock_waiters: HashMap::new(),
        next_ticket: 0,
        answers,
        next_index,
        next_shard: 0,
        inodes: count(store, b'I')?,
        orphans: count(store, b'O')?,
        early_reaps: Vec::new(),
        tables: superblock.tables.clone(),
        window: None,
    })
}
