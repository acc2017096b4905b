//! What ordinary programs look at, and do, on two mounts.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use system_tests::cluster::{Cache, Cluster, Options};
use system_tests::guard;
use system_tests::process::fsd_binary;

fn check(job: fn(&Cluster, &Path, &Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    for cache in [Cache::Writethrough, Cache::Direct] {
        let options = Options {
            cache,
            storage: 1,
            ..Options::default()
        };
        guard::with_cluster(options, move |cluster| {
            job(cluster, &cluster.mount(0), &cluster.mount(1)).with_context(|| format!("{cache:?}"))
        })?;
    }
    Ok(())
}

/// Programs that archive holes as holes (`tar -S`, `rsync -S`) believe a file that takes no storage to be all hole.
#[test]
fn data_takes_storage_from_the_first_moment() -> anyhow::Result<()> {
    check(|_, a, b| {
        for kib in [1, 4, 30, 200, 600] {
            for (writer, reader) in [(a, a), (a, b), (b, a), (b, b)] {
                let (len, name) = (kib * 1024, format!("f{kib}"));
                let file = File::create(writer.join(&name))?;
                file.write_all_at(&vec![b'x'; len as usize], 0)?;
                for open in [true, false] {
                    let taken = reader.join(&name).metadata()?.blocks() * 512;
                    ensure!(taken >= len, "{len} bytes take {taken}, open: {open}");
                    if open {
                        fs::write(writer.join("other"), b"x")?;
                    }
                }
                drop(file);
                let before = reader.join(&name).metadata()?.blocks();
                File::open(reader.join(&name))?.sync_all()?;
                let after = reader.join(&name).metadata()?.blocks();
                ensure!(before == after, "{len}: {before} blocks, stored {after}");
                fs::remove_file(reader.join(&name))?;
            }
        }
        Ok(())
    })
}

/// Everyday work on two mounts, as far as the programs are there.
const WORK: &str = r#"
set -e
a=$FSD_DIR/0 b=$FSD_DIR/1
export HOME=$a GIT_CONFIG_NOSYSTEM=1
if command -v git > /dev/null; then
    git init -q $a/repo; cd $a/repo; git config user.email a@b; git config user.name n
    for i in 1 2 3; do echo $i > f$i; done
    git add .; git commit -qm one; git checkout -q -b other; echo x >> f1; git commit -qam two; git gc -q
    cd $b/repo; git status --short; git clone -q . $b/clone; git fsck > /dev/null 2>&1
fi
if command -v cc > /dev/null; then
    echo 'int main(void) { return 0; }' > $a/m.c; cc -g -o $b/m $a/m.c; $b/m; $a/m
fi
mkdir -p $a/repo $a/out; echo 1 > $a/repo/one
tar -C $a -cf $b/all.tar repo; tar -C $a/out -xf $a/all.tar
python3 - $a <<'P'
import select, sqlite3, sys
name = sys.argv[1] + "/text"
open(name, "w").write("x" * 100)
assert len(open(name).read()) == 100
db = sqlite3.connect(sys.argv[1] + "/db")
db.execute("create table t(a)"); db.execute("insert into t values(1)"); db.commit()
poll = select.poll(); poll.register(open(name), select.POLLIN); poll.poll(0)
P
( timeout -s KILL 0.2 flock $b/all.tar sleep 1 & flock $a/all.tar sleep 0.5; wait ) > /dev/null 2>&1 || true
df $a > /dev/null; ls -laR $a > /dev/null; rm -rf $b/out
"#;

/// Nobody says anything where nothing is wrong, but the command itself.
#[test]
fn ordinary_programs_run_without_a_word() -> anyhow::Result<()> {
    for cache in ["writethrough", "direct"] {
        let run = |more: &[&str]| {
            std::process::Command::new("timeout")
                .arg("60")
                .arg(system_tests::process::fsd_binary()?)
                .args(["dev", "--cache", cache, "--storage", "1", "--pool", "128MiB"])
                .args(more)
                .output()
                .context("fsd dev")
        };
        let out = run(&["--", "sh", "-c", WORK])?;
        let told = format!(
            "{}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
        ensure!(
            out.status.success() && told.is_empty(),
            "{cache}: {}\n{told}",
            out.status
        );
        // Asked for it, they do speak, without colours where no terminal is.
        let out = run(&["--verbose", "--", "true"])?;
        let told = String::from_utf8_lossy(&out.stderr);
        ensure!(
            told.contains("mounts over shm") && told.contains(" INFO "),
            "{told}"
        );
        ensure!(!told.contains('\u{1b}'), "colours: {told}");
    }
    Ok(())
}

/// The benchmark of names at its smallest: it looks at sizes and contents itself, of what other mounts have made, too.
#[test]
fn names_are_measured() -> anyhow::Result<()> {
    let fsd = fsd_binary()?;
    let bench = fsd.with_file_name("bench");
    ensure!(
        bench.is_file(),
        "no {}: cargo build --release --workspace",
        bench.display()
    );
    let dir = tempfile::Builder::new().prefix("dfst-").tempdir_in("/tmp")?;
    let out = Command::new("timeout")
        .arg("80")
        .arg(&bench)
        .arg("--out")
        .arg(dir.path())
        .args([
            "names", "--files", "5", "--rounds", "1", "--mounts", "1,2", "--disk",
        ])
        .arg(dir.path())
        .env("FSD_BIN", &fsd)
        .output()?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "bench names: {} {said}", out.status);
    for (mounts, rows) in [(1, 14), (2, 18)] {
        let stem = dir.path().join(format!("names-shm-{mounts}"));
        let table = fs::read_to_string(stem.with_extension("csv"))?;
        ensure!(table.lines().count() == 1 + rows, "{table}");
        ensure!(stem.with_extension("svg").is_file(), "no plot of {mounts} mounts");
    }
    Ok(())
}
