//! Whole-system tests: real processes and mounts. Run with few threads; each test has its own cluster.

// A test may end where something is not as it must be; helpers of tests are no library code.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod allocation;
mod anew;
mod async_io;
mod bad_input;
mod both_die;
mod closing;
mod coherence;
mod contended;
mod copies;
mod deaths;
mod durable;
mod early_handles;
mod ends;
mod extension;
mod extension_contended;
mod extension_names;
mod extension_space;
mod extension_term;
mod faults;
mod foreseen;
mod former;
mod generations;
mod half_done;
mod histories;
mod keeper;
mod launch;
mod leftovers;
mod links;
mod locks_many;
mod lost_end;
mod mappings;
mod memory;
mod models;
mod mounting;
mod names_held;
mod opened_alone;
mod parked;
mod partitions;
mod posix;
mod pressure;
mod privileges;
mod replace;
mod servers_away;
mod side_by_side;
mod silent_host;
mod status;
mod stopping;
mod storage;
mod storm;
mod suspend;
mod synced;
mod tools;
mod trees;
