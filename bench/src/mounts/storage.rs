//! What a storage node's process does while mounts read, write and take leases: nothing, it is claimed. Shown by the time
//! it has had on a processor, by the requests it has answered, and by stopping it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::ops;
use crate::fs::micro_ops::{MIB, open};
use crate::procs;
use crate::progress::check;
use crate::stats::sig;
use crate::table::Table;

/// How long the process is stopped at most: less than peers wait for each other.
const STOPPED: Duration = Duration::from_secs(8);
/// Requests for an operation that there may be: those for whole files, and of the background.
const REQUESTS: f64 = 0.1;

/// A cluster and the storage node of it that is watched.
pub struct Watched {
    /// Its program.
    pub fsd: PathBuf,
    /// Its configuration.
    pub config: PathBuf,
    /// The storage node's process.
    pub pid: u32,
}

struct Counts {
    /// Answered by the storage node.
    requests: u64,
    /// Messages and batches of one-sided operations of all mounts.
    fabric: u64,
    /// Lease records that somebody has.
    held: u64,
}

impl Watched {
    fn counts(&self) -> anyhow::Result<Counts> {
        let report = procs::status(&self.fsd, &self.config).context("fsd status does not answer")?;
        let sum = |list: &str, name: &str| -> Option<u64> {
            let all = report.get(list)?.as_array()?;
            all.iter().map(|m| m.get(1)?.get("Ok")?.get(name)?.as_u64()).sum()
        };
        Ok(Counts {
            requests: sum("storage", "requests").context("requests in fsd status")?,
            fabric: sum("mounts", "messages").context("messages in fsd status")?,
            held: sum("storage", "exclusive")
                .zip(sum("storage", "shared"))
                .map(|(exclusive, shared)| exclusive + shared)
                .context("leases in fsd status")?,
        })
    }

    /// utime and stime of the process.
    fn ticks(&self) -> anyhow::Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).context("the storage node")?;
        cpu_of_stat(&stat).context("/proc/PID/stat")
    }

    fn watch(&self, run: impl FnOnce() -> anyhow::Result<u64>) -> anyhow::Result<Row> {
        // Asking is a request too.
        let first = self.counts()?;
        let before = self.counts()?;
        let (cpu, ticks) = (procs::cpu_time(self.pid), self.ticks()?);
        let start = Instant::now();
        let operations = run()?;
        let took = start.elapsed();
        let cpu = procs::cpu_time(self.pid).saturating_sub(cpu);
        let ticks = self.ticks()?.saturating_sub(ticks);
        let after = self.counts()?;
        let asking = (before.requests - first.requests, before.fabric - first.fabric);
        Ok(Row {
            operations,
            took,
            cpu,
            ticks,
            requests: (after.requests - before.requests).saturating_sub(asking.0),
            fabric: (after.fabric - before.fabric).saturating_sub(asking.1),
            leases: after.held.saturating_sub(before.held),
        })
    }

    /// Runs something while the process is stopped; how long it took.
    fn stopped(&self, run: impl FnOnce() -> anyhow::Result<u64>) -> anyhow::Result<Duration> {
        let pid = i32::try_from(self.pid)
            .ok()
            .and_then(Pid::from_raw)
            .context("the storage node's process")?;
        let (done, wait) = mpsc::channel::<()>();
        kill_process(pid, Signal::STOP)?;
        // It goes on whatever happens here.
        let guard = std::thread::spawn(move || {
            let _ = wait.recv_timeout(STOPPED);
            kill_process(pid, Signal::CONT)
        });
        let start = Instant::now();
        let result = run();
        let took = start.elapsed();
        drop(done);
        guard
            .join()
            .map_err(|_| anyhow::anyhow!("the guard died"))?
            .context("SIGCONT")?;
        result?;
        ensure!(took < STOPPED, "it waited for the storage node");
        Ok(took)
    }
}

struct Row {
    operations: u64,
    took: Duration,
    cpu: Duration,
    ticks: Duration,
    requests: u64,
    fabric: u64,
    leases: u64,
}

/// utime and stime of a line of `/proc/PID/stat`, which are in hundredths of a second.
fn cpu_of_stat(stat: &str) -> Option<Duration> {
    let fields = stat.rsplit_once(") ")?.1;
    let mut numbers = fields.split(' ').skip(11).map(str::parse::<u64>);
    let ticks = numbers.next()?.ok()? + numbers.next()?.ok()?;
    Some(Duration::from_millis(ticks * 10))
}

fn overwrite(file: &File, blocks: u64, round: u8) -> anyhow::Result<u64> {
    let block = vec![round; MIB];
    for n in 0..blocks {
        file.write_all_at(&block, n * MIB as u64)?;
        check()?;
    }
    Ok(blocks)
}

