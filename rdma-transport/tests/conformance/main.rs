//! One suite for every provider: each clause of the contract is a function that takes a [`world::World`].
//!
//! A clause that cannot be checked on a provider is listed in [`NOT_ON_SIM`] with the reason; nothing is
//! skipped silently.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod basics;
mod children;
mod data;
mod endings;
mod hello;
mod load;
mod ordering;
mod processes;
mod sim;
mod world;

use world::World;

/// Clauses that need processes, sockets or real time.
const NOT_ON_SIM: &[(&str, &str)] = &[
    (
        "processes_share_atomics",
        "the simulator is one process; concurrent_atomics covers the interleavings",
    ),
    (
        "killed_peer",
        "process death is sim::crashes (crash at random moments)",
    ),
    ("killed_peer_says_what_it_said", "as above"),
    ("wrong_version", "there are no bytes on a wire"),
    ("garbage_and_half_greetings", "there are no bytes on a wire"),
    ("slow_greeting_blocks_nobody", "there are no bytes on a wire"),
    ("flood_both_ways", "queues of the simulator are unbounded"),
    (
        "blocked_senders_get_through",
        "queues of the simulator are unbounded",
    ),
    ("queueing_waits_for_nobody", "one thread"),
    ("words_are_never_torn", "one thread"),
    ("deregister_waits_for_operations", "one thread"),
    ("idle_costs_nothing", "no threads"),
    ("newest_connection_stays", "one thread"),
    ("shutdown_frees_everything", "no threads, no descriptors"),
    ("dead_process_frees_address", "process death"),
    ("unresponsive_peer_times_out", "nothing is ever unresponsive"),
    ("silent_peer_is_given_up", "as above"),
];

macro_rules! clauses {
    (everywhere: $($file:ident :: $name:ident),* ; real: $($rfile:ident :: $rname:ident),* $(;)?) => {
        mod on_shm {
            $( #[test] fn $name() { super::$file::$name(&super::World::shm()); } )*
            $( #[test] fn $rname() { super::$rfile::$rname(&super::World::shm()); } )*
        }
        mod on_tcp {
            $( #[test] fn $name() { super::$file::$name(&super::World::tcp()); } )*
            $( #[test] fn $rname() { super::$rfile::$rname(&super::World::tcp()); } )*
        }
        mod on_verbs {
            $( #[test] #[ignore = "needs an RDMA device: make lab"]
               fn $name() { super::$file::$name(&super::World::verbs()); } )*
            $( #[test] #[ignore = "needs an RDMA device: make lab"]
               fn $rname() { super::$rfile::$rname(&super::World::verbs()); } )*
        }
        mod on_sim {
            $( #[test] fn $name() { for seed in 0..20 { super::$file::$name(&super::World::sim(seed)); } } )*
            #[test]
            fn what_is_not_here() {
                let listed: Vec<&str> = super::NOT_ON_SIM.iter().map(|(name, _)| *name).collect();
                for (name, why) in super::NOT_ON_SIM {
                    println!("not on sim: {name}: {why}");
                }
                let mut real = vec![$( stringify!($rname) ),*];
                let mut listed = listed;
                real.sort_unstable();
                listed.sort_unstable();
                assert_eq!(real, listed, "every clause that does not run on sim is listed, with its reason");
            }
        }
    };
}

clauses! {
    everywhere:
        basics::operations, basics::submitted_operations, basics::boundaries, basics::limits_are_enforced,
        basics::self_connection, basics::large_transfers, basics::counters,
        ordering::messages_are_fifo, ordering::message_after_write,
        ordering::operations_in_order, ordering::callbacks_may_use_the_fabric, ordering::concurrent_atomics,
        data::mixed_batch, data::in_order, data::many_at_once, data::more_than_fits, data::gathered,
        data::failures_return_buffers, data::dead_connections_return_buffers, data::limits,
        endings::out_of_range, endings::access_rights, endings::unknown_region, endings::region_disappears,
        endings::submitted_to_unknown_region, endings::closed_by_connector, endings::closed_by_listener,
        endings::shutdown_ends_connections, endings::newer_connection_replaces_older,
        hello::wrong_key, hello::refused, hello::unreachable, hello::address_in_use, hello::identities,
        hello::useless_configurations;
    real:
        processes::processes_share_atomics, processes::killed_peer, processes::killed_peer_says_what_it_said,
        processes::idle_costs_nothing, processes::shutdown_frees_everything,
        processes::dead_process_frees_address, processes::unresponsive_peer_times_out,
        processes::silent_peer_is_given_up,
        hello::wrong_version, hello::garbage_and_half_greetings, hello::slow_greeting_blocks_nobody,
        load::flood_both_ways, load::blocked_senders_get_through, load::queueing_waits_for_nobody, load::words_are_never_torn,
        load::deregister_waits_for_operations, endings::newest_connection_stays;
}

/// Not a test of its own: the tests start this executable again with a role for it to play.
#[test]
fn child() {
    if let Ok(role) = std::env::var("FABRIC_CHILD") {
        children::play(&role);
    }
}
