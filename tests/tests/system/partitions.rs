//! Links between any two processes of a cluster are cut, also in one direction only: what can go on does, what cannot waits, and after
//! that all is as before. Cases 6, 7, 12 and 27 of `docs/failures.md`.
//!
//! Limits are for the time in which this machine is not busy with something else ([`system_tests::quiet`]).
//!
//! The test itself has no file of a mount open while it starts other programs: closing it in the child waits for a mount that is cut off.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use system_tests::asking::Asking;
use system_tests::cluster::{Cache, Cluster, Fabric, Options, Role, nodes};
use system_tests::guard;
use system_tests::quiet::Stopwatch;

const MOUNTS: usize = 3;
const SHARDS: usize = 2;
const TERM: Duration = Duration::from_secs(2);
/// Who is cut off from the metadata server is dead then.
const DEAD: Duration = Duration::from_millis(2000 + 400 + 1000);
/// Longest time of a call that has nothing to do with what is cut, or has another way.
const SOON: Duration = Duration::from_secs(2);
/// Longest time of all that is done in one cluster.
const LIMIT: Duration = Duration::from_secs(60);
/// Longest time after which all is as before.
const BACK: Duration = Duration::from_secs(10);

/// What of a link is cut.
#[derive(Debug, Clone, Copy)]
enum Ways {
    Both,
    There,
    Back,
}

const ALL_WAYS: [Ways; 3] = [Ways::Both, Ways::There, Ways::Back];

/// A link that is cut; mended when dropped at the latest.
struct Cut<'a>(&'a Cluster, Vec<(Role, Role)>);

impl<'a> Cut<'a> {
    fn new(cluster: &'a Cluster, (a, b): (Role, Role), ways: Ways) -> anyhow::Result<Self> {
        let mut cut = Self(cluster, Vec::new());
        let both = [(a, b), (b, a)];
        let which = match ways {
            Ways::Both => &both[..],
            Ways::There => &both[..1],
            Ways::Back => &both[1..],
        };
        for &(from, to) in which {
            cluster.cut_way(from, to)?;
            cut.1.push((from, to));
        }
        Ok(cut)
    }

    fn mend(mut self) -> anyhow::Result<()> {
        let all = std::mem::take(&mut self.1);
        all.into_iter()
            .try_for_each(|(from, to)| self.0.mend_way(from, to))
    }
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        for (from, to) in &self.1 {
            // The test has failed already.
            let _ = self.0.mend_way(*from, *to);
        }
    }
}

/// A call that must not take longer than this.
fn within<T>(limit: Duration, what: &str, call: impl FnOnce() -> std::io::Result<T>) -> anyhow::Result<T> {
    let watch = Stopwatch::start();
    let result = call().with_context(|| what.to_owned())?;
    watch.within(limit, what)?;
    Ok(result)
}

/// Makes a file; the storage node that has its lease and its first block.
fn make(path: &Path) -> anyhow::Result<usize> {
    fs::write(path, "first")?;
    // Numbers of inodes: [generation:19 | shard:8 | index:36].
    Ok(usize::try_from(fs::metadata(path)?.ino() >> 36 & 0xff)?)
}

/// A cluster, and files that it is tried with.
struct Field<'a> {
    cluster: &'a Cluster,
    /// By mount that writes it, and storage node that has its lease and its data.
    files: BTreeMap<(usize, usize), PathBuf>,
    turn: u32,
}

impl<'a> Field<'a> {
    fn new(cluster: &'a Cluster) -> anyhow::Result<Self> {
        let mut files = BTreeMap::new();
        for mount in 0..MOUNTS {
            for n in 0.. {
                ensure!(n < 1000, "no file has its lease on one of the storage nodes");
                if (0..SHARDS).all(|shard| files.contains_key(&(mount, shard))) {
                    break;
                }
                let name = PathBuf::from(format!("f{mount}.{n}"));
                let shard = make(&cluster.mount(mount).join(&name))?;
                files.entry((mount, shard)).or_insert(name);
            }
        }
        let mut field = Self {
            cluster,
            files,
            turn: 0,
        };
        for mount in 0..MOUNTS {
            let name = field.fresh(mount, 0)?;
            let root = cluster.mount(mount);
            fs::rename(root.join(name), root.join(format!("known{mount}")))?;
        }
        Ok(field)
    }

