//! What every role of DistFUSE stands on: the configuration, the endpoint of the fabric, the embedded store, and files that
//! survive power cuts.

pub mod config;
pub mod endpoint;
#[cfg(feature = "testing")]
pub mod fake_conn;
#[cfg(feature = "testing")]
pub mod fake_disk;
pub mod files;
pub mod heap;
pub mod memory;
pub mod ports;
pub mod probe;
pub mod store;
