//! Starts the members of a job on other hosts, with ssh or a program that is used like it.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use crate::cmd::children::{code_of, signal, wait_for};
use crate::cmd::hex::hex;

/// What the member that leads a job is told when it is enough.
pub const FINISH: &str = "finish";

/// How long an ssh may outlive the job.
const FAREWELL: Duration = Duration::from_secs(10);

/// The hosts of a hostfile, one a rank: a name a line, `#` begins a comment, what MPI adds (`slots=4`) is
/// skipped.
///
/// # Errors
/// The file cannot be read, or names nobody.
pub fn hosts(file: &Path) -> anyhow::Result<Vec<String>> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let hosts: Vec<String> = text
        .lines()
        .filter_map(|l| l.split('#').next()?.split_whitespace().next())
        .map(str::to_owned)
        .collect();
    ensure!(!hosts.is_empty(), "{} names no host", file.display());
    Ok(hosts)
}

/// How members are started.
pub struct Start<'a> {
    /// The program with its options, words separated by spaces.
    pub ssh: &'a str,
    /// Path of `fsd` there.
    pub fsd: PathBuf,
    /// `HOST:PORT` of the rendezvous, or `:PORT` for the host that the ssh comes from.
    pub rendezvous: String,
    /// Options of `fsd launch` for the member.
    pub options: Vec<String>,
    /// More of them, and the command, for the first member, if the members meet at its host and it leads the job.
    pub lead: Option<Vec<String>>,
    /// Key of the job.
    pub key: &'a [u8],
    /// Begin each line of output with the host.
    pub tag: bool,
}

/// The ssh's; dropping them ends them.
pub struct Remotes {
    all: Vec<(String, Child)>,
    /// Standard input of the member that leads the job: it is told there what to do, and by its end that this process has gone.
    lead: Option<ChildStdin>,
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:=+,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn copy_lines(from: impl Read + Send + 'static, tag: String, error: bool) {
    std::thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
            let line = format!("[{tag}] {}\n", String::from_utf8_lossy(&line));
            // Nobody may be reading any more.
            let _ = if error {
                std::io::stderr().write_all(line.as_bytes())
            } else {
                std::io::stdout().write_all(line.as_bytes())
            };
        }
    });
}

impl Remotes {
    /// Starts a member on every host.
    ///
    /// # Errors
    /// The ssh program cannot be run.
    pub fn start(start: &Start<'_>, hosts: &[String]) -> anyhow::Result<Self> {
        let mut words = start.ssh.split_whitespace();
        let program = words.next().context("--ssh is empty")?;
        let options: Vec<&str> = words.collect();
        let mut remotes = Self {
            all: Vec::with_capacity(hosts.len()),
            lead: None,
        };
        for (rank, host) in hosts.iter().enumerate() {
            let mut remote = vec![
                "exec".to_owned(),
                quoted(&start.fsd.to_string_lossy()),
                format!("launch --member {rank} --size {} --rendezvous", hosts.len()),
                quoted(&start.rendezvous),
            ];
            let lead = start.lead.iter().flatten().filter(|_| rank == 0);
            remote.extend(start.options.iter().chain(lead).map(|w| quoted(w)));
            let piped = || {
                if start.tag {
                    Stdio::piped()
                } else {
                    Stdio::inherit()
                }
            };
            let mut child = Command::new(program)
                .args(&options)
                .arg(host)
                .arg(remote.join(" "))
                .stdin(Stdio::piped())
                .stdout(piped())
                .stderr(piped())
                .spawn()
                .with_context(|| format!("cannot run {program}"))?;
            if let Some(stdout) = child.stdout.take() {
                copy_lines(stdout, host.clone(), false);
            }
            if let Some(stderr) = child.stderr.take() {
                copy_lines(stderr, host.clone(), true);
            }
            // Through the encrypted connection, not on a command line that others can read. If the member
            // has gone already, its end says why.
            if let Some(mut stdin) = child.stdin.take() {
                let _ = writeln!(stdin, "{}", hex(start.key));
                if rank == 0 && start.lead.is_some() {
                    remotes.lead = Some(stdin);
                }
            }
            remotes.all.push((host.clone(), child));
        }
        Ok(remotes)
    }

    /// Has one ended whose member is still `missing`, or as ssh does for failures of its own? What members that
    /// have come do is told by themselves.
    ///
    /// # Errors
    /// Which, and how.
    pub fn check(&mut self, missing: &[u32]) -> anyhow::Result<()> {
        for (rank, (host, child)) in (0u32..).zip(&mut self.all) {
            if let Some(status) = child.try_wait()?
                && (status.code() == Some(255) || missing.contains(&rank))
            {
                bail!("ssh to {host} (rank {rank}) has ended ({status}); its message is above");
            }
        }
        Ok(())
    }
}

impl Remotes {
    /// Tells the member that leads the job that it is enough.
    pub fn finish(&mut self) {
        if let Some(lead) = &mut self.lead {
            // If it has gone, its end says why.
            let _ = writeln!(lead, "{FINISH}");
        }
    }

    /// The exit status of the member that leads the job, when all have ended.
    ///
    /// # Errors
    /// The system's.
    pub fn ended(&mut self) -> anyhow::Result<Option<u8>> {
        let mut first = None;
        for (_, child) in self.all.iter_mut().rev() {
            match child.try_wait()? {
                Some(status) => first = Some(code_of(status)),
                None => return Ok(None),
            }
        }
        Ok(first)
    }
}

impl Drop for Remotes {
    fn drop(&mut self) {
        self.lead = None;
        for (_, child) in &mut self.all {
            if !wait_for_end(child) {
                signal(child, rustix::process::Signal::TERM);
                wait_for(child, FAREWELL);
            }
            let _ = child.wait();
        }
    }
}

fn wait_for_end(child: &mut Child) -> bool {
    let deadline = std::time::Instant::now() + FAREWELL;
    while std::time::Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostfiles() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("hosts");
        std::fs::write(&file, "# the rack\nnode1 slots=4\n\n  node2   # slow\nnode1\n").unwrap();
        assert_eq!(hosts(&file).unwrap(), ["node1", "node2", "node1"]);
        std::fs::write(&file, "# nobody\n").unwrap();
        assert!(hosts(&file).unwrap_err().to_string().contains("names no host"));
        assert!(hosts(&dir.path().join("absent")).is_err());
    }

    #[test]
    fn words_for_a_shell() {
        assert_eq!(quoted("/usr/bin/fsd"), "/usr/bin/fsd");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
