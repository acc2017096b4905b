//! Finding out who can be reached, for `fsd status`.

use std::time::Duration;

use rt::channel::bounded;
use rt::time::Instant;

/// Who has not answered after this is told of as one that does not answer: before the tool that asks gives up itself.
pub const PATIENCE: Duration = Duration::from_secs(3);

/// A question to somebody.
pub struct Probe {
    /// Who, in a message.
    pub who: String,
    /// Asks, and says what went wrong.
    pub ask: Box<dyn FnOnce() -> Result<(), String> + Send>,
}

/// Asks all at once; a sentence for everybody who does not answer.
#[must_use]
pub fn unreachable(probes: Vec<Probe>, patience: Duration) -> Vec<String> {
    let deadline = Instant::now() + patience;
    let (tell, told) = bounded(probes.len());
    let mut silent: Vec<(usize, String)> = Vec::new();
    let mut troubles = Vec::new();
    for (number, Probe { who, ask }) in probes.into_iter().enumerate() {
        let tell = tell.clone();
        let asking = rt::thread::Builder::new().name("probe".into()).spawn(move || {
            // Nobody listens any more to who has taken too long.
            let _ = tell.send((number, ask()));
        });
        match asking {
            Ok(_) => silent.push((number, who)),
            Err(error) => troubles.push(format!("{who} could not be asked: {error}")),
        }
    }
    drop(tell);
    while !silent.is_empty() {
        let Ok((number, answer)) = told.recv_deadline(deadline) else {
            break;
        };
        let Some(at) = silent.iter().position(|(n, _)| *n == number) else {
            continue;
        };
        let (_, who) = silent.swap_remove(at);
        if let Err(why) = answer {
            troubles.push(format!("{who} cannot be reached: {why}"));
        }
    }
    let silent = silent.into_iter();
    troubles.extend(silent.map(|(_, who)| format!("{who} does not answer within {} s", patience.as_secs())));
    troubles.sort();
    troubles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_answer_holds_nobody_up() {
        let probe =
            |who: &str, ask: Box<dyn FnOnce() -> Result<(), String> + Send>| Probe { who: who.into(), ask };
        let (hold, held) = bounded::<()>(0);
        let troubles = unreachable(
            vec![
                probe("a", Box::new(|| Ok(()))),
                probe("b", Box::new(|| Err("refused".into()))),
                probe(
                    "c",
                    Box::new(move || {
                        let _ = held.recv();
                        Ok(())
                    }),
                ),
            ],
            Duration::from_millis(200),
        );
        drop(hold);
        assert_eq!(
            troubles,
            ["b cannot be reached: refused", "c does not answer within 0 s"]
        );
        assert!(unreachable(Vec::new(), Duration::ZERO).is_empty());
    }
}
