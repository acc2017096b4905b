//! The connection to the metadata server is silent, and nobody is told of it, as after its host was without power: another one is made before
//! the mount is taken for dead.

use std::fs;
use std::time::Duration;

use anyhow::ensure;
use system_tests::asking::Asking;
use system_tests::cluster::{Cache, Fabric, Options};
use system_tests::guard;
use system_tests::quiet::LONGEST;

const TERM: Duration = Duration::from_secs(10);

#[test]
fn a_silent_connection_is_replaced_within_the_term() -> anyhow::Result<()> {
    let options = Options {
        fabric: Fabric::Tcp,
        cache: Cache::Direct,
        term: TERM,
        // So long a connection is kept on which nobody answers.
        timeout: LONGEST,
        proxied: true,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        let file = cluster.mount(0).join("f");
        fs::write(&file, "first\n")?;
        // Open files of a life that has ended are no use.
        let script = "exec 9>>\"$0\" && echo open && read go && echo more >&9 && cat \"$0\"";
        let mut old = Asking::shell(script, &file)?;
        ensure!(old.says()? == "open", "the file cannot be opened");
        cluster.proxies()?.meta.silence();
        // By then they would be dead.
        std::thread::sleep(TERM * 3 / 2);
        old.tell("go")?;
        let seen = old.answer(LONGEST)?;
        ensure!(
            seen.as_deref() == Some("first"),
            "the mount has begun a new life: its file says {seen:?}"
        );
        let other = fs::read_to_string(cluster.mount(1).join("f"))?;
        ensure!(other == "first\nmore\n", "the other mount reads {other:?}");
        Ok(())
    })
}
