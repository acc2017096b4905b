//! Whole-system tests of DistFUSE.
//!
//! A library for the tests in `tests/`: clusters of real processes ([`cluster`]), tests with a time limit
//! ([`guard`]), network namespaces as hosts ([`hosts`]), system calls that `std` lacks ([`sys`]), numbers of
//! chance that can be had again ([`chance`]), cross-mount checks ([`coherence`]), a
//! linearizability checker ([`linear`]) with recorded histories ([`history`]), random operations against a
//! local directory ([`model`]), random input and output on one file through several paths ([`fsx`]),
//! programs that ask a mount for something ([`asking`]), programs on a mount whose daemon is replaced ([`replaced`]), reads and writes in batches ([`async_io`]), machines that are short of
//! memory ([`pressure`]), how long something took where the machine was not busy ([`quiet`]), and faults at random under a workload that
//! knows what it may see ([`storm`]).

pub mod asking;
pub mod async_io;
pub mod chance;
pub mod cluster;
pub mod coherence;
pub mod contended;
pub mod fsx;
pub mod guard;
pub mod history;
pub mod hosts;
pub mod linear;
pub mod model;
pub mod pressure;
pub mod process;
pub mod proxy;
pub mod quiet;
pub mod replaced;
pub mod side_by_side;
pub mod stale;
pub mod storm;
pub mod sys;
