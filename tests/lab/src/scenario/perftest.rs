//! `perftest`: latency and bandwidth between two nodes, by the usual tools, as a table.

use std::fmt::Write;
use std::fs;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::error::{At, Error, Result};
use crate::options::Tier;

/// Longest time for one measurement.
const LIMIT: Duration = Duration::from_secs(90);
/// Longest time for a server to listen.
const LISTEN_LIMIT: Duration = Duration::from_secs(20);
/// The first TCP port by which the two sides of a tool find each other.
const FIRST_PORT: usize = 18_500;
/// Queue-pair timeout as an exponent: what perftest takes by itself is shorter than a busy emulated guest
/// needs for an answer, which then looks like a lost packet.
const TIMEOUT: u32 = 19;

/// One measurement to make.
struct Measurement {
    tool: &'static str,
    size: usize,
    /// In one guest; between guests, where all takes ten times as long.
    iterations: (usize, usize),
}

const fn measure(tool: &'static str, size: usize, iterations: (usize, usize)) -> Measurement {
    Measurement {
        tool,
        size,
        iterations,
    }
}

const MEASUREMENTS: &[Measurement] = &[
    measure("ib_read_lat", 8, (1000, 300)),
    measure("ib_write_lat", 8, (1000, 300)),
    measure("ib_send_lat", 64, (1000, 300)),
    measure("ib_atomic_lat", 8, (1000, 300)),
    measure("ib_write_bw", 65_536, (500, 200)),
    measure("ib_read_bw", 65_536, (500, 200)),
];

/// A line of perftest's output, as much of it as is of use.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Figures {
    /// In µs.
    Latency {
        /// The median.
        typical: f64,
        /// The mean.
        average: f64,
        /// What one in a hundred exceeds.
        p99: f64,
    },
    /// In MB/s.
    Bandwidth {
        /// The best of it.
        peak: f64,
        /// The mean.
        average: f64,
    },
}

/// Reads what a tool printed.
///
/// # Errors
/// It has no line of results.
pub fn parse(output: &str) -> Result<Figures> {
    let mut lines = output
        .lines()
        .skip_while(|line| !line.trim_start().starts_with("#bytes"));
    let head = lines.next().unwrap_or_default();
    let numbers: Vec<f64> = lines
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect();
    let column = |index: usize| {
        let missing = || Error::check(format!("no results in what perftest printed: {}", output.trim()));
        numbers.get(index).copied().ok_or_else(missing)
    };
    if head.contains("t_typical") {
        // bytes, iterations, min, max, typical, average, deviation, 99 %, 99.9 %
        Ok(Figures::Latency {
            typical: column(4)?,
            average: column(5)?,
            p99: column(7)?,
        })
    } else {
        // bytes, iterations, peak, average, messages
        Ok(Figures::Bandwidth {
            peak: column(2)?,
            average: column(3)?,
        })
    }
}

/// A result.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The tool.
    pub tool: String,
    /// Bytes of a message.
    pub size: usize,
    /// What it measured.
    pub figures: Figures,
}

/// The rows as a table for people.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<14} {:>7}  {:>12} {:>12} {:>12}\n",
        "tool", "bytes", "typical/peak", "average", "99 %"
    );
    for Row { tool, size, figures } in rows {
        // Writing to a string does not fail.
        let _ = match figures {
            Figures::Latency {
                typical,
                average,
                p99,
            } => {
                writeln!(
                    text,
                    "{tool:<14} {size:>7}  {typical:>9.1} µs {average:>9.1} µs {p99:>9.1} µs"
                )
            }
            Figures::Bandwidth { peak, average } => {
                writeln!(text, "{tool:<14} {size:>7}  {peak:>7.1} MB/s {average:>7.1} MB/s")
            }
        };
    }
    text
}

/// The rows as comma-separated values.
pub fn csv(rows: &[Row]) -> String {
    let mut text = String::from("tool,bytes,typical_us,average_us,p99_us,peak_mb_s,average_mb_s\n");
    for Row { tool, size, figures } in rows {
        let _ = match figures {
            Figures::Latency {
                typical,
                average,
                p99,
            } => {
                writeln!(text, "{tool},{size},{typical},{average},{p99},,")
            }
            Figures::Bandwidth { peak, average } => writeln!(text, "{tool},{size},,,,{peak},{average}"),
        };
    }
    text
}

