//! The metadata server's host loses its power, and nobody is told; when it is back its mounts come back in time, although what they send
//! on their old connections is repeated ever more seldom.

use std::fs;
use std::time::Duration;

use anyhow::{Context, ensure};
use system_tests::asking::Asking;
use system_tests::cluster::{Cache, Fabric, Options, Role};
use system_tests::guard;
use system_tests::quiet::LONGEST;

/// The server waits for its mounts a fifth longer.
const TERM: Duration = Duration::from_secs(5);
/// Just after TCP has sent once more what was not acknowledged, a heartbeat at most after the cut: the next time is as long after that.
const AWAY: Duration = Duration::from_millis(14_500);

#[test]
fn mounts_come_back_to_a_host_that_was_without_power() -> anyhow::Result<()> {
    let options = Options {
        fabric: Fabric::Tcp,
        cache: Cache::Direct,
        term: TERM,
        // So long a connection is kept on which nobody answers.
        timeout: LONGEST,
        apart: true,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        let file = cluster.mount(0).join("f");
        fs::write(&file, "first\n")?;
        let links: Vec<(Role, Role)> = (0..2)
            .flat_map(|m| [(Role::Mount(m), Role::Meta), (Role::Meta, Role::Mount(m))])
            .collect();
        // Open files of a life that has ended are no use.
        let mut old = Asking::shell(
            "exec 9>>\"$0\" && echo open && read go && echo more >&9 && cat \"$0\"",
            &file,
        )?;
        ensure!(old.says()? == "open", "the file cannot be opened");
        for &(from, to) in &links {
            cluster.cut_way(from, to)?;
        }
        cluster.kill(Role::Meta);
        std::thread::sleep(AWAY);
        for &(from, to) in &links {
            cluster.mend_way(from, to)?;
        }
        cluster.start_role(Role::Meta)?;
        old.tell("go")?;
        let seen = old.answer(LONGEST)?;
        ensure!(
            seen.as_deref() == Some("first"),
            "the mount has begun a new life: its file says {seen:?}"
        );
        let other = fs::read_to_string(cluster.mount(1).join("f")).context("the other mount")?;
        ensure!(other == "first\nmore\n", "the other mount reads {other:?}");
        Ok(())
    })
}
