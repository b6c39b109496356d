//! The packet filter's rules as values. They print as `nft list table inet malha` does.
//!
//! ```text
//! prerouting (enters the pod)  -> interfaces left alone -> inbound
//! output (leaves a process)    -> interfaces left alone -> the proxy's own -> loopback -> users, ports, ranges left alone
//!                                                       -> ports, ranges captured -> the proxy's outbound port
//! inbound (both come here)     -> ports left alone -> ports captured -> the proxy's inbound port
//! ```
//!
//! A nat chain sees the first packet of a connection only, so a rule costs nothing afterwards.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::values::{Cidr, Interface, PortRange};

/// The table that holds it all, in family `inet`.
pub const TABLE: &str = "malha";
/// The chain of what enters.
pub const PREROUTING: &str = "prerouting";
/// The chain of what leaves.
pub const OUTPUT: &str = "output";
/// The chain where both meet when the proxy's inbound port is next.
pub const INBOUND: &str = "inbound";

/// What the proxy binds to when it passes a connection on to the application, so that it is not captured again. The
/// IPv6 one must be given to `lo`; all of 127.0.0.0/8 is there from the start.
const PASSED_ON: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6)),
    IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6)),
];

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() {
            Self::V4
        } else {
            Self::V6
        }
    }

    /// The source of what the proxy passes on to the application.
    pub fn passed_on(self) -> IpAddr {
        match self {
            Self::V4 => PASSED_ON[0],
            Self::V6 => PASSED_ON[1],
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// Which families a pod has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Families {
    /// IPv4 is there.
    pub v4: bool,
    /// IPv6 is there.
    pub v6: bool,
}

impl Families {
    /// Both.
    pub const BOTH: Self = Self { v4: true, v6: true };

    /// Whether the family is there.
    pub fn has(self, family: Family) -> bool {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }

    pub(super) fn each(self) -> impl Iterator<Item = Family> {
        [Family::V4, Family::V6]
            .into_iter()
            .filter(move |family| self.has(*family))
    }
}

/// The chains of the table, in the order in which they are made: what is gone to stands before who goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSet {
    /// The chains.
    pub chains: Vec<Chain>,
}

/// Rules in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Its name.
    pub name: &'static str,
    /// Where packets enter it; `None` if only other chains lead here.
    pub hook: Option<Hook>,
    /// The rules.
    pub rules: Vec<Rule>,
}

/// The place of a nat chain in the kernel. The priority is that of destination NAT, -100, in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// What came in, before it is routed.
    Prerouting,
    /// What a process of the pod sends.
    Output,
}

/// All matches hold: the act is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The conditions.
    pub matches: Vec<Match>,
    /// What is done.
    pub act: Act,
}

/// A condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    /// Another protocol than TCP.
    NotTcp,
    /// TCP.
    Tcp,
    /// The packet's family.
    Family(Family),
    /// It came in by this interface.
    In(Interface),
    /// It goes out by this interface.
    Out(Interface),
    /// It goes out by `lo`.
    OutLoopback,
    /// A process of this group sends it.
    Group(u32),
    /// A process of this user sends it.
    User(u32),
    /// One of its addresses is in the range, or is not and of the range's family all the same.
    Address {
        /// Which of the two.
        side: Side,
        /// The range.
        range: Cidr,
        /// Whether it must be in it.
        within: bool,
    },
    /// Its destination port is one of these.
    Port(PortRange),
}

/// One of a packet's two addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Who sends.
    Source,
    /// Who is to receive.
    Destination,
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Leaves the connection alone.
    Return,
    /// Goes on in another chain and does not come back.
    Goto(&'static str),
    /// Sends the connection to a port of this pod.
    Redirect(u16),
}

/// As `nft list table inet malha`.
impl fmt::Display for RuleSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table inet {TABLE} {{")?;
        for (at, chain) in self.chains.iter().enumerate() {
            if at > 0 {
                writeln!(f)?;
            }
            write!(f, "{chain}")?;
        }
        writeln!(f, "}}")
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\tchain {} {{", self.name)?;
        if let Some(hook) = self.hook {
            writeln!(f, "\t\t{hook}; policy accept;")?;
        }
        for rule in &self.rules {
            writeln!(f, "\t\t{rule}")?;
        }
        writeln!(f, "\t}}")
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prerouting => "type nat hook prerouting priority dstnat",
            Self::Output => "type nat hook output priority -100",
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for matched in &self.matches {
            write!(f, "{matched} ")?;
        }
        write!(f, "{}", self.act)
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotTcp => f.write_str("meta l4proto != tcp"),
            Self::Tcp => f.write_str("meta l4proto tcp"),
            Self::Family(Family::V4) => f.write_str("meta nfproto ipv4"),
            Self::Family(Family::V6) => f.write_str("meta nfproto ipv6"),
            Self::In(name) => write!(f, "iifname \"{}\"", name.as_str()),
            Self::Out(name) => write!(f, "oifname \"{}\"", name.as_str()),
            Self::OutLoopback => f.write_str("oif \"lo\""),
            Self::Group(gid) => write!(f, "meta skgid {gid}"),
            Self::User(uid) => write!(f, "meta skuid {uid}"),
            Self::Address {
                side,
                range,
                within,
            } => {
                let ip = if range.network().is_ipv4() {
                    "ip"
                } else {
                    "ip6"
                };
                let address = match side {
                    Side::Source => "saddr",
                    Side::Destination => "daddr",
                };
                let not = if *within { "" } else { "!= " };
                write!(f, "{ip} {address} {not}{}", range.shortest())
            }
            Self::Port(range) => write!(f, "tcp dport {range}"),
        }
    }
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Return => f.write_str("return"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::Redirect(port) => write!(f, "redirect to :{port}"),
        }
    }
}
