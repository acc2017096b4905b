//! The command line.

pub mod alarm;
pub mod check;
pub mod children;
pub mod clean;
pub mod defaults;
pub mod dev;
pub mod evict;
pub mod format;
pub mod hex;
pub mod keeper;
pub mod launch;
pub mod leftovers;
pub mod life;
pub mod logging;
pub mod mask;
pub mod replace;
pub mod role;
pub mod status;
pub mod temporary;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use fsd_node::config::{CacheMode, Config};

/// DistFUSE: a distributed POSIX file system with kernel-cached speed and single-copy consistency.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a cluster on this machine: servers and mounts as separate processes.
    Dev(dev::DevArgs),
    /// Run a cluster on several hosts, as a job: over ssh, or started by mpirun or srun.
    Launch(launch::LaunchArgs),
    /// Run the metadata server.
    Meta {
        #[command(flatten)]
        /// Common arguments.
        role: RoleArgs,
        /// Take stores that were put back from an older copy, this server's or a storage node's, as they are.
        #[arg(long)]
        accept_older: bool,
    },
    /// Run a storage node.
    Storage {
        #[command(flatten)]
        /// Common arguments.
        role: RoleArgs,
        /// Which storage node of the configuration.
        #[arg(long, default_value_t = 0)]
        id: u16,
        /// Release the pool's memory at the end (everything is in the backing file then).
        #[arg(long)]
        forget: bool,
        /// Take a store that was put back from an older copy as it is; what is in memory is given up.
        #[arg(long)]
        accept_older: bool,
    },
    /// Mount the file system.
    Mount {
        #[command(flatten)]
        /// Common arguments.
        role: RoleArgs,
        /// How the kernel may cache (default: as the configuration says).
        #[arg(long)]
        cache: Option<CacheMode>,
        /// With --cache writethrough, as mount.cache_shared in the configuration: for comparisons, not coherent.
        #[arg(long)]
        cache_shared: bool,
        /// Address other mounts reach this one at.
        #[arg(long)]
        listen: Option<String>,
        /// Options as mount(8) has them: ro, suid, dev, noexec, atime… (default: nosuid,nodev).
        #[arg(short = 'o', value_name = "OPTIONS")]
        options: Vec<String>,
        /// Mount over a directory that is not empty.
        #[arg(long)]
        allow_nonempty: bool,
        /// Have fusermount3 unmount when this process dies.
        #[arg(long)]
        auto_unmount: bool,
        /// Have a small process wait for the daemon, and start it again when it dies.
        #[arg(long, conflicts_with = "auto_unmount")]
        keep: bool,
        /// Where to mount.
        point: PathBuf,
    },
    /// Have another process, of this program or another one, serve what is mounted, without unmounting: open files go on.
    Replace(replace::ReplaceArgs),
    /// Make the stores: of all roles where all are on this host, else of one (--role).
    Format(format::FormatArgs),
    /// Examine the stores of storage nodes that are stopped: every block against its checksum.
    Check(check::CheckArgs),
    /// List the memory files of servers on this host, and remove those whose store is gone.
    Clean(clean::CleanArgs),
    /// Make a cluster key.
    Keygen {
        /// File to write (mode 0600); - prints the key.
        file: PathBuf,
    },
    /// Declare a mount dead, so that others get at once what it has leased. What it has not stored is lost.
    Evict {
        /// Its number, as fsd status shows it.
        node: u16,
        #[command(flatten)]
        /// Common arguments.
        role: RoleArgs,
    },
    /// Show nodes, leases, capacity and health. Exit status: 0 healthy, 1 not, 2 where that cannot be found out from here.
    Status {
        /// Configuration file.
        #[arg(long, default_value = "cluster.toml", env = "FSD_CONFIG")]
        config: PathBuf,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
}

/// Arguments of every role.
#[derive(Debug, clap::Args)]
pub struct RoleArgs {
    /// Configuration file.
    #[arg(long, default_value = "cluster.toml", env = "FSD_CONFIG")]
    pub config: PathBuf,
}

/// Runs a command.
#[must_use]
pub fn run(cli: Cli) -> ExitCode {
    fsd_node::heap::bound();
    logging::start();
    let result = match cli.command {
        Command::Dev(args) => dev::run(&args),
        Command::Launch(args) => launch::run(&args),
        Command::Meta { role, accept_older } => {
            load(&role).and_then(|(c, key)| role::meta(&c, key, accept_older))
        }
        Command::Storage {
            role,
            id,
            forget,
            accept_older,
        } => load(&role).and_then(|(c, key)| role::storage(&c, key, id, forget, accept_older)),
        Command::Mount { keep: true, .. } if !keeper::is_kept() => keeper::run(),
        Command::Mount {
            role,
            cache,
            cache_shared,
            listen,
            options,
            allow_nonempty,
            auto_unmount,
            keep: _,
            point,
        } => load(&role).and_then(|(c, key)| {
            let cache = cache.unwrap_or(c.mount.cache);
            let options = fsd_client::MountOptions {
                former: life::former(),
                options,
                point,
                cache,
                cache_shared: cache_shared || c.mount.cache_shared,
                listen,
                allow_nonempty,
                auto_unmount,
            };
            role::mount(&c, &key, &options)
        }),
        Command::Replace(args) => replace::run(&args),
        Command::Format(args) => format::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Clean(args) => clean::run(&args),
        Command::Keygen { file } => format::keygen(&file).map(|()| ExitCode::SUCCESS),
        Command::Evict { node, role } => Config::load(&role.config)
            .map_err(Into::into)
            .and_then(|config| evict::run(&config, node)),
        Command::Status { config, json } => Ok(status::run(&config, json)),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            replace::refuse(&error);
            eprintln!("fsd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn load(args: &RoleArgs) -> anyhow::Result<(Config, Vec<u8>)> {
    let config = Config::load(&args.config)?;
    let key = config.key()?;
    Ok((config, key))
}
