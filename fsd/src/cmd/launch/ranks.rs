//! Which rank this process is, as Open MPI, MPICH's hydra (PMI) or Slurm say in the environment.

/// A process among those started together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rank {
    /// Number, from 0.
    pub rank: u32,
    /// How many there are.
    pub size: u32,
    /// All of them are on this host.
    pub local: bool,
    /// The host of rank 0, where the launcher tells.
    pub first_host: Option<String>,
    /// Number of the job, where the launcher tells: the same on all hosts.
    pub job: Option<u64>,
}

/// Looks at the environment; `None` if no launcher has started this process as one of several.
pub fn from_env(var: impl Fn(&str) -> Option<String>) -> Option<Rank> {
    let number = |name: &str| var(name).and_then(|v| v.trim().parse::<u32>().ok());
    if let (Some(rank), Some(size)) = (number("OMPI_COMM_WORLD_RANK"), number("OMPI_COMM_WORLD_SIZE")) {
        return Some(Rank {
            rank,
            size,
            local: number("OMPI_COMM_WORLD_LOCAL_SIZE") == Some(size),
            first_host: None,
            job: None,
        });
    }
    if let (Some(rank), Some(size)) = (number("SLURM_PROCID"), number("SLURM_NTASKS")) {
        return Some(Rank {
            rank,
            size,
            local: number("SLURM_JOB_NUM_NODES") == Some(1),
            first_host: var("SLURM_JOB_NODELIST").and_then(|list| first_of(&list)),
            job: var("SLURM_JOB_ID").and_then(|v| v.trim().parse().ok()),
        });
    }
    let (rank, size) = (number("PMI_RANK")?, number("PMI_SIZE")?);
    Some(Rank {
        rank,
        size,
        local: number("MPI_LOCALNRANKS") == Some(size),
        first_host: None,
        job: None,
    })
}

/// The first host of a Slurm node list such as `login,rack[07-09,12]-ib`.
fn first_of(list: &str) -> Option<String> {
    let end = list
        .char_indices()
        .scan(0, |depth, (i, c)| {
            *depth += i32::from(c == '[') - i32::from(c == ']');
            Some((i, c, *depth))
        })
        .find(|&(_, c, depth)| c == ',' && depth == 0)
        .map_or(list.len(), |(i, ..)| i);
    let first = list[..end].trim();
    let Some((prefix, rest)) = first.split_once('[') else {
        return (!first.is_empty()).then(|| first.to_owned());
    };
    let (numbers, suffix) = rest.split_once(']')?;
    let number = numbers.split([',', '-']).next()?;
    Some(format!("{prefix}{number}{suffix}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(vars: &[(&str, &str)]) -> Option<Rank> {
        from_env(|name| {
            let found = vars.iter().find(|(n, _)| *n == name);
            found.map(|(_, v)| (*v).to_owned())
        })
    }

    #[test]
    fn launchers_are_recognised() {
        assert_eq!(seen(&[("PATH", "/bin")]), None);
        let ompi = [
            ("OMPI_COMM_WORLD_RANK", "2"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
        ];
        let rank = seen(&ompi).unwrap();
        assert_eq!((rank.rank, rank.size, rank.local), (2, 4, true));
        let rank = seen(&ompi[..2]).unwrap();
        assert!(!rank.local);
        let rank = seen(&[("PMI_RANK", "1"), ("PMI_SIZE", "3")]).unwrap();
        assert_eq!((rank.rank, rank.size, rank.local), (1, 3, false));
        let slurm = seen(&[
            ("SLURM_PROCID", "0"),
            ("SLURM_NTASKS", "8"),
            ("SLURM_JOB_NUM_NODES", "8"),
            ("SLURM_JOB_NODELIST", "node[003-010]"),
            ("SLURM_JOB_ID", "4711"),
            // Slurm sets this, too.
            ("PMI_RANK", "0"),
            ("PMI_SIZE", "8"),
        ])
        .unwrap();
        assert_eq!(slurm.first_host.as_deref(), Some("node003"));
        assert_eq!((slurm.job, slurm.local), (Some(4711), false));
    }

    #[test]
    fn node_lists() {
        for (list, first) in [
            ("a", Some("a")),
            ("a,b", Some("a")),
            ("rack[07-09,12]-ib,z", Some("rack07-ib")),
            ("n[3,5]", Some("n3")),
            ("", None),
            ("n[3", None),
        ] {
            assert_eq!(first_of(list).as_deref(), first, "{list}");
        }
    }
}
