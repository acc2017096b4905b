//! Scenarios run, each in a cluster of its own.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::cli::Machine;
use crate::cluster::Cluster;
use crate::error::{Error, Result};
use crate::options::{Options, Tier};
use crate::report::Outcome;
use crate::scenario::file::Script;
use crate::scenario::{self, Scenario};
use crate::tools;

/// What can be run.
pub enum Subject {
    /// A scenario of this program.
    Known(&'static Scenario),
    /// One of a file.
    File {
        /// What it is called: as the file, without the extension.
        name: String,
        /// What it does.
        script: Script,
    },
}

impl Subject {
    /// A scenario by its name, or by the path of its file.
    ///
    /// # Errors
    /// There is neither; the file cannot be understood.
    pub fn find(name: &str) -> Result<Subject> {
        if let Some(scenario) = scenario::find(name) {
            return Ok(Subject::Known(scenario));
        }
        let path = Path::new(name);
        if !path.is_file() {
            let known = scenario::ALL.iter().map(|scenario| scenario.name);
            let known = known.collect::<Vec<_>>().join(", ");
            return Err(Error::check(format!(
                "there is no scenario {name:?}, nor such a file; known are: {known}"
            )));
        }
        Ok(Subject::File {
            name: path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            script: Script::load(path)?,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Subject::Known(scenario) => scenario.name,
            Subject::File { name, .. } => name,
        }
    }

    /// The tier it is run in where none is named.
    pub fn tier(&self) -> Tier {
        match self {
            Subject::Known(_) => Tier::Single,
            Subject::File { script, .. } => script.tier.unwrap_or(Tier::Single),
        }
    }

    /// Runs it; the outcome has its failures.
    ///
    /// # Errors
    /// It could not be run at all.
    pub fn run(&self, tier: Tier, kernel: &str, machine: &Machine) -> Result<Outcome> {
        match self {
            Subject::Known(scenario) => {
                let mut options = machine.options(tier, kernel, None, None)?;
                if machine.nodes.is_none() {
                    options.nodes = options.nodes.max(scenario.nodes);
                }
                if options.nodes < scenario.nodes {
                    return Err(Error::check(format!(
                        "the scenario {} needs {} nodes",
                        scenario.name, scenario.nodes
                    )));
                }
                in_cluster(scenario.name, options, machine, kernel, scenario.run)
            }
            Subject::File { name, script } => {
                let mut options = machine.options(tier, kernel, script.nodes, script.mtu)?;
                options.extra.modules.extend(script.modules.iter().cloned());
                for name in &script.programs {
                    options.extra.files.push(tools::find(name)?);
                }
                options.memory = options.memory.or(script.memory);
                if let Some(size) = script.disk {
                    options.disk = Some(size);
                    options.extra.modules.push("virtio_blk".into());
                }
                in_cluster(name, options, machine, kernel, |cluster| script.run(cluster))
            }
        }
    }
}

/// What a run is called, by which its logs are found.
pub fn name_of(scenario: &str, tier: Tier, kernel: &str, machine: &Machine) -> String {
    let file = machine
        .kernel_deb
        .as_deref()
        .and_then(Path::file_stem)
        .map(|stem| stem.to_string_lossy());
    format!("{scenario}-{tier}-{}", file.as_deref().unwrap_or(kernel))
}

/// Runs `body` in a cluster of its own; the outcome has its failures.
fn in_cluster(
    scenario: &str,
    options: Options,
    machine: &Machine,
    kernel: &str,
    body: impl FnOnce(&Cluster) -> Result<()>,
) -> Result<Outcome> {
    let name = name_of(scenario, options.tier, kernel, machine);
    let logs = machine.logs()?.join(&name);
    eprintln!("== {name}");
    let start = Instant::now();
    let (mut boot, mut notes) = (Duration::ZERO, Vec::new());
    let result = Cluster::start(options, &logs).and_then(|cluster| {
        boot = start.elapsed();
        let result = body(&cluster);
        notes = cluster.notes();
        cluster.finish(result)
    });
    // These are not the scenario's failures, and in the second case the folder is not ours to write to.
    if let Err(error @ (Error::Missing { .. } | Error::Busy { .. })) = result {
        return Err(error);
    }
    let outcome = Outcome::new(&name, &result, start.elapsed(), boot, notes);
    outcome.save(&logs)?;
    Ok(outcome)
}
