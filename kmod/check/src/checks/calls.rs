//! Other system calls that read or write.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::atomic::Ordering::SeqCst;

use anyhow::{Result, bail, ensure};
use distfuse_abi::Mode;

use super::{ensure_eq, read_at};
use crate::fixture::{Fixture, Task, ino};

fn sendfile(from: &File, to: &File, len: usize) -> Result<usize> {
    // SAFETY: no pointers.
    match unsafe { libc::sendfile(to.as_raw_fd(), from.as_raw_fd(), std::ptr::null_mut(), len) } {
        done if done < 0 => bail!("sendfile: {}", std::io::Error::last_os_error()),
        done => Ok(done.unsigned_abs()),
    }
}

pub fn splice() -> Result<()> {
    let fixture = Fixture::two()?;
    let one = fixture.open(0, "f0")?;
    let two = fixture.open(1, "f0")?;
    let other = fixture.open(1, "f1")?;
    for round in 0..20u8 {
        one.write_all_at(&vec![round; 65536], 0)?;
        (&two).rewind()?;
        (&other).rewind()?;
        let mut done = 0;
        while done < 65536 {
            match sendfile(&two, &other, 65536 - done)? {
                0 => bail!("sendfile ends at {done}"),
                n => done += n,
            }
        }
        let copy = fixture.open(0, "f1")?;
        ensure_eq!(read_at(&copy, 0, 65536)?, vec![round; 65536], "copy by sendfile");
        let (mut from, mut to) = (0i64, 0i64);
        let target = fixture.open(0, "f2")?;
        while from < 65536 {
            // SAFETY: two offsets, alive and ours.
            let done = unsafe {
                libc::copy_file_range(
                    two.as_raw_fd(),
                    &raw mut from,
                    fixture.open(1, "f2")?.as_raw_fd(),
                    &raw mut to,
                    65536,
                    0,
                )
            };
            if done <= 0 {
                bail!("copy_file_range: {done}: {}", std::io::Error::last_os_error());
            }
        }
        ensure_eq!(
            read_at(&target, 0, 65536)?,
            vec![round; 65536],
            "copy by copy_file_range"
        );
    }
    drop((one, two, other));
    fixture.end()
}

pub fn direct() -> Result<()> {
    let fixture = Fixture::two()?;
    let cached = fixture.open(0, "f0")?;
    let direct = fixture.open_with(1, "f0", libc::O_DIRECT)?;
    let mut buffer = vec![0u8; 8192 + 4096];
    let skip = buffer.as_ptr().align_offset(4096);
    for round in 0..30u8 {
        cached.write_all_at(&[round; 4096], 4096)?;
        let Some(aligned) = buffer.get_mut(skip..skip + 4096) else {
            bail!("no aligned buffer");
        };
        direct.read_exact_at(aligned, 4096)?;
        ensure!(
            aligned.iter().all(|byte| *byte == round),
            "direct read in round {round}"
        );
        aligned.fill(round + 100);
        direct.write_all_at(aligned, 8192)?;
        ensure_eq!(
            read_at(&cached, 8192, 4096)?,
            vec![round + 100; 4096],
            "cached read"
        );
        direct.write_all_at(aligned, 65536 + u64::from(round) * 4096)?;
        ensure_eq!(
            cached.metadata()?.len(),
            65536 + (u64::from(round) + 1) * 4096,
            "size"
        );
    }
    drop((cached, direct));
    fixture.end()
}

pub fn append() -> Result<()> {
    let fixture = Fixture::two()?;
    let tasks: Vec<_> = (0..2u8)
        .map(|mount| {
            let mut file = fixture.open_with(mount.into(), "log", libc::O_APPEND | libc::O_CREAT)?;
            Ok(Task::start(move || -> std::io::Result<()> {
                for n in 0..100u8 {
                    file.write_all(&[mount, n, b'\n'])?;
                }
                Ok(())
            }))
        })
        .collect::<Result<_>>()?;
    for task in tasks {
        task.end("appending")??;
    }
    for mount in 0..2 {
        let mut log = Vec::new();
        fixture.open(mount, "log")?.read_to_end(&mut log)?;
        ensure_eq!(log.len(), 600, "bytes seen by mount {mount}");
        let mut next = [0u8; 2];
        for line in log.chunks(3) {
            let [from, n, b'\n'] = line else {
                bail!("torn: {line:?}");
            };
            let Some(next) = next.get_mut(usize::from(*from)) else {
                bail!("from nobody: {line:?}");
            };
            ensure_eq!(*n, *next, "next of mount {from}");
            *next += 1;
        }
    }
    fixture.end()
}

