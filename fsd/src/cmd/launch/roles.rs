//! Which rank plays which roles.

use std::collections::BTreeSet;

/// Roles by rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roles {
    /// The metadata server's.
    pub meta: u32,
    /// Those of the storage nodes, by their number.
    pub storage: Vec<u32>,
    /// Those that mount and run the command.
    pub clients: Vec<u32>,
}

impl Roles {
    /// From `meta=0,storage=0-1+4,client=1-3`; what is not named is as in `meta=0,storage=0,client=all`.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn parse(spec: Option<&str>, size: u32) -> Result<Self, String> {
        let all: Vec<u32> = (0..size).collect();
        let mut roles = Self {
            meta: 0,
            storage: vec![0],
            clients: all.clone(),
        };
        for part in spec.unwrap_or_default().split(',').filter(|p| !p.is_empty()) {
            let (role, ranks) = part
                .split_once('=')
                .ok_or(format!("'{part}' in --roles is not ROLE=RANKS"))?;
            let ranks = if ranks == "all" {
                all.clone()
            } else {
                parse_ranks(ranks)?
            };
            if let Some(beyond) = ranks.iter().find(|&&r| r >= size) {
                return Err(format!("--roles names rank {beyond}, but there are {size} hosts"));
            }
            match (role, &ranks[..]) {
                ("meta", [one]) => roles.meta = *one,
                ("meta", _) => return Err("there is one metadata server: --roles meta=RANK".into()),
                ("storage", _) => roles.storage = ranks,
                ("client" | "clients", _) => roles.clients = ranks,
                _ => return Err(format!("'{role}' is no role: meta, storage, client")),
            }
        }
        Ok(roles)
    }
}

/// Ranks from `0-2+5`, each once, in order.
fn parse_ranks(text: &str) -> Result<Vec<u32>, String> {
    let bad = || format!("'{text}' does not name ranks: write for example 0-2+5, or all");
    let mut ranks = BTreeSet::new();
    for part in text.split('+') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let from: u32 = from.trim().parse().map_err(|_| bad())?;
        let to: u32 = to.trim().parse().map_err(|_| bad())?;
        if from > to || to - from > 100_000 {
            return Err(bad());
        }
        ranks.extend(from..=to);
    }
    Ok(ranks.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_from_their_description() {
        let roles = Roles::parse(None, 3).unwrap();
        assert_eq!(
            (roles.meta, &roles.storage[..], &roles.clients[..]),
            (0, &[0][..], &[0, 1, 2][..])
        );
        let roles = Roles::parse(Some("meta=1,storage=0-1+3,client=2-3"), 4).unwrap();
        assert_eq!(
            (roles.meta, &roles.storage[..], &roles.clients[..]),
            (1, &[0, 1, 3][..], &[2, 3][..])
        );
        assert_eq!(Roles::parse(Some("storage=all"), 2).unwrap().storage, [0, 1]);
        for bad in [
            "meta=0-1",
            "storage",
            "disk=0",
            "client=4",
            "client=2-1",
            "client=x",
        ] {
            assert!(Roles::parse(Some(bad), 4).is_err(), "{bad}");
        }
    }
}
