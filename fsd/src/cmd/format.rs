//! `fsd format`, `fsd keygen`.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use rand::Rng;

use crate::config::Config;
use crate::storage::label::Label;

/// Arguments of `fsd format`.
#[derive(Debug, clap::Args)]
pub struct FormatArgs {
    /// Configuration file.
    #[arg(long, default_value = "cluster.toml", env = "FSD_CONFIG")]
    pub config: PathBuf,
    /// Only the metadata server's store.
    #[arg(long, conflicts_with = "storage")]
    pub meta: bool,
    /// Only this storage node's.
    #[arg(long)]
    pub storage: Option<u16>,
}

/// Makes a key file that only its owner can read; `-` stands for the standard output, in hexadecimal.
///
/// # Errors
/// It exists already, or the disk refuses.
pub fn keygen(path: &Path) -> anyhow::Result<()> {
    let mut key = [0u8; 32];
    rand::rng().fill(&mut key);
    if path == Path::new("-") {
        println!("{}", super::launch::hex(&key));
        return Ok(());
    }
    write_key(path, &key)
}

/// Writes a key into a file that only its owner can read.
///
/// # Errors
/// It exists already, or the disk refuses.
pub fn write_key(path: &Path, key: &[u8]) -> anyhow::Result<()> {
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut f| f.write_all(key))
        .with_context(|| format!("cannot write the key file {}", path.display()))
}

/// Makes the stores.
///
/// # Errors
/// A store exists already, or the disk refuses.
pub fn run(args: &FormatArgs) -> anyhow::Result<ExitCode> {
    let config = Config::load(&args.config)?;
    let uuid = format!("{:032x}", rand::random::<u128>());
    if args.storage.is_none() {
        crate::meta::server::format(&config, &uuid)?;
        println!("metadata store made in {}", config.meta.dir.display());
    }
    if let Some(id) = args.storage {
        anyhow::ensure!(
            config.storage.iter().any(|s| s.id == id),
            "the configuration has no storage node {id}"
        );
    }
    for section in config
        .storage
        .iter()
        .filter(|s| !args.meta && args.storage.is_none_or(|id| id == s.id))
    {
        crate::storage::label::format(&section.dir, &Label::new(&config, section))?;
        println!(
            "storage node {} made in {} ({})",
            section.id,
            section.dir.display(),
            section.pool
        );
    }
    Ok(ExitCode::SUCCESS)
}
