//! What it costs to tell two hundred proxies of five hundred services: how soon a change is in effect everywhere, what a
//! restart sends again, and memory.
//!
//! The control plane is the real program, with a directory for a mesh; the proxies are clients that acknowledge as Envoy
//! does and keep only versions. They share the cores with it, so the times are upper bounds.

use std::{
    fs,
    ops::Range,
    path::Path,
    time::{Duration, Instant},
};

use malha::standalone::{Directory, TokenMaker};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::{
    Bench,
    clock::{Rounds, resident_mib},
    delta::{CDS, Client, Credentials, Held, NAME, certified, connect},
    serve::Server,
};

const PROXIES: usize = 200;
const SERVICES: usize = 500;
const QUIET: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn run(bench: &Bench) {
    let figures = [
        "xds_effective_p50",
        "xds_effective_p99",
        "xds_resend",
        "xds_first",
        "xds_memory_per_service",
        "xds_memory_per_proxy",
    ];
    if bench.wants(&figures) {
        tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .expect("a runtime")
            .block_on(measure(bench));
    }
}

async fn measure(bench: &Bench) {
    let home = tempfile::tempdir().expect("a directory");
    let directory = home.path().join("state");
    let server = Server::start_at(&directory, "127.0.0.1:0");
    let ca = server.ca;
    let roots: Vec<_> = CertificateDer::pem_slice_iter(&server.roots_pem)
        .collect::<Result<_, _>>()
        .expect("PEM");
    let token = token(&directory);
    let shown = certified(ca, &roots, &token).await;

    let empty = resident_mib(server.pid());
    let mesh = directory.join("mesh");
    put(&mesh, "pods.json", &pods());
    for number in 0..SERVICES {
        put(&mesh, &format!("s{number}.json"), &service(number, 2));
    }
    // the first stream waits until all of it is known
    let first = Proxy::open(ca, &roots, &shown, 0, Held::default()).await;
    drop(first);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let filled = resident_mib(server.pid());

    let mut clients = Vec::new();
    for number in 0..PROXIES {
        clients.push(Proxy::open(ca, &roots, &shown, number, Held::default()).await);
    }
    settle(&mut clients).await;
    let connected = resident_mib(server.pid());
    let of_first = clients.iter().map(|client| client.bytes).sum::<usize>() / PROXIES;
    assert!(
        clients
            .iter()
            .all(|client| client.held.count(CDS) >= SERVICES)
    );

    let rounds = 0..if bench.quick { 10 } else { 200 };
    let (clients, effective) = changes(rounds, &mesh, clients).await;
    drop(server);
    let _again = Server::start_at(&directory, &ca.to_string());
    let mut again = Vec::new();
    for (number, client) in clients.into_iter().enumerate() {
        again.push(Proxy::open(ca, &roots, &shown, number, client.held).await);
    }
    settle(&mut again).await;
    let resent = again.iter().map(|client| client.bytes).sum::<usize>() / PROXIES;
    // what was sent for nothing is counted; that they are told of a change at all is not taken on trust
    changes(SERVICES..SERVICES + 1, &mesh, again).await;

    let one = |value: f64| {
        let mut rounds = Rounds::default();
        rounds.push(value);
        rounds
    };
    let how = format!(
        "{PROXIES} proxies, {SERVICES} services of 2 endpoints; from the write of a manifest to the last proxy's ACK"
    );
    let percentile = |share: f64| {
        let place = (effective.len() - 1) as f64 * share;
        one(effective[place.round() as usize])
    };
    bench.figure("xds_effective_p50", &percentile(0.5), "ms", &how);
    bench.figure("xds_effective_p99", &percentile(0.99), "ms", &how);
    bench.figure(
        "xds_first",
        &one(of_first as f64),
        "bytes",
        "sent to each proxy that holds nothing",
    );
    bench.figure(
        "xds_resend",
        &one(resent as f64),
        "bytes",
        "sent to each proxy that comes back after the control plane was killed",
    );
    let share = |from: f64, to: f64, of: usize| one((to - from) * 1024.0 / of as f64);
    bench.figure(
        "xds_memory_per_service",
        &share(empty, filled, SERVICES),
        "KiB",
        "resident memory, its endpoints included",
    );
    bench.figure(
        "xds_memory_per_proxy",
        &share(filled, connected, PROXIES),
        "KiB",
        "resident memory, TLS connection included",
    );
}

