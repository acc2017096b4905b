//! A shell in a guest on the terminal of the person at the lab.

use std::io::{IsTerminal, Read, Write};
use std::sync::Mutex;
use std::time::Duration;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::SIGWINCH;
use signal_hook::iterator::Signals;

use crate::cluster::Cluster;
use crate::error::{At, Result};
use crate::process::lock;
use crate::proto::{Ending, Size};

/// A shell may stay open as long as the cluster does.
const LIMIT: Duration = Duration::from_secs(365 * 24 * 3600);
/// The terminal as it was before a shell took it.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Gives the terminal back as it was. Does nothing where it was not taken.
pub fn restore_terminal() {
    if let Some(before) = lock(&BEFORE).take() {
        // There is nothing to be done where the terminal is gone.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &before);
    }
}

/// Runs a shell on a node until it ends.
///
/// # Errors
/// The guest is gone.
pub fn run(cluster: &Cluster, node: usize) -> Result<Ending> {
    let argv = ["bash", "--login"].map(str::to_owned);
    let running = cluster.start_program(node, &argv, Some(size()))?;
    if std::io::stdin().is_terminal() {
        let before = tcgetattr(std::io::stdin()).at(|| "ask the terminal for its settings".into())?;
        let mut raw = before.clone();
        raw.make_raw();
        *lock(&BEFORE) = Some(before);
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw).at(|| "set the terminal".into())?;
    }
    let typist = running.handle();
    // These end with the program: reading the terminal cannot be interrupted.
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            let count = std::io::stdin().read(&mut buffer).unwrap_or(0);
            // At the end of the input the shell is told so as a terminal does it.
            let data = if count == 0 {
                &[4][..]
            } else {
                buffer.get(..count).unwrap_or_default()
            };
            if typist.input(data).is_err() || count == 0 {
                return;
            }
        }
    });
    if let Ok(mut signals) = Signals::new([SIGWINCH]) {
        let resized = running.handle();
        std::thread::spawn(
            move || while signals.forever().next().is_some() && resized.resize(size()).is_ok() {},
        );
    }
    let done = running.wait_with(LIMIT, |_, data| {
        let mut out = std::io::stdout();
        // A closed output ends nothing: the shell may be doing something of use.
        let _ = out.write_all(data).and_then(|()| out.flush());
    });
    restore_terminal();
    Ok(done?.ending)
}

fn size() -> Size {
    match tcgetwinsize(std::io::stdout()) {
        Ok(size) if size.ws_row > 0 => Size {
            rows: size.ws_row,
            columns: size.ws_col,
        },
        _ => Size {
            rows: 25,
            columns: 80,
        },
    }
}
