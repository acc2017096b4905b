//! The figures: what is run for each point, and what the paper says of it. Pure.

use super::mix::{Kind, Mix};
use super::published as said;
use super::{Args, Figure};
use crate::fs::pattern::Workload;

/// What a point runs.
#[derive(Debug, Clone, Copy)]
pub enum Work {
    /// Blocks, in the manner of fio.
    Blocks(Workload),
    /// A loop, in the manner of filebench.
    Loop(Mix),
}

/// A point of a figure.
#[derive(Debug, Clone)]
pub struct Point {
    /// Along the x axis.
    pub name: String,
    /// What is run.
    pub work: Work,
    /// The paper's throughput, write-back by write-through.
    pub ratio: Option<f64>,
    /// The same of the mean latency.
    pub latency_ratio: Option<f64>,
}

/// A figure, or a pair of them that come from the same runs.
#[derive(Debug, Clone)]
pub struct Plan {
    /// For files.
    pub stem: &'static str,
    /// For people.
    pub title: String,
    /// Of throughput.
    pub unit: &'static str,
    /// Along the x axis.
    pub points: Vec<Point>,
}

fn blocks(args: &Args) -> Workload {
    Workload {
        random: true,
        reads: 50,
        block: 4096,
        contention: 0,
        nodes: args.nodes,
        threads: args.threads,
        files: args.files,
        file_size: args.file_size,
    }
}

/// Every other one, if it must be quick.
fn some<T: Copy>(args: &Args, all: &[T]) -> Vec<(usize, T)> {
    let every = if args.quick { 2 } else { 1 };
    all.iter().copied().enumerate().step_by(every).collect()
}

fn mixes(args: &Args) -> Vec<Plan> {
    let plan = |random: bool| {
        let (ratios, latencies) = if random {
            (said::RANDOM, said::RANDOM_MS)
        } else {
            (said::SEQUENTIAL, said::SEQUENTIAL_MS)
        };
        let point = |(i, reads): (usize, u32)| Point {
            name: format!("{reads}:{}", 100 - reads),
            work: Work::Blocks(Workload {
                random,
                reads,
                ..blocks(args)
            }),
            ratio: Some(ratios[i].ratio()),
            latency_ratio: Some(latencies[i].ratio()),
        };
        let (stem, figures, kind) = if random {
            ("paper-fig6-random", "6a and 6c", "random")
        } else {
            ("paper-fig6-sequential", "6b and 6d", "sequential")
        };
        Plan {
            stem,
            title: format!(
                "Figures {figures}: {kind} 4 KiB by read:write, {} nodes, no contention",
                args.nodes
            ),
            unit: "MiB/s",
            points: some(args, &said::READS)
                .into_iter()
                .filter(|(_, reads)| args.reads.contains(reads))
                .map(point)
                .collect(),
        }
    };
    vec![plan(true), plan(false)]
}

fn contention(args: &Args) -> Plan {
    let point = |(i, contention): (usize, u32)| Point {
        name: format!("{contention} %"),
        work: Work::Blocks(Workload {
            contention,
            ..blocks(args)
        }),
        ratio: Some(said::BY_CONTENTION[i].ratio()),
        latency_ratio: None,
    };
    Plan {
        stem: "paper-fig7",
        title: format!("Figure 7: random 4 KiB 50:50 by contention, {} nodes", args.nodes),
        unit: "MiB/s",
        points: some(args, &said::CONTENTION).into_iter().map(point).collect(),
    }
}

fn nodes(args: &Args) -> Plan {
    let point = |(_, nodes): (usize, usize)| Point {
        name: format!("{nodes} nodes"),
        work: Work::Blocks(Workload {
            nodes,
            contention: 50,
            ..blocks(args)
        }),
        ratio: said::nodes_ratio(nodes),
        latency_ratio: None,
    };
    Plan {
        stem: "paper-fig8",
        title: "Figure 8: random 4 KiB 50:50, 50 % contention, by nodes".into(),
        unit: "MiB/s",
        points: some(args, &args.scale_nodes).into_iter().map(point).collect(),
    }
}

fn loops(args: &Args) -> Plan {
    let point = |kind: Kind, shared: bool| Point {
        name: format!("{} {} %", kind.name(), if shared { 100 } else { 0 }),
        work: Work::Loop(Mix::new(
            kind,
            shared,
            args.nodes,
            args.threads,
            args.count_scale,
            args.size_scale,
        )),
        ratio: Some(
            match kind {
                Kind::Fileserver => said::FILESERVER,
                Kind::Webserver => said::WEBSERVER,
                Kind::Netsfs => said::NETSFS,
            }[usize::from(shared)]
            .ratio(),
        ),
        latency_ratio: None,
    };
    Plan {
        stem: "paper-fig9",
        title: format!("Figure 9: loops at 0 and 100 % contention, {} nodes", args.nodes),
        unit: "MB/s",
        points: Kind::ALL
            .iter()
            .flat_map(|kind| [point(*kind, false), point(*kind, true)])
            .collect(),
    }
}

/// What is to be run, except for figure 2.
pub fn plans(args: &Args) -> Vec<Plan> {
    let wants = |figure| args.wants(figure);
    let mut plans = Vec::new();
    if wants(Figure::Fig6) {
        plans.extend(mixes(args));
    }
    if wants(Figure::Fig7) {
        plans.push(contention(args));
    }
    if wants(Figure::Fig8) {
        plans.push(nodes(args));
    }
    if wants(Figure::Fig9) {
        plans.push(loops(args));
    }
    plans
}

#[cfg(test)]
mod tests {
    use super::super::tests::arguments;
    use super::*;

    #[test]
    fn all_points_of_the_paper_are_there() {
        let count = |args: &[&str]| -> Vec<usize> {
            plans(&arguments(args)).iter().map(|p| p.points.len()).collect()
        };
        assert_eq!(count(&[]), [5, 5, 5, 3, 6]);
        assert_eq!(count(&["--quick"]), [3, 3, 3, 2, 6]);
        assert_eq!(count(&["--only", "fig7,fig9"]), [5, 6]);
        let plans = plans(&arguments(&["--quick"]));
        let names: Vec<&str> = plans[2].points.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["0 %", "50 %", "100 %"]);
        assert_eq!(plans[2].points[2].ratio, Some(9.7 / 5.6));
    }
}
