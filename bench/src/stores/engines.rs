//! The engines behind one face.

use std::path::Path;

use anyhow::{Context, bail};

/// How far a commit must get before it returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The death of the process cannot undo it.
    Process,
    /// Nor can that of the machine.
    Disk,
}

/// What the metadata server needs.
pub trait Engine {
    /// Puts together.
    fn commit(&self, puts: &[(Vec<u8>, Vec<u8>)], how: Durability) -> anyhow::Result<()>;
    /// One value.
    fn get(&self, key: &[u8]) -> anyhow::Result<Option<Vec<u8>>>;
    /// Reads at most `limit` pairs in order; how many.
    fn scan(&self, from: &[u8], limit: usize) -> anyhow::Result<usize>;
}

/// Names for [`open`].
pub const KINDS: &[&str] = &["fjall", "redb", "redb, sync skipped", "heed (LMDB)", "rusqlite"];

/// Opens or makes a store.
pub fn open(kind: &str, dir: &Path) -> anyhow::Result<Box<dyn Engine>> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(match kind {
        "fjall" => Box::new(Fjall::open(dir)?),
        "redb" => Box::new(Redb::open(dir, false)?),
        "redb, sync skipped" => Box::new(Redb::open(dir, true)?),
        "heed (LMDB)" => Box::new(Heed::open(dir)?),
        "rusqlite" => Box::new(Sqlite::open(dir)?),
        _ => bail!("no engine {kind}"),
    })
}

struct Fjall {
    db: fjall::Database,
    keys: fjall::Keyspace,
}

impl Fjall {
    fn open(dir: &Path) -> anyhow::Result<Self> {
        let db = fjall::Database::builder(dir)
            .manual_journal_persist(false)
            .open()?;
        let keys = db.keyspace("data", fjall::KeyspaceCreateOptions::default)?;
        Ok(Self { db, keys })
    }
}

impl Engine for Fjall {
    fn commit(&self, puts: &[(Vec<u8>, Vec<u8>)], how: Durability) -> anyhow::Result<()> {
        let mut batch = self.db.batch();
        for (k, v) in puts {
            batch.insert(&self.keys, k.as_slice(), v.as_slice());
        }
        batch.commit()?;
        let mode = match how {
            Durability::Process => fjall::PersistMode::Buffer,
            Durability::Disk => fjall::PersistMode::SyncAll,
        };
        Ok(self.db.persist(mode)?)
    }
    fn get(&self, key: &[u8]) -> anyhow::Result<Option<Vec<u8>>> {
        Ok(self.keys.get(key)?.map(|v| v.to_vec()))
    }
    fn scan(&self, from: &[u8], limit: usize) -> anyhow::Result<usize> {
        let mut n = 0;
        for pair in self.keys.range(from..).take(limit) {
            let (k, v) = pair.into_inner()?;
            n += usize::from(!k.is_empty() && !v.is_empty());
        }
        Ok(n)
    }
}

/// A file backend whose syncs are skipped while asked to: commits then reach the page cache in order.
#[derive(Debug)]
struct NoSync {
    file: redb::backends::FileBackend,
    skip: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl redb::StorageBackend for NoSync {
    fn len(&self) -> std::io::Result<u64> {
        self.file.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.file.read(offset, out)
    }
    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.file.set_len(len)
    }
    fn sync_data(&self) -> std::io::Result<()> {
        if self.skip.load(std::sync::atomic::Ordering::Relaxed) {
            Ok(())
        } else {
            self.file.sync_data()
        }
    }
    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.file.write(offset, data)
    }
    fn close(&self) -> std::io::Result<()> {
        self.file.close()
    }
}

const REDB: redb::TableDefinition<'static, &[u8], &[u8]> = redb::TableDefinition::new("data");

struct Redb {
    db: redb::Database,
    skip: Option<std::sync::Arc<std::sync::atomic::AtomicBool>>,
}

impl Redb {
    fn open(dir: &Path, skip: bool) -> anyhow::Result<Self> {
        let path = dir.join("redb");
        let (db, skip) = if skip {
            let file = std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)?;
            let flag = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
            let backend = NoSync {
                file: redb::backends::FileBackend::new(file)?,
                skip: std::sync::Arc::clone(&flag),
            };
            (redb::Builder::new().create_with_backend(backend)?, Some(flag))
        } else {
            (redb::Database::create(path)?, None)
        };
        Ok(Self { db, skip })
    }
}

