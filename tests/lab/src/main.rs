//! `fsd-lab`: guests with SoftRoCE, and commands and scenarios in them.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use lab::cli::{Action, Cli, Fetch, KERNELS, List, Run, Shell, Test};
use lab::cluster::Cluster;
use lab::error::{At, Error, Result};
use lab::image::packages;
use lab::options::Tier;
use lab::proto::Stream;
use lab::report::summary;
use lab::run::{Subject, name_of};
use lab::scenario::{self, Scenario};
use lab::{process, shell, snapshot, soak};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Statuses of our own are those of `timeout` and its like: a command's own are below.
const FAILED: u8 = 125;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = end_on_signals().and_then(|()| match cli.command {
        Action::Run(run) => run_one(&run),
        Action::Shell(shell) => open_shell(&shell),
        Action::Test(test) => run_tests(&test),
        Action::Soak(args) => soak::run(&args).map(|good| ExitCode::from(u8::from(!good))),
        Action::List(list) => print_list(&list),
        Action::Fetch(fetch) => fetch_kernels(&fetch),
        Action::Kmod(kernels) => build_kmod(&kernels),
    });
    shell::restore_terminal();
    // What fails because a signal ended the guests is not worth a message: the signal's thread has the last word.
    while process::interrupted() {
        std::thread::park();
    }
    done.unwrap_or_else(|error| {
        eprintln!("fsd-lab: {error}");
        ExitCode::from(FAILED)
    })
}

/// Emulators and the terminal's settings must not outlive us.
fn end_on_signals() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).at(|| "watch for signals".into())?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            process::interrupt();
            shell::restore_terminal();
            eprintln!("fsd-lab: interrupted; the guests were ended");
            soak::interrupted();
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

fn run_one(run: &Run) -> Result<ExitCode> {
    let Some(name) = &run.scenario else {
        return run_command(run);
    };
    let subject = Subject::find(name)?;
    let tier = run.tier.unwrap_or_else(|| subject.tier());
    let outcome = subject.run(tier, &run.kernel, &run.machine)?;
    println!("{}", summary(std::slice::from_ref(&outcome)));
    Ok(if outcome.error.is_none() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    })
}

fn run_command(run: &Run) -> Result<ExitCode> {
    let tier = run.tier.unwrap_or(Tier::Single);
    let options = run.machine.options(tier, &run.kernel, None, None)?;
    let limit = options.limit;
    let logs = run
        .machine
        .logs()?
        .join(name_of("run", tier, &run.kernel, &run.machine));
    let cluster = Cluster::start(options, &logs)?;
    let mut code = 0;
    let result = cluster
        .start_program(run.node, &run.argv, None)
        .and_then(|program| {
            let done = program.wait_with(limit, |stream, data| {
                // A closed output is no reason to end the command.
                let _ = match stream {
                    Stream::Out => write_now(&mut std::io::stdout(), data),
                    Stream::Err => write_now(&mut std::io::stderr(), data),
                };
            })?;
            if let lab::proto::Ending::NotStarted(why) = &done.ending {
                eprintln!("fsd-lab: {}: {why}", run.argv.join(" "));
            }
            code = done.ending.code();
            Ok(())
        });
    cluster.finish(result)?;
    Ok(ExitCode::from(code))
}

fn write_now(out: &mut impl Write, data: &[u8]) -> std::io::Result<()> {
    out.write_all(data)?;
    out.flush()
}

fn open_shell(args: &Shell) -> Result<ExitCode> {
    let mut options = args.machine.options(args.tier, &args.kernel, None, None)?;
    // As long as the developer likes.
    options.limit = Duration::from_secs(7 * 24 * 3600);
    let logs = args
        .machine
        .logs()?
        .join(name_of("shell", args.tier, &args.kernel, &args.machine));
    eprintln!("booting; the shell ends with Ctrl-D, and the guests with it");
    let cluster = Cluster::start(options, &logs)?;
    let mut code = 0;
    let result = shell::run(&cluster, args.node).map(|ending| code = ending.code());
    cluster.finish(result)?;
    Ok(ExitCode::from(code))
}

fn run_tests(test: &Test) -> Result<ExitCode> {
    let mut chosen: Vec<&'static Scenario> = Vec::new();
    for name in &test.scenarios {
        let unknown = || Error::check(format!("there is no scenario {name:?}; see fsd-lab list"));
        chosen.push(scenario::find(name).ok_or_else(unknown)?);
    }
    if chosen.is_empty() {
        chosen = scenario::ALL.iter().collect();
    }
    let kernels: Vec<&str> = if test.kernel.is_empty() {
        KERNELS.to_vec()
    } else {
        test.kernel.iter().map(String::as_str).collect()
    };
    let tiers = if test.tier.is_empty() {
        vec![Tier::Single, Tier::Multi]
    } else {
        test.tier.clone()
    };
    let mut outcomes = Vec::new();
    for kernel in kernels {
        for tier in &tiers {
            for scenario in chosen.iter().filter(|scenario| scenario.tiers.contains(tier)) {
                let outcome = Subject::Known(scenario).run(*tier, kernel, &test.machine)?;
                eprintln!("{}", outcome.line());
                outcomes.push(outcome);
            }
        }
    }
    println!("\n{}", summary(&outcomes));
    let failed = outcomes.iter().any(|outcome| outcome.error.is_some());
    Ok(if failed || outcomes.is_empty() {
        ExitCode::from(1)
    } else {
        ExitCode::SUCCESS
    })
}

fn print_list(list: &List) -> Result<ExitCode> {
    println!("scenarios:");
    for scenario in scenario::ALL {
        println!("  {:<10} {}", scenario.name, scenario.about);
    }
    let cache = list.places.cache()?;
    println!("cache {}:", cache.display());
    for line in snapshot::cached(&cache)? {
        println!("  {line}");
    }
    Ok(ExitCode::SUCCESS)
}

fn wanted(fetch: &Fetch) -> Vec<&str> {
    if fetch.kernel.is_empty() {
        KERNELS.to_vec()
    } else {
        fetch.kernel.iter().map(String::as_str).collect()
    }
}

fn build_kmod(wanted_kernels: &Fetch) -> Result<ExitCode> {
    let cache = wanted_kernels.places.cache()?;
    let mirror = wanted_kernels.places.mirror.as_deref();
    std::fs::create_dir_all(&cache).at(|| format!("make the folder {}", cache.display()))?;
    for series in wanted(wanted_kernels) {
        let kernel = packages::kernel(&cache, series, mirror, false)?;
        let module = lab::kmod::build(&cache, &kernel, mirror)?;
        println!("{series}: {}", module.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn fetch_kernels(fetch: &Fetch) -> Result<ExitCode> {
    let cache = fetch.places.cache()?;
    std::fs::create_dir_all(&cache).at(|| format!("make the folder {}", cache.display()))?;
    for series in wanted(fetch) {
        let kernel = packages::kernel(&cache, series, fetch.places.mirror.as_deref(), true)?;
        println!("{series}: {} in {}", kernel.release, kernel.dir.display());
    }
    Ok(ExitCode::SUCCESS)
}
