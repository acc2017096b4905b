//! `fsd check`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use fsd_node::config::{Config, Size};
use fsd_storage::check::examine;

/// Arguments of `fsd check`.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Configuration file.
    #[arg(long, default_value = "cluster.toml", env = "FSD_CONFIG")]
    pub config: PathBuf,
    /// Only this storage node; else those whose directories are on this host.
    #[arg(long)]
    pub storage: Option<u16>,
}

/// Examines the stores of storage nodes. Exit status 1 where something is wrong.
///
/// # Errors
/// A node is running, or its directory cannot be read at all.
pub fn run(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let config = Config::load(&args.config)?;
    let (mut examined, mut wrong) = (0, 0);
    for section in &config.storage {
        if args.storage.is_some_and(|id| id != section.id)
            || (args.storage.is_none() && !section.dir.exists())
        {
            continue;
        }
        let (label, found) = examine(&section.dir).with_context(|| {
            format!(
                "storage node {} cannot be examined (it must not be running)",
                section.id
            )
        })?;
        examined += 1;
        wrong += found.problems.len();
        for problem in &found.problems {
            println!("storage node {}: {problem}", section.id);
        }
        println!(
            "storage node {}: store {}, pool {}: {} blocks ({} bytes) on disk, {} not stored yet, {} problems",
            section.id,
            label.uuid,
            Size(label.pool),
            found.stored,
            found.bytes,
            found.unstored,
            found.problems.len()
        );
    }
    anyhow::ensure!(
        examined > 0,
        "no storage node's directory is on this host, or the configuration has no such node"
    );
    Ok(if wrong == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