struct Proxy;

impl Proxy {
    async fn open(
        ca: std::net::SocketAddr,
        roots: &[CertificateDer<'static>],
        shown: &Credentials,
        number: usize,
        held: Held,
    ) -> Client {
        let channel = connect(ca, NAME, roots, Some(shown.clone())).await;
        Client::open(channel, &format!("web-{number}.shop"), held)
            .await
            .expect("its own pod")
    }
}

async fn settle(clients: &mut [Client]) {
    futures::future::join_all(clients.iter_mut().map(|client| client.settle(QUIET))).await;
}

/// Changes one service's endpoints after the other; milliseconds until the last proxy acknowledged, sorted.
///
/// Every [`SERVICES`] rounds the number of endpoints is another, so that no round is without a change.
async fn changes(
    rounds: Range<usize>,
    mesh: &Path,
    clients: Vec<Client>,
) -> (Vec<Client>, Vec<f64>) {
    let (tell, mut told) = mpsc::unbounded_channel();
    let (stop, _) = tokio::sync::watch::channel(false);
    let mut tasks = Vec::new();
    for mut client in clients {
        let (tell, mut stop) = (tell.clone(), stop.subscribe());
        tasks.push(tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = stop.changed() => return client,
                    step = client.step(PATIENCE) => match step {
                        Some(step) => {
                            step.expect("the stream goes on");
                            for name in &client.told {
                                let _ = tell.send((name.clone(), Instant::now()));
                            }
                        }
                        None => continue,
                    },
                }
            }
        }));
    }
    let mut took = Vec::new();
    for round in rounds {
        let number = round * 7 % SERVICES;
        let before = Instant::now();
        put(
            mesh,
            &format!("s{number}.json"),
            &service(number, 1 + (round / SERVICES + 1) % 2 * 2),
        );
        let mut last = before;
        let mut heard = 0;
        while heard < PROXIES {
            let (name, at) = tokio::time::timeout(PATIENCE, told.recv())
                .await
                .expect("the change reaches everybody")
                .expect("clients live");
            if name.contains(&format!("s{number}.")) {
                heard += 1;
                last = last.max(at);
            }
        }
        took.push(last.duration_since(before).as_secs_f64() * 1e3);
    }
    stop.send_replace(true);
    let mut clients = Vec::new();
    for task in tasks {
        clients.push(task.await.expect("a client"));
    }
    took.sort_by(f64::total_cmp);
    (clients, took)
}

fn token(directory: &Path) -> String {
    let directory = Directory::open_existing(directory).expect("the server made it");
    let domain = "cluster.local".parse().expect("a trust domain");
    let maker = TokenMaker::open(&directory, domain).expect("its key");
    let now = malha::runtime::clock::system().now();
    let hour = Duration::from_secs(3600);
    maker.mint("shop", "web", hour, now).expect("a token")
}

fn put(mesh: &Path, file: &str, objects: &[Value]) {
    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
    let half = mesh.join(format!("{file}.half"));
    fs::write(&half, list.to_string()).expect("written");
    fs::rename(half, mesh.join(file)).expect("renamed");
}

fn pods() -> Vec<Value> {
    let pod = |number: usize| {
        let ip = format!("10.1.{}.{}", number / 250, number % 250);
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("web-{number}"), "namespace": "shop", "labels": {"app": "web"}},
            "spec": {
                "serviceAccountName": "web",
                "initContainers": [{"name": "malha-proxy", "image": "malha-proxy"}],
                "containers": [{"name": "app", "image": "app", "ports": [{"containerPort": 8080}]}],
            },
            "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]},
        })
    };
    (0..PROXIES).map(pod).collect()
}

fn service(number: usize, endpoints: usize) -> [Value; 2] {
    let name = format!("s{number}");
    let ip = format!("10.2.{}.{}", number / 250, number % 250);
    let endpoint = |it: usize| {
        let address = format!("10.3.{it}.{}", number % 250);
        json!({"addresses": [address], "conditions": {"ready": true, "serving": true}})
    };
    [
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {
                "clusterIP": ip, "clusterIPs": [ip], "selector": {"app": name},
                "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}],
            },
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("{name}-1"), "namespace": "shop", "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": (0..endpoints).map(endpoint).collect::<Vec<_>>(),
        }),
    ]
}
