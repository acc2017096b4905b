//! Time: real, or that of the simulation.

use std::ops::{Add, AddAssign, Sub};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use super::groups::{shown, when};
use super::sched;

/// Instants count from long before anything began, so that one may look back.
const BEGINNING: u64 = 1_000_000_000_000_000;
/// What the clock on the wall says at the beginning of a simulation: the year 2030.
const WALL: Duration = Duration::from_secs(1_893_456_000);
/// What it takes to look at a clock: whoever looks again and again sees it move.
const LOOK: u64 = 25;

/// As [`std::time::Instant`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(u64);

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

/// Time since the host was started.
#[must_use]
pub fn since_boot() -> Duration {
    Duration::from_nanos(Instant::now().0)
}

/// Time that passes for all alike, whatever their clocks show; since any moment.
#[must_use]
pub fn for_all() -> Duration {
    match sched::me() {
        Some(me) => {
            me.core.tick(LOOK);
            Duration::from_nanos(BEGINNING + me.core.now())
        }
        None => since_boot(),
    }
}

impl Instant {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        static BASE: OnceLock<std::time::Instant> = OnceLock::new();
        match sched::me() {
            Some(me) => {
                me.core.tick(LOOK);
                Self(BEGINNING + shown(me.core.now(), me.rate))
            }
            None => Self(BEGINNING + nanos(BASE.get_or_init(std::time::Instant::now).elapsed())),
        }
    }

    /// Since then.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        Self::now().saturating_duration_since(*self)
    }

    /// From an earlier one to this.
    #[must_use]
    pub fn duration_since(&self, earlier: Self) -> Duration {
        self.saturating_duration_since(earlier)
    }

    /// From an earlier one to this; zero if it is later.
    #[must_use]
    pub fn saturating_duration_since(&self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// From an earlier one to this, if it is earlier.
    #[must_use]
    pub fn checked_duration_since(&self, earlier: Self) -> Option<Duration> {
        self.0.checked_sub(earlier.0).map(Duration::from_nanos)
    }

    /// Later by so much.
    #[must_use]
    pub fn checked_add(&self, d: Duration) -> Option<Self> {
        self.0.checked_add(nanos(d)).map(Self)
    }

    /// Earlier by so much.
    #[must_use]
    pub fn checked_sub(&self, d: Duration) -> Option<Self> {
        self.0.checked_sub(nanos(d)).map(Self)
    }

    /// When the caller's clock shows it, in nanoseconds of the simulation.
    pub(super) fn virtual_nanos(self) -> u64 {
        let shows = self.0.saturating_sub(BEGINNING);
        when(shows, sched::me().map_or(0, |me| me.rate))
    }

    /// The same for the system, outside of simulations.
    pub(super) fn real(self) -> std::time::Instant {
        std::time::Instant::now() + self.saturating_duration_since(Self::now())
    }
}

impl Add<Duration> for Instant {
    type Output = Self;
    fn add(self, d: Duration) -> Self {
        Self(self.0.saturating_add(nanos(d)))
    }
}

impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, d: Duration) {
        *self = *self + d;
    }
}

impl Sub<Duration> for Instant {
    type Output = Self;
    fn sub(self, d: Duration) -> Self {
        Self(self.0.saturating_sub(nanos(d)))
    }
}

impl Sub for Instant {
    type Output = Duration;
    fn sub(self, earlier: Self) -> Duration {
        self.saturating_duration_since(earlier)
    }
}

/// What the clock on the wall says.
#[must_use]
pub fn system_now() -> SystemTime {
    match sched::me() {
        Some(me) => {
            me.core.tick(LOOK);
            SystemTime::UNIX_EPOCH + WALL + Duration::from_nanos(me.core.now())
        }
        None => SystemTime::now(),
    }
}
