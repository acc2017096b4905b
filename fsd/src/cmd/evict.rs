//! `fsd evict`.

use std::process::ExitCode;
use std::time::Duration;

use fsd_node::config::Config;
use fsd_proto::ask;
use fsd_proto::rpc::{Errno, RpcError};

use super::status::Asker;

/// How long the command waits: everything is given back within moments, unless a server or another mount is away.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `fsd evict`.
///
/// # Errors
/// One sentence, for the operator.
pub fn run(config: &Config, node: u16) -> anyhow::Result<ExitCode> {
    let asker = Asker::new(config)?;
    let conn = asker.connect(&config.meta.listen)?;
    match asker.ask_for(&conn, ask::meta::Evict { node }, PATIENCE) {
        Ok(()) => {
            println!("mount {node} is declared dead, and what it had leased is free");
            Ok(ExitCode::SUCCESS)
        }
        Err(RpcError::Errno(Errno(libc::ENOENT))) => {
            anyhow::bail!("there is no mount {node}: fsd status lists them")
        }
        Err(RpcError::Errno(Errno(libc::EALREADY))) => {
            anyhow::bail!(
                "mount {node} has been declared dead already: fsd status tells what its recovery waits for"
            )
        }
        Err(RpcError::Transport(rdma_transport::TransportError::Timeout { .. })) => anyhow::bail!(
            "the metadata server has not answered within {} s: fsd status tells whether mount {node} is declared dead, and what its recovery waits for",
            PATIENCE.as_secs()
        ),
        Err(error) => anyhow::bail!("mount {node} is not declared dead: {error}"),
    }
}
