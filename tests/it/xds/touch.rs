//! A change touches what it must and nothing else.

use std::collections::BTreeSet;

use malha::{
    mesh::{Event, Health, ObjectName},
    xds::{Catalogue, Kind, Touched},
};

/// `web` with one port and two pods, `batch` without a Service.
const SHOP: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
  - {addresses: [10.244.0.5], targetRef: {kind: Pod, name: web-a, namespace: shop}}
  - {addresses: [10.244.0.6], targetRef: {kind: Pod, name: web-b, namespace: shop}}
---
apiVersion: v1
kind: Pod
metadata: {name: web-a, namespace: shop, labels: {app: web}}
spec: {serviceAccountName: web, containers: [{name: app}, {name: malha-proxy}]}
status: {podIP: 10.244.0.5}
---
apiVersion: v1
kind: Pod
metadata: {name: web-b, namespace: shop, labels: {app: web}}
spec: {serviceAccountName: web, containers: [{name: app}, {name: malha-proxy}]}
status: {podIP: 10.244.0.6}
---
apiVersion: v1
kind: Pod
metadata: {name: batch, namespace: jobs, labels: {app: batch}}
spec: {serviceAccountName: batch, containers: [{name: app}, {name: malha-proxy}]}
status: {podIP: 10.244.0.7}
";

const WEB: &str = "outbound|80||web.shop.svc.cluster.local";
const BLOCK: &str = "pods|10.244.0.0/24";

fn shop() -> Catalogue {
    let mut catalogue = Catalogue::new(super::settings());
    catalogue.apply(super::world(SHOP));
    catalogue
}

/// The first event of SHOP that `wanted` takes, after a change.
fn changed(change: impl Fn(&mut Event) -> bool) -> Event {
    let mut events = super::world(SHOP).into_iter();
    let changed = events.find_map(|mut event| change(&mut event).then_some(event));
    changed.expect("an event of the shop")
}

fn policy(namespace: &str, spec: &str) -> Event {
    let text = format!(
        "{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {{name: p, namespace: {namespace}}}, spec: {spec}}}"
    );
    super::world(&text).remove(0)
}

fn shared(touched: &Touched) -> BTreeSet<(Kind, &str)> {
    touched
        .shared
        .iter()
        .map(|(kind, name)| (*kind, &**name))
        .collect()
}

fn proxies(touched: &Touched) -> Vec<String> {
    touched.proxies.iter().map(ToString::to_string).collect()
}

#[test]
fn what_is_known_already_touches_nothing() {
    assert_eq!(shop().apply(super::world(SHOP)), Touched::default());
}

#[test]
fn an_endpoint_touches_its_assignment_alone() {
    let mut shop = shop();
    let cluster = |shop: &Catalogue| {
        let proxy = ObjectName::new("jobs", "batch");
        shop.find(&proxy, Kind::Cluster, WEB)
            .expect("a cluster")
            .version
    };
    let before = cluster(&shop);
    let gone = shop.apply([changed(|event| match event {
        Event::Slice(_, Some(slice)) => slice.endpoints.pop().is_some(),
        _ => false,
    })]);
    assert_eq!(shared(&gone), [(Kind::Endpoints, WEB)].into());
    assert_eq!(proxies(&gone), [""; 0]);
    let draining = shop.apply([changed(|event| match event {
        Event::Slice(_, Some(slice)) => {
            slice.endpoints[0].health = Health::Draining;
            true
        }
        _ => false,
    })]);
    assert_eq!(shared(&draining), [(Kind::Endpoints, WEB)].into());
    assert_eq!(cluster(&shop), before);
}

#[test]
fn an_account_is_a_name_of_the_server_before_it_has_an_endpoint() {
    let mut shop = shop();
    let new = changed(|event| match event {
        Event::Workload(name, Some(pod)) => {
            *name = ObjectName::new("shop", "web-c");
            pod.account = "canary".into();
            pod.addresses = vec!["10.244.9.9".parse().expect("an address")];
            true
        }
        _ => false,
    });
    let touched = shop.apply([new]);
    assert!(
        shared(&touched).contains(&(Kind::Cluster, WEB)),
        "{touched:?}"
    );
    assert!(
        !shared(&touched).contains(&(Kind::Endpoints, WEB)),
        "{touched:?}"
    );
    // Its addresses are a new block: listeners learn of that.
    assert!(
        shared(&touched).contains(&(Kind::Listener, "virtualOutbound")),
        "{touched:?}"
    );
    assert_eq!(proxies(&touched), ["shop/web-c"]);
}

