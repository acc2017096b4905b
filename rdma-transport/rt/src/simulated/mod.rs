//! Each of them real or simulated, as its thread is.

mod affinity;
pub mod channel;
mod entropy;
mod groups;
pub mod hint;
mod lock;
mod report;
mod sched;
mod settings;
pub mod sim;
pub mod sync;
mod task;
pub mod thread;
pub mod time;

pub use entropy::random;
