//! `fsd`: every role and command of DistFUSE.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    fsd::cmd::run(fsd::cmd::Cli::parse())
}
