//! The packet filter's rules as values. They print as `nft list table inet malha` does, and tell what becomes of a
//! connection without a kernel.
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

use super::{
    Redirection,
    values::{Cidr, Include, Interface, PortRange},
};

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

    fn loopback(self) -> Cidr {
        let (address, bits): (IpAddr, _) = match self {
            Self::V4 => (Ipv4Addr::LOCALHOST.into(), 8),
            Self::V6 => (Ipv6Addr::LOCALHOST.into(), 128),
        };
        Cidr::new(address, bits).expect("no more bits than the address has")
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

    fn each(self) -> impl Iterator<Item = Family> {
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

pub(super) fn build(settings: &Redirection, families: Families) -> RuleSet {
    let chain = |name, hook, rules| Chain { name, hook, rules };
    RuleSet {
        chains: vec![
            chain(INBOUND, None, inbound(settings)),
            chain(PREROUTING, Some(Hook::Prerouting), prerouting(settings)),
            chain(OUTPUT, Some(Hook::Output), output(settings, families)),
        ],
    }
}

fn prerouting(settings: &Redirection) -> Vec<Rule> {
    let mut rules = vec![leave([Match::NotTcp])];
    let interfaces = settings.exclude_interfaces.iter();
    rules.extend(interfaces.map(|name| leave([Match::In(name.clone())])));
    rules.push(Rule::new([], Act::Goto(INBOUND)));
    rules
}

fn inbound(settings: &Redirection) -> Vec<Rule> {
    let redirect = Act::Redirect(settings.inbound_port);
    let mut rules = ports(&settings.exclude_inbound_ports, Act::Return);
    match &settings.include_inbound_ports {
        Include::All => rules.push(Rule::new([], redirect)),
        Include::Only(included) => rules.extend(ports(included, redirect)),
    }
    rules
}

fn output(settings: &Redirection, families: Families) -> Vec<Rule> {
    let mut rules = vec![leave([Match::NotTcp])];
    let interfaces = settings.exclude_interfaces.iter();
    rules.extend(interfaces.map(|name| leave([Match::Out(name.clone())])));
    // The proxy first: neither a port nor a user that is left alone may change what becomes of its own connections.
    rules.extend(families.each().map(|family| self_call(settings, family)));
    rules.push(leave([Match::Group(settings.proxy_gid)]));
    // The application calls itself: by loopback, or by its own address, which the kernel sends by `lo` as well.
    rules.push(leave([Match::OutLoopback]));
    let users = settings.exclude_outbound_uids.iter();
    rules.extend(users.map(|user| leave([Match::User(*user)])));
    rules.extend(ports(&settings.exclude_outbound_ports, Act::Return));
    let excluded = &settings.exclude_outbound_ip_ranges;
    rules.extend(destinations(excluded, families, Act::Return));
    rules.extend(captured(settings, families));
    rules
}

/// A pod that calls its own Service may be load-balanced to itself: the proxy then opens TLS to the pod's own address
/// by `lo`, and it must meet its inbound side, not the application. What its inbound side passes on to the application
/// goes by `lo` too and is told by its source. (istio/istio#12551)
fn self_call(settings: &Redirection, family: Family) -> Rule {
    let outside = |side, range| Match::Address {
        side,
        range,
        within: false,
    };
    Rule::new(
        [
            Match::Group(settings.proxy_gid),
            Match::OutLoopback,
            outside(Side::Destination, family.loopback()),
            outside(Side::Source, Cidr::host(family.passed_on())),
        ],
        Act::Goto(INBOUND),
    )
}

fn captured(settings: &Redirection, families: Families) -> Vec<Rule> {
    let redirect = Act::Redirect(settings.outbound_port);
    let all = Rule::new([], redirect);
    let Include::Only(included) = &settings.include_outbound_ports else {
        return vec![all];
    };
    let Include::Only(ranges) = &settings.include_outbound_ip_ranges else {
        return vec![all];
    };
    let mut rules = ports(included, redirect);
    rules.extend(destinations(ranges, families, redirect));
    rules
}

fn ports(ports: &[u16], act: Act) -> Vec<Rule> {
    let ranges = PortRange::cover(ports).into_iter();
    ranges
        .map(|range| Rule::new([Match::Port(range)], act))
        .collect()
}

fn destinations(ranges: &[Cidr], families: Families, act: Act) -> impl Iterator<Item = Rule> {
    let there = ranges
        .iter()
        .filter(move |range| families.has(Family::of(range.network())));
    there.map(move |range| {
        let matched = match range.bits() {
            0 => Match::Family(Family::of(range.network())),
            _ => Match::Address {
                side: Side::Destination,
                range: *range,
                within: true,
            },
        };
        Rule::new([matched], act)
    })
}

fn leave(matches: impl Into<Vec<Match>>) -> Rule {
    Rule::new(matches, Act::Return)
}

impl Rule {
    fn new(matches: impl Into<Vec<Match>>, act: Act) -> Self {
        let mut matches = matches.into();
        // The chains have let go of all else, but `nft` does not take back what it has listed unless the rule says so.
        let said = matches
            .iter()
            .any(|matched| matches!(matched, Match::Port(_)));
        if matches!(act, Act::Redirect(_)) && !said {
            matches.push(Match::Tcp);
        }
        Self { matches, act }
    }
}

/// The first packet of a connection, as a chain sees it.
#[derive(Clone, Copy, Debug)]
pub struct Connection<'a> {
    /// Where it is.
    pub place: Place<'a>,
    /// Whether it is TCP.
    pub tcp: bool,
    /// The sender's address.
    pub source: IpAddr,
    /// The receiver's address.
    pub destination: IpAddr,
    /// The receiver's port.
    pub port: u16,
}

/// Where a packet is, and what the kernel knows of it there.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// It came in by an interface.
    Entering(&'a str),
    /// A process sends it.
    Leaving {
        /// By this interface.
        interface: &'a str,
        /// The process' user.
        uid: u32,
        /// The process' group.
        gid: u32,
    },
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes where it wanted to.
    Untouched,
    /// It comes to this port of the pod.
    Redirected(u16),
}

impl RuleSet {
    /// What the kernel does with a connection under these rules.
    pub fn fate(&self, connection: &Connection<'_>) -> Fate {
        self.follow(
            match connection.place {
                Place::Entering(_) => PREROUTING,
                Place::Leaving { .. } => OUTPUT,
            },
            connection,
        )
    }

    fn follow(&self, name: &str, connection: &Connection<'_>) -> Fate {
        let chain = self.chains.iter().find(|chain| chain.name == name);
        let mut rules = chain.into_iter().flat_map(|chain| &chain.rules);
        let act = rules
            .find(|rule| rule.matches.iter().all(|matched| matched.holds(connection)))
            .map(|rule| rule.act);
        match act {
            None | Some(Act::Return) => Fate::Untouched,
            // The chains form no ring: only `inbound` is gone to, and it goes nowhere.
            Some(Act::Goto(next)) => self.follow(next, connection),
            Some(Act::Redirect(port)) => Fate::Redirected(port),
        }
    }
}

impl Match {
    fn holds(&self, connection: &Connection<'_>) -> bool {
        match (self, connection.place) {
            (Self::NotTcp, _) => !connection.tcp,
            (Self::Tcp, _) => connection.tcp,
            (Self::Family(family), _) => Family::of(connection.destination) == *family,
            (Self::In(name), Place::Entering(interface))
            | (Self::Out(name), Place::Leaving { interface, .. }) => name.as_str() == interface,
            (Self::OutLoopback, Place::Leaving { interface, .. }) => interface == "lo",
            (Self::Group(group), Place::Leaving { gid, .. }) => *group == gid,
            (Self::User(user), Place::Leaving { uid, .. }) => *user == uid,
            (
                Self::Address {
                    side,
                    range,
                    within,
                },
                _,
            ) => {
                let address = match side {
                    Side::Source => connection.source,
                    Side::Destination => connection.destination,
                };
                Family::of(address) == Family::of(range.network())
                    && range.contains(address) == *within
            }
            (Self::Port(range), _) => range.contains(connection.port),
            // What the kernel does not know at a place equals nothing there.
            _ => false,
        }
    }
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
