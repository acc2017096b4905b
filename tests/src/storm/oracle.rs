//! What a read may show: pure rules.

use super::MOUNTS;

/// What is known of a cell before it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// The number that an fsync has acknowledged.
    pub synced: u64,
    /// Numbers that are lost end here.
    pub gap: u64,
    /// What each mount has acknowledged.
    pub acked: [u64; MOUNTS],
}

impl Known {
    /// The oldest that may be seen if these mounts are safe.
    #[must_use]
    pub fn floor(&self, safe: [bool; MOUNTS]) -> u64 {
        let acked = self.acked.iter().zip(safe).filter(|(_, safe)| *safe);
        acked.map(|(n, _)| *n).fold(self.synced, u64::max)
    }

    /// One of these numbers is of a write that had not been acknowledged when it was begun to be read.
    #[must_use]
    pub fn is_unfinished(&self, numbers: &[u64], safe: [bool; MOUNTS]) -> bool {
        numbers.iter().any(|n| *n > self.floor(safe))
    }

    /// What is wrong with seeing `number`, when `issued` was the last one begun after the read, and nothing if it is right. `owner` is
    /// the only mount that writes the cell, if there is one.
    #[must_use]
    pub fn wrong(
        &self,
        number: u64,
        issued: u64,
        safe: [bool; MOUNTS],
        owner: Option<usize>,
    ) -> Option<&'static str> {
        let floor = self.floor(safe);
        if number < self.synced {
            return Some("older than what was fsynced");
        }
        if number < floor {
            return Some("older than what was acknowledged");
        }
        if number > issued {
            return Some("never written");
        }
        // Between what the writer's last life has left and what it began later there is nothing.
        if owner.is_some_and(|m| safe[m]) && number > floor && number <= self.gap {
            return Some("of a life that has ended");
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::Known;

    const ALL: [bool; 3] = [true; 3];
    const NOT_FIRST: [bool; 3] = [false, true, true];

    fn known() -> Known {
        Known {
            synced: 5,
            gap: 0,
            acked: [8, 0, 6],
        }
    }

    #[test]
    fn what_was_acknowledged_is_seen_while_its_mount_is_safe() {
        let wrong = |n, safe| known().wrong(n, 9, safe, None);
        assert_eq!(wrong(7, ALL), Some("older than what was acknowledged"));
        assert_eq!(wrong(8, ALL), None);
        assert_eq!(wrong(9, ALL), None);
        assert_eq!(wrong(10, ALL), Some("never written"));
        // What the others have acknowledged counts on.
        assert_eq!(wrong(6, NOT_FIRST), None);
        assert_eq!(wrong(5, NOT_FIRST), Some("older than what was acknowledged"));
    }

    #[test]
    fn what_was_fsynced_is_seen_whoever_dies() {
        let wrong = |n| known().wrong(n, 9, [false; 3], None);
        assert_eq!(wrong(4), Some("older than what was fsynced"));
        assert_eq!(wrong(5), None);
    }

    #[test]
    fn what_a_life_has_lost_does_not_come_back() {
        let known = Known {
            synced: 5,
            gap: 9,
            acked: [6, 0, 0],
        };
        let wrong = |n, safe| known.wrong(n, 11, safe, Some(0));
        assert_eq!(wrong(6, ALL), None);
        assert_eq!(wrong(8, ALL), Some("of a life that has ended"));
        assert_eq!(wrong(10, ALL), None);
        assert_eq!(wrong(8, NOT_FIRST), None);
    }
}
