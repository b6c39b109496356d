//! What every proxy acknowledged is what the API server says, after whatever happened there; and how soon.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use envoy_types::pb::envoy::config::{
    core::v3::{HealthStatus, address::Address, socket_address::PortSpecifier},
    endpoint::v3::{ClusterLoadAssignment, lb_endpoint::HostIdentifier},
};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::{
    Api, Client as Kube,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use prost::Message;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

use crate::{
    authority::ca_bundle,
    delta::{CDS, Client, EDS, Held, NAME, certified, connect},
    dice::Dice,
    rig::{
        self, Cluster, TokenOf,
        outside::{self, ControlPlane},
        pods::{MESH, create, pod, raw_pods},
    },
};

const CHANGES: usize = 1000;
/// Streams to each replica.
const PROXIES: usize = 3;
/// How long after the last change every proxy may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Address and port -> whether it is sent requests.
type Endpoints = BTreeMap<(String, u32), bool>;
/// Clusters of the test's namespace -> their endpoints.
type Told = BTreeMap<String, Endpoints>;

#[tokio::test(flavor = "multi_thread")]
async fn after_a_thousand_random_changes_every_proxy_acknowledged_what_the_api_server_says() {
    let Some(plane) = outside::shared().await else {
        return;
    };
    let cluster = rig::shared().await.expect("the control plane runs in it");
    let namespace = cluster.namespace("random", MESH).await;
    let clients = streams(cluster, &plane, &namespace, PROXIES).await;
    let (wanted, want) = watch::channel(None);
    let proxies: Vec<_> = clients
        .into_iter()
        .map(|client| tokio::spawn(listen(client, namespace.clone(), want.clone())))
        .collect();

    let seed = std::process::id().into();
    let mut world = World::new(cluster.client().await, &namespace, seed);
    for _ in 0..CHANGES {
        world.change().await;
    }
    let truth = Arc::new(world.truth().await);
    assert!(truth.values().any(|endpoints| endpoints.len() > 1));
    wanted.send_replace(Some(Arc::clone(&truth)));
    for (number, proxy) in proxies.into_iter().enumerate() {
        let told = proxy.await.expect("it listens");
        let same = told == *truth;
        let differ = truth.keys().chain(told.keys());
        let differ: BTreeSet<_> = differ
            .filter(|name| told.get(*name) != truth.get(*name))
            .collect();
        let differ: Vec<_> = differ
            .iter()
            .map(|name| (name, told.get(*name), truth.get(*name)))
            .collect();
        assert!(
            same,
            "seed {seed}, proxy {number}: name, acknowledged, wanted: {differ:#?}"
        );
    }
}

/// Acknowledges what comes until it is what is wanted, or the time is over; what was acknowledged at last.
async fn listen(
    mut client: Client,
    namespace: String,
    want: watch::Receiver<Option<Arc<Told>>>,
) -> Told {
    let mut deadline = None;
    loop {
        if let Some(step) = client.step(Duration::from_millis(300)).await {
            step.expect("the stream goes on");
            continue;
        }
        let Some(wanted) = want.borrow().clone() else {
            continue;
        };
        let deadline = *deadline.get_or_insert_with(|| Instant::now() + PATIENCE);
        let told = acknowledged(&client.held, &namespace);
        if told == *wanted || Instant::now() > deadline {
            return told;
        }
    }
}

fn acknowledged(held: &Held, namespace: &str) -> Told {
    let suffix = format!(".{namespace}.svc.cluster.local");
    let clusters = held.versions.keys().filter(|(kind, _)| *kind == CDS);
    let ours = clusters.filter(|(_, name)| name.ends_with(&suffix));
    ours.map(|(_, name)| {
        let body = held.bodies.get(&(EDS, name.clone()));
        let endpoints = body.map(|body| endpoints(body)).unwrap_or_default();
        (name.clone(), endpoints)
    })
    .collect()
}

fn endpoints(body: &[u8]) -> Endpoints {
    let assignment = ClusterLoadAssignment::decode(body).expect("an assignment");
    let endpoints = assignment.endpoints.iter();
    let endpoints = endpoints.flat_map(|locality| &locality.lb_endpoints);
    endpoints
        .map(|endpoint| {
            let Some(HostIdentifier::Endpoint(at)) = &endpoint.host_identifier else {
                panic!("no address: {endpoint:?}");
            };
            let address = at.address.as_ref().and_then(|it| it.address.as_ref());
            let Some(Address::SocketAddress(at)) = address else {
                panic!("no address: {endpoint:?}");
            };
            let Some(PortSpecifier::PortValue(port)) = at.port_specifier else {
                panic!("no port: {endpoint:?}");
            };
            let healthy = endpoint.health_status == i32::from(HealthStatus::Healthy);
            ((at.address.clone(), port), healthy)
        })
        .collect()
}

/// Streams of pods' proxies, `each` to every replica.
async fn streams(
    cluster: &Cluster,
    plane: &ControlPlane,
    namespace: &str,
    each: usize,
) -> Vec<Client> {
    let bundle = ca_bundle(cluster).await;
    let roots: Vec<_> = CertificateDer::pem_slice_iter(bundle.as_bytes())
        .collect::<Result<_, _>>()
        .expect("PEM");
    let pods = raw_pods(&cluster.client().await, namespace);
    let mut clients = Vec::new();
    for number in 0..each {
        let name = format!("proxy-{number}");
        create(cluster, namespace, &pod(&name))
            .await
            .expect("a meshed pod");
        let ip = format!("10.244.8.{}", number + 1);
        let status = json!({"status": {"podIP": ip, "podIPs": [{"ip": ip}], "phase": "Running"}});
        pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(status))
            .await
            .expect("an address");
        let token = TokenOf::Pod(&name);
        let token = cluster
            .token(namespace, "default", &token, &["malha-ca"], 600)
            .await;
        for replica in plane.replicas() {
            let shown = certified(replica.ca, &roots, &token).await;
            let channel = connect(replica.ca, NAME, &roots, Some(shown)).await;
            let node = format!("{name}.{namespace}");
            let client = Client::open(channel, &node, Held::default()).await;
            let mut client = client.expect("its own pod");
            client.keeps_bodies = true;
            clients.push(client);
        }
    }
    clients
}