    /// A file that no other mount has used.
    fn fresh(&mut self, mount: usize, shard: usize) -> anyhow::Result<PathBuf> {
        loop {
            self.turn += 1;
            let name = PathBuf::from(format!("fresh{}", self.turn));
            if make(&self.cluster.mount(mount).join(&name))? == shard {
                return Ok(name);
            }
        }
    }

    fn path(&self, at: usize, of: usize, shard: usize) -> PathBuf {
        self.cluster.mount(at).join(&self.files[&(of, shard)])
    }

    fn text(&mut self) -> String {
        self.turn += 1;
        format!("turn {}", self.turn)
    }

    /// As [`Field::exchange_by`], of one of the files, and fsyncs it.
    fn exchange(&mut self, from: usize, to: &[usize], shard: usize, limit: Duration) -> anyhow::Result<()> {
        let name = self.files[&(from, shard)].clone();
        self.exchange_by(from, to, &name, limit)?;
        let path = self.path(from, from, shard);
        within(limit, "fsync", || fs::File::open(&path)?.sync_all())
    }

    /// One mount writes and renames (in the root directory, a file whose lease is where that directory's is), and others see it, each call within the time.
    fn exchange_by(&mut self, from: usize, to: &[usize], name: &Path, limit: Duration) -> anyhow::Result<()> {
        let text = self.text();
        let what = |who: usize, does: &str| format!("mount {who} {does} {}, {text}", name.display());
        let path = self.cluster.mount(from).join(name);
        within(limit, &what(from, "writes"), || fs::write(&path, &text))?;
        for &at in to {
            let path = self.cluster.mount(at).join(name);
            let seen = within(limit, &what(at, "reads"), || fs::read_to_string(&path))?;
            ensure!(
                seen == text,
                "mount {at} reads {seen:?}, and {text:?} was written"
            );
        }
        let (old, new) = (format!("known{from}"), format!("known{from}, {text}"));
        let root = |at: usize| self.cluster.mount(at);
        within(limit, &what(from, "renames beside"), || {
            fs::rename(root(from).join(&old), root(from).join(&new))
        })?;
        for &at in to {
            let there = within(limit, &what(at, "looks beside"), || {
                root(at).join(&new).try_exists()
            })?;
            ensure!(there, "mount {at} does not see {new}");
        }
        within(limit, &what(from, "renames back"), || {
            fs::rename(root(from).join(&new), root(from).join(&old))
        })
    }

    /// All mounts see what each writes, and the cluster is healthy.
    fn all_well(&mut self) -> anyhow::Result<()> {
        let watch = Stopwatch::start();
        for (from, shard) in (0..MOUNTS).flat_map(|m| (0..SHARDS).map(move |s| (m, s))) {
            let to: Vec<usize> = (0..MOUNTS).filter(|to| *to != from).collect();
            self.exchange(from, &to, shard, BACK)?;
        }
        let mut problems = serde_json::Value::Null;
        let healthy = watch.until("a healthy cluster", BACK, || {
            problems = self.cluster.status()?["problems"].clone();
            Ok(problems.as_array().is_some_and(Vec::is_empty))
        });
        healthy.with_context(|| problems.to_string())?;
        println!("  as before after {:?}", watch.all());
        Ok(())
    }

    /// A link that mounts can do without: all goes on.
    fn without(&mut self, link: (Role, Role), ways: Ways) -> anyhow::Result<()> {
        let cut = Cut::new(self.cluster, link, ways)?;
        for turn in 0..2 {
            for (from, shard) in (0..MOUNTS).flat_map(|m| (0..SHARDS).map(move |s| (m, s))) {
                let to: Vec<usize> = (0..MOUNTS).filter(|to| *to != from).collect();
                self.exchange(from, &to, shard, SOON)
                    .with_context(|| format!("round {turn}"))?;
            }
        }
        cut.mend()
    }

