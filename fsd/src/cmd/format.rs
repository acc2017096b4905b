//! `fsd format`, `fsd keygen`.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use rand::Rng;

use fsd_client::mount::listen::is_here;
use fsd_node::config::{Config, FabricChoice, StorageConfig};
use fsd_storage::label::Label;

/// Arguments of `fsd format`.
#[derive(Debug, clap::Args)]
pub struct FormatArgs {
    /// Configuration file.
    #[arg(long, default_value = "cluster.toml", env = "FSD_CONFIG")]
    pub config: PathBuf,
    /// Only the store of this role, whose host this is (default: all, where all are on this host).
    #[arg(long)]
    pub role: Option<FormatRole>,
    /// Which storage node, with --role storage.
    #[arg(long, requires = "role")]
    pub id: Option<u16>,
}

/// Roles that have a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum FormatRole {
    /// The metadata server.
    Meta,
    /// A storage node.
    Storage,
}

/// Which stores are to be made: the metadata server's, and those of storage nodes.
fn chosen(
    config: &Config,
    role: Option<FormatRole>,
    id: Option<u16>,
) -> Result<(bool, Vec<&StorageConfig>), String> {
    let known = || {
        let ids: Vec<String> = config.storage.iter().map(|s| s.id.to_string()).collect();
        ids.join(", ")
    };
    match (role, id) {
        (None, _) => Ok((true, config.storage.iter().collect())),
        (Some(FormatRole::Meta), None) => Ok((true, Vec::new())),
        (Some(FormatRole::Meta), Some(_)) => {
            Err("there is one metadata server: --role meta takes no --id".into())
        }
        (Some(FormatRole::Storage), None) => Err(format!(
            "which storage node? Say --id N (the configuration has {})",
            known()
        )),
        (Some(FormatRole::Storage), Some(id)) => {
            let section = config.storage.iter().find(|s| s.id == id);
            let section = section
                .ok_or_else(|| format!("the configuration has no storage node {id}, but {}", known()))?;
            Ok((false, vec![section]))
        }
    }
}

/// Makes a key file that only its owner can read; `-` stands for the standard output, in hexadecimal.
///
/// # Errors
/// It exists already, or the disk refuses.
pub fn keygen(path: &Path) -> anyhow::Result<()> {
    let mut key = [0u8; 32];
    rand::rng().fill(&mut key);
    if path == Path::new("-") {
        println!("{}", super::hex::hex(&key));
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

/// Makes the stores; none, if one of them is there already.
///
/// # Errors
/// A store exists already, or belongs to another host; the disk refuses.
pub fn run(args: &FormatArgs) -> anyhow::Result<ExitCode> {
    let config = Config::load(&args.config)?;
    let (meta, storage) = chosen(&config, args.role, args.id).map_err(anyhow::Error::msg)?;
    if args.role.is_none() && config.fabric != FabricChoice::Shm {
        let elsewhere = |address: &String| !is_here(address);
        let listen = storage.iter().map(|s| &s.listen).chain([&config.meta.listen]);
        if let Some(address) = listen.into_iter().find(|address| elsewhere(address)) {
            anyhow::bail!(
                "{address} is not an address of this host: make each store on its own host, with fsd format --role meta and fsd format --role storage --id N"
            );
        }
    }
    if meta {
        fsd_meta::server::check_unformatted(&config.meta.dir)?;
    }
    for section in &storage {
        fsd_storage::label::check_unformatted(&section.dir)?;
    }
    if meta {
        let uuid = format!("{:032x}", rand::random::<u128>());
        fsd_meta::server::format(&config, &uuid)?;
        println!("metadata store made in {}", config.meta.dir.display());
    }
    for section in storage {
        fsd_storage::label::format(&section.dir, &Label::new(&config, section))?;
        println!(
            "storage node {} made in {} ({})",
            section.id,
            section.dir.display(),
            section.pool
        );
    }
    Ok(ExitCode::SUCCESS)
}
