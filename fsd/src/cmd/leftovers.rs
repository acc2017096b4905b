//! Memory files that servers have left behind: whose they are, and taking away those that are nobody's any more.

use std::fs::{File, TryLockError};
use std::io::{Read, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fsd_node::memory::{NOTE, Note, PREFIX, is_at, open_note};
use fsd_storage::StorageError;
use fsd_storage::label::Label;

/// What may be done with memory files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Their server runs.
    InUse,
    /// Their server does not run, but its store is there, and may need what is in memory only.
    Kept,
    /// Their store is gone; why that is believed.
    Gone(&'static str),
    /// It cannot be told; why.
    Unknown(String),
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::InUse => write!(f, "in use"),
            Self::Kept => write!(f, "kept for the next start of its server"),
            Self::Gone(why) => write!(f, "left behind: {why}"),
            Self::Unknown(why) => write!(f, "kept: {why}"),
        }
    }
}

/// The memory files of one store.
#[derive(Debug, Clone)]
pub struct Memory {
    /// The files but for the note.
    files: Vec<PathBuf>,
    note_path: PathBuf,
    /// How their names begin, with the directory.
    pub stem: PathBuf,
    /// Memory that they take, bytes.
    pub bytes: u64,
    /// Who made them.
    pub uid: u32,
    /// Which store they belong to, if that can be told.
    pub note: Option<Note>,
    /// What may be done with them.
    pub verdict: Verdict,
}

/// Is the store of a note there? It may only have been moved, or its disk be not mounted: then, too, its server will not find
/// it where it was.
fn judge(note: &Note) -> Verdict {
    match note.store.try_exists() {
        Err(error) => return Verdict::Unknown(format!("its store cannot be looked at ({error})")),
        Ok(false) => return Verdict::Gone("its store does not exist any more"),
        Ok(true) => {}
    }
    if note.storage.is_none() {
        return Verdict::Kept;
    }
    match Label::read(&note.store) {
        Ok(label) if label.uuid != note.uuid => Verdict::Gone("its directory has another store now"),
        Ok(_) => Verdict::Kept,
        Err(error @ StorageError::Format { .. }) => Verdict::Unknown(error.to_string()),
        Err(error) => Verdict::Unknown(format!("its store cannot be read ({error})")),
    }
}

impl Memory {
    /// Reads the note and finds out what may be done; the lock that came with it is held as long as what is returned.
    fn look(&mut self) -> Option<File> {
        let read = || -> std::io::Result<(File, Note)> {
            let mut file = open_note(&self.note_path)?;
            if file.metadata()?.uid() != self.uid {
                return Err(std::io::Error::other("it is somebody else's"));
            }
            let mut text = String::new();
            file.read_to_string(&mut text)?;
            file.rewind()?;
            Ok((file, toml::from_str(&text).map_err(std::io::Error::other)?))
        };
        let (file, note) = match read() {
            Ok(found) => found,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.verdict = Verdict::Unknown("nothing tells whose it is".into());
                return None;
            }
            Err(error) => {
                self.verdict = Verdict::Unknown(format!("its note cannot be read ({error})"));
                return None;
            }
        };
        self.verdict = match file.try_lock() {
            Ok(()) => judge(&note),
            Err(TryLockError::WouldBlock) => Verdict::InUse,
            Err(TryLockError::Error(error)) => {
                Verdict::Unknown(format!("its note cannot be locked ({error})"))
            }
        };
        self.note = Some(note);
        Some(file)
    }

    /// Removes the files if their store is still gone.
    ///
    /// # Errors
    /// The system refuses.
    pub fn remove_if_gone(&mut self) -> std::io::Result<bool> {
        self.remove_if(|_, verdict| matches!(verdict, Verdict::Gone(_)))
    }

    fn remove_if(&mut self, wanted: impl Fn(&Note, &Verdict) -> bool) -> std::io::Result<bool> {
        // A server that starts meanwhile waits for the lock, and then makes everything anew.
        let lock = self.look();
        let (Some(lock), Some(note)) = (lock, &self.note) else {
            return Ok(false);
        };
        if self.verdict == Verdict::InUse || !wanted(note, &self.verdict) || !is_at(&lock, &self.note_path)? {
            return Ok(false);
        }
        for file in self.files.iter().chain([&self.note_path]) {
            match std::fs::remove_file(file) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(true)
    }
}

/// All memory files in a directory, by store.
///
/// # Errors
/// The directory cannot be read.
pub fn list(dir: &Path) -> std::io::Result<Vec<Memory>> {
    let mut found: Vec<Memory> = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| name.starts_with(PREFIX)) else {
            continue;
        };
        let meta = match std::fs::symlink_metadata(entry.path()) {
            // It was removed meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            meta => meta?,
        };
        if !meta.is_file() {
            continue;
        }
        let (stem, end) = name.split_once('.').unwrap_or((name, ""));
        let stem = dir.join(stem);
        // Who may write to the directory can make a note for another's files, so files are together with those of the same
        // user only.
        let at = found.iter().position(|m| m.stem == stem && m.uid == meta.uid());
        let at = at.unwrap_or_else(|| {
            found.push(Memory {
                files: Vec::new(),
                note_path: stem.with_extension(NOTE),
                stem,
                bytes: 0,
                uid: meta.uid(),
                note: None,
                verdict: Verdict::Unknown(String::new()),
            });
            found.len() - 1
        });
        let memory = &mut found[at];
        memory.bytes += meta.blocks() * 512;
        if end != NOTE {
            memory.files.push(entry.path());
        }
    }
    found.sort_by(|a, b| a.stem.cmp(&b.stem));
    for memory in &mut found {
        memory.look();
    }
    Ok(found)
}

