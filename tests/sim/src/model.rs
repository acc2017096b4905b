//! A directory of files as a single machine has it.

use std::collections::BTreeMap;

use system_tests::linear::Model;

use crate::content::Content;

/// Result of a call: nothing, or an error number.
pub type Done = Result<(), i32>;

/// A call and what came back. Handles are numbers that the history gives out.
#[derive(Debug, Clone)]
pub enum Op {
    /// open(O_CREAT | O_EXCL): the handle.
    Create(usize, Result<u32, i32>),
    /// open: the handle.
    Open(usize, Result<u32, i32>),
    /// close.
    Close(u32),
    /// From a cell on, so many, with a stamp.
    Write(u32, u64, u64, u64),
    /// At the end, so many, with a stamp.
    Append(u32, u64, u64),
    /// From a cell on, so many.
    Read(u32, u64, u64, Content),
    /// ftruncate.
    Truncate(u32, u64),
    /// fstat: size in cells; links.
    Fstat(u32, u64, u32),
    /// A look at the size through a handle, in cells.
    Size(u32, u64),
    /// stat of a name that is none.
    Stat(usize, i32),
    /// unlink.
    Unlink(usize, Done),
    /// rename.
    Rename(usize, usize, Done),
    /// readdir: of one name, whether it was there. Of names that come and go meanwhile, each may be seen or not.
    Has(usize, bool),
}

/// The state of all.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct State {
    names: BTreeMap<usize, u32>,
    files: BTreeMap<u32, Content>,
    handles: BTreeMap<u32, u32>,
}

impl State {
    /// With these files.
    #[must_use]
    pub fn with(files: &[(usize, Content)]) -> Self {
        let mut state = Self::default();
        for (name, content) in files {
            let file = u32::MAX - *name as u32;
            state.names.insert(*name, file);
            state.files.insert(file, content.clone());
        }
        state
    }

    /// Forgets what nobody can reach, so that states that cannot be told apart are equal.
    fn tidy(&mut self) {
        let (names, handles) = (&self.names, &self.handles);
        self.files
            .retain(|file, _| names.values().chain(handles.values()).any(|f| f == file));
    }

    fn of(&mut self, handle: u32) -> Option<&mut Content> {
        let file = self.handles.get(&handle)?;
        self.files.get_mut(file)
    }

    fn apply(&mut self, op: &Op) -> Option<()> {
        match op {
            Op::Create(name, Ok(handle)) => {
                let free = !self.names.contains_key(name);
                self.names.insert(*name, *handle);
                self.files.insert(*handle, Content::default());
                self.handles.insert(*handle, *handle);
                free.then_some(())
            }
            Op::Create(name, Err(libc::EEXIST)) => self.names.get(name).map(drop),
            Op::Open(name, Ok(handle)) => {
                let file = *self.names.get(name)?;
                self.handles.insert(*handle, file);
                Some(())
            }
            Op::Open(name, Err(libc::ENOENT))
            | Op::Stat(name, libc::ENOENT)
            | Op::Unlink(name, Err(libc::ENOENT))
            | Op::Rename(name, _, Err(libc::ENOENT)) => (!self.names.contains_key(name)).then_some(()),
            Op::Close(handle) => self.handles.remove(handle).map(drop),
            Op::Write(handle, from, cells, stamp) => {
                self.of(*handle)?.write(*from, *cells, *stamp);
                Some(())
            }
            Op::Append(handle, cells, stamp) => {
                let content = self.of(*handle)?;
                let end = content.len();
                content.write(end, *cells, *stamp);
                Some(())
            }
            Op::Read(handle, from, cells, got) => {
                (self.of(*handle)?.range(*from, *cells) == *got).then_some(())
            }
            Op::Truncate(handle, cells) => {
                self.of(*handle)?.truncate(*cells);
                Some(())
            }
            Op::Fstat(handle, cells, links) => {
                let file = *self.handles.get(handle)?;
                let named = self.names.values().any(|f| *f == file);
                let size = self.of(*handle)?.len();
                (size == *cells && u32::from(named) == *links).then_some(())
            }
            Op::Size(handle, cells) => (self.of(*handle)?.len() == *cells).then_some(()),
            Op::Unlink(name, Ok(())) => self.names.remove(name).map(drop),
            Op::Rename(from, to, Ok(())) => {
                let file = *self.names.get(from)?;
                if from != to {
                    self.names.remove(from);
                    self.names.insert(*to, file);
                }
                Some(())
            }
            Op::Has(name, there) => (self.names.contains_key(name) == *there).then_some(()),
            _ => None,
        }
    }
}

/// Begins with these files.
pub struct Directory(pub State);

impl Model for Directory {
    type Op = Op;
    type State = State;

    fn start(&self) -> State {
        self.0.clone()
    }

    fn step(&self, state: &State, op: &Op) -> Option<State> {
        let mut next = state.clone();
        next.apply(op)?;
        next.tidy();
        Some(next)
    }
}
