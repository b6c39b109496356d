//! A catalogue that followed a random history equals one that is told the end of it.

use malha::{
    mesh::{
        Address, Endpoint, Event, ExportTo, Health, Mode, ObjectName, PeerAuthentication, Protocol,
        Service, ServicePort, Slice, TargetPort, Workload, World,
    },
    xds::{Catalogue, Kind},
};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn a_catalogue_that_followed_equals_a_fresh_one(
        history in proptest::collection::vec(any::<[u8; 8]>(), 1..60),
    ) {
        let mut followed = Catalogue::new(super::settings());
        let mut told = std::collections::BTreeMap::new();
        for dice in history {
            let before = super::versions(&followed);
            let touched = followed.apply([event(dice)]);
            for proxy in super::proxies(&followed) {
                for (kind, resource) in super::resources(&followed, &proxy) {
                    told.insert((proxy.clone(), kind, resource.name.clone()), resource.version);
                }
            }
            // Nothing changes without a word.
            if touched == malha::xds::Touched::default() {
                prop_assert_eq!(before, super::versions(&followed));
            }
        }
        let mut fresh = Catalogue::new(super::settings());
        fresh.apply(events(followed.world()));
        prop_assert_eq!(super::versions(&followed), super::versions(&fresh));
    }

    #[test]
    fn whatever_changes_is_touched(
        history in proptest::collection::vec(any::<[u8; 8]>(), 1..40),
    ) {
        let mut catalogue = Catalogue::new(super::settings());
        let mut before = std::collections::BTreeMap::new();
        for dice in history {
            let touched = catalogue.apply([event(dice)]);
            let mut after = std::collections::BTreeMap::new();
            for proxy in super::proxies(&catalogue) {
                for (kind, resource) in super::resources(&catalogue, &proxy) {
                    after.insert((proxy.clone(), kind, resource.name.clone()), resource.version);
                }
            }
            let changed = after.iter().filter(|(key, version)| before.get(*key) != Some(*version));
            let gone = before.keys().filter(|key| !after.contains_key(*key));
            for (proxy, kind, name) in changed.map(|(key, _)| key).chain(gone) {
                let of_proxy = touched.proxies.contains(proxy);
                let shared = touched.shared.contains(&(*kind, name.clone()));
                prop_assert!(of_proxy || shared, "{} {:?} {} in {:?}", proxy, kind, name, touched);
            }
            before = after;
        }
    }
}

fn events(world: &World) -> Vec<Event> {
    let mut events = Vec::new();
    let policies = world.peer_authentications.clone().into_iter();
    events.extend(policies.map(|(name, one)| Event::PeerAuthentication(name, Some(one))));
    let pods = world.workloads.clone().into_iter();
    events.extend(pods.map(|(name, one)| Event::Workload(name, Some(one))));
    let slices = world.slices.clone().into_iter();
    events.extend(slices.map(|(name, one)| Event::Slice(name, Some(one))));
    let services = world.services.clone().into_iter();
    events.extend(services.map(|(name, one)| Event::Service(name, Some(one))));
    events
}

