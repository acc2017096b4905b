//! Waiting without the scheduler.

/// Lets others run, in simulation.
#[inline]
pub fn spin_loop() {
    if !super::sched::give_way() {
        std::hint::spin_loop();
    }
}
