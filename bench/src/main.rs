//! The benchmark program.
mod nullfs;
fn main() -> anyhow::Result<()> {
    use clap::ValueEnum;
    use std::io::{Read, Write, Seek};
    use std::os::unix::fs::FileExt;
    for mode in nullfs::NullMode::value_variants() {
        let dir = std::path::PathBuf::from(format!("/tmp/null{mode:?}"));
        std::fs::create_dir_all(&dir)?;
        let s = nullfs::NullFs::new(*mode).mount(&dir, 2)?;
        let f = std::fs::OpenOptions::new().read(true).write(true).create(true).open(dir.join("a"))?;
        let buf = vec![7u8; 1 << 20];
        for i in 0..16 { f.write_all_at(&buf, i << 20)?; }
        for round in 0..2 {
        let n = 30000u64;
        let t = std::time::Instant::now();
        for i in 0..n { f.write_all_at(&buf[..4096], (i % 4096) * 4096)?; }
        let w = t.elapsed().as_nanos() as f64 / n as f64 / 1000.0;
        let mut b = vec![0u8; 4096];
        for i in 0..4096u64 { f.read_exact_at(&mut b, i * 4096)?; }
        let t = std::time::Instant::now();
        for i in 0..n { f.read_exact_at(&mut b, (i % 4096) * 4096)?; }
        let r = t.elapsed().as_nanos() as f64 / n as f64 / 1000.0;
        let t = std::time::Instant::now();
        for i in 0..200u64 { f.write_all_at(&buf, (i%16) << 20)?; }
        let sw = 200.0 / t.elapsed().as_secs_f64();
        println!("{mode:?} {round}: write {w:.2} us, read {r:.2} us, 1M write {sw:.0} MB/s");
        }
        drop(f);
        s.umount_and_join()?;
    }
    Ok(())
}
