//! perftest's tools: how they are called, and what they print.

use std::process::Command;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

/// Queue-pair timeout as an exponent: perftest's own is too short for busy emulated guests, which then see
/// lost packets where there are none.
const TIMEOUT: u32 = 19;

/// The device that the tools use on one side.
#[derive(Debug, Clone)]
pub struct Device {
    /// As `ibv_devices` lists it.
    pub name: String,
    /// Index of its GID.
    pub gid: u32,
}

/// The tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tool {
    ReadLatency,
    WriteLatency,
    SendLatency,
    /// Of compare-and-swap.
    CasLatency,
    /// Of fetch-and-add.
    FaaLatency,
    ReadBandwidth,
    WriteBandwidth,
    /// Writes one at a time, each until it is completed: what `ib_write_bw` does with one request in its queue.
    WriteCompletion,
}

impl Tool {
    /// The program.
    pub fn program(self) -> &'static str {
        match self {
            Self::ReadLatency => "ib_read_lat",
            Self::WriteLatency => "ib_write_lat",
            Self::SendLatency => "ib_send_lat",
            Self::CasLatency | Self::FaaLatency => "ib_atomic_lat",
            Self::ReadBandwidth => "ib_read_bw",
            Self::WriteBandwidth | Self::WriteCompletion => "ib_write_bw",
        }
    }

    /// With what makes it what it is, for people.
    pub fn describe(self) -> String {
        let how = match self {
            Self::CasLatency => " CMP_AND_SWAP",
            Self::FaaLatency => " FETCH_AND_ADD",
            Self::WriteCompletion => " -t 1",
            _ => "",
        };
        format!("{}{how}", self.program())
    }

    fn extra(self) -> &'static [&'static str] {
        match self {
            Self::CasLatency => &["-A", "CMP_AND_SWAP"],
            Self::FaaLatency => &["-A", "FETCH_AND_ADD"],
            Self::WriteCompletion => &["-t", "1", "-Q", "1"],
            _ => &[],
        }
    }
}

/// One run of a tool.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Run {
    pub tool: Tool,
    /// Bytes of an operation.
    pub size: usize,
    pub iterations: u64,
    /// By which its two sides find each other.
    pub port: u16,
}

impl Run {
    /// The arguments for a side; its client adds the server's address.
    pub fn arguments(&self, device: &Device) -> Vec<String> {
        let mut all: Vec<String> = ["-d", &device.name, "-F", "-x"].map(str::to_owned).into();
        all.push(device.gid.to_string());
        for (flag, value) in [
            ("-u", u64::from(TIMEOUT)),
            ("-p", u64::from(self.port)),
            ("-n", self.iterations),
        ] {
            all.extend([flag.to_owned(), value.to_string()]);
        }
        all.extend(self.tool.extra().iter().map(|a| (*a).to_owned()));
        // Atomics have one size only, and the tool knows no such option.
        if self.tool.program() != "ib_atomic_lat" {
            all.extend(["-s".to_owned(), self.size.to_string()]);
        }
        all
    }

    /// Runs the client; µs of an operation, or MiB/s.
    ///
    /// # Errors
    /// The tool fails; what it said is in the error.
    pub fn measure(&self, device: &Device, server: &str) -> anyhow::Result<f64> {
        let program = self.tool.program();
        let out = Command::new(program)
            .args(self.arguments(device))
            .arg(server)
            .output()
            .with_context(|| format!("cannot run {program}: install perftest"))?;
        let text = String::from_utf8_lossy(&out.stdout);
        if !out.status.success() {
            bail!(
                "{program} failed ({}): {}{}",
                out.status,
                text.trim(),
                String::from_utf8_lossy(&out.stderr).trim()
            );
        }
        figure(self.tool, &text)
    }
}

/// What a tool printed: its median in µs, or its mean in MiB/s.
fn figure(tool: Tool, text: &str) -> anyhow::Result<f64> {
    let column = match tool {
        // Bytes, iterations, best and mean bandwidth, millions of messages a second.
        Tool::ReadBandwidth | Tool::WriteBandwidth => 3,
        Tool::WriteCompletion => 4,
        // Bytes, iterations, least, most, median …
        _ => 4,
    };
    let mut lines = text.lines().skip_while(|l| !l.trim_start().starts_with("#bytes"));
    let value = lines
        .nth(1)
        .and_then(|l| l.split_whitespace().nth(column)?.parse::<f64>().ok())
        .filter(|v| *v > 0.0)
        .with_context(|| format!("no figures in what {} printed: {}", tool.program(), text.trim()))?;
    Ok(match tool {
        Tool::WriteCompletion => 1.0 / value,
        // Its MB are of 1,048,576 bytes.
        _ => value,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATENCY: &str = "----\n #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]\n \
        8       1000          31.00          1044.93      37.27    \t       40.76\n----\n";
    const BANDWIDTH: &str = " #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]\n \
        8      500              1.21              1.10\t\t   0.025000\n";

    #[test]
    fn figures_are_found() {
        assert_eq!(figure(Tool::ReadLatency, LATENCY).unwrap(), 37.27);
        assert_eq!(figure(Tool::ReadBandwidth, BANDWIDTH).unwrap(), 1.10);
        assert_eq!(figure(Tool::WriteCompletion, BANDWIDTH).unwrap(), 40.0);
        let none = figure(Tool::ReadLatency, "Couldn't connect\n").unwrap_err();
        assert!(none.to_string().contains("Couldn't connect"), "{none}");
    }

    #[test]
    fn atomics_have_no_size() {
        let device = Device {
            name: "rxe0".into(),
            gid: 1,
        };
        let run = |tool| Run {
            tool,
            size: 8,
            iterations: 10,
            port: 18_500,
        };
        let line = |tool| run(tool).arguments(&device).join(" ");
        assert_eq!(
            line(Tool::ReadLatency),
            "-d rxe0 -F -x 1 -u 19 -p 18500 -n 10 -s 8"
        );
        assert_eq!(
            line(Tool::FaaLatency),
            "-d rxe0 -F -x 1 -u 19 -p 18500 -n 10 -A FETCH_AND_ADD"
        );
    }
}
