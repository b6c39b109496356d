//! What the rules mean, for settings and connections of every kind, without a kernel.

use std::net::IpAddr;

use malha::redirect::{Cidr, Connection, Families, Fate, Include, Place, Redirection};
use proptest::prelude::*;

const PASSED_ON: [&str; 2] = ["127.0.0.6", "::6"];

fn port() -> impl Strategy<Value = u16> {
    // Few, so that settings and connections meet; the ends, and neighbours.
    prop_oneof![
        Just(1),
        Just(80),
        Just(81),
        Just(82),
        Just(15001),
        Just(15006),
        Just(15020),
        Just(15021),
        Just(65534),
        Just(65535)
    ]
}

fn address() -> impl Strategy<Value = IpAddr> {
    let texts = [
        "10.0.0.1",
        "10.0.0.9",
        "10.200.0.1",
        "192.0.2.1",
        "127.0.0.1",
        "127.0.0.6",
        "fd00::1",
        "fd00:1::9",
        "2001:db8::1",
        "::1",
        "::6",
    ];
    prop::sample::select(texts.map(|text| text.parse().expect("an address")).to_vec())
}

fn cidr() -> impl Strategy<Value = Cidr> {
    let bits = prop::sample::select(vec![0, 8, 9, 24, 32, 48, 64, 127, 128]);
    (address(), bits).prop_filter_map("bits", |(address, bits)| Cidr::new(address, bits))
}

fn some<T: Clone + std::fmt::Debug + 'static>(
    one: impl Strategy<Value = T> + 'static,
) -> impl Strategy<Value = Vec<T>> {
    prop::collection::vec(one, 0..4)
}

fn all_or_some<T: Clone + std::fmt::Debug + 'static>(
    one: impl Strategy<Value = T> + 'static,
) -> impl Strategy<Value = Include<T>> {
    prop_oneof![Just(Include::All), some(one).prop_map(Include::Only)]
}

fn redirection() -> impl Strategy<Value = Redirection> {
    let inbound = (all_or_some(port()), some(port()));
    let outbound = (
        all_or_some(port()),
        some(port()),
        all_or_some(cidr()),
        some(cidr()),
    );
    let interface = prop::sample::select(vec!["eth0", "eth1", "lo"]);
    let interface = interface.prop_map(|name| name.parse().expect("a name"));
    let left_alone = (
        some(interface),
        some(prop::sample::select(vec![0, 1000, 1337])),
    );
    (inbound, outbound, left_alone).prop_map(|(inbound, outbound, left_alone)| Redirection {
        proxy_gid: 1337,
        inbound_port: 15006,
        outbound_port: 15001,
        include_inbound_ports: inbound.0,
        exclude_inbound_ports: inbound.1,
        include_outbound_ports: outbound.0,
        exclude_outbound_ports: outbound.1,
        include_outbound_ip_ranges: outbound.2,
        exclude_outbound_ip_ranges: outbound.3,
        exclude_interfaces: left_alone.0,
        exclude_outbound_uids: left_alone.1,
    })
}

fn place() -> impl Strategy<Value = Place<'static>> {
    let interface = prop::sample::select(vec!["eth0", "eth1", "lo"]);
    let id = prop::sample::select(vec![0, 1000, 1337]);
    prop_oneof![
        interface.clone().prop_map(Place::Entering),
        (interface, id.clone(), id).prop_map(|(interface, uid, gid)| Place::Leaving {
            interface,
            uid,
            gid
        }),
    ]
}

