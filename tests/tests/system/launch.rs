//! Jobs: `fsd launch` with ssh, and under Open MPI; network namespaces are the hosts.

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::guard;
use system_tests::hosts::Hosts;
use system_tests::process::fsd_binary;

const LIMIT: Duration = Duration::from_secs(120);
/// Every client writes a file, and waits until it reads everybody's; the last one is not content.
const JOB: &str = r#"
set -e
echo "I am $FSD_CLIENT" > "$FSD_MOUNT/from$FSD_CLIENT"
i=0
while [ $i -lt $FSD_CLIENTS ]; do
    while ! [ -s "$FSD_MOUNT/from$i" ]; do sleep 0.02; done
    [ "$(cat "$FSD_MOUNT/from$i")" = "I am $i" ]
    i=$((i + 1))
done
echo "rank $FSD_RANK of $FSD_SIZE saw $i"
[ "$FSD_RANK" != 1 ] || exit 7
"#;

fn text(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// Does a process of one of the hosts see a mount below this folder?
fn is_mounted(hosts: &Hosts, dir: &Path) -> anyhow::Result<bool> {
    let below = format!(" {}/", dir.to_string_lossy());
    // Processes that have ended meanwhile see none.
    let sees = |pid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/mounts")).is_ok_and(|all| all.contains(&below))
    };
    Ok(hosts.pids()?.iter().any(sees))
}

/// The job's output shows that all clients saw each other, and its status is the worst one's.
fn all_saw_all(output: &Output, clients: &[u32], size: u32, status: i32) -> anyhow::Result<()> {
    let (out, err) = text(output);
    let n = clients.len();
    for rank in clients {
        let line = format!("rank {rank} of {size} saw {n}");
        ensure!(out.contains(&line), "'{line}' is missing in\n{out}\n{err}");
    }
    ensure!(
        output.status.code() == Some(status),
        "{}\n{out}\n{err}",
        output.status
    );
    Ok(())
}

fn launch() -> anyhow::Result<Command> {
    let mut command = Command::new(fsd_binary()?);
    command
        .args(["launch", "--pool", "64MiB"])
        .env("RUST_LOG", "warn");
    Ok(command)
}

fn test(body: impl FnOnce() -> anyhow::Result<()> + Send + 'static) -> anyhow::Result<()> {
    guard::within(LIMIT, body, || ())
}

#[test]
fn over_ssh() -> anyhow::Result<()> {
    test(|| {
        let hosts = Hosts::new(3)?;
        let (file, ssh) = (hosts.hostfile()?, hosts.ssh());
        let output = launch()?
            .arg("--hostfile")
            .arg(file)
            .arg("--ssh")
            .arg(ssh)
            .args([
                "--roles",
                "meta=0,storage=0-1,client=1-2",
                "--tag",
                "--",
                "sh",
                "-c",
                JOB,
            ])
            .output()?;
        all_saw_all(&output, &[1, 2], 3, 7)?;
        let tag = format!("[{}] rank 1 of 3", hosts.address(1));
        ensure!(text(&output).0.contains(&tag), "'{tag}' is missing: {output:?}");
        hosts.wait_quiet(Duration::from_secs(1))
    })
}

