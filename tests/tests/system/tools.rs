//! What ordinary programs look at, and do, on two mounts.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, ensure};
use system_tests::cluster::{Cache, Cluster, Options};
use system_tests::guard;

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