/// Services of a namespace and their slices, changed at random.
struct World {
    services: Api<Service>,
    slices: Api<EndpointSlice>,
    namespace: String,
    dice: Dice,
    /// Service -> its slices, of those that are there.
    there: BTreeMap<usize, BTreeSet<usize>>,
}

impl World {
    fn new(client: Kube, namespace: &str, seed: u64) -> Self {
        Self {
            services: Api::namespaced(client.clone(), namespace),
            slices: Api::namespaced(client, namespace),
            namespace: namespace.to_owned(),
            dice: Dice::new(seed),
            there: BTreeMap::new(),
        }
    }

    /// One write that succeeds.
    async fn change(&mut self) {
        let number = self.dice.below(12);
        let name = format!("s{number}");
        if !self.there.contains_key(&number) {
            let service = self.service(&name);
            let made = self.services.create(&PostParams::default(), &service).await;
            made.expect("a Service");
            self.there.insert(number, BTreeSet::new());
            return;
        }
        match self.dice.below(20) {
            0 => {
                // Its slices stay: they were not the controllers'.
                let deleted = self.services.delete(&name, &DeleteParams::default()).await;
                deleted.expect("deleted");
                for slice in self.there.remove(&number).into_iter().flatten() {
                    self.delete_slice(&name, slice).await;
                }
            }
            1 | 2 => {
                let ports = json!({"spec": {"ports": self.ports()}});
                let patch = Patch::Merge(ports);
                let patched = self
                    .services
                    .patch(&name, &PatchParams::default(), &patch)
                    .await;
                patched.expect("other ports");
            }
            _ => self.change_slice(number, &name).await,
        }
    }

    async fn change_slice(&mut self, number: usize, name: &str) {
        let which = self.dice.below(3);
        let slices = self.there.get_mut(&number).expect("it is there");
        if !slices.insert(which) && self.dice.chance(10) {
            slices.remove(&which);
            self.delete_slice(name, which).await;
            return;
        }
        let slice = self.slice(name, which);
        let params = PatchParams::apply("malha-test").force();
        let slice = Patch::Apply(slice);
        let applied = self
            .slices
            .patch(&format!("{name}-{which}"), &params, &slice)
            .await;
        applied.expect("a slice");
    }

    async fn delete_slice(&self, name: &str, which: usize) {
        let name = format!("{name}-{which}");
        let deleted = self.slices.delete(&name, &DeleteParams::default()).await;
        deleted.expect("deleted");
    }

    /// Without a selector, so that no controller writes slices too.
    fn service(&mut self, name: &str) -> Service {
        let service = json!({"metadata": {"name": name}, "spec": {"ports": self.ports()}});
        serde_json::from_value(service).expect("a Service")
    }

