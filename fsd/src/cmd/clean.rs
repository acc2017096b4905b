//! `fsd clean`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;

use super::leftovers::{self, Verdict};
use super::status::mib;
use fsd_node::config::Config;
use fsd_node::memory;

/// Arguments of `fsd clean`.
#[derive(Debug, clap::Args)]
pub struct CleanArgs {
    /// Look into this memory file system (default: /dev/shm, and those that the configuration names).
    #[arg(long)]
    pub dir: Vec<PathBuf>,
    /// Configuration file, if there is one.
    #[arg(long, env = "FSD_CONFIG")]
    pub config: Option<PathBuf>,
    /// Remove memory whose store is gone and whose server does not run.
    #[arg(long)]
    pub remove: bool,
}

fn dirs(args: &CleanArgs) -> anyhow::Result<Vec<PathBuf>> {
    if !args.dir.is_empty() {
        return Ok(args.dir.clone());
    }
    let mut dirs = vec![PathBuf::from(memory::DEFAULT_DIR)];
    if let Some(file) = &args.config {
        let config = Config::load(file)?;
        let named = config.storage.into_iter().map(|s| s.memory_dir);
        // Those of other hosts may not exist here.
        dirs.extend(named.chain([config.meta.memory_dir]).filter(|dir| dir.is_dir()));
    }
    dirs.sort();
    dirs.dedup();
    Ok(dirs)
}

/// Lists memory files, and removes those that are nobody's.
///
/// # Errors
/// A directory cannot be read, or a file not be removed.
pub fn run(args: &CleanArgs) -> anyhow::Result<ExitCode> {
    let (mut left, mut removed) = (0, 0);
    for dir in dirs(args)? {
        let found = leftovers::list(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
        for mut memory in found {
            if matches!(memory.verdict, Verdict::Gone(_)) {
                left += memory.bytes;
                if args.remove
                    && memory
                        .remove_if_gone()
                        .with_context(|| format!("cannot remove {}.*", memory.stem.display()))?
                {
                    removed += memory.bytes;
                    println!("{}: removed", line(&memory, &dir));
                    continue;
                }
            }
            println!("{}: {}", line(&memory, &dir), memory.verdict);
        }
    }
    if removed < left {
        println!(
            "{} can be removed with --remove, if no store of them was moved away or is on a disk that is not mounted now",
            mib(left - removed)
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn line(memory: &leftovers::Memory, dir: &Path) -> String {
    let name = memory.stem.strip_prefix(dir).unwrap_or(&memory.stem);
    let whose = match &memory.note {
        Some(note) => note.to_string(),
        None => "an unknown store".into(),
    };
    format!(
        "{} {}: {whose} (uid {})",
        dir.join(name).display(),
        mib(memory.bytes),
        memory.uid
    )
}