/// One change of a small world: 2 namespaces, 3 apps in each, 6 pods, 4 ports.
fn event([kind, namespace, which, there, a, b, c, d]: [u8; 8]) -> Event {
    let namespace = ["shop", "malha-system"][usize::from(namespace % 2)];
    let app = ["web", "api", "db"][usize::from(which % 3)];
    let there = there % 4 != 0;
    let number = u8::from(namespace == "shop") * 3 + which % 3;
    match kind % 4 {
        0 => {
            let name = ObjectName::new(namespace, app);
            Event::Service(name, there.then(|| service(number, app, [a, b, c, d])))
        }
        1 => {
            let name = ObjectName::new(namespace, &format!("{app}-{}", a % 2));
            Event::Slice(name, there.then(|| slice(namespace, app, [a, b, c, d])))
        }
        2 => {
            let name = ObjectName::new(namespace, &format!("{app}-{}", a % 2));
            let address = format!("10.244.{}.{}", number, 1 + a % 2);
            let pod = Workload {
                account: ["one", "two"][usize::from(b % 2)].into(),
                addresses: vec![address.parse().expect("an address")],
                labels: [("app".to_owned(), app.to_owned())].into(),
                sidecar: c % 4 != 0,
                host_network: c % 16 == 1,
                ended: d % 8 == 0,
                ports: vec![],
            };
            Event::Workload(name, there.then_some(pod))
        }
        _ => {
            let name = ObjectName::new(namespace, &format!("policy-{}", a % 2));
            let mode =
                |dice: u8| [Mode::Strict, Mode::Permissive, Mode::Disable][usize::from(dice % 3)];
            let policy = PeerAuthentication {
                selector: (b % 2 == 0).then(|| [("app".to_owned(), app.to_owned())].into()),
                mode: (c % 4 != 0).then(|| mode(c)),
                ports: (d % 2 == 0)
                    .then(|| (8080 + u16::from(d % 4), mode(d / 4)))
                    .into_iter()
                    .collect(),
                created: None,
            };
            Event::PeerAuthentication(name, there.then_some(policy))
        }
    }
}

fn service(number: u8, app: &str, [a, b, c, d]: [u8; 4]) -> Service {
    let protocols = [
        Protocol::Http,
        Protocol::Grpc,
        Protocol::Tcp,
        Protocol::Undeclared,
    ];
    let port = |n: u8, dice: u8| ServicePort {
        name: format!("p{n}"),
        number: 80 + u16::from(n),
        target: TargetPort::Number(8080 + u16::from(n)),
        protocol: protocols[usize::from(dice % 4)],
    };
    Service {
        address: match a % 8 {
            0 => Address::Headless,
            1 => Address::External("api.shop.svc.cluster.local".to_owned()),
            2 => Address::ClusterIps(vec![format!("fd00::{number}").parse().expect("an address")]),
            _ => Address::ClusterIps(vec![
                format!("10.96.0.{number}").parse().expect("an address"),
            ]),
        },
        ports: vec![port(0, b), port(1, b / 4)],
        selector: match c % 3 {
            0 => [].into(),
            _ => [("app".to_owned(), app.to_owned())].into(),
        },
        export_to: match d % 4 {
            0 => ExportTo::Only(vec!["shop".into()]),
            _ => ExportTo::Everyone,
        },
    }
}

fn slice(namespace: &str, app: &str, [a, b, c, d]: [u8; 4]) -> Slice {
    let endpoint = |n: u8, dice: u8| Endpoint {
        address: format!("10.244.7.{n}").parse().expect("an address"),
        pod: (!dice.is_multiple_of(4)).then(|| ObjectName::new(namespace, &format!("{app}-{n}"))),
        health: if dice.is_multiple_of(3) {
            Health::Draining
        } else {
            Health::Healthy
        },
        zone: None,
        hostname: None,
    };
    Slice {
        service: ["web", "api", app][usize::from(b % 3)].into(),
        ports: [("p0".to_owned(), 8080), ("p1".to_owned(), 8081)].into(),
        endpoints: (0..2)
            .filter(|n| (a >> n) & 1 == 0)
            .map(|n| endpoint(n, [c, d][usize::from(n)]))
            .collect(),
    }
}

/// The world of [`event`] makes something of every kind, or the tests above would prove nothing.
#[test]
fn the_random_world_is_not_empty() {
    let mut catalogue = Catalogue::new(super::settings());
    let mut state = 1u64;
    let mut dice = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        u8::try_from(state >> 56).expect("8 bits")
    };
    for _ in 0..200 {
        catalogue.apply([event(std::array::from_fn(|_| dice()))]);
    }
    let proxies = super::proxies(&catalogue);
    let kinds: std::collections::BTreeSet<_> = proxies
        .iter()
        .flat_map(|proxy| super::resources(&catalogue, proxy))
        .map(|(kind, _)| kind)
        .collect();
    assert_eq!(
        kinds.into_iter().collect::<Vec<_>>(),
        [Kind::Cluster, Kind::Endpoints, Kind::Listener, Kind::Route]
    );
}
