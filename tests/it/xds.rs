//! What proxies are told: golden worlds, `tests/golden/xds/<case>/world.yaml` -> `want.json`, each of which a real Envoy
//! takes; changes that touch what they must and nothing else; and real Envoys that talk to each other.
//!
//! `want.json` says what matters of each resource, not every byte. `SNAPSHOTS=overwrite` rewrites it; read the difference.

mod live;
mod random;
mod summary;
mod touch;
mod validate;

use std::{
    fs,
    path::{Path, PathBuf},
};

use k8s_openapi::serde::de::DeserializeOwned;
use malha::{
    mesh::{Event, ObjectName, istio, kubernetes},
    xds::{Catalogue, Kind, Settings},
};
use serde_json::{Value, json};

#[test]
fn each_golden_world_is_told_as_it_is_written() {
    let failed: Vec<String> = cases()
        .iter()
        .filter_map(|case| check(case).err())
        .collect();
    assert!(
        failed.is_empty(),
        "{}\nSNAPSHOTS=overwrite rewrites them",
        failed.join("\n")
    );
}

#[test]
fn the_users_strict_documents_bind_their_namespace_and_no_other() {
    let requirements = ["explained-04", "planning-03"];
    for (document, namespace) in requirements.into_iter().zip(["jobs", "default"]) {
        let case = golden().join(document);
        let told = told(&catalogue(&case));
        let inbound = |pod: &str| told[pod]["listeners"]["virtualInbound"].to_string();
        let strict = inbound(&format!("{namespace}/web-a"));
        assert!(!strict.contains("plain"), "{document}: {strict}");
        let other = inbound("other/web-a");
        assert!(other.contains("8080-plain"), "{document}: {other}");
    }
}

#[test]
fn the_same_world_told_in_another_order_has_the_same_versions() {
    for case in cases() {
        let want = versions(&catalogue(&case));
        let mut events = events(&case);
        for turn in 0..20 {
            let middle = turn * 7 % events.len();
            events.rotate_left(middle);
            let mut catalogue = Catalogue::new(settings());
            for event in events.clone() {
                catalogue.apply([event]);
            }
            assert_eq!(versions(&catalogue), want, "{}", case.display());
        }
    }
}

fn check(case: &Path) -> Result<(), String> {
    let got = told(&catalogue(case));
    let file = case.join("want.json");
    if std::env::var("SNAPSHOTS").is_ok_and(|value| value == "overwrite") {
        let text = serde_json::to_string_pretty(&got).expect("it is JSON") + "\n";
        fs::write(&file, text).expect("a writable tree");
    }
    let want: Value = fs::read(&file)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default();
    match want == got {
        true => Ok(()),
        false => Err(format!("{}: got {got:#}", file.display())),
    }
}

/// What every proxy is told. What all are told in the same way stands under `everyone`.
fn told(catalogue: &Catalogue) -> Value {
    let mut all = json!({});
    for proxy in proxies(catalogue) {
        all[proxy.to_string()] = summary::of(catalogue, &proxy);
    }
    all
}

/// Versions of everything that every proxy is told.
fn versions(catalogue: &Catalogue) -> Vec<String> {
    let mut all = Vec::new();
    for proxy in proxies(catalogue) {
        for (kind, resource) in resources(catalogue, &proxy) {
            all.push(format!(
                "{proxy} {kind:?} {} {:x}",
                resource.name, resource.version
            ));
        }
    }
    all
}

/// Everything that a proxy is told, with what it asks for by name.
fn resources(
    catalogue: &Catalogue,
    proxy: &ObjectName,
) -> Vec<(Kind, std::sync::Arc<malha::xds::Resource>)> {
    let mut all = Vec::new();
    for resource in catalogue.all(proxy, Kind::Cluster) {
        let endpoints = catalogue.find(proxy, Kind::Endpoints, &resource.name);
        all.push((Kind::Cluster, resource));
        all.extend(endpoints.map(|endpoints| (Kind::Endpoints, endpoints)));
    }
    for resource in catalogue.all(proxy, Kind::Listener) {
        let port = resource
            .name
            .rsplit_once('_')
            .map(|(_, port)| port.to_owned());
        let wildcard = resource.name.starts_with("0.0.0.0_") || resource.name.starts_with("[::]_");
        all.push((Kind::Listener, resource));
        if let Some(port) = port.filter(|_| wildcard) {
            let routes = catalogue.find(proxy, Kind::Route, &port);
            all.push((Kind::Route, routes.expect("a listener's routes")));
        }
    }
    all
}

