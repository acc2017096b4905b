//! How long a server is waited for.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use rt::time::Instant;

/// Longest wait for an answer of a mount that leaves with nothing left to lose.
const HURRY: Duration = Duration::from_secs(1);
/// How much longer than for an answer a mount waits for those of a former life to come back or be given up.
pub(super) const JOIN_GRACE: Duration = Duration::from_secs(15);

/// What the mount is about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Mood {
    /// It joins or leaves: whoever asked for that wants to know soon.
    Brief,
    /// It serves programs, which had rather wait than fail.
    Hard,
    /// It leaves, and has nothing left to lose.
    Hurried,
}

/// How long a server is waited for: for one answer, and until it is back when it is away.
#[derive(Debug)]
pub struct Patience {
    answer: Duration,
    hard: Option<Duration>,
    mood: AtomicU8,
}

impl Patience {
    /// A mount that joins. `answer` is the longest wait for one answer; `hard`, how long programs wait for a server that is away
    /// once the mount serves them: for ever without it.
    #[must_use]
    pub fn new(answer: Duration, hard: Option<Duration>) -> Self {
        Self {
            answer,
            hard,
            mood: AtomicU8::new(Mood::Brief as u8),
        }
    }

    fn is(&self, mood: Mood) -> bool {
        self.mood.load(Ordering::Acquire) == mood as u8
    }

    /// From now on programs are served.
    pub fn serve(&self) {
        self.mood.store(Mood::Hard as u8, Ordering::Release);
    }

    /// The mount leaves: who waits for a server that is away learns soon that it is.
    pub fn leave(&self) {
        self.mood.store(Mood::Brief as u8, Ordering::Release);
    }

    /// It leaves, and has nothing left to lose.
    pub fn hurry(&self) {
        self.mood.store(Mood::Hurried as u8, Ordering::Release);
    }

    /// Longest wait for an answer.
    #[must_use]
    pub fn for_answer(&self) -> Duration {
        if self.is(Mood::Hurried) {
            HURRY.min(self.answer)
        } else {
            self.answer
        }
    }

    /// Longest wait for an answer of the metadata server: one that has restarted may wait for other mounts before it answers.
    #[must_use]
    pub fn for_meta(&self) -> Duration {
        if self.is(Mood::Hurried) {
            self.for_answer()
        } else {
            self.answer + JOIN_GRACE
        }
    }

    /// Longest wait for a server that is away; none: for ever.
    #[must_use]
    pub fn for_return(&self) -> Option<Duration> {
        if self.is(Mood::Hard) {
            self.hard
        } else {
            Some(self.for_answer())
        }
    }

    /// Has a server been waited for long enough that was needed first at `began`?
    #[must_use]
    pub fn is_over(&self, began: Instant) -> bool {
        self.for_return().is_some_and(|limit| began.elapsed() >= limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_wait_for_ever_unless_somebody_said_how_long() {
        let long_ago = Instant::now() - Duration::from_secs(1000);
        let patience = Patience::new(Duration::from_secs(10), None);
        assert!(patience.is_over(long_ago), "it joins");
        patience.serve();
        assert!(!patience.is_over(long_ago));
        patience.leave();
        assert!(patience.is_over(long_ago));
        assert_eq!(patience.for_meta(), Duration::from_secs(25));
        patience.hurry();
        assert_eq!(patience.for_return(), Some(HURRY));
        assert_eq!(patience.for_meta(), HURRY);
        let soft = Patience::new(Duration::from_secs(10), Some(Duration::from_secs(60)));
        soft.serve();
        assert!(soft.is_over(long_ago) && !soft.is_over(Instant::now()));
    }
}