pub fn sizes() -> Result<()> {
    let fixture = Fixture::two()?;
    let files = [fixture.open(0, "f0")?, fixture.open(1, "f0")?];
    for round in 0..60u64 {
        let (me, other) = match round % 2 {
            0 => (&files[0], &files[1]),
            _ => (&files[1], &files[0]),
        };
        let size = 1000 + round * 7919 % 90_000;
        match round % 3 {
            0 => me.set_len(size)?,
            1 => {
                me.set_len(0)?;
                me.write_all_at(&vec![round as u8; size as usize], 0)?;
            }
            _ => {
                me.set_len(10)?;
                // SAFETY: no pointers.
                let done = unsafe { libc::fallocate(me.as_raw_fd(), 0, 0, size as i64) };
                ensure_eq!(done, 0, "fallocate");
            }
        }
        ensure_eq!(other.metadata()?.len(), size, "size in round {round}");
        let mut end = other;
        ensure_eq!(end.seek(SeekFrom::End(0))?, size, "end in round {round}");
        let data = read_at(other, 0, 200_000)?;
        ensure_eq!(data.len() as u64, size, "bytes in round {round}");
        match round % 3 {
            1 => ensure!(
                data.iter().all(|byte| *byte == round as u8),
                "contents in round {round}"
            ),
            2 => ensure!(
                data.iter().skip(10).all(|byte| *byte == 0),
                "not zero in round {round}"
            ),
            _ => {}
        }
    }
    drop(files);
    fixture.end()
}

pub fn nowait() -> Result<()> {
    let fixture = Fixture::plain()?;
    let manager = fixture.manager()?;
    manager.automatic.store(false, SeqCst);
    let file = fixture.open(0, "f0")?;
    let read = || {
        let mut byte = 0u8;
        let part = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        // SAFETY: one byte, alive and ours.
        match unsafe { libc::preadv2(file.as_raw_fd(), &raw const part, 1, 0, libc::RWF_NOWAIT) } {
            1 => Ok(byte),
            _ => Err(std::io::Error::last_os_error().raw_os_error()),
        }
    };
    let first = read();
    if first == Err(Some(libc::EOPNOTSUPP)) {
        // FUSE files are not for it in these kernels: then it does not come to us.
        println!("        FUSE refuses NOWAIT on this kernel");
    } else {
        ensure_eq!(first, Err(Some(libc::EAGAIN)), "without a lease");
        manager.give(0, ino(0), Mode::Shared)?;
        read_at(&file, 0, 4096)?;
        ensure_eq!(read(), Ok(b'a'), "with a lease");
    }
    drop(file);
    fixture.end()
}

pub fn others() -> Result<()> {
    let fixture = Fixture::plain()?;
    let manager = fixture.manager()?;
    manager.automatic.store(false, SeqCst);
    let file = fixture.open(0, "f0")?;
    let ahead = file.try_clone()?;
    // SAFETY: no pointers.
    let ahead = Task::start(move || unsafe {
        libc::posix_fadvise(ahead.as_raw_fd(), 0, 65536, libc::POSIX_FADV_WILLNEED)
    });
    ahead.waits("reading ahead without a lease")?;
    manager.give(0, ino(0), Mode::Shared)?;
    ensure_eq!(ahead.end("reading ahead")?, 0, "fadvise");
    let end = fixture.open(0, "f1")?;
    let end = Task::start(move || (&end).seek(SeekFrom::End(0)));
    end.waits("a seek to the end without a lease")?;
    manager.give(0, ino(1), Mode::Shared)?;
    ensure_eq!(end.end("the seek")??, 65536, "end");

    // One that was made and opened in one call is ours from the start.
    let made = fixture.open_with(0, "made", libc::O_CREAT)?;
    let number = ino(8);
    let writer = made.try_clone()?;
    let writer = Task::start(move || writer.write_all_at(&[b'N'; 300_000], 0));
    writer.waits("a write to a new file without a lease")?;
    manager.give(0, number, Mode::Exclusive)?;
    writer.end("the write")??;
    manager.take(0, number, Mode::None)?;
    ensure_eq!(
        fixture.control.read(number, 0, 400_000)?,
        vec![b'N'; 300_000],
        "at the server"
    );
    drop((file, made));
    fixture.end()
}

/// FUSE has no freezing, and the extension does not pretend to.
pub fn freeze() -> Result<()> {
    /// `_IOWR('X', 119, int)`, linux/fs.h.
    const FIFREEZE: libc::c_ulong = 0xc004_5877;
    let fixture = Fixture::one()?;
    let file = fixture.open(0, "f0")?;
    file.write_all_at(b"dirty", 0)?;
    let mut level: libc::c_int = 0;
    // SAFETY: the call is given an int, which lives.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), FIFREEZE, &raw mut level) };
    let error = std::io::Error::last_os_error();
    ensure_eq!(
        (done, error.raw_os_error()),
        (-1, Some(libc::EOPNOTSUPP)),
        "freezing"
    );
    file.write_all_at(b"goes on", 0)?;
    drop(file);
    fixture.end()
}

pub fn exec() -> Result<()> {
    let fixture = Fixture::two()?;
    let shell = std::fs::read("/usr/bin/dash").or_else(|_| std::fs::read("/bin/sh"))?;
    let program = fixture.open_with(0, "program", libc::O_CREAT)?;
    program.set_permissions(std::fs::Permissions::from_mode(0o755))?;
    for round in 0..6 {
        let says = format!("round {round}");
        program.set_len(0)?;
        if round % 2 == 0 {
            program.write_all_at(&shell, 0)?;
        } else {
            program.write_all_at(format!("#!/bin/sh\necho {says}\n").as_bytes(), 0)?;
        }
        let output = std::process::Command::new(fixture.path(1, "program"))
            .args(["-c", &format!("echo {says}")])
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure_eq!(text.trim(), says, "what the program says");
    }
    drop(program);
    fixture.end()
}
