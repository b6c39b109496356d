//! The address of `lo` that the proxy binds to when it passes an IPv6 connection on to the application.

use std::net::IpAddr;

use nix::{errno::Errno, sys::socket::SockProtocol};

use super::{
    socket::{Outcome, Socket},
    wire::{self, ACK, Attributes, CREATE, EXCLUSIVE, REQUEST},
};

/// `RTM_NEWADDR`
const NEW_ADDRESS: u16 = 20;
/// `IFA_F_NODAD`: nobody else can have an address of `lo`.
const NO_DETECTION: u8 = 2;
/// `RT_SCOPE_HOST`
const HOST: u8 = 254;
/// `AF_INET6`
const INET6: u8 = 10;
/// `lo` is the first interface of every network namespace.
const LOOPBACK: u32 = 1;

/// `struct ifa_cacheinfo`: valid for ever, preferred never, so that nobody who binds to nothing gets it as a source.
const LIFETIMES: [u32; 4] = [0, u32::MAX, 0, 0];

/// Gives `lo` an IPv6 address; that it has it already is as good.
pub(super) fn add(address: IpAddr) -> Result<(), Errno> {
    let IpAddr::V6(address) = address else {
        return Ok(());
    };
    let mut fixed = vec![INET6, 128, NO_DETECTION, HOST];
    fixed.extend(LOOPBACK.to_ne_bytes());
    let attributes = Attributes::default()
        .bytes(1, &address.octets())
        .bytes(2, &address.octets())
        .bytes(6, &LIFETIMES.map(u32::to_ne_bytes).concat());
    let flags = REQUEST | ACK | CREATE | EXCLUSIVE;
    let message = wire::message(NEW_ADDRESS, flags, 1, &fixed, &attributes);
    let mut socket = Socket::open(SockProtocol::NetlinkRoute)?;
    match socket.transact(&message, &[1])? {
        Outcome::Done | Outcome::Refused(_, Errno::EEXIST) => Ok(()),
        Outcome::Refused(_, error) => Err(error),
        Outcome::Unknown => Err(Errno::ETIMEDOUT),
    }
}
