//! The command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::error::{Error, Result};
use crate::image::Extra;
use crate::options::{Boot, KernelChoice, Options, Tier};

/// Kernels that the scenarios are run on.
pub const KERNELS: &[&str] = &["6.12", "6.1"];

/// Boots guests with SoftRoCE on stock Debian kernels and runs commands and scenarios in them.
#[derive(Debug, Parser)]
#[command(name = "fsd-lab", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Action,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Run a command on a node, or a scenario, and exit with its status
    Run(Run),
    /// Open a shell on a node
    Shell(Shell),
    /// Run scenarios on kernels and tiers; the last line is "N passed, N failed"
    Test(Test),
    /// Run checks round after round until the time is used up; fails if any of them failed once
    Soak(Soak),
    /// List the scenarios and what the cache holds
    List(List),
    /// Download kernels, and nothing else
    Fetch(Fetch),
    /// Build the kernel extension for kernels, and print where it is
    Kmod(Fetch),
}

/// Where things are.
#[derive(Debug, Clone, Args)]
pub struct Places {
    /// Folder for what is downloaded and built [default: $XDG_CACHE_HOME/distfuse-lab, or lab-cache in the target folder]
    #[arg(long, env = "FSD_LAB_CACHE")]
    pub cache: Option<PathBuf>,
    /// Debian mirror to fetch from, instead of the one that the host's apt uses
    #[arg(long, env = "FSD_LAB_MIRROR")]
    pub mirror: Option<String>,
}

/// What the cluster is to be.
#[derive(Debug, Clone, Args)]
pub struct Machine {
    /// Where things are.
    #[command(flatten)]
    pub places: Places,
    /// Kernel package file to run, instead of Debian's
    #[arg(long, value_name = "FILE")]
    pub kernel_deb: Option<PathBuf>,
    /// Nodes; in the tier "multi" each is a guest [default: 4 in "single", 3 in "multi"]
    #[arg(long, visible_alias = "guests")]
    pub nodes: Option<usize>,
    /// Largest packet between nodes, 1280 to 9000 [default: 9000]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1280..=9000))]
    pub mtu: Option<u32>,
    /// Processors of a guest [default: 2 in "single", 1 in "multi"]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub cpus: Option<u32>,
    /// Memory of a guest in MiB [default: 3072 in "single", 1536 in "multi"]
    #[arg(long, value_parser = clap::value_parser!(u32).range(256..=65536))]
    pub memory: Option<u32>,
    /// How guests come up
    #[arg(long, default_value = "snapshot")]
    pub boot: Boot,
    /// Longest time for one boot, in seconds
    #[arg(long, default_value_t = 120)]
    pub boot_limit: u64,
    /// Longest time for a command or scenario, in seconds [default: 300; of a soak's scenarios 900]
    #[arg(long)]
    pub limit: Option<u64>,
    /// What tests in guests draw their random numbers from, and a soak its order, too [default: another one each time]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Kernel module to have at hand for modprobe; may be repeated
    #[arg(long, value_name = "NAME")]
    pub module: Vec<String>,
    /// Program or file of the host to have in guests under its own name, with its libraries; may be repeated
    #[arg(long, value_name = "PATH")]
    pub file: Vec<PathBuf>,
    /// Folder of this repository's programs, which guests have as /target [default: where this program is]
    #[arg(long, value_name = "FOLDER")]
    pub target: Option<PathBuf>,
    /// Folder for logs and results [default: test-logs/lab in the target folder]
    #[arg(long, value_name = "FOLDER")]
    pub logs: Option<PathBuf>,
}

/// `fsd-lab run`
#[derive(Debug, Args)]
pub struct Run {
    /// How nodes are spread over guests [default: single, or what the scenario's file says]
    #[arg(long)]
    pub tier: Option<Tier>,
    /// Debian kernel: 6.1 or 6.12
    #[arg(long, default_value = "6.12")]
    pub kernel: String,
    /// A scenario's name, or a file with one
    #[arg(long, conflicts_with = "argv", required_unless_present = "argv")]
    pub scenario: Option<String>,
    /// The node that the command runs on
    #[arg(long, default_value_t = 1)]
    pub node: usize,
    /// What the cluster is to be.
    #[command(flatten)]
    pub machine: Machine,
    /// The command and its arguments
    #[arg(last = true, value_name = "COMMAND")]
    pub argv: Vec<String>,
}

/// `fsd-lab shell`
#[derive(Debug, Args)]
pub struct Shell {
    /// How nodes are spread over guests
    #[arg(long, default_value = "single")]
    pub tier: Tier,
    /// Debian kernel: 6.1 or 6.12
    #[arg(long, default_value = "6.12")]
    pub kernel: String,
    /// The node
    #[arg(long, default_value_t = 1)]
    pub node: usize,
    /// What the cluster is to be.
    #[command(flatten)]
    pub machine: Machine,
}

