//! Time that passes on the way.

use std::time::Duration;

use rt::sync::Mutex;

use super::state::{State, nanos};

/// Time that something takes to get from one endpoint to another passes, where time passes by itself.
pub(super) fn travel(net: &Mutex<State>) {
    let delay = {
        let mut state = net.lock();
        if state.clock.is_none() {
            return;
        }
        let config = state.config;
        state
            .chance
            .between(nanos(config.min_delay), nanos(config.max_delay))
    };
    rt::thread::sleep(Duration::from_nanos(delay));
}
