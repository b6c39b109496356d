//! A control plane that runs outside the cluster, reached by the API server as if it ran inside.

use std::net::IpAddr;

use nix::ifaddrs::getifaddrs;

/// An address of this machine that an EndpointSlice may hold: not loopback and not link-local.
pub(crate) fn host_address() -> Option<IpAddr> {
    let addresses = getifaddrs().ok()?.filter_map(|interface| {
        let address = interface.address?;
        if let Some(v4) = address.as_sockaddr_in() {
            return Some(IpAddr::V4(v4.ip()));
        }
        address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip()))
    });
    let mut usable: Vec<_> = addresses.filter(usable_as_endpoint).collect();
    usable.sort_by_key(IpAddr::is_ipv6);
    usable.first().copied()
}

fn usable_as_endpoint(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local() && !v6.is_unspecified(),
    }
}
