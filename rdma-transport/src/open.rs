//! Opening an endpoint of any provider.

use std::sync::Arc;

use crate::handshake::MAX_IDENTITY;
use crate::{Fabric, FabricConfig, FabricKind, Handler, TransportError, VerbsOptions, shm, tcp};

/// Shortest cluster key, bytes.
const MIN_KEY: usize = 16;

/// Opens an endpoint. Endpoints of the simulator come from `sim::SimNet` instead.
///
/// # Errors
/// [`TransportError::Invalid`] for a configuration that cannot work, [`TransportError::Os`] where the system
/// refuses, for instance because the address is in use.
pub fn open(
    kind: FabricKind,
    config: FabricConfig,
    handler: Arc<dyn Handler>,
) -> Result<Arc<dyn Fabric>, TransportError> {
    check(&config)?;
    match kind {
        FabricKind::Shm => shm::open(config, handler),
        FabricKind::Tcp => tcp::open(config, handler),
        FabricKind::Sim => Err(TransportError::Invalid(
            "endpoints of the simulator are made by sim::SimNet, which all of them share".to_owned(),
        )),
        FabricKind::Verbs => open_verbs(config, &VerbsOptions::default().with_env()?, handler),
    }
}

/// Opens an endpoint of the verbs provider with a choice of device and address; [`open`] takes the choice from
/// the environment.
///
/// # Errors
/// As [`open`]; also [`TransportError::Os`] where there is no device that can be used, and
/// [`TransportError::Invalid`] in a build without this provider.
#[cfg(feature = "verbs")]
pub fn open_verbs(
    config: FabricConfig,
    options: &VerbsOptions,
    handler: Arc<dyn Handler>,
) -> Result<Arc<dyn Fabric>, TransportError> {
    check(&config)?;
    options.check()?;
    crate::verbs::open(config, options, handler)
}

/// Says that this build does not have the verbs provider.
///
/// # Errors
/// Always [`TransportError::Invalid`].
#[cfg(not(feature = "verbs"))]
pub fn open_verbs(
    _config: FabricConfig,
    _options: &VerbsOptions,
    _handler: Arc<dyn Handler>,
) -> Result<Arc<dyn Fabric>, TransportError> {
    Err(TransportError::Invalid(
        "this build is without the verbs provider (feature `verbs`): use tcp between hosts, shm within one"
            .to_owned(),
    ))
}

/// What every provider requires of its configuration.
pub(crate) fn check(config: &FabricConfig) -> Result<(), TransportError> {
    if config.key.len() < MIN_KEY {
        return Err(TransportError::Invalid(format!(
            "the cluster key has {} bytes, at least {MIN_KEY} are needed",
            config.key.len()
        )));
    }
    if config.identity.len() > MAX_IDENTITY {
        return Err(TransportError::Invalid(format!(
            "the identity has {} bytes, {MAX_IDENTITY} are possible",
            config.identity.len()
        )));
    }
    Ok(())
}
