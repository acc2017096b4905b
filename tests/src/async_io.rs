//! Reads and writes that are handed to the kernel in batches: Linux AIO and io_uring; and a check of them on one mount
//! beside plain calls on another.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, anyhow, bail, ensure};

/// Length of a block, which is read and written as a whole: several pages, so that half of one can be seen.
pub const BLOCK: usize = 16_384;
/// Blocks of the file: half of them belong to each side.
const BLOCKS: usize = 16;

/// Memory for a block, as direct I/O wants it.
#[repr(C, align(4096))]
pub struct Block([u64; BLOCK / 8]);

impl Block {
    fn of(value: u64) -> Box<Self> {
        Box::new(Self([value; BLOCK / 8]))
    }

    /// What all of it consists of.
    fn value(&self) -> anyhow::Result<u64> {
        let first = self.0[0];
        let other = self.0.iter().position(|word| *word != first);
        match other {
            None => Ok(first),
            Some(at) => bail!("torn: {first}, and {} from byte {}", self.0[at], at * 8),
        }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: all of it is initialised and has no padding.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), BLOCK) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: all of it is initialised, has no padding, and any bytes are a value.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), BLOCK) }
    }
}

/// An operation of a batch.
pub struct Operation {
    /// The block of the file.
    pub at: usize,
    /// Whether it is written, not read.
    pub write: bool,
    /// What is written, or has been read.
    pub data: Box<Block>,
}

/// A way to hand operations to the kernel.
pub trait Engine {
    /// Carries out a batch; returns when all of it is done.
    ///
    /// # Errors
    /// Those of any operation, also that it was done in part.
    fn run(&mut self, file: &File, batch: &mut [Operation]) -> anyhow::Result<()>;
}

/// Linux AIO.
pub struct Aio(libc::c_ulong);

/// The answer to one operation of Linux AIO.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Event {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

fn syscall(result: libc::c_long) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

impl Aio {
    /// For batches of up to `depth` operations.
    ///
    /// # Errors
    /// Those of io_setup(2): ENOSYS where the kernel was built without.
    pub fn new(depth: usize) -> io::Result<Self> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes the context's number there.
        syscall(unsafe { libc::syscall(libc::SYS_io_setup, depth, &raw mut context) })?;
        Ok(Self(context))
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: no memory is involved. It waits for what is still under way.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

impl Engine for Aio {
    fn run(&mut self, file: &File, batch: &mut [Operation]) -> anyhow::Result<()> {
        // IOCB_CMD_PREAD and IOCB_CMD_PWRITE.
        const READ: u16 = 0;
        const WRITE: u16 = 1;
        let mut blocks: Vec<libc::iocb> = Vec::new();
        for (i, operation) in batch.iter_mut().enumerate() {
            // SAFETY: zeros are a value of this structure of numbers.
            let mut block: libc::iocb = unsafe { std::mem::zeroed() };
            block.aio_data = i as u64;
            block.aio_lio_opcode = if operation.write { WRITE } else { READ };
            block.aio_fildes = file.as_raw_fd() as u32;
            block.aio_buf = operation.data.bytes_mut().as_mut_ptr() as u64;
            block.aio_nbytes = BLOCK as u64;
            block.aio_offset = (operation.at * BLOCK) as i64;
            blocks.push(block);
        }
        let mut list: Vec<*mut libc::iocb> = blocks.iter_mut().map(|block| &raw mut *block).collect();
        let mut handed = 0;
        while handed < list.len() {
            let rest = &mut list[handed..];
            // SAFETY: the blocks and the buffers they name live until the answers to all of them are here.
            handed += syscall(unsafe {
                libc::syscall(libc::SYS_io_submit, self.0, rest.len(), rest.as_mut_ptr())
            })?;
        }
        let mut events = vec![Event::default(); batch.len()];
        let mut answered = 0;
        while answered < events.len() {
            let rest = &mut events[answered..];
            // Without a time limit: the kernel may write to the buffers until it has answered. Who hangs here is freed by the
            // end of the mount.
            // SAFETY: there is room for as many events.
            let got = syscall(unsafe {
                libc::syscall(
                    libc::SYS_io_getevents,
                    self.0,
                    rest.len(),
                    rest.len(),
                    rest.as_mut_ptr(),
                    std::ptr::null::<libc::timespec>(),
                )
            });
            match got {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                got => answered += got?,
            }
        }
        let mut answers = events.iter().map(|event| (event.data, event.result));
        answers.try_for_each(|answer| done(batch, answer))
    }
}

/// Whether an operation, by its place in the batch, was carried out.
fn done(batch: &[Operation], (place, result): (u64, i64)) -> anyhow::Result<()> {
    let Operation { at, write, .. } = &batch[place as usize];
    let what = if *write { "write" } else { "read" };
    match result {
        n if n == BLOCK as i64 => Ok(()),
        n if n < 0 => {
            Err(io::Error::from_raw_os_error(-n as i32)).with_context(|| format!("{what} of block {at}"))
        }
        n => bail!("{what} of block {at}: {n} bytes of {BLOCK}"),
    }
}

/// io_uring.
pub struct Uring(io_uring::IoUring);

impl Uring {
    /// For batches of up to `depth` operations.
    ///
    /// # Errors
    /// Those of io_uring_setup(2): ENOSYS where the kernel was built without, EPERM where it is not allowed.
    pub fn new(depth: usize) -> io::Result<Self> {
        Ok(Self(io_uring::IoUring::new(depth as u32)?))
    }
}

impl Engine for Uring {
    fn run(&mut self, file: &File, batch: &mut [Operation]) -> anyhow::Result<()> {
        use io_uring::{opcode, types};
        let fd = types::Fd(file.as_raw_fd());
        for (i, operation) in batch.iter_mut().enumerate() {
            let memory = operation.data.bytes_mut().as_mut_ptr();
            let at = (operation.at * BLOCK) as u64;
            let entry = if operation.write {
                opcode::Write::new(fd, memory, BLOCK as u32).offset(at).build()
            } else {
                opcode::Read::new(fd, memory, BLOCK as u32).offset(at).build()
            };
            // SAFETY: the file is open, and buffers live, until the answers to all of them are here.
            unsafe { self.0.submission().push(&entry.user_data(i as u64)) }.map_err(|e| anyhow!("{e}"))?;
        }
        let mut results = Vec::new();
        while results.len() < batch.len() {
            match self.0.submit_and_wait(batch.len() - results.len()) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error.into()),
                _ => results.extend(
                    self.0
                        .completion()
                        .map(|entry| (entry.user_data(), entry.result().into())),
                ),
            }
        }
        results.into_iter().try_for_each(|answer| done(batch, answer))
    }
}