    /// The link between a mount and a storage node: what needs it waits, and is not lost, and nothing else does.
    fn without_storage(&mut self, mount: usize, shard: usize, ways: Ways) -> anyhow::Result<()> {
        let (other, third) = ((mount + 1) % MOUNTS, (mount + 2) % MOUNTS);
        // Of which the mount has no lease: what it has leased there waits with it.
        let fresh = [self.fresh(other, shard)?, self.fresh(third, shard)?];
        let mine = self.cluster.mount(mount).join(self.fresh(mount, shard)?);
        // Acknowledged, and not stored yet: it would be after two seconds.
        let text = self.text();
        fs::write(self.path(mount, mount, shard), &text)?;
        let cut = Cut::new(self.cluster, (Role::Mount(mount), Role::Storage(shard)), ways)?;
        let mut own = Asking::shell("echo more >\"$0\" && sync \"$0\" && cat \"$0\"", &mine)?;
        let mut others = Asking::shell("cat \"$0\"", &self.path(other, mount, shard))?;
        let watch = Stopwatch::start();
        while watch.all() < TERM * 2 {
            self.exchange_by(other, &[third], &fresh[0], SOON)?;
            self.exchange_by(third, &[other], &fresh[1], SOON)?;
            self.exchange(mount, &[other, third], 1 - shard, SOON)?;
            self.exchange(other, &[mount, third], 1 - shard, SOON)?;
        }
        let (own_waits, others_wait) = (own.waits()?, others.waits()?);
        ensure!(
            own_waits && others_wait,
            "what needs the link does not wait: {own_waits} on the mount, {others_wait} on another"
        );
        let known = nodes(&self.cluster.status()?)?;
        ensure!(known.len() == MOUNTS, "a mount was declared dead: {known:?}");
        cut.mend()?;
        ensure!(
            own.answer(BACK)?.as_deref() == Some("more"),
            "what waited on the mount has failed"
        );
        let seen = others.answer(BACK)?;
        ensure!(
            seen.as_ref() == Some(&text),
            "{text:?} was acknowledged, another mount reads {seen:?}"
        );
        Ok(())
    }