/// `fsd-lab test`
#[derive(Debug, Args)]
pub struct Test {
    /// Tier to test in; may be repeated [default: both]
    #[arg(long)]
    pub tier: Vec<Tier>,
    /// Kernel to test on; may be repeated [default: 6.12 and 6.1]
    #[arg(long)]
    pub kernel: Vec<String>,
    /// What the clusters are to be.
    #[command(flatten)]
    pub machine: Machine,
    /// Scenarios [default: all]
    pub scenarios: Vec<String>,
}

/// `fsd-lab soak`
#[derive(Debug, Args)]
pub struct Soak {
    /// How long
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub minutes: u64,
    /// Debian kernel; may be repeated
    #[arg(long, default_value = "6.12")]
    pub kernel: Vec<String>,
    /// What the clusters are to be.
    #[command(flatten)]
    pub machine: Machine,
    /// Scenarios, or files with some [default: all that check the file system or the kernel extension]
    pub scenarios: Vec<String>,
}

/// `fsd-lab list`
#[derive(Debug, Args)]
pub struct List {
    /// Where things are.
    #[command(flatten)]
    pub places: Places,
}

/// `fsd-lab fetch` and `fsd-lab kmod`
#[derive(Debug, Args)]
pub struct Fetch {
    /// Kernel; may be repeated [default: 6.12 and 6.1]
    #[arg(long)]
    pub kernel: Vec<String>,
    /// Where things are.
    #[command(flatten)]
    pub places: Places,
}

impl Places {
    /// The cache folder.
    ///
    /// # Errors
    /// The current folder is gone.
    pub fn cache(&self) -> Result<PathBuf> {
        let home = || {
            let home = std::env::var_os("XDG_CACHE_HOME").filter(|home| !home.is_empty())?;
            Some(PathBuf::from(home).join("distfuse-lab"))
        };
        match self.cache.clone().or_else(home) {
            Some(path) => absolute(&path),
            None => Ok(target_of(&programs()?).join("lab-cache")),
        }
    }
}

impl Machine {
    /// The options of a cluster in this tier; `nodes` and `mtu` are used where the command line has none.
    ///
    /// # Errors
    /// The current folder is gone.
    pub fn options(
        &self,
        tier: Tier,
        kernel: &str,
        nodes: Option<usize>,
        mtu: Option<u32>,
    ) -> Result<Options> {
        let usual = if tier == Tier::Single { 4 } else { 3 };
        let target = match &self.target {
            Some(path) => absolute(path)?,
            None => programs()?,
        };
        Ok(Options {
            tier,
            kernel: match &self.kernel_deb {
                Some(path) => KernelChoice::File(absolute(path)?),
                None => KernelChoice::Series(kernel.to_owned()),
            },
            nodes: self.nodes.or(nodes).unwrap_or(usual),
            mtu: self.mtu.or(mtu).unwrap_or(9000),
            cpus: self.cpus,
            memory: self.memory,
            disk: None,
            boot: self.boot,
            boot_limit: Duration::from_secs(self.boot_limit),
            limit: Duration::from_secs(self.limit.unwrap_or(300)),
            seed: self.seed,
            extra: Extra {
                modules: self.module.clone(),
                files: self.file.clone(),
            },
            target,
            cache: self.places.cache()?,
            mirror: self.places.mirror.clone(),
        })
    }

    /// The folder for logs.
    ///
    /// # Errors
    /// The current folder is gone.
    pub fn logs(&self) -> Result<PathBuf> {
        match &self.logs {
            Some(path) => absolute(path),
            None => Ok(target_of(&programs()?).join("test-logs/lab")),
        }
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|source| Error::Io {
        what: format!("find {}", path.display()),
        source,
    })
}

/// The folder that this program was built into, with the others.
fn programs() -> Result<PathBuf> {
    let me = std::env::current_exe().map_err(|source| Error::Io {
        what: "find this program".into(),
        source,
    })?;
    Ok(me.parent().unwrap_or(Path::new("/")).to_owned())
}

fn target_of(programs: &Path) -> PathBuf {
    programs.parent().unwrap_or(programs).to_owned()
}

#[cfg(test)]
mod tests {
    use super::Cli;
    use clap::{CommandFactory, Parser};

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        assert!(Cli::try_parse_from(["fsd-lab", "run", "--", "ibv_devinfo", "-v"]).is_ok());
        assert!(Cli::try_parse_from(["fsd-lab", "run"]).is_err());
        assert!(Cli::try_parse_from(["fsd-lab", "run", "--scenario", "x", "--", "y"]).is_err());
        assert!(
            Cli::try_parse_from([
                "fsd-lab",
                "run",
                "--guests",
                "3",
                "--tier",
                "multi",
                "--scenario",
                "x"
            ])
            .is_ok()
        );
    }
}