fn proxies(catalogue: &Catalogue) -> Vec<ObjectName> {
    let pods = catalogue.world().workloads.iter();
    let meshed = pods.filter(|(_, pod)| pod.sidecar);
    meshed.map(|(name, _)| name.clone()).collect()
}

fn settings() -> Settings {
    Settings {
        trust_domain: "cluster.local".parse().expect("a trust domain"),
        root_namespace: "malha-system".into(),
        cluster_domain: "cluster.local".into(),
    }
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/xds")
}

fn cases() -> Vec<PathBuf> {
    let entries = fs::read_dir(golden()).expect("the folder of golden worlds");
    let mut cases: Vec<_> = entries.map(|entry| entry.expect("a case").path()).collect();
    cases.sort();
    assert!(cases.len() >= 8, "the golden worlds are gone");
    cases
}

fn catalogue(case: &Path) -> Catalogue {
    let mut catalogue = Catalogue::new(settings());
    catalogue.apply(events(case));
    catalogue
}

fn events(case: &Path) -> Vec<Event> {
    let file = case.join("world.yaml");
    let text =
        fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let mut events = world(&text);
    // A document of the user's own, as it is, and the namespace that it was applied in.
    for entry in fs::read_dir(case).expect("a folder") {
        let file = entry.expect("a file").path();
        let name = file
            .file_stem()
            .and_then(|name| name.to_str())
            .expect("UTF-8");
        if let Some(namespace) = name.strip_prefix("applied-in-") {
            let text = fs::read_to_string(&file).expect("readable");
            let policies = documents(&text).into_iter();
            let policies = policies.filter(|document| document["kind"] == "PeerAuthentication");
            events.extend(policies.map(|mut document| {
                document["metadata"]["namespace"] = namespace.into();
                event(document)
            }));
        }
    }
    events
}

/// Kubernetes and Istio documents as events, by the parsers of the mesh.
fn world(yaml: &str) -> Vec<Event> {
    documents(yaml).into_iter().map(event).collect()
}

fn documents(yaml: &str) -> Vec<Value> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(yaml).expect("YAML");
    documents
        .into_iter()
        .filter(|document| !document.is_null())
        .collect()
}

fn event(document: Value) -> Event {
    let kind = document["kind"].as_str().unwrap_or_default().to_owned();
    match kind.as_str() {
        "Namespace" => {
            let (name, namespace) = kubernetes::namespace(&typed(document)).expect("a namespace");
            Event::Namespace(name, Some(namespace))
        }
        "Service" => {
            let (name, service) = kubernetes::service(&typed(document)).expect("a Service");
            Event::Service(name, Some(service))
        }
        "EndpointSlice" => {
            let (name, slice) = kubernetes::slice(&typed(document)).expect("a slice");
            Event::Slice(name, Some(slice))
        }
        "Pod" => {
            let (name, pod) = kubernetes::workload(&typed(document)).expect("a pod");
            Event::Workload(name, Some(pod))
        }
        "PeerAuthentication" => {
            let text = |field: &str| document["metadata"][field].as_str().unwrap_or("default");
            let name = ObjectName::new(text("namespace"), text("name"));
            let (policy, findings) = istio::peer_authentication(&document);
            assert_eq!(findings, [], "{name}");
            Event::PeerAuthentication(name, policy)
        }
        other => panic!("{other} is no kind of a golden world"),
    }
}

fn typed<T: DeserializeOwned>(document: Value) -> T {
    serde_json::from_value(document).expect("of its kind")
}
