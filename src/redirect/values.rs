//! The small values of capture settings.

use std::{fmt, net::IpAddr, str::FromStr};

use serde::{Serialize, Serializer};

/// Everything, or what a list names (an empty list names nothing).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Include<T> {
    /// `*`.
    All,
    /// The list.
    Only(Vec<T>),
}

impl<T: Serialize> Serialize for Include<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::All => serializer.serialize_str("*"),
            Self::Only(items) => items.serialize(serializer),
        }
    }
}

/// A text that is not such a value: what would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(pub(super) &'static str);

/// A range of addresses, kept and written as its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    network: IpAddr,
    bits: u8,
}

impl Cidr {
    /// The range of the first `bits` bits of `address`; `None` if it does not have so many.
    pub fn new(address: IpAddr, bits: u8) -> Option<Self> {
        let shift = |width: u8| u32::from(width).checked_sub(u32::from(bits));
        let network = match address {
            IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(shift(32)?).unwrap_or(0);
                IpAddr::V4((u32::from(v4) & mask).into())
            }
            IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(shift(128)?).unwrap_or(0);
                IpAddr::V6((u128::from(v6) & mask).into())
            }
        };
        Some(Self { network, bits })
    }

    /// One address.
    pub fn host(address: IpAddr) -> Self {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        Self {
            network: address,
            bits,
        }
    }

    /// The first address, all of whose bits after the prefix are zero.
    pub fn network(&self) -> IpAddr {
        self.network
    }

    /// How many bits the addresses of the range have in common.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Whether the range holds the address.
    pub fn contains(&self, address: IpAddr) -> bool {
        Self::new(address, self.bits) == Some(*self)
    }

    fn is_host(&self) -> bool {
        *self == Self::host(self.network)
    }

    /// As `nft` writes it: one address without its length.
    pub(super) fn shortest(&self) -> String {
        match self.is_host() {
            true => self.network.to_string(),
            false => self.to_string(),
        }
    }
}

impl FromStr for Cidr {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let parse = || {
            let (address, bits) = text.split_once('/')?;
            // `FromStr` alone would take a sign.
            let digits = bits.bytes().all(|b| b.is_ascii_digit());
            Self::new(
                address.parse().ok()?,
                digits.then(|| bits.parse().ok()).flatten()?,
            )
        };
        parse().ok_or(ValueError(
            "a range is written like 10.0.0.0/8 or 2001:db8::/32",
        ))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.bits)
    }
}

impl Serialize for Cidr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The name of a network interface: at most 15 characters (`IFNAMSIZ` counts a NUL), and none that would need quoting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Interface(String);

impl Interface {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Interface {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"._-@+:".contains(&b);
        let named = (1..=15).contains(&text.len()) && text != "." && text != "..";
        match named && text.bytes().all(legal) {
            true => Ok(Self(text.to_owned())),
            false => Err(ValueError(
                "an interface has a name of 1 to 15 letters, digits and ._-@+:",
            )),
        }
    }
}

/// Ports in a row, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The lowest.
    pub first: u16,
    /// The highest.
    pub last: u16,
}

impl PortRange {
    /// As few ranges as hold exactly these ports, in ascending order.
    pub(super) fn cover(ports: &[u16]) -> Vec<Self> {
        let mut ports = ports.to_vec();
        ports.sort_unstable();
        let mut ranges: Vec<Self> = Vec::new();
        for port in ports {
            match ranges.last_mut() {
                Some(range) if port <= range.last.saturating_add(1) => range.last = port,
                _ => ranges.push(Self {
                    first: port,
                    last: port,
                }),
            }
        }
        ranges
    }

    /// Whether the port is one of them.
    pub fn contains(&self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first == self.last {
            true => write!(f, "{}", self.first),
            false => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_written_as_their_network() {
        let cidr = |text: &str| text.parse::<Cidr>().ok().map(|cidr| cidr.to_string());
        assert_eq!(cidr("10.1.2.3/8").as_deref(), Some("10.0.0.0/8"));
        assert_eq!(cidr("0.0.0.0/0").as_deref(), Some("0.0.0.0/0"));
        assert_eq!(cidr("10.1.2.3/32").as_deref(), Some("10.1.2.3/32"));
        assert_eq!(cidr("fd00::1/64").as_deref(), Some("fd00::/64"));
        assert_eq!(cidr("::/0").as_deref(), Some("::/0"));
        for bad in [
            "10.0.0.0",
            "10.0.0.0/33",
            "10.0.0/8",
            "::/129",
            "10.0.0.0/+8",
            "/8",
            "10.0.0.0/",
            "10.0.0.0/256",
            "fe80::1%eth0/64",
        ] {
            assert_eq!(cidr(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_range_holds_its_own_family_only() {
        let all: Cidr = "0.0.0.0/0".parse().expect("a range");
        assert!(all.contains([192, 0, 2, 1].into()));
        assert!(!all.contains("::".parse().expect("an address")));
        let ten: Cidr = "10.0.0.0/8".parse().expect("a range");
        assert!(ten.contains([10, 255, 0, 1].into()) && !ten.contains([11, 0, 0, 1].into()));
    }

    #[test]
    fn interfaces_are_names_of_at_most_fifteen_characters() {
        let interface = |text: &str| text.parse::<Interface>().is_ok();
        assert!(interface("eth0") && interface("veth1234567890a"));
        for bad in ["", ".", "..", "veth1234567890ab", "a/b", "a b", "a'b", "é"] {
            assert!(!interface(bad), "{bad:?}");
        }
    }

    #[test]
    fn ports_in_a_row_are_one_range() {
        let cover = |ports: &[u16]| {
            let ranges = PortRange::cover(ports);
            ranges
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(cover(&[15090, 15021, 15020, 15021]), "15020-15021 15090");
        assert_eq!(cover(&[65535, 65534, 1]), "1 65534-65535");
        assert_eq!(cover(&[]), "");
    }
}
