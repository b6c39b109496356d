//! Capture settings as rules.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    Redirection,
    rules::{
        Act, Chain, Families, Family, Hook, INBOUND, Match, OUTPUT, PREROUTING, Rule, RuleSet, Side,
    },
    values::{Cidr, Include, PortRange},
};

pub(super) fn rule_set(settings: &Redirection, families: Families) -> RuleSet {
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
            outside(Side::Destination, loopback(family)),
            outside(Side::Source, Cidr::host(family.passed_on())),
        ],
        Act::Goto(INBOUND),
    )
}

fn loopback(family: Family) -> Cidr {
    let (address, bits): (IpAddr, _) = match family {
        Family::V4 => (Ipv4Addr::LOCALHOST.into(), 8),
        Family::V6 => (Ipv6Addr::LOCALHOST.into(), 128),
    };
    Cidr::new(address, bits).expect("no more bits than the address has")
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
