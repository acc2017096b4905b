//! Rules that can be left out, so that tests can show what each of them is for.

/// A rule left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// Inode numbers are given out before that is durable.
    NumbersEarly,
    /// Blocks of a removed file are freed before the removal is durable.
    FreedEarly,
    /// That blocks are freed is forgotten before it is durable on the storage nodes.
    FreedForgotten,
    /// What mounts tell a server that has lost its end is carried out as it comes.
    ReplayedAnyhow,
    /// A mount leaves before what it has done is durable.
    LeftEarly,
    /// A server that dies in its recovery window forgets that it had one.
    WindowForgotten,
    /// After the window, places are given again that mounts know as those of what could not be carried out.
    PlacesAgain,
    /// What dead mounts left beyond the ends of files stays.
    EndsNotCut,
    /// Mounts are taken for silent that this server did not hear because it was stopped itself.
    PauseBlamed,
    /// A mount is declared dead before its own term has ended.
    DeclaredEarly,
    /// What the dead had is given to others though the storage nodes have not shut them out.
    NotFenced,
    /// Mounts are told of what others have changed before it is durable.
    SharedEarly,
    /// A mount that reads a directory ahead is told of what others have changed before it is durable.
    ReadEarly,
    /// A mount that comes back to a directory is told that others have changed nothing in it.
    ChangesUntold,
    /// A mount leases in a new table while others still trust the one that it replaces.
    TablesMixed,
    /// What mounts left beyond the ends of files stays when their leases were lost.
    EraNotCleared,
}

/// The rules that a server keeps: all of them, except in tests.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rules {
    #[cfg(any(test, feature = "flaws"))]
    without: Option<Flaw>,
}

impl Rules {
    /// All but this one.
    #[cfg(any(test, feature = "flaws"))]
    #[must_use]
    pub const fn without(flaw: Option<Flaw>) -> Self {
        Self { without: flaw }
    }

    #[cfg(any(test, feature = "flaws"))]
    pub(crate) fn lack(self, flaw: Flaw) -> bool {
        self.without == Some(flaw)
    }

    #[cfg(not(any(test, feature = "flaws")))]
    pub(crate) const fn lack(self, _flaw: Flaw) -> bool {
        false
    }
}
