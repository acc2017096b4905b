//! Where a mount is reached by others.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::path::Path;
use std::sync::Arc;

use rdma_transport::TransportError;

use crate::mount::error::MountError;
use fsd_node::config::{Config, FabricChoice};
use fsd_node::endpoint::Endpoint;
use fsd_proto::rpc::Service;
use fsd_proto::wire::Role;

/// This host's address on the way to another; nothing is sent.
#[must_use]
pub fn route_to(addr: &str) -> Option<IpAddr> {
    let to = addr.to_socket_addrs().ok()?.next()?;
    let any: IpAddr = if to.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    // Connecting a datagram socket only looks the route up.
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(to).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// An address for a mount, beside the metadata server's, at a port that is given later (0: one that is free).
fn own_listen(config: &Config) -> impl Fn(u16) -> String {
    let socket = (config.fabric == FabricChoice::Shm).then(|| {
        let dir = Path::new(&config.meta.listen)
            .parent()
            .unwrap_or(Path::new("/tmp"));
        let name = format!("mount-{}-{:08x}.sock", std::process::id(), rt::random::<u32>());
        dir.join(name).to_string_lossy().into_owned()
    });
    // Others are told the address, so it must be one of this host's; it also tells which RDMA device is used.
    let ip = route_to(&config.meta.listen).unwrap_or(Ipv4Addr::LOCALHOST.into());
    move |port| match &socket {
        Some(path) => path.clone(),
        None => SocketAddr::new(ip, port).to_string(),
    }
}

/// Opens the endpoint of a mount, at an address if one is given, else where the configuration allows it.
///
/// # Errors
/// Every port is taken; the fabric refuses.
pub(crate) fn open_endpoint(
    config: &Config,
    listen: Option<&str>,
    key: &[u8],
    service: &Arc<dyn Service>,
) -> Result<Endpoint, MountError> {
    let open = |address: String| {
        let service = Arc::clone(service);
        Endpoint::open(config, Role::Client(None), address, key.to_vec(), service)
    };
    if let Some(address) = listen {
        return Ok(open(address.to_owned())?);
    }
    let own = own_listen(config);
    let Some(ports) = config.mount.ports.filter(|_| config.fabric != FabricChoice::Shm) else {
        return Ok(open(own(0))?);
    };
    for port in ports.all() {
        match open(own(port)) {
            Err(TransportError::AddressInUse { .. }) => {}
            other => return Ok(other?),
        }
    }
    Err(MountError::Ports(ports))
}

/// Is an address one of this host's? One that cannot be told counts as ours: its server will say what is wrong with it.
#[must_use]
pub fn is_here(address: &str) -> bool {
    let Ok(addresses) = address.to_socket_addrs() else {
        return true;
    };
    let mut ips = addresses.map(|a| a.ip()).peekable();
    ips.peek().is_none()
        || ips.any(|ip| match UdpSocket::bind((ip, 0)) {
            Ok(_) => true,
            Err(error) => error.kind() != std::io::ErrorKind::AddrNotAvailable,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_this_host() {
        assert!(is_here("127.0.0.1:7000") && is_here("localhost:7000"));
        // For documentation only: nobody has it.
        assert!(!is_here("192.0.2.1:7000"));
        assert!(is_here("no.such.host.invalid:7000") && is_here("nonsense"));
    }
}