/// Removes the memory of stores below a directory, but for what is in use; how much that was, bytes. For who has made the
/// stores for a while only.
///
/// # Errors
/// The system refuses.
pub fn remove_below(dir: &Path, stores: &Path) -> std::io::Result<u64> {
    let me = rustix::process::geteuid().as_raw();
    let mut bytes = 0;
    for mut memory in list(dir)?.into_iter().filter(|m| m.uid == me) {
        if memory.remove_if(|note, _| note.store.starts_with(stores))? {
            bytes += memory.bytes;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use fsd_node::memory::Claim;

    use super::*;

    fn note(store: &Path, storage: Option<u16>) -> Note {
        Note {
            cluster: "c".into(),
            storage,
            store: store.to_owned(),
            uuid: "0123".into(),
        }
    }

    fn one(dir: &Path) -> Memory {
        let mut all = list(dir).unwrap();
        assert_eq!(all.len(), 1);
        all.remove(0)
    }

    fn made(dir: &Path, note: &Note) -> Claim {
        let claim = Claim::take(dir, note).unwrap();
        for end in ["pool", "leases.0"] {
            std::fs::write(dir.join(format!("{}.{end}", note.stem())), [1; 5000]).unwrap();
        }
        claim
    }

    #[test]
    fn only_memory_without_a_store_is_removed() {
        let (dir, stores) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let note = note(&stores.path().join("m"), None);
        std::fs::create_dir(&note.store).unwrap();
        let claim = made(dir.path(), &note);
        std::fs::remove_dir(&note.store).unwrap();
        // Whatever became of its store, its server runs.
        let mut memory = one(dir.path());
        assert_eq!(
            (memory.note.as_ref(), &memory.verdict),
            (Some(&note), &Verdict::InUse)
        );
        assert!(memory.bytes >= 10_000);
        assert!(!memory.remove_if_gone().unwrap());
        drop(claim);
        std::fs::create_dir(&note.store).unwrap();
        assert_eq!(one(dir.path()).verdict, Verdict::Kept);
        assert!(!one(dir.path()).remove_if_gone().unwrap());
        std::fs::remove_dir(&note.store).unwrap();
        let mut memory = one(dir.path());
        assert!(matches!(memory.verdict, Verdict::Gone(_)));
        // It may have come back since the list was made.
        let claim = Claim::take(dir.path(), &note).unwrap();
        assert!(!memory.remove_if_gone().unwrap());
        drop(claim);
        assert!(memory.remove_if_gone().unwrap());
        assert!(list(dir.path()).unwrap().is_empty());
    }

    #[test]
    fn memory_that_nothing_tells_of_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("distfuse-77-0.pool"), b"x").unwrap();
        std::fs::write(dir.path().join("other"), b"x").unwrap();
        let mut memory = one(dir.path());
        assert!(matches!(memory.verdict, Verdict::Unknown(_)));
        assert!(!memory.remove_if_gone().unwrap());
        std::fs::write(dir.path().join("distfuse-77-0.note"), b"nonsense").unwrap();
        assert!(matches!(one(dir.path()).verdict, Verdict::Unknown(_)));
    }

    #[test]
    fn memory_of_another_store_in_the_directory_is_left_behind() {
        let (dir, stores) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let note = note(&stores.path().join("s"), Some(0));
        std::fs::create_dir(&note.store).unwrap();
        drop(made(dir.path(), &note));
        // A directory without a label may be the place where its disk is mounted.
        assert!(matches!(one(dir.path()).verdict, Verdict::Unknown(_)));
        let label = |uuid: &str| {
            let text = format!(
                "format = {}\ncluster = 'c'\nnode = 0\nuuid = '{uuid}'\npool = 1\nrecord_bytes = 64\n",
                fsd_storage::label::FORMAT
            );
            std::fs::write(note.store.join("storage.label"), text).unwrap();
        };
        label("0123");
        assert_eq!(one(dir.path()).verdict, Verdict::Kept);
        label("4567");
        assert!(matches!(one(dir.path()).verdict, Verdict::Gone(_)));
    }

    #[test]
    fn who_made_stores_for_a_while_removes_their_memory() {
        let (dir, stores) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let note = note(&stores.path().join("m"), None);
        std::fs::create_dir(&note.store).unwrap();
        let claim = made(dir.path(), &note);
        assert_eq!(remove_below(dir.path(), stores.path()).unwrap(), 0);
        drop(claim);
        assert_eq!(remove_below(dir.path(), Path::new("/elsewhere")).unwrap(), 0);
        assert!(remove_below(dir.path(), stores.path()).unwrap() >= 10_000);
        assert!(list(dir.path()).unwrap().is_empty());
    }
}
