//! Time that passes on the way.

use std::time::Duration;

use rt::sync::Mutex;

use super::state::State;

/// Time that something takes to get from one endpoint to another passes, where time passes by itself.
pub(super) fn travel(net: &Mutex<State>) {
    let delay = {
        let schedule = &mut net.lock().lanes.schedule;
        if schedule.clock.is_none() {
            return;
        }
        schedule.delay()
    };
    rt::thread::sleep(Duration::from_nanos(delay));
}
