//! The engine while it works. After a failed write it refuses everything until it is opened again, as it would be
//! after a crash; that is done here, as soon as the disk allows.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rt::sync::{RwLock, RwLockReadGuard};
use rt::time::Instant;

use super::engine::{Engine, engine_error};
use super::kinds::StoreError;

/// What must be free on the disk before an engine that failed is opened again, bytes.
pub const RESERVE_MIN: u64 = 1 << 20;
/// Pause between attempts to open an engine again that has failed.
const REOPEN: Duration = Duration::from_secs(1);

/// The engine, if it works, and when it was last tried to bring it back.
struct Slot {
    engine: Option<Engine>,
    tried: Instant,
}

/// The engine of one directory.
pub struct EngineSlot {
    path: PathBuf,
    slot: RwLock<Slot>,
}

impl EngineSlot {
    /// Opens the store in a directory, or makes it.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let slot = Slot {
            engine: Some(Engine::open(path)?),
            tried: Instant::now(),
        };
        Ok(Self {
            path: path.to_owned(),
            slot: RwLock::new(slot),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the disk and what is free on it, bytes.
    pub fn disk(&self) -> Result<(u64, u64), StoreError> {
        let disk = rustix::fs::statvfs(&self.path).map_err(|error| StoreError::Engine {
            path: self.path.clone(),
            detail: format!("its disk cannot be asked: {error}"),
        })?;
        Ok((disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize))
    }

    /// The error of a disk that is full.
    pub fn full(&self) -> StoreError {
        StoreError::Full {
            path: self.path.clone(),
        }
    }

    fn engine(&self) -> Result<RwLockReadGuard<'_, Slot>, StoreError> {
        let slot = self.slot.read();
        if slot.engine.is_some() {
            return Ok(slot);
        }
        drop(slot);
        {
            let mut slot = self.slot.write();
            if slot.engine.is_none() {
                if slot.tried.elapsed() < REOPEN {
                    return Err(StoreError::Engine {
                        path: self.path.clone(),
                        detail: "it has failed and is opened again soon".into(),
                    });
                }
                slot.tried = Instant::now();
                // Part of what is kept for such times may be in use.
                if self.disk()?.1 < RESERVE_MIN {
                    return Err(self.full());
                }
                slot.engine = Some(Engine::open(&self.path)?);
                tracing::info!("the store in {} works again", self.path.display());
            }
        }
        Ok(self.slot.read())
    }

    /// Does something with the engine.
    pub fn with<T>(&self, f: impl FnOnce(&Engine) -> Result<T, fjall::Error>) -> Result<T, StoreError> {
        let failed = |error: &fjall::Error| engine_error(&self.path, error);
        let slot = self.engine()?;
        let Some(engine) = &slot.engine else {
            return Err(failed(&fjall::Error::Poisoned));
        };
        let result = f(engine);
        drop(slot);
        result.map_err(|error| {
            // What it has not acknowledged is not there when it is opened again, as after a crash.
            let mut slot = self.slot.write();
            slot.engine = None;
            slot.tried = Instant::now();
            failed(&error)
        })
    }

    /// If the engine is `ready`, closes it, and opens it again after `meanwhile`. Nobody uses it before it has been
    /// `looked` after.
    pub fn reopen(
        &self,
        ready: impl FnOnce(&Engine) -> bool,
        meanwhile: impl FnOnce(),
        looked: impl FnOnce(&Engine),
    ) -> Result<(), StoreError> {
        let mut slot = self.slot.write();
        if !slot.engine.as_ref().is_some_and(ready) {
            return Ok(());
        }
        slot.engine = None;
        slot.tried = Instant::now();
        meanwhile();
        let engine = Engine::open(&self.path)?;
        looked(&engine);
        slot.engine = Some(engine);
        Ok(())
    }
}