/// What is written where: who has published it has written it before.
#[derive(Default)]
struct Published {
    /// By block: values that were about to be written, and that have been.
    begun: [AtomicU64; BLOCKS],
    written: [AtomicU64; BLOCKS],
}

/// Batches of an engine at `first`, where it writes the even blocks and reads all, and plain calls at `second`, which
/// writes the odd ones and reads all, at the same time on one file. A block that was read must be whole, no older than
/// what had been written when the read began, and not newer than what was begun when it ended.
///
/// # Errors
/// One of these does not hold, or a call failed.
pub fn check(
    engine: &mut dyn Engine,
    first: (&Path, i32),
    second: &Path,
    batches: u64,
    depth: usize,
) -> anyhow::Result<()> {
    let file = crate::sys::open(first.0, libc::O_RDWR | libc::O_CREAT | first.1)?;
    file.set_len((BLOCKS * BLOCK) as u64)?;
    let other = crate::sys::open(second, libc::O_RDWR)?;
    let (published, over) = (Published::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let plain = scope.spawn(|| plainly(&other, &published, &over));
        let batched = in_batches(engine, &file, &published, batches, depth);
        over.store(true, Ordering::SeqCst);
        let rounds = plain.join().map_err(|_| anyhow!("panic"))??;
        batched?;
        ensure!(rounds > 1, "the other mount came to {rounds} rounds only");
        Ok(())
    })?;
    // Both sides at rest: all of it, everywhere.
    for at in 0..BLOCKS {
        let want = published.written[at].load(Ordering::SeqCst);
        for file in [File::open(first.0)?, File::open(second)?] {
            let mut data = Block::of(0);
            file.read_exact_at(data.bytes_mut(), (at * BLOCK) as u64)?;
            let got = data.value()?;
            ensure!(got == want, "block {at} is {got} at the end, not {want}");
        }
    }
    Ok(())
}

impl Published {
    fn floor(&self, at: usize) -> u64 {
        self.written[at].load(Ordering::SeqCst)
    }

    fn begin(&self, at: usize) -> u64 {
        self.begun[at].fetch_add(1, Ordering::SeqCst) + 1
    }

    fn end(&self, at: usize, value: u64) {
        self.written[at].store(value, Ordering::SeqCst);
    }

    fn read(&self, at: usize, floor: u64, data: &Block) -> anyhow::Result<()> {
        let value = data.value().with_context(|| format!("block {at}"))?;
        let ceiling = self.begun[at].load(Ordering::SeqCst);
        ensure!(
            (floor..=ceiling).contains(&value),
            "block {at}: {value}, where {floor} was written before and {ceiling} is the last"
        );
        Ok(())
    }
}

fn in_batches(
    engine: &mut dyn Engine,
    file: &File,
    published: &Published,
    batches: u64,
    depth: usize,
) -> anyhow::Result<()> {
    for batch in 0..batches {
        let place = |i: usize| (batch as usize * 5 + i * 3) % BLOCKS;
        let mut floors = Vec::new();
        let mut operations: Vec<Operation> = (0..depth)
            .map(|i| {
                let at = place(i);
                // A block once in a batch to be written, so that its value is known.
                let write = at.is_multiple_of(2) && (0..i).all(|earlier| place(earlier) != at);
                floors.push(published.floor(at));
                let value = if write { published.begin(at) } else { 0 };
                Operation {
                    at,
                    write,
                    data: Block::of(value),
                }
            })
            .collect();
        engine
            .run(file, &mut operations)
            .with_context(|| format!("batch {batch}"))?;
        for (operation, floor) in operations.iter().zip(floors) {
            if operation.write {
                published.end(operation.at, operation.data.value()?);
            } else {
                published
                    .read(operation.at, floor, &operation.data)
                    .with_context(|| format!("batch {batch}"))?;
            }
        }
    }
    Ok(())
}

/// Rounds of plain reads and writes until the batches are over; their number.
fn plainly(file: &File, published: &Published, over: &AtomicBool) -> anyhow::Result<u64> {
    let mut rounds = 0;
    while !over.load(Ordering::SeqCst) {
        for at in 0..BLOCKS {
            let place = (at * BLOCK) as u64;
            if at % 2 == 1 {
                let value = published.begin(at);
                file.write_all_at(Block::of(value).bytes(), place)?;
                published.end(at, value);
            }
            let floor = published.floor(at);
            let mut data = Block::of(0);
            file.read_exact_at(data.bytes_mut(), place)?;
            published
                .read(at, floor, &data)
                .with_context(|| format!("plain round {rounds}"))?;
        }
        rounds += 1;
    }
    Ok(rounds)
}
