//! What `make demo` shows: a real tree, a real build, coherence, and a table, on a cluster of three mounts.

mod build;
mod coherence;
mod tree;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail};

use crate::fs::micro;
use crate::procs::{self, Cluster, ClusterSpec};
use crate::progress::check;
use crate::stats::sig;
use crate::table::Table;

/// Arguments of `bench demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Results go here.
    #[arg(long, default_value = "target/demo")]
    to: PathBuf,
    /// Copy at most this many files.
    #[arg(long, default_value_t = 3000)]
    files: usize,
    /// Copy at most this many MiB.
    #[arg(long, default_value_t = 64)]
    mib: u64,
    /// Fabric.
    #[arg(long, default_value = "shm")]
    fabric: String,
}

struct Demo {
    cluster: Cluster,
    steps: Table,
    started: Instant,
}

impl Demo {
    fn done(&mut self, step: &str, result: String) {
        println!(
            "[{:5.1} s] {step}: {result}",
            self.started.elapsed().as_secs_f64()
        );
        self.steps.row(vec![step.into(), result]);
    }
}

fn show(demo: &mut Demo, args: &Args, fsd: &Path) -> anyhow::Result<()> {
    let mounts: Vec<PathBuf> = (0..3).map(|n| demo.cluster.mount(n)).collect();
    let list = tree::collect(args.files, args.mib << 20)?;
    let (count, bytes) = (list.files.len(), list.bytes);
    let mib = bytes as f64 / f64::from(1 << 20);

    let t = Instant::now();
    let sums = tree::copy(&list, &mounts[0].join("tree"))?;
    let s = t.elapsed().as_secs_f64();
    let text = format!(
        "{count} files, {mib:.0} MiB in {s:.1} s: {} files/s, {} MiB/s",
        sig(count as f64 / s),
        sig(mib / s)
    );
    demo.done("copy a tree through mount 0", text);
    for (n, mount) in mounts.iter().enumerate().skip(1) {
        let t = Instant::now();
        let read = tree::verify(&list, &sums, &mount.join("tree"), n)?;
        let s = t.elapsed().as_secs_f64();
        let text = format!(
            "{read} of {count} checksums equal in {s:.1} s: {} MiB/s",
            sig(mib / s)
        );
        demo.done(&format!("verify it through mount {n}"), text);
    }
    for build in [build::c_program, build::rust_program] {
        let out = build(&mounts)?;
        demo.done(&out.what, out.result);
    }
    let outcome = coherence::run(&mounts, 2_000)?;
    let wrong: u64 = outcome.iter().map(|c| c.wrong).sum();
    for check in &outcome {
        demo.done(
            &format!("coherence: {}", check.what),
            format!(
                "{} checks, {} wrong, {} a second",
                check.checks,
                check.wrong,
                sig(check.per_second)
            ),
        );
    }
    if wrong > 0 {
        bail!("{wrong} coherence checks failed");
    }
    if let Some(suite) = coherence::suite(fsd) {
        let status = std::process::Command::new(&suite)
            .args(&mounts[..2])
            .args(["--rounds", "20"])
            .status()
            .with_context(|| format!("cannot run {}", suite.display()))?;
        demo.done("coherence program of the test suite", status.to_string());
        anyhow::ensure!(status.success(), "the coherence program failed");
    }
    Ok(())
}

/// Runs `bench demo`.
///
/// # Errors
/// Something does not start, does not work, or is not coherent.
pub fn run(args: &Args) -> anyhow::Result<()> {
    std::fs::create_dir_all(&args.to).with_context(|| format!("cannot make {}", args.to.display()))?;
    let fsd = procs::fsd_binary()?;
    let started = Instant::now();
    let spec = ClusterSpec {
        mounts: 3,
        cache: "auto".into(),
        cache_shared: false,
        fabric: args.fabric.clone(),
        pool_mib: 768,
    };
    let cluster = Cluster::start(&fsd, &spec)?;
    let mut demo = Demo {
        cluster,
        steps: Table::new("Demo", &["step", "result"]),
        started,
    };
    let text = format!(
        "three mounts, two storage nodes, one metadata server over {}",
        args.fabric
    );
    demo.done("start a cluster", text);
    let shown = show(&mut demo, args, &fsd);
    if shown.is_err() {
        eprint!("{}", demo.cluster.log());
    }
    let Demo {
        cluster, mut steps, ..
    } = demo;
    drop(cluster);
    shown?;
    steps.row(vec!["end".into(), "all processes and mounts are gone".into()]);
    check()?;
    steps.write_csv(&args.to.join("steps.csv"))?;
    let table = micro::run("all CPUs", &args.fabric, micro::Scale::quick(), &args.to)?;
    println!("{table}");
    println!(
        "wt: writethrough, the mode of a stock kernel; null: a FUSE server that only keeps memory; done in {:.0} s.\n\
         CSV and plots: {}",
        started.elapsed().as_secs_f64(),
        args.to.display()
    );
    Ok(())
}