/// Empty files are one lease each and nothing else that a storage node has.
fn leases(dir: &Path, prefix: &str, count: u64) -> anyhow::Result<u64> {
    for n in 0..count {
        File::create_new(dir.join(format!("{prefix}{n}")))?;
    }
    Ok(count)
}

/// Measures it on two mounts of the cluster; the table, and what is wrong.
///
/// # Errors
/// A call fails, or the cluster does not answer.
pub fn run(watched: &Watched, dirs: &[PathBuf], mib: u64) -> anyhow::Result<(Table, Vec<String>)> {
    let header = [
        "operation",
        "operations",
        "seconds",
        "messages and batches of one-sided operations of the mounts",
        "leases taken",
        "requests to the storage node",
        "requests per operation",
        "its utime+stime, ms",
        "its CPU, ms",
        "idle in that time, ms",
        "beyond that, us per operation",
        "with its process stopped",
    ];
    let mut table = Table::new("The storage node's process meanwhile", &header);
    let mut wrong = Vec::new();
    let dir = &dirs[0];
    // What has been written before shall be stored.
    std::thread::sleep(Duration::from_secs(5));
    let idle = watched.watch(|| {
        std::thread::sleep(Duration::from_secs(5));
        Ok(0)
    })?;
    let idle_rate = idle.cpu.as_secs_f64() / idle.took.as_secs_f64();
    let mut row = |name: &str, row: Row, stopped: Option<anyhow::Result<Duration>>, judged: bool| {
        let own = row.cpu.as_secs_f64();
        let idle = idle_rate * row.took.as_secs_f64();
        let per = row.requests as f64 / row.operations.max(1) as f64;
        let done = match &stopped {
            None => "-".to_owned(),
            Some(Ok(took)) => format!("done, {} s", sig(took.as_secs_f64())),
            Some(Err(why)) => format!("NOT DONE: {why:#}"),
        };
        if judged && (per > REQUESTS || matches!(stopped, Some(Err(_)))) {
            wrong.push(format!(
                "{name}: {per:.2} requests per operation; stopped: {done}"
            ));
        }
        table.row(vec![
            name.to_owned(),
            row.operations.to_string(),
            sig(row.took.as_secs_f64()),
            row.fabric.to_string(),
            row.leases.to_string(),
            row.requests.to_string(),
            format!("{per:.3}"),
            sig(row.ticks.as_secs_f64() * 1e3),
            sig(own * 1e3),
            sig(idle * 1e3),
            sig((own - idle).max(0.0) * 1e6 / row.operations.max(1) as f64),
            done,
        ]);
    };
    row("nothing, for comparison", idle, None, false);

    let size = mib << 20;
    let read = |number: u64| -> anyhow::Result<File> {
        let reader = ops::written_elsewhere(dirs, size, number)?;
        // The background stores what was written: not the readers' doing.
        std::thread::sleep(Duration::from_secs(5));
        Ok(reader)
    };
    let checked = |reader: &File, number: u64| {
        ensure!(ops::read_through(reader, size, number)? == 0, "stale data");
        Ok(mib)
    };
    let reader = read(1)?;
    let counted = watched.watch(|| checked(&reader, 1))?;
    let reader = read(2)?;
    let stopped = watched.stopped(|| checked(&reader, 2));
    row("1 MiB read that misses every cache", counted, Some(stopped), true);

    let file = open(&dir.join("written"))?;
    overwrite(&file, mib, 1)?;
    file.sync_all()?;
    let counted = watched.watch(|| overwrite(&file, mib, 2))?;
    let stopped = watched.stopped(|| overwrite(&file, mib, 3));
    row("1 MiB overwrite", counted, Some(stopped), true);
    let stored = watched.watch(|| {
        std::thread::sleep(Duration::from_secs(5));
        Ok(mib)
    })?;
    row("(storing that in the background, per MiB)", stored, None, false);

    leases(dir, "warm", 4)?;
    let counted = watched.watch(|| leases(dir, "counted", 200))?;
    let stopped = watched.stopped(|| leases(dir, "stopped", 50));
    row("new empty file (one lease each)", counted, Some(stopped), true);
    Ok((table, wrong))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_found() {
        let stat = "17 (a (b) c) S 1 17 17 0 -1 4194560 100 0 0 0 250 30 0 0 20 0 9 0 100 1000 10 0";
        assert_eq!(cpu_of_stat(stat), Some(Duration::from_millis(2800)));
        assert_eq!(cpu_of_stat("17 (x) S"), None);
    }
}