/// Runs one tool between two nodes and returns its figures.
///
/// # Errors
/// It fails on either side.
pub fn between(
    cluster: &Cluster,
    (server, client): (usize, usize),
    port: usize,
    tool: &str,
    arguments: &str,
) -> Result<Figures> {
    let command = format!("{tool} -d $LAB_DEVICE -x $LAB_GID -F -u {TIMEOUT} -p {port} {arguments}");
    let listening = cluster.spawn(server, &command)?;
    // The kernel's table has ports in hexadecimal; 0A is the state of listening.
    let listens = format!("grep -q ':{port:04X} .* 0A ' /proc/net/tcp /proc/net/tcp6");
    let ip = cluster.node(server)?.ip;
    let measured = cluster
        .eventually(server, &listens, LISTEN_LIMIT)
        .and_then(|_| cluster.run(client, &format!("{command} {ip}"), LIMIT))
        .inspect_err(|_| listening.kill());
    let served = listening.wait(LIMIT)?;
    match (measured, served.ending.ok()) {
        (Ok(output), true) => parse(&output),
        (Err(error), true) => Err(error),
        // A server that failed explains why its client did.
        (measured, false) => Err(Error::check(format!(
            "the server of {tool} on node {server} {}: {}{}{}",
            served.ending,
            served.out.trim(),
            served.err.trim(),
            measured
                .err()
                .map_or(String::new(), |error| format!("\nthe client: {error}"))
        ))),
    }
}

/// The scenario.
///
/// # Errors
/// A tool fails.
pub fn run(cluster: &Cluster) -> Result<()> {
    let mut rows = Vec::new();
    for (
        port,
        Measurement {
            tool,
            size,
            iterations,
        },
    ) in (FIRST_PORT..).zip(MEASUREMENTS)
    {
        cluster.step(&format!("{tool} from node 2 to node 1"));
        let iterations = match cluster.options().tier {
            Tier::Single => iterations.0,
            Tier::Multi => iterations.1,
        };
        // Atomics are of 8 bytes, and the tool knows no other size.
        let size_argument = if *tool == "ib_atomic_lat" {
            String::new()
        } else {
            format!("-s {size} ")
        };
        let figures = between(
            cluster,
            (1, 2),
            port,
            tool,
            &format!("{size_argument}-n {iterations}"),
        )?;
        rows.push(Row {
            tool: (*tool).to_owned(),
            size: *size,
            figures,
        });
    }
    let text = table(&rows);
    println!("{text}");
    for (name, contents) in [("perftest.txt", &text), ("perftest.csv", &csv(&rows))] {
        let path = cluster.logs().join(name);
        fs::write(&path, contents).at(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATENCY: &str = "---------------\n                    RDMA_Read Latency Test\n Dual-port       : OFF\t\tDevice         : rxe2\n\
        ---------------\n local address: LID 0000 QPN 0x0011 PSN 0x9b\n---------------\n\
        \x20#bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec] \n\
        \x208       1000          31.00          1044.93      37.27    \t       40.76       \t32.98  \t\t88.60   \t\t1044.93\n---------------\n";
    const BANDWIDTH: &str = "\x20#bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]\n\
        \x2065536      500              53.21              52.90\t\t   0.000846\n";

    #[test]
    fn output_is_read() {
        assert_eq!(
            parse(LATENCY).unwrap(),
            Figures::Latency {
                typical: 37.27,
                average: 40.76,
                p99: 88.60
            }
        );
        assert_eq!(
            parse(BANDWIDTH).unwrap(),
            Figures::Bandwidth {
                peak: 53.21,
                average: 52.90
            }
        );
        assert!(parse("Couldn't connect to 10.77.0.1:18515\n").is_err());
        assert!(parse(" #bytes #iterations t_min[usec]\n").is_err());
    }

    #[test]
    fn rows_become_tables() {
        let rows = [
            Row {
                tool: "ib_read_lat".into(),
                size: 8,
                figures: parse(LATENCY).unwrap(),
            },
            Row {
                tool: "ib_read_bw".into(),
                size: 65_536,
                figures: parse(BANDWIDTH).unwrap(),
            },
        ];
        assert_eq!(
            csv(&rows),
            "tool,bytes,typical_us,average_us,p99_us,peak_mb_s,average_mb_s\nib_read_lat,8,37.27,40.76,88.6,,\nib_read_bw,65536,,,,53.21,52.9\n"
        );
        assert_eq!(table(&rows).lines().count(), 3);
    }
}
