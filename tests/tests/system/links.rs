//! The link between two mounts breaks, not those to the servers: what one asked the other is answered by way of the metadata server.

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::guard;
use system_tests::hosts::Hosts;
use system_tests::process::fsd_binary;

const LIMIT: Duration = Duration::from_secs(180);
/// Clients tell each other and the test how far they are by files in a folder that all see, `@`.
const JOB: &str = r#"
set -e
at() { while ! [ -e "@/$1" ]; do sleep 0.02; done; }
cd "$FSD_MOUNT"
if [ "$FSD_CLIENT" = 0 ]; then
    echo one > shared; : > @/one
    at two; echo three > shared; : > @/three
    at four; echo mine > mine; sync mine; : > @/written
    at answered; [ "$(cat shared)" = answer ]
else
    at one; [ "$(cat shared)" = one ]; : > @/two
    at three; [ "$(cat shared)" = three ]; : > @/four
    # So that only the file's lease is to be asked for, and who has it is in its record.
    at written; ls > /dev/null; : > @/listed
    at cut; : > @/asking
    [ "$(stat -c %s mine)" = 5 ]
    [ "$(cat mine)" = mine ]
    echo answer > shared; : > @/answered
fi
"#;

/// A job, which is ended where the test fails; what it has started on the hosts ends with them.
struct Job(Child);

impl Job {
    /// Runs `script` on two clients, with the hosts' folder for its `@/`.
    fn start(hosts: &Hosts, script: &str) -> anyhow::Result<Self> {
        let dir = hosts.dir().to_str().context("a path that is no text")?;
        let child = Command::new(fsd_binary()?)
            .args(["launch", "--pool", "64MiB", "--hostfile"])
            .arg(hosts.hostfile()?)
            .arg("--ssh")
            .arg(hosts.ssh())
            .args(["--roles", "meta=0,storage=0,client=1-2", "--", "sh", "-c"])
            .arg(script.replace("@/", &format!("{dir}/")))
            .env("RUST_LOG", "warn")
            .spawn()?;
        Ok(Self(child))
    }

    fn end(&mut self) -> anyhow::Result<()> {
        until("the job to end", || Ok(self.0.try_wait()?.is_some()))?;
        let status = self.0.wait()?;
        ensure!(status.success(), "the job ended with {status}");
        Ok(())
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn until(what: &str, holds: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    guard::until(what, LIMIT / 3, holds).map(drop)
}

fn until_there(dir: &Path, name: &str) -> anyhow::Result<()> {
    until(name, || Ok(dir.join(name).exists()))
}

/// Each in turn writes and renames what the other then reads. A step that takes longer than five seconds is told of.
const TURNS: &str = r#"
set -e
at() { while ! [ -e "@/$1" ]; do sleep 0.02; done; }
now() { date +%s%3N; }
step() {
    began=$(now)
    "$@"
    took=$(( $(now) - began ))
    [ $took -lt 5000 ] || { echo "$* took $took ms" > "@/slow"; exit 1; }
}
says() { [ "$(cat "$1")" = "$2" ]; }
puts() { echo "$2" > "$1"; }
cd "$FSD_MOUNT"
mkdir -p d
if [ "$FSD_CLIENT" = 0 ]; then
    echo one > shared; : > @/one
    at two
else
    at one; [ "$(cat shared)" = one ]; echo two > shared; : > @/two
fi
: > "@/known$FSD_CLIENT"
at cut
for turn in 1 2 3 4 5 6; do
    if [ $(( turn % 2 )) = "$FSD_CLIENT" ]; then
        step puts shared "turn $turn"
        step puts "d/made$turn" "$turn"
        [ "$turn" = 1 ] || step mv "d/name$(( turn - 1 ))" "d/name$turn"
        [ "$turn" != 1 ] || step puts d/name1 name
        : > "@/turn$turn"
    else
        at "turn$turn"
        step says shared "turn $turn"
        step says "d/made$turn" "$turn"
        step says "d/name$turn" name
        step test ! -e "d/name$(( turn - 1 ))"
        : > "@/seen$turn"
    fi
    at "seen$turn"
done
: > "@/done$FSD_CLIENT"
at mended
"#;

/// Runs it on two clients, with the link cut as soon as they know each other.
#[test]
fn mounts_that_cannot_reach_each_other_go_on() -> anyhow::Result<()> {
    let body = || {
        let hosts = Hosts::new(3)?;
        let dir = hosts.dir().to_path_buf();
        let mut job = Job::start(&hosts, TURNS)?;
        until_there(&dir, "known0")?;
        until_there(&dir, "known1")?;
        hosts.cut(1, 2)?;
        let cut = Instant::now();
        std::fs::write(dir.join("cut"), "")?;
        for client in ["done0", "done1"] {
            until(client, || {
                ensure!(job.0.try_wait()?.is_none(), "the job has ended: {}", slow(&dir));
                Ok(dir.join(client).exists())
            })?;
        }
        eprintln!("six turns with the link cut took {:?}", cut.elapsed());
        hosts.mend(1, 2)?;
        std::fs::write(dir.join("mended"), "")?;
        job.end()?;
        hosts.wait_quiet(Duration::from_secs(1))
    };
    guard::within(LIMIT, body, || ())
}

/// What took too long.
fn slow(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("slow")).unwrap_or_default()
}

#[test]
fn a_question_outlives_its_connection() -> anyhow::Result<()> {
    let body = || {
        let hosts = Hosts::new(3)?;
        let dir = hosts.dir().to_path_buf();
        let mut job = Job::start(&hosts, JOB)?;
        until_there(&dir, "listed")?;
        let before = hosts.connections(2, 1)?;
        ensure!(before > 0, "the mounts do not know each other");
        hosts.cut(1, 2)?;
        std::fs::write(dir.join("cut"), "")?;
        until_there(&dir, "asking")?;
        until("the connection to be given up", || {
            Ok(hosts.connections(2, 1)? < before)
        })?;
        hosts.mend(1, 2)?;
        job.end()?;
        hosts.wait_quiet(Duration::from_secs(1))
    };
    guard::within(LIMIT, body, || ())
}