    /// The link between a mount and the metadata server: it is dead in time, others have what it had, and it comes back.
    fn without_meta(&mut self, mount: usize, ways: Ways, evict: bool) -> anyhow::Result<()> {
        let (other, third) = ((mount + 1) % MOUNTS, (mount + 2) % MOUNTS);
        let mine = self.path(mount, mount, 0);
        let text = self.text();
        fs::write(&mine, &text)?;
        fs::File::open(&mine)?.sync_all()?;
        // It holds a file lock, and data that are not stored, until it is told to write once more.
        let script = "exec 9<>\"$0\" && flock 9 && echo locked && read go && { printf late >&9 && sync \"$0\" && echo written || echo failed; }";
        let mut holder = Asking::shell(script, &self.path(mount, mount, 1))?;
        ensure!(holder.says()? == "locked", "the file cannot be locked");
        let number = number(self.cluster, mount)?;
        let cut = Cut::new(self.cluster, (Role::Mount(mount), Role::Meta), ways)?;
        let watch = Stopwatch::start();
        let locking = "exec 9<>\"$0\" && flock 9 && echo locked";
        let lock = Asking::shell(locking, &self.path(other, mount, 1))?;
        let change = Asking::shell("echo theirs >\"$0\" && cat \"$0\"", &self.path(other, mount, 0))?;
        if evict {
            let config = self.cluster.config().display().to_string();
            self.cluster
                .tool(&["evict", &number.to_string(), "--config", &config])?;
            cut.mend()?;
            ensure!(
                lock.answer(DEAD)?.as_deref() == Some("locked"),
                "the lock is not free"
            );
            ensure!(
                change.answer(DEAD)?.as_deref() == Some("theirs"),
                "another cannot write"
            );
        } else {
            self.exchange(other, &[third], 0, DEAD)?;
            self.exchange(third, &[other], 1, SOON)?;
            let locked = lock.answer_by(&watch, DEAD).context("the lock of the dead")?;
            let changed = change.answer_by(&watch, DEAD).context("the file of the dead")?;
            ensure!(
                locked.as_deref() == Some("locked") && changed.as_deref() == Some("theirs"),
                "another got {locked:?} and {changed:?}"
            );
            println!("  what it had is free after {:?}", watch.all());
            // Nothing of it shows, and nothing of it lands, while it is cut off.
            let mut stale = Asking::shell("cat \"$0\"", &mine)?;
            std::thread::sleep(TERM / 2);
            if !stale.waits()? {
                let seen = stale.says()?;
                ensure!(seen.is_empty() || seen == "theirs", "a dead mount shows {seen:?}");
            }
            drop(stale);
            cut.mend()?;
        }
        let healed = Stopwatch::start();
        holder.tell("go")?;
        let end = holder.answer(BACK)?;
        ensure!(
            end.as_deref() != Some("written"),
            "a write under a lock that was lost has been acknowledged"
        );
        // In its next life it sees what others have done.
        healed.until("the mount to come back", BACK, || {
            let seen = Asking::shell("cat \"$0\"", &mine)?.answer(BACK)?;
            let seen = seen.unwrap_or_default();
            ensure!(seen != text, "it shows what was there before its death");
            Ok(seen == "theirs")
        })?;
        println!("  it is back after {:?}", healed.all());
        Ok(())
    }
}

/// The number of a mount.
fn number(cluster: &Cluster, mount: usize) -> anyhow::Result<u64> {
    let point = cluster.mount(mount).display().to_string();
    let all = nodes(&cluster.status()?)?;
    let mut ours = all
        .iter()
        .filter(|n| n["name"].as_str().is_some_and(|name| name.ends_with(&point)));
    ours.next()
        .and_then(|n| n["node"].as_u64())
        .context("the status does not know the mount")
}

fn options(cache: Cache) -> Options {
    Options {
        fabric: Fabric::Tcp,
        cache,
        mounts: MOUNTS,
        storage: SHARDS,
        term: TERM,
        // Shorter than links are cut: what has waited in vain for an answer is asked again.
        timeout: TERM,
        apart: true,
        ..Options::default()
    }
}

/// All pairs in all directions, in both modes: `FSD_PARTITIONS=all`; else one pair of each kind.
fn every_pair() -> bool {
    std::env::var("FSD_PARTITIONS").is_ok_and(|v| v == "all")
}

