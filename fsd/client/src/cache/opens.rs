//! Who has an inode open on this mount, and what the mount's bits in the lease record say of that.

use std::time::Duration;

use rt::time::Instant;

/// What a mount does with a file, as the lease record says it: the mount's open bit and its use bit.
///
/// A pin beside an open has no bit of its own, for the open keeps the inode as well.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Usage {
    /// Neither has it open nor pins it: no bit.
    #[default]
    Unused,
    /// Pins it after a look-up and does not have it open: the use bit.
    Pinned,
    /// Has it open for reading: the open bit.
    Reading,
    /// Has it open for writing: both bits.
    Writing,
}

/// A bit of a mount in a lease record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum UsageBit {
    /// In the opens bitmap.
    Open,
    /// In the uses bitmap.
    Use,
}

impl Usage {
    /// From the two bits.
    #[must_use]
    pub fn from_bits(open: bool, uses: bool) -> Self {
        match (open, uses) {
            (false, false) => Self::Unused,
            (false, true) => Self::Pinned,
            (true, false) => Self::Reading,
            (true, true) => Self::Writing,
        }
    }

    /// Is this bit set?
    #[must_use]
    pub fn has(self, bit: UsageBit) -> bool {
        match bit {
            UsageBit::Open => matches!(self, Self::Reading | Self::Writing),
            UsageBit::Use => matches!(self, Self::Pinned | Self::Writing),
        }
    }

    /// The bits to change on the way to another usage, in order, and whether each is to be set. Bits are set before others are
    /// cleared, so that a file in use never looks unused to other mounts.
    pub fn steps_to(self, wanted: Self) -> impl Iterator<Item = (UsageBit, bool)> {
        use UsageBit::{Open, Use};
        let steps = [(Open, true), (Use, true), (Use, false), (Open, false)];
        steps
            .into_iter()
            .filter(move |&(bit, set)| wanted.has(bit) == set && self.has(bit) != set)
    }
}

/// What the lease record has to say of a mount's opens, while it has the lease.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Telling {
    /// All.
    #[default]
    All,
    /// Not that it only reads the file. A lease is held, under which no other mount was seen to have the file open for writing, or to remove
    /// it: who wants to do either needs the exclusive lease first. Before the lease is given up the record says it after all.
    Writing,
    /// Nothing: the exclusive lease is held, nobody else has the file open or pins it, and nobody can before this mount gives up or lowers
    /// the lease.
    Nothing,
}

/// Removals on this mount of what may be an inode's last name.
#[derive(Debug, Default)]
pub struct Unlinking {
    /// How many have begun; and again from 0, as there are never many at once.
    pub begun: u16,
    /// How many of them have ended.
    pub ended: u16,
}

impl Unlinking {
    /// Is any under way?
    #[must_use]
    pub fn is_under_way(&self) -> bool {
        self.begun != self.ended
    }
}

/// Open files of an inode on this mount.
#[derive(Debug, Default)]
pub struct Opens {
    /// Open handles, of all kinds.
    pub count: u32,
    /// Of those, for writing in a way that may leave dirty pages, or locked ones, in the kernel: through its page cache, or mapped.
    pub page_writers: u32,
    /// For writing, of any kind.
    pub writers: u32,
    /// This mount pins it, at least until then.
    pub pinned: Option<Instant>,
    /// What the lease record says of this mount.
    pub recorded: Usage,
    /// A change of the record failed in the middle: it may say something else than `recorded`.
    pub in_doubt: bool,
    /// What the record has to say.
    pub telling: Telling,
    /// When others were seen to have it open for good.
    pub looked_again: Option<Instant>,
    /// It is being removed: nobody may open it any more.
    pub removed: bool,
    /// It may be losing its last name.
    pub unlinking: Unlinking,
    /// The last user went meanwhile: who ends that looks after the inode.
    pub left: bool,
}

impl Opens {
    /// What the lease record should say of this mount.
    #[must_use]
    pub fn usage(&self) -> Usage {
        match (self.count, self.writers, self.pinned) {
            (0, _, None) => Usage::Unused,
            (0, _, Some(_)) => Usage::Pinned,
            (_, 0, _) => Usage::Reading,
            _ => Usage::Writing,
        }
    }

    /// Does the lease record say what it has to?
    #[must_use]
    pub fn is_recorded(&self) -> bool {
        match self.telling {
            Telling::All => self.is_published(),
            Telling::Writing => self.is_published() || self.only_reads_unsaid(),
            Telling::Nothing => true,
        }
    }

    /// Does this mount only read the file, if it has it open at all, and has the record never said anything else?
    #[must_use]
    pub fn only_reads_unsaid(&self) -> bool {
        let reads = matches!(self.usage(), Usage::Unused | Usage::Reading);
        reads && !self.in_doubt && self.recorded == Usage::Unused
    }

    /// Does nobody have to ask or change the record when this mount opens the file once more, or closes it?
    #[must_use]
    pub fn asks_nobody(&self, writer: bool) -> bool {
        match self.telling {
            Telling::All => false,
            Telling::Writing => !writer && self.only_reads_unsaid(),
            Telling::Nothing => true,
        }
    }

    /// Were others seen a moment ago to have it open for good?
    #[must_use]
    pub fn met_others(&self) -> bool {
        const NOT_BEFORE: Duration = Duration::from_secs(1);
        self.looked_again.is_some_and(|at| at.elapsed() < NOT_BEFORE)
    }

    /// The exclusive lease is lowered to a shared one. False: the record has to say something first.
    pub fn lower(&mut self) -> bool {
        let unsaid = self.telling != Telling::All && self.only_reads_unsaid();
        if unsaid {
            self.telling = Telling::Writing;
        }
        unsaid
    }

    /// Does the lease record say what this mount does?
    #[must_use]
    pub fn is_published(&self) -> bool {
        !self.in_doubt && self.recorded == self.usage()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Usage; 4] = [Usage::Unused, Usage::Pinned, Usage::Reading, Usage::Writing];

    #[test]
    fn bits_are_changed_strictly_in_turn() {
        for from in ALL {
            for to in ALL {
                let mut bits = [from.has(UsageBit::Open), from.has(UsageBit::Use)];
                for (bit, set) in from.steps_to(to) {
                    let now = &mut bits[bit as usize];
                    assert_ne!(*now, set, "{from:?} to {to:?} would carry");
                    *now = set;
                    let unused = bits == [false; 2];
                    assert!(!unused || to == Usage::Unused, "{from:?} to {to:?} looks unused");
                }
                assert_eq!(Usage::from_bits(bits[0], bits[1]), to);
            }
        }
    }
}
