//! Ranges of ports, as firewalls have them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Ports that may be listened at; in the configuration a number, or a string `LOW-HIGH`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    low: u16,
    high: u16,
}

impl Ports {
    /// All of them, the lowest first.
    pub fn all(self) -> impl Iterator<Item = u16> {
        self.low..=self.high
    }
}

impl std::str::FromStr for Ports {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("'{text}' names no ports: write for example \"7200-7299\", or 7200");
        let (low, high) = text.split_once('-').unwrap_or((text, text));
        let port = |text: &str| text.trim().parse::<u16>().ok().filter(|&port| port > 0);
        let (low, high) = port(low).zip(port(high)).ok_or_else(bad)?;
        if low > high {
            return Err(format!("'{text}' names no ports: it begins behind its end"));
        }
        Ok(Self { low, high })
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.low == self.high {
            write!(f, "{}", self.low)
        } else {
            write!(f, "{}-{}", self.low, self.high)
        }
    }
}

impl Serialize for Ports {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Ports {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Ports;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "ports: for example \"7200-7299\", or 7200")
            }
            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Ports, E> {
                self.visit_str(&number.to_string())
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Ports, E> {
                text.parse().map_err(E::custom)
            }
        }
        d.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Serialize, Deserialize)]
    struct Section {
        ports: Ports,
    }

    #[test]
    fn ranges_and_single_ports() {
        let read = |text: &str| toml::from_str::<Section>(text).map(|s| s.ports);
        for (text, all) in [
            ("ports = 7200", 7200..=7200),
            ("ports = '7200'", 7200..=7200),
            ("ports = '7200-7203'", 7200..=7203),
            ("ports = ' 65535 - 65535 '", 65535..=65535),
        ] {
            let ports = read(text).unwrap();
            assert!(ports.all().eq(all), "{text}");
            let section = toml::to_string(&Section { ports }).unwrap();
            assert_eq!(read(&section).unwrap(), ports);
        }
        for (text, told) in [
            ("ports = '7203-7200'", "begins behind its end"),
            ("ports = 0", "'0' names no ports"),
            ("ports = -7200", "'-7200' names no ports"),
            ("ports = '7200-65536'", "'7200-65536' names no ports"),
            ("ports = '7200-'", "names no ports"),
            ("ports = 'some'", "write for example"),
            ("ports = true", "7200-7299"),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(told), "{text}: {error}");
        }
    }
}