#[test]
fn over_ssh_until_interrupted_with_stores_kept() -> anyhow::Result<()> {
    test(|| {
        let hosts = Hosts::new(2)?;
        let (state, dir) = (hosts.dir().join("state"), hosts.dir().join("mnt"));
        for (round, job) in [
            "echo kept > $FSD_MOUNT/file$FSD_RANK; sync $FSD_MOUNT/file$FSD_RANK",
            "cat $FSD_MOUNT/file0 $FSD_MOUNT/file1",
        ]
        .into_iter()
        .enumerate()
        {
            let output = launch()?
                .args([
                    "--hosts",
                    &format!("{},{}", hosts.address(0), hosts.address(1)),
                    "--ssh",
                ])
                .arg(hosts.ssh())
                .arg("--state")
                .arg(&state)
                .args(["--", "sh", "-c", job])
                .output()?;
            let (out, err) = text(&output);
            ensure!(output.status.success(), "round {round}: {out}\n{err}");
            ensure!(round == 0 || out == "kept\n".repeat(4), "round {round}: {out}");
        }
        // Without a command it runs until it is told.
        let mut child = launch()?
            .args(["--hosts", &hosts.address(0), "--ssh"])
            .arg(hosts.ssh())
            .arg("--dir")
            .arg(&dir)
            .spawn()?;
        let start = Instant::now();
        // The mount is in the host's own namespace.
        while !is_mounted(&hosts, &dir)? {
            ensure!(
                start.elapsed() < Duration::from_secs(30),
                "the job does not start"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        let pid = rustix::process::Pid::from_raw(child.id() as i32).context("pid")?;
        rustix::process::kill_process(pid, rustix::process::Signal::INT)?;
        let status = child.wait()?;
        ensure!(status.success(), "after an interrupt: {status}");
        hosts.wait_quiet(Duration::from_secs(1))
    })
}

/// The members cannot always reach the host that starts them.
#[test]
fn over_ssh_meeting_at_the_first_host() -> anyhow::Result<()> {
    test(|| {
        let hosts = Hosts::new(3)?;
        let start = |meet: &str| -> anyhow::Result<Command> {
            let mut command = launch()?;
            command
                .arg("--hostfile")
                .arg(hosts.hostfile()?)
                .arg("--ssh")
                .arg(hosts.ssh());
            command.args(["--rendezvous", meet, "--wait", "20"]);
            Ok(command)
        };
        let meet = format!("{}:23007", hosts.address(0));
        let output = start(&meet)?
            .args(["--roles", "meta=0,storage=0-1,client=1-2", "--", "sh", "-c", JOB])
            .output()?;
        all_saw_all(&output, &[1, 2], 3, 7)?;
        hosts.wait_quiet(Duration::from_secs(5))?;
        // Of the host that starts it, as before.
        let output = start(&format!("{}:23008", hosts.head()))?
            .args(["--", "true"])
            .output()?;
        ensure!(output.status.success(), "{output:?}");
        // Where nobody leads it is told at once.
        let begun = Instant::now();
        let output = start(&format!("{}:23009", hosts.address(1)))?
            .args(["--", "true"])
            .output()?;
        let (_, err) = text(&output);
        ensure!(
            err.contains("not an address of the first one's host") && !output.status.success(),
            "{err}"
        );
        ensure!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
        hosts.wait_quiet(Duration::from_secs(30))?;
        // Without a command it runs until it is told; and it does not outlive who started it.
        for signal in [rustix::process::Signal::INT, rustix::process::Signal::KILL] {
            let mut child = start(&meet)?.arg("--roles").arg("client=0-2").spawn()?;
            let begun = Instant::now();
            // A member, its mount, and what serves.
            while hosts.pids()?.len() < 8 {
                ensure!(
                    begun.elapsed() < Duration::from_secs(30),
                    "the job does not start"
                );
                std::thread::sleep(Duration::from_millis(50));
            }
            let pid = rustix::process::Pid::from_raw(child.id() as i32).context("pid")?;
            rustix::process::kill_process(pid, signal)?;
            let status = child.wait()?;
            ensure!(
                status.success() || signal == rustix::process::Signal::KILL,
                "{status}"
            );
            hosts.wait_quiet(Duration::from_secs(30))?;
        }
        Ok(())
    })
}

#[test]
fn a_member_that_dies_ends_the_job() -> anyhow::Result<()> {
    test(|| {
        let hosts = Hosts::new(3)?;
        let start = Instant::now();
        let output = launch()?
            .arg("--hostfile")
            .arg(hosts.hostfile()?)
            .arg("--ssh")
            .arg(hosts.ssh())
            .args([
                "--",
                "sh",
                "-c",
                "[ $FSD_RANK != 1 ] || kill -9 $PPID; exec sleep 100",
            ])
            .output()?;
        let (out, err) = text(&output);
        ensure!(output.status.code() == Some(1), "{}\n{out}\n{err}", output.status);
        ensure!(err.contains("rank 1 on") && err.contains("has gone"), "{err}");
        ensure!(
            start.elapsed() < Duration::from_secs(60),
            "it took {:?}",
            start.elapsed()
        );
        // What the killed member ran follows it, its servers a few seconds later.
        hosts.wait_quiet(Duration::from_secs(15))
    })
}

#[test]
fn what_cannot_be_launched_says_why() -> anyhow::Result<()> {
    test(|| {
        let hosts = Hosts::new(1)?;
        let refused = |args: &[&str], says: &[&str]| -> anyhow::Result<()> {
            let output = launch()?
                .args(args)
                .arg("--ssh")
                .arg(hosts.ssh())
                .args(["--", "true"])
                .output()?;
            let (_, err) = text(&output);
            ensure!(output.status.code() == Some(1), "{args:?}: {}", output.status);
            for word in says {
                ensure!(err.contains(word), "{args:?} does not say '{word}': {err}");
            }
            Ok(())
        };
        let one = hosts.address(0);
        refused(&["--hosts", &format!("{one},192.0.2.7")], &["192.0.2.7", "ssh"])?;
        refused(&["--hosts", &one, "--roles", "client=3"], &["rank 3", "1 hosts"])?;
        refused(&["--hosts", &one, "--fabric", "shm"], &["fsd dev"])?;
        refused(&["--hostfile", "/nonexistent"], &["/nonexistent"])?;
        refused(&[], &["--hostfile", "mpirun"])?;
        hosts.wait_quiet(Duration::from_secs(10))
    })
}

fn mpirun(args: &[&str]) -> Command {
    let mut command = Command::new("mpirun");
    command
        .args([
            "--allow-run-as-root",
            "--oversubscribe",
            "-x",
            "FSD_LAUNCH_KEY",
            "-x",
            "RUST_LOG",
        ])
        .args(args)
        .env("FSD_LAUNCH_KEY", "00112233445566778899aabbccddeeff")
        .env("RUST_LOG", "warn");
    command
}

#[test]
fn under_mpirun_on_one_host() -> anyhow::Result<()> {
    test(|| {
        let fsd = fsd_binary()?.display().to_string();
        let output = mpirun(&[
            "-n", "3", &fsd, "launch", "--pool", "64MiB", "--", "sh", "-c", JOB,
        ])
        .output()?;
        all_saw_all(&output, &[0, 1, 2], 3, 7)?;
        let output = Command::new("mpirun")
            .args(["--allow-run-as-root", "-n", "1", &fsd, "launch", "--", "true"])
            .env_remove("FSD_LAUNCH_KEY")
            .output()?;
        let (_, err) = text(&output);
        ensure!(
            err.contains("FSD_LAUNCH_KEY") && !output.status.success(),
            "without a secret: {err}"
        );
        Ok(())
    })
}

#[test]
fn under_mpirun_on_several_hosts() -> anyhow::Result<()> {
    test(|| {
        let hosts = Hosts::new(3)?;
        let (file, ssh) = (
            hosts.hostfile()?.display().to_string(),
            hosts.ssh().display().to_string(),
        );
        let (fsd, meet) = (
            fsd_binary()?.display().to_string(),
            format!("{}:7007", hosts.address(0)),
        );
        let output = mpirun(&["-n", "3", "--hostfile", &file, "--mca", "plm_rsh_agent", &ssh])
            .args([&*fsd, "launch", "--rendezvous", &meet, "--pool", "64MiB"])
            .args(["--roles", "meta=0,storage=0-2,client=0-2", "--", "sh", "-c", JOB])
            .output()?;
        all_saw_all(&output, &[0, 1, 2], 3, 7)?;
        hosts.wait_quiet(Duration::from_secs(10))
    })
}