fn connection() -> impl Strategy<Value = Connection<'static>> {
    let addresses = (address(), address()).prop_filter("one family", |(source, destination)| {
        source.is_ipv4() == destination.is_ipv4()
    });
    let tcp = prop::bool::weighted(0.9);
    (place(), tcp, addresses, port()).prop_map(|(place, tcp, (source, destination), port)| {
        Connection {
            place,
            tcp,
            source,
            destination,
            port,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_is_written_is_read(settings in redirection()) {
        let argument = settings.to_argument();
        prop_assert_eq!(Redirection::parse(&argument).expect(&argument), settings);
    }

    #[test]
    fn the_rules_do_what_the_settings_say(settings in redirection(), connection in connection()) {
        let rules = settings.rule_set(Families::BOTH);
        prop_assert_eq!(rules.fate(&connection), expected(&settings, &connection), "{}", rules);
    }

    #[test]
    fn the_proxy_never_meets_its_own_outbound_side(settings in redirection(), connection in connection()) {
        if let Place::Leaving { gid: 1337, .. } = connection.place {
            let fate = settings.rule_set(Families::BOTH).fate(&connection);
            prop_assert_ne!(fate, Fate::Redirected(15001));
        }
    }

    #[test]
    fn what_the_proxy_passes_on_is_never_captured_again(settings in redirection(), mut connection in connection()) {
        let own = PASSED_ON[usize::from(connection.destination.is_ipv6())];
        connection.source = own.parse().expect("an address");
        connection.place = Place::Leaving { interface: "lo", uid: 1337, gid: 1337 };
        prop_assert_eq!(settings.rule_set(Families::BOTH).fate(&connection), Fate::Untouched);
    }

    #[test]
    fn rules_of_an_absent_family_are_not_missed(settings in redirection(), connection in connection()) {
        let v4 = connection.destination.is_ipv4();
        let only = settings.rule_set(Families { v4, v6: !v4 });
        let both = settings.rule_set(Families::BOTH);
        prop_assert_eq!(only.fate(&connection), both.fate(&connection));
        let other = if v4 { "ip6 " } else { "ip " };
        prop_assert!(!only.to_string().contains(other), "{}", only);
    }
}

/// The settings' words, one after the other, without rules.
fn expected(settings: &Redirection, connection: &Connection<'_>) -> Fate {
    if !connection.tcp {
        return Fate::Untouched;
    }
    let (Place::Entering(interface) | Place::Leaving { interface, .. }) = connection.place;
    let excluded = |name: &str| {
        let mut excluded = settings.exclude_interfaces.iter();
        excluded.any(|interface| interface.as_str() == name)
    };
    if excluded(interface) {
        return Fate::Untouched;
    }
    let Place::Leaving {
        interface,
        uid,
        gid,
    } = connection.place
    else {
        return inbound(settings, connection.port);
    };
    let (source, destination) = (connection.source, connection.destination);
    let passed_on = PASSED_ON
        .iter()
        .any(|own| source == own.parse::<IpAddr>().expect("an address"));
    match (gid == settings.proxy_gid, interface == "lo") {
        (true, true) if !destination.is_loopback() && !passed_on => {
            inbound(settings, connection.port)
        }
        (true, _) | (_, true) => Fate::Untouched,
        _ => outbound(settings, uid, destination, connection.port),
    }
}

fn inbound(settings: &Redirection, port: u16) -> Fate {
    let included = includes(&settings.include_inbound_ports, |one| *one == port);
    match included && !settings.exclude_inbound_ports.contains(&port) {
        true => Fate::Redirected(settings.inbound_port),
        false => Fate::Untouched,
    }
}

fn outbound(settings: &Redirection, uid: u32, destination: IpAddr, port: u16) -> Fate {
    let holds = |range: &Cidr| range.contains(destination);
    let left_alone = settings.exclude_outbound_uids.contains(&uid)
        || settings.exclude_outbound_ports.contains(&port)
        || settings.exclude_outbound_ip_ranges.iter().any(holds);
    let captured = includes(&settings.include_outbound_ports, |one| *one == port)
        || includes(&settings.include_outbound_ip_ranges, holds);
    match captured && !left_alone {
        true => Fate::Redirected(settings.outbound_port),
        false => Fate::Untouched,
    }
}

fn includes<T>(include: &Include<T>, holds: impl Fn(&T) -> bool) -> bool {
    match include {
        Include::All => true,
        Include::Only(items) => items.iter().any(holds),
    }
}
