//! The engine `fjall`, opened in a directory.

use std::path::{Path, PathBuf};

use fjall::{Database, Keyspace, KeyspaceCreateOptions};

use super::kinds::StoreError;
use super::tail;

/// Changes that the engine keeps in memory before it writes them to a table, as it counts them; they take about three times as much.
const MEMTABLE: u64 = 16 << 20;

/// The engine.
pub struct Engine {
    /// What batches go to.
    pub db: Database,
    /// All keys.
    pub keys: Keyspace,
}

impl Engine {
    /// Opens what is in a directory, or makes it.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let fail = |e: fjall::Error| match (&e, engine_error(path, &e)) {
            (fjall::Error::Locked, _) => StoreError::InUse {
                path: path.to_owned(),
            },
            // Also a system's error: what is too short, or not there, is the engine's file.
            (_, StoreError::Engine { path, detail }) => StoreError::Damaged { path, detail },
            (_, other) => other,
        };
        let open = || Database::builder(path).manual_journal_persist(false).open();
        let io = |error: std::io::Error| fail(fjall::Error::Io(error));
        let db = match open() {
            Err(fjall::Error::JournalRecovery(error)) => match tail::cut(path).map_err(io)? {
                Some(bytes) => {
                    tracing::warn!(
                        "the journal in {} ends with {bytes} bytes that a power cut has left incomplete: they are cut off",
                        path.display()
                    );
                    open()
                }
                None => Err(fjall::Error::JournalRecovery(error)),
            },
            other => other,
        };
        let db = db.map_err(fail)?;
        let keys = db
            .keyspace("data", || {
                KeyspaceCreateOptions::default().max_memtable_size(MEMTABLE)
            })
            .map_err(fail)?;
        tail::opened(path).map_err(io)?;
        Ok(Self { db, keys })
    }
}

/// A file of the engine that is not there, though each store has one.
pub fn lacks(path: &Path) -> Option<String> {
    let below = |dir: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).into_iter().flatten();
        entries.filter_map(|e| e.ok().map(|e| e.path())).collect()
    };
    if !path.join("version").exists() {
        return Some("version".into());
    }
    if !below(path)
        .iter()
        .any(|p| p.extension().is_some_and(|e| e == "jnl"))
    {
        return Some("the journal (*.jnl)".into());
    }
    // The engine's own, and ours.
    let keyspaces = below(&path.join("keyspaces"));
    if keyspaces.len() < 2 {
        return Some("a directory in keyspaces".into());
    }
    let current = keyspaces.iter().map(|k| k.join("current"));
    current
        .filter(|c| !c.exists())
        .map(|c| c.display().to_string())
        .next()
}

/// Is there anything of a store in a directory?
#[must_use]
pub fn is_begun(path: &Path) -> bool {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|e| e.path()).any(|p| {
        p.extension().is_some_and(|e| e == "jnl")
            || p.file_name().is_some_and(|n| n == "version" || n == "keyspaces")
    })
}

/// What the engine says, as an error of the store.
pub fn engine_error(path: &Path, error: &fjall::Error) -> StoreError {
    let detail = error.to_string();
    let mut source: Option<&dyn std::error::Error> = Some(error);
    while let Some(e) = source {
        if let Some(io) = e.downcast_ref::<std::io::Error>()
            && io.raw_os_error() == Some(libc::ENOSPC)
        {
            return StoreError::Full {
                path: path.to_owned(),
            };
        }
        source = e.source();
    }
    StoreError::Engine {
        path: path.to_owned(),
        detail,
    }
}