#[test]
fn a_policy_touches_whom_it_binds() {
    let mut shop = shop();
    let strict = shop.apply([policy("shop", "{mtls: {mode: STRICT}}")]);
    // Callers speak mutual TLS before and after.
    assert_eq!(shared(&strict), BTreeSet::new());
    assert_eq!(proxies(&strict), ["shop/web-a", "shop/web-b"]);
    let disabled = shop.apply([policy("shop", "{mtls: {mode: DISABLE}}")]);
    assert_eq!(
        shared(&disabled),
        [(Kind::Endpoints, WEB), (Kind::Cluster, BLOCK)].into()
    );
    let elsewhere = shop.apply([policy("other", "{mtls: {mode: STRICT}}")]);
    assert_eq!(elsewhere, Touched::default());
    let mesh = shop.apply([policy("malha-system", "{mtls: {mode: STRICT}}")]);
    assert_eq!(proxies(&mesh), ["jobs/batch"]);
    let gone = shop.apply([Event::PeerAuthentication(
        ObjectName::new("shop", "p"),
        None,
    )]);
    assert_eq!(proxies(&gone), ["shop/web-a", "shop/web-b"]);
}

#[test]
fn a_listener_names_the_policy_that_it_was_made_from() {
    let mut catalogue = shop();
    let blamed = |catalogue: &Catalogue, namespace: &str, pod: &str| {
        let listener = catalogue.find(
            &ObjectName::new(namespace, pod),
            Kind::Listener,
            "virtualInbound",
        );
        listener.expect("the inbound listener").source.clone()
    };
    assert_eq!(blamed(&catalogue, "shop", "web-a"), None);
    catalogue.apply([policy("shop", "{mtls: {mode: STRICT}}")]);
    let source = blamed(&catalogue, "shop", "web-a").expect("a policy");
    assert_eq!(
        (source.kind, &*source.name.namespace),
        ("PeerAuthentication", "shop")
    );
    assert_eq!(blamed(&catalogue, "jobs", "batch"), None);
}

#[test]
fn a_port_that_changes_its_protocol_moves_from_routes_to_a_listener() {
    let mut shop = shop();
    let touched = shop.apply([changed(|event| match event {
        Event::Service(_, Some(service)) => {
            service.ports[0].protocol = malha::mesh::Protocol::Tcp;
            true
        }
        _ => false,
    })]);
    let all = shared(&touched);
    for want in [
        (Kind::Cluster, WEB),
        (Kind::Listener, "0.0.0.0_80"),
        (Kind::Listener, "10.96.0.1_80"),
        (Kind::Route, "80"),
    ] {
        assert!(all.contains(&want), "{want:?} in {all:?}");
    }
    let proxy = ObjectName::new("jobs", "batch");
    assert_eq!(shop.find(&proxy, Kind::Route, "80"), None);
    assert_eq!(shop.find(&proxy, Kind::Listener, "0.0.0.0_80"), None);
    assert!(shop.find(&proxy, Kind::Listener, "10.96.0.1_80").is_some());
}

#[test]
fn a_pod_that_is_gone_is_told_nothing() {
    let mut shop = shop();
    let batch = ObjectName::new("jobs", "batch");
    assert!(!shop.all(&batch, Kind::Listener).is_empty());
    let touched = shop.apply([Event::Workload(batch.clone(), None)]);
    assert_eq!(proxies(&touched), ["jobs/batch"]);
    assert!(shop.all(&batch, Kind::Listener).is_empty());
    assert_eq!(shop.find(&batch, Kind::Cluster, WEB), None);
}

#[test]
fn equal_pods_share_what_they_are_told() {
    let shop = shop();
    let inbound = |pod| {
        let found = shop.find(
            &ObjectName::new("shop", pod),
            Kind::Listener,
            "virtualInbound",
        );
        found.expect("a listener")
    };
    assert!(std::sync::Arc::ptr_eq(&inbound("web-a"), &inbound("web-b")));
}
