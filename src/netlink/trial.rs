//! Sees by a connection whether what leaves this pod is redirected: the kernel shows its rules only to those who may
//! change them, and where a component of the node installs them, this container may not.
//!
//! What enters the pod cannot be tried from within, so the trial says nothing about it.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use nix::{
    sys::socket::{getsockopt, sockopt},
    unistd::{Gid, Uid},
};

use crate::redirect::{Connection, Families, Family, Fate, Match, Place, RuleSet, Side};

/// A redirected connection never leaves the pod, so it is there in less than a millisecond. One that does leave it goes
/// to an address that nobody has.
const PATIENCE: Duration = Duration::from_secs(2);
/// Addresses for documentation (RFC 5737, RFC 3849): nobody answers there.
const NOBODY: [IpAddr; 4] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)),
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];
/// `discard`, and two that are rarely left alone together with it.
const PORTS: [u16; 3] = [9, 80, 61_337];

/// What the connection of one family showed.
#[derive(Debug)]
pub enum Trial {
    /// It came to the proxy's port, with its destination known.
    Redirected(SocketAddr),
    /// It did not.
    NotRedirected(SocketAddr),
    /// There was no connection to be tried, and why.
    Untried(String),
}

/// Tries one connection of a family that the rules redirect to the proxy's outbound port.
fn trial(rules: &RuleSet, family: Family, outbound_port: u16) -> Trial {
    let Some(to) = captured(rules, family, outbound_port) else {
        return Trial::Untried("the settings capture nothing that this process sends".to_owned());
    };
    // What a process redirects comes to the loopback address.
    let here: IpAddr = match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    };
    if !has_route(to) {
        return Trial::Untried(format!("there is no route to {to}"));
    }
    let listener = match TcpListener::bind((here, outbound_port)) {
        Ok(listener) => listener,
        Err(error) => return Trial::Untried(format!("cannot listen on {here}: {error}")),
    };
    match TcpStream::connect_timeout(&to, PATIENCE) {
        Ok(_) if arrives(&listener, to) => Trial::Redirected(to),
        // That a network is unreachable may be the word of a router, to which a redirected connection does not come.
        _ => Trial::NotRedirected(to),
    }
}

/// Whether this pod knows a way to an address: without one the kernel refuses a connection before its rules see it.
/// Nothing is sent.
fn has_route(to: SocketAddr) -> bool {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let tried = UdpSocket::bind((any, 0)).and_then(|socket| socket.connect(to));
    !tried.is_err_and(|error| error.kind() == ErrorKind::NetworkUnreachable)
}

/// A destination that goes to the proxy.
fn captured(rules: &RuleSet, family: Family, outbound_port: u16) -> Option<SocketAddr> {
    let (addresses, ports) = candidates(rules, family);
    let (uid, gid) = (Uid::current().as_raw(), Gid::current().as_raw());
    let redirected = |address, port| {
        let place = Place::Leaving {
            interface: "",
            uid,
            gid,
        };
        rules.fate(&Connection {
            place,
            tcp: true,
            source: family.passed_on(),
            destination: address,
            port,
        }) == Fate::Redirected(outbound_port)
    };
    addresses
        .iter()
        .flat_map(|address| ports.iter().map(|port| (*address, *port)))
        .find(|(address, port)| redirected(*address, *port))
        .map(SocketAddr::from)
}

/// Addresses and ports of which some pair is captured, if any is.
fn candidates(rules: &RuleSet, family: Family) -> (Vec<IpAddr>, Vec<u16>) {
    let matches = rules
        .chains
        .iter()
        .flat_map(|chain| &chain.rules)
        .flat_map(|rule| &rule.matches);
    let (mut addresses, mut ports) = (NOBODY.to_vec(), PORTS.to_vec());
    for matched in matches {
        match matched {
            Match::Address {
                side: Side::Destination,
                range,
                within: true,
            } => addresses.push(range.network()),
            Match::Port(range) => ports.extend([range.first, range.last.saturating_add(1)]),
            _ => {}
        }
    }
    addresses.retain(|address| Family::of(*address) == family);
    (addresses, ports)
}

/// The connection is at our listener, and the kernel knows where it wanted to go.
fn arrives(listener: &TcpListener, to: SocketAddr) -> bool {
    if listener.set_nonblocking(true).is_err() {
        return false;
    }
    // It is established, so it is in the listener's queue.
    let Ok((stream, _)) = listener.accept() else {
        return false;
    };
    match to {
        SocketAddr::V4(to) => getsockopt(&stream, sockopt::OriginalDst).is_ok_and(|found| {
            u32::from_be(found.sin_addr.s_addr) == u32::from(*to.ip())
                && u16::from_be(found.sin_port) == to.port()
        }),
        SocketAddr::V6(to) => getsockopt(&stream, sockopt::Ip6tOriginalDst).is_ok_and(|found| {
            found.sin6_addr.s6_addr == to.ip().octets()
                && u16::from_be(found.sin6_port) == to.port()
        }),
    }
}

/// Tries each family that is there.
pub fn trials(rules: &RuleSet, families: Families, outbound_port: u16) -> Vec<(Family, Trial)> {
    [Family::V4, Family::V6]
        .into_iter()
        .filter(|family| families.has(*family))
        .map(|family| (family, trial(rules, family, outbound_port)))
        .collect()
}
