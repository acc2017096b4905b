//! Which device, port and address an endpoint uses.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::ffi::{self, Context, DeviceLimits, Gid, Pd, PortInfo};
use crate::{TransportError, VerbsOptions};

/// An open device, and the place on it that peers are to send to.
pub(super) struct Device {
    pub(super) pd: Arc<Pd>,
    pub(super) limits: DeviceLimits,
    pub(super) port: u8,
    pub(super) info: PortInfo,
    pub(super) gid_index: u8,
    pub(super) gid: [u8; 16],
}

/// A port that could be used, and how well it fits.
struct Candidate {
    context: Arc<Context>,
    limits: DeviceLimits,
    port: u8,
    info: PortInfo,
    gid_index: u8,
    gid: [u8; 16],
    /// Small is good.
    rank: u8,
}

fn os(what: String, e: &std::io::Error) -> TransportError {
    TransportError::os(what, e)
}

/// Opens the device that the options name, else the one with the address listened on, else the first.
pub(super) fn open(listen: SocketAddr, options: &VerbsOptions) -> Result<Device, TransportError> {
    let names = match &options.device {
        Some(name) => vec![name.clone()],
        None => ffi::names().map_err(|e| os("list the RDMA devices".to_owned(), &e))?,
    };
    if names.is_empty() {
        return Err(missing(
            "this machine has no RDMA device: load its driver, or add one with `rdma link add`",
        ));
    }
    let mut best: Option<Candidate> = None;
    let mut why = Vec::new();
    for name in &names {
        let context = match Context::open(name) {
            Ok(context) => context,
            Err(e) if names.len() == 1 => return Err(os(format!("open the RDMA device {name}"), &e)),
            Err(e) => {
                why.push(format!("{name}: {e}"));
                continue;
            }
        };
        let limits = context
            .limits()
            .map_err(|e| os(format!("ask the RDMA device {name} for its limits"), &e))?;
        if !limits.atomics {
            why.push(format!("{name}: no atomic operations"));
            continue;
        }
        let ports = match options.port {
            Some(port) => port..=port,
            None => 1..=limits.ports,
        };
        for port in ports {
            match candidate(&context, limits, port, listen.ip(), options) {
                Ok(found) => {
                    if best.as_ref().is_none_or(|b| found.rank < b.rank) {
                        best = Some(found);
                    }
                }
                Err(reason) => why.push(format!("{name} port {port}: {reason}")),
            }
        }
    }
    let Some(best) = best else {
        return Err(missing(&format!("no RDMA port can be used ({})", why.join("; "))));
    };
    let pd = Pd::new(&best.context)
        .map_err(|e| os(format!("set up a protection domain of {}", best.context.name), &e))?;
    Ok(Device {
        pd,
        limits: best.limits,
        port: best.port,
        info: best.info,
        gid_index: best.gid_index,
        gid: best.gid,
    })
}

fn missing(reason: &str) -> TransportError {
    TransportError::Os {
        what: "find an RDMA device".to_owned(),
        reason: reason.to_owned(),
    }
}

fn candidate(
    context: &Arc<Context>,
    limits: DeviceLimits,
    port: u8,
    listen: IpAddr,
    options: &VerbsOptions,
) -> Result<Candidate, String> {
    let info = context.port(port).map_err(|e| e.to_string())?;
    if !info.active {
        return Err("not active".to_owned());
    }
    let entries =
        (0..info.gids.min(256)).filter_map(|i| Some((u8::try_from(i).ok()?, context.gid(port, i)?)));
    let (gid_index, gid, rank) = match options.gid_index {
        Some(wanted) => entries
            .into_iter()
            .find(|(i, _)| *i == wanted)
            .map(|(i, g)| (i, g.raw, 0))
            .ok_or_else(|| format!("no address at index {wanted}"))?,
        None if info.ethernet => entries
            .filter_map(|(i, g)| Some((i, g.raw, rank(&g, listen)?)))
            .min_by_key(|(_, _, rank)| *rank)
            .ok_or("no RoCE v2 address: give its network device an IP address")?,
        // The address is needed across subnets only.
        None => entries
            .into_iter()
            .next()
            .map(|(i, g)| (i, g.raw, 2))
            .ok_or("no address")?,
    };
    Ok(Candidate {
        context: Arc::clone(context),
        limits,
        port,
        info,
        gid_index,
        gid,
        rank,
    })
}

/// How well an address fits what is listened on; None if not at all.
fn rank(gid: &Gid, listen: IpAddr) -> Option<u8> {
    if !gid.roce_v2 {
        return None;
    }
    let address = std::net::Ipv6Addr::from(gid.raw);
    let wanted = match listen {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    Some(if address == wanted {
        0
    } else if address.to_ipv4_mapped().is_some() == listen.is_ipv4() && !address.is_unicast_link_local() {
        1
    } else if !address.is_unicast_link_local() {
        2
    } else {
        3
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_listened_on_comes_first() {
        let v2 = |address: &str| Gid {
            raw: address.parse::<std::net::Ipv6Addr>().unwrap().octets(),
            roce_v2: true,
        };
        let listen: IpAddr = "10.77.0.2".parse().unwrap();
        assert_eq!(rank(&v2("::ffff:10.77.0.2"), listen), Some(0));
        assert_eq!(rank(&v2("::ffff:10.77.0.3"), listen), Some(1));
        assert_eq!(rank(&v2("fd00::2"), listen), Some(2));
        assert_eq!(rank(&v2("fe80::2"), listen), Some(3));
        let v1 = Gid {
            roce_v2: false,
            ..v2("::ffff:10.77.0.2")
        };
        assert_eq!(rank(&v1, listen), None);
        let listen: IpAddr = "fd00::2".parse().unwrap();
        assert_eq!(rank(&v2("fd00::2"), listen), Some(0));
        assert_eq!(rank(&v2("fd00::3"), listen), Some(1));
        assert_eq!(rank(&v2("::ffff:10.77.0.2"), listen), Some(2));
    }

    #[test]
    fn a_device_that_is_not_there_is_said_to_be_missing() {
        let options = VerbsOptions {
            device: Some("nosuch0".to_owned()),
            ..VerbsOptions::default()
        };
        let error = open("127.0.0.1:0".parse().unwrap(), &options).err().unwrap();
        assert!(error.to_string().contains("nosuch0"), "{error}");
    }
}