/// Cuts links one after the other in a cluster, and looks after each whether all is as before.
fn cut_all(
    links: impl Fn() -> Vec<(Role, Role)> + Clone + Send + 'static,
    then: impl Fn(&mut Field<'_>, (Role, Role), Ways) -> anyhow::Result<()> + Clone + Send + 'static,
) -> anyhow::Result<()> {
    let (caches, pairs) = if every_pair() {
        (&[Cache::Direct, Cache::Writethrough][..], usize::MAX)
    } else {
        (&[Cache::Writethrough][..], 1)
    };
    for &cache in caches {
        let (links, then) = (links.clone(), then.clone());
        guard::with_cluster_within(LIMIT * pairs.min(6) as u32, options(cache), move |cluster| {
            let mut field = Field::new(cluster)?;
            field.all_well().context("at first")?;
            for link in links().into_iter().take(pairs) {
                for ways in ALL_WAYS {
                    println!("{cache:?}: {link:?} {ways:?}");
                    then(&mut field, link, ways)
                        .and_then(|()| field.all_well())
                        .with_context(|| format!("{link:?} {ways:?}"))?;
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn mounts_that_are_cut_off_from_each_other() -> anyhow::Result<()> {
    let links = || {
        [(0, 1), (1, 2), (2, 0)]
            .map(|(a, b)| (Role::Mount(a), Role::Mount(b)))
            .to_vec()
    };
    cut_all(links, |field, link, ways| field.without(link, ways))
}

#[test]
fn servers_that_are_cut_off_from_each_other() -> anyhow::Result<()> {
    let links = || {
        let storage = (Role::Storage(0), Role::Storage(1));
        vec![
            (Role::Storage(1), Role::Meta),
            (Role::Storage(0), Role::Meta),
            storage,
        ]
    };
    cut_all(links, |field, link, ways| field.without(link, ways))
}

#[test]
fn mounts_that_are_cut_off_from_a_storage_node() -> anyhow::Result<()> {
    let links = || {
        let each = |m| (0..SHARDS).map(move |s| (Role::Mount(m), Role::Storage(s)));
        let mut all: Vec<_> = (0..MOUNTS).flat_map(each).collect();
        // The first has the root directory: nothing goes on for a mount that is cut off from it.
        all.retain(|(_, storage)| *storage != Role::Storage(0));
        all
    };
    cut_all(links, |field, link, ways| match link {
        (Role::Mount(mount), Role::Storage(shard)) => field.without_storage(mount, shard, ways),
        _ => anyhow::bail!("no such link"),
    })
}

#[test]
fn mounts_that_are_cut_off_from_the_metadata_server() -> anyhow::Result<()> {
    let links = || (0..MOUNTS).map(|m| (Role::Mount(m), Role::Meta)).collect();
    cut_all(links, |field, link, ways| {
        let Role::Mount(mount) = link.0 else {
            anyhow::bail!("no such link");
        };
        field.without_meta(mount, ways, false)?;
        field.all_well()?;
        // Eviction beside a reconnection.
        field.without_meta(mount, ways, true).context("evicted")
    })
}

/// A mount waits for a storage node that it is cut off from, which is to hear that files without a name are closed; then another mount dies. It
/// looks whether that one had such files open last, and lives on.
#[test]
fn a_mount_that_waits_for_a_storage_node_outlives_another() -> anyhow::Result<()> {
    const HELD: usize = 4;
    let options = Options {
        timeout: Duration::from_secs(10),
        ..options(Cache::Direct)
    };
    guard::with_cluster_within(LIMIT, options, |cluster| {
        let mut field = Field::new(cluster)?;
        let root = |at: usize| cluster.mount(at);
        for n in 0..HELD {
            let name = field.fresh(0, 1)?;
            fs::rename(root(0).join(name), root(0).join(format!("held{n}")))?;
            // So that its lease record says who has it open.
            fs::read(root(1).join(format!("held{n}")))?;
        }
        let script = "exec 3<\"$0\"/held0 4<\"$0\"/held1 5<\"$0\"/held2 6<\"$0\"/held3; echo held; read go";
        let mut holder = Asking::shell(script, &root(0))?;
        ensure!(holder.says()? == "held", "the files cannot be opened");
        (0..HELD).try_for_each(|n| fs::remove_file(root(0).join(format!("held{n}"))))?;
        let before = number(cluster, 0)?;
        let cut = Cut::new(cluster, (Role::Mount(0), Role::Storage(1)), Ways::Both)?;
        holder.tell("go")?;
        holder.answer(SOON)?;
        // The kernel tells of the last close when the program is gone.
        std::thread::sleep(SOON / 4);
        cluster.kill(Role::Mount(2));
        let watch = Stopwatch::start();
        while watch.all() < TERM * 3 {
            field.exchange(0, &[1], 0, SOON)?;
            field.exchange(1, &[0], 0, SOON)?;
        }
        let now = number(cluster, 0)?;
        ensure!(
            now == before,
            "mount {before} was declared dead, and is {now} now"
        );
        cut.mend()?;
        cluster.start_role(Role::Mount(2))?;
        field.all_well()
    })
}