impl Engine for Redb {
    fn commit(&self, puts: &[(Vec<u8>, Vec<u8>)], how: Durability) -> anyhow::Result<()> {
        let mut tx = self.db.begin_write()?;
        match &self.skip {
            Some(skip) => skip.store(how == Durability::Process, std::sync::atomic::Ordering::Relaxed),
            // Its own way of not syncing: nothing is on disk before the next commit that syncs.
            None if how == Durability::Process => tx.set_durability(redb::Durability::None)?,
            None => {}
        }
        {
            let mut table = tx.open_table(REDB)?;
            for (k, v) in puts {
                table.insert(k.as_slice(), v.as_slice())?;
            }
        }
        Ok(tx.commit()?)
    }
    fn get(&self, key: &[u8]) -> anyhow::Result<Option<Vec<u8>>> {
        use redb::ReadableDatabase;
        let tx = self.db.begin_read()?;
        let table = match tx.open_table(REDB) {
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
            other => other?,
        };
        Ok(table.get(key)?.map(|v| v.value().to_vec()))
    }
    fn scan(&self, from: &[u8], limit: usize) -> anyhow::Result<usize> {
        use redb::ReadableDatabase;
        let tx = self.db.begin_read()?;
        let table = tx.open_table(REDB)?;
        let mut n = 0;
        for pair in table.range::<&[u8]>(from..)?.take(limit) {
            let (k, v) = pair?;
            n += usize::from(!k.value().is_empty() && !v.value().is_empty());
        }
        Ok(n)
    }
}

struct Heed {
    env: heed::Env,
    data: heed::Database<heed::types::Bytes, heed::types::Bytes>,
}

impl Heed {
    fn open(dir: &Path) -> anyhow::Result<Self> {
        let mut options = heed::EnvOpenOptions::new();
        options.map_size(4 << 30);
        // SAFETY: the file is changed by nobody else; NO_SYNC costs durability only, and commits sync below
        // where they must.
        let env = unsafe {
            options.flags(heed::EnvFlags::NO_SYNC);
            options.open(dir)?
        };
        let mut tx = env.write_txn()?;
        let data = env.create_database(&mut tx, None)?;
        tx.commit()?;
        Ok(Self { env, data })
    }
}

impl Engine for Heed {
    fn commit(&self, puts: &[(Vec<u8>, Vec<u8>)], how: Durability) -> anyhow::Result<()> {
        let mut tx = self.env.write_txn()?;
        for (k, v) in puts {
            self.data.put(&mut tx, k, v)?;
        }
        tx.commit()?;
        if how == Durability::Disk {
            self.env.force_sync()?;
        }
        Ok(())
    }
    fn get(&self, key: &[u8]) -> anyhow::Result<Option<Vec<u8>>> {
        let tx = self.env.read_txn()?;
        Ok(self.data.get(&tx, key)?.map(<[u8]>::to_vec))
    }
    fn scan(&self, from: &[u8], limit: usize) -> anyhow::Result<usize> {
        let tx = self.env.read_txn()?;
        let range = (std::ops::Bound::Included(from), std::ops::Bound::Unbounded);
        let mut n = 0;
        for pair in self.data.range(&tx, &range)?.take(limit) {
            let (k, v) = pair?;
            n += usize::from(!k.is_empty() && !v.is_empty());
        }
        Ok(n)
    }
}

struct Sqlite(rusqlite::Connection);

impl Sqlite {
    fn open(dir: &Path) -> anyhow::Result<Self> {
        let db = rusqlite::Connection::open(dir.join("db"))?;
        db.pragma_update(None, "journal_mode", "wal")?;
        db.execute(
            "create table if not exists data (k blob primary key, v blob) without rowid",
            [],
        )?;
        Ok(Self(db))
    }
}

impl Engine for Sqlite {
    fn commit(&self, puts: &[(Vec<u8>, Vec<u8>)], how: Durability) -> anyhow::Result<()> {
        let level = if how == Durability::Disk { "full" } else { "off" };
        self.0.pragma_update(None, "synchronous", level)?;
        let tx = self.0.unchecked_transaction()?;
        {
            let mut put = tx.prepare_cached("insert or replace into data values (?1, ?2)")?;
            for (k, v) in puts {
                put.execute((k, v))?;
            }
        }
        Ok(tx.commit()?)
    }
    fn get(&self, key: &[u8]) -> anyhow::Result<Option<Vec<u8>>> {
        use rusqlite::OptionalExtension;
        let mut get = self.0.prepare_cached("select v from data where k = ?1")?;
        Ok(get.query_row([key], |row| row.get(0)).optional()?)
    }
    fn scan(&self, from: &[u8], limit: usize) -> anyhow::Result<usize> {
        let mut scan = self
            .0
            .prepare_cached("select k, v from data where k >= ?1 order by k limit ?2")?;
        let mut rows = scan.query((from, limit))?;
        let mut n = 0;
        while let Some(row) = rows.next()? {
            let (k, v) = (row.get_ref(0)?.as_blob()?, row.get_ref(1)?.as_blob()?);
            n += usize::from(!k.is_empty() && !v.is_empty());
        }
        Ok(n)
    }
}