    fn ports(&mut self) -> Value {
        let all = [
            json!({"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}),
            json!({"name": "grpc", "port": 81, "targetPort": 8081, "protocol": "TCP"}),
            json!({"name": "tcp-raw", "port": 9000, "targetPort": 9000, "protocol": "TCP"}),
        ];
        let first = self.dice.below(all.len());
        all[..=first].iter().cloned().collect()
    }

    fn slice(&mut self, service: &str, which: usize) -> Value {
        let endpoints: Vec<_> = (0..self.dice.below(6)).map(|_| self.endpoint()).collect();
        let ports = [("http", 8080), ("grpc", 8081), ("tcp-raw", 9000)];
        let ports: Vec<_> = ports[..=self.dice.below(ports.len())]
            .iter()
            .map(|(name, port)| json!({"name": name, "port": port, "protocol": "TCP"}))
            .collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{service}-{which}"),
                "labels": {"kubernetes.io/service-name": service},
            },
            "addressType": "IPv4", "ports": ports, "endpoints": endpoints,
        })
    }

    fn endpoint(&mut self) -> Value {
        let conditions = [
            json!({}),
            json!({"ready": true, "serving": true, "terminating": false}),
            json!({"ready": false, "serving": true, "terminating": true}),
            json!({"ready": false, "serving": false, "terminating": false}),
        ];
        json!({
            "addresses": [format!("10.244.9.{}", 1 + self.dice.below(20))],
            "conditions": self.dice.pick(&conditions),
        })
    }

    /// What the API server says now, as the documentation of EndpointSlices reads, and written without a line of the
    /// translator's: ready ones get requests; those that serve while they end are known, and get them where none is ready.
    async fn truth(&self) -> Told {
        let services = self.services.list(&ListParams::default()).await;
        let slices = self.slices.list(&ListParams::default()).await;
        let slices = slices.expect("slices").items;
        let mut truth = Told::new();
        for service in services.expect("Services") {
            let name = service.metadata.name.unwrap_or_default();
            for port in service
                .spec
                .and_then(|spec| spec.ports)
                .into_iter()
                .flatten()
            {
                let mut endpoints = Endpoints::new();
                for slice in &slices {
                    let labels = slice.metadata.labels.as_ref().expect("labels");
                    let ports = slice.ports.iter().flatten();
                    let ports = ports.filter(|of| of.name == port.name);
                    let numbers: Vec<_> = ports.filter_map(|of| of.port).collect();
                    if labels["kubernetes.io/service-name"] != name {
                        continue;
                    }
                    for endpoint in &slice.endpoints {
                        let conditions = endpoint.conditions.clone().unwrap_or_default();
                        let ready = conditions.ready.unwrap_or(true);
                        let ending = conditions.terminating.unwrap_or(false)
                            && conditions.serving.unwrap_or(ready);
                        if !ready && !ending {
                            continue;
                        }
                        for number in &numbers {
                            let port = u32::try_from(*number).expect("a port");
                            let at = (endpoint.addresses[0].clone(), port);
                            *endpoints.entry(at).or_default() |= ready;
                        }
                    }
                }
                if endpoints.values().all(|ready| !ready) {
                    endpoints.values_mut().for_each(|healthy| *healthy = true);
                }
                let host = format!("{name}.{}.svc.cluster.local", self.namespace);
                truth.insert(format!("outbound|{}||{host}", port.port), endpoints);
            }
        }
        truth
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: make bench-mesh"]
async fn bench_discovery() {
    const ENDPOINT_CHANGES: usize = 300;
    let Some(plane) = outside::shared().await else {
        return;
    };
    let cluster = rig::shared().await.expect("the control plane runs in it");
    let namespace = cluster.namespace("effective", MESH).await;
    let (tell, mut told) = mpsc::unbounded_channel();
    let clients = streams(cluster, &plane, &namespace, 10).await;
    let proxies = clients.len();
    for mut client in clients {
        let tell = tell.clone();
        tokio::spawn(async move {
            // Ends with the runtime.
            while let Some(step) = client.step(Duration::from_secs(3600)).await {
                step.expect("the stream goes on");
                for name in &client.told {
                    let body = client.held.bodies.get(&(EDS, name.clone()));
                    let count = body.map_or(0, |body| endpoints(body).len());
                    let _ = tell.send((name.clone(), count, Instant::now()));
                }
            }
        });
    }
    let mut world = World::new(cluster.client().await, &namespace, 1);
    let service = world.service("cart");
    let made = world
        .services
        .create(&PostParams::default(), &service)
        .await;
    made.expect("a Service");
    let mut took = Vec::new();
    for round in 0..ENDPOINT_CHANGES {
        let count = 1 + round % 2;
        let endpoints: Vec<_> = (1..=count)
            .map(|it| json!({"addresses": [format!("10.244.9.{it}")], "conditions": {"ready": true}}))
            .collect();
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "cart-1", "labels": {"kubernetes.io/service-name": "cart"}},
            "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        });
        let params = PatchParams::apply("malha-test").force();
        let before = Instant::now();
        let applied = world
            .slices
            .patch("cart-1", &params, &Patch::Apply(slice))
            .await;
        applied.expect("a slice");
        let (mut heard, mut last) = (0, before);
        while heard < proxies {
            let next = tokio::time::timeout(PATIENCE, told.recv()).await;
            let (name, of, at) = next.expect("everybody is told").expect("they live");
            if name.starts_with("outbound|80||cart.") && of == count && at > before {
                heard += 1;
                last = last.max(at);
            }
        }
        took.push(last.duration_since(before).as_secs_f64() * 1e3);
    }
    took.sort_by(f64::total_cmp);
    println!(
        "# {proxies} proxies of 2 replicas; from the write at the API server to the last proxy's ACK"
    );
    for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
        let place = ((took.len() - 1) as f64 * share).round() as usize;
        println!("bench xds_effective_api_{name} {:.2} ms", took[place]);
    }
}
