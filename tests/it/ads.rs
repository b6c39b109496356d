//! Configuration for proxies from the real program: who is told, what, and how little when nothing changed.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::{Code, transport::Channel};

use crate::{
    agent::sidecar::{ask, children, free_ports, try_get},
    delta::{CDS, Client, Credentials, EDS, Held, LDS, NAME, SDS, certified, connect},
    support::program::Program,
};

/// For what takes milliseconds, on a machine that does something else.
const PATIENCE: Duration = Duration::from_secs(60);

/// No response for so long: nothing more is coming.
const QUIET: Duration = Duration::from_millis(700);

/// A control plane in a directory, and a mesh in it.
struct Plane {
    directory: TempDir,
    program: Option<Program>,
    addresses: Value,
}

impl Plane {
    fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let mut plane = Self {
            directory,
            program: None,
            addresses: Value::Null,
        };
        plane.begin();
        plane
    }

    fn begin(&mut self) {
        let state = self.state();
        let path = state.to_str().expect("UTF-8");
        let mut args = vec!["serve", "--standalone", path, "--drain=10ms"];
        let ca = self.addresses["ca"]
            .as_str()
            .unwrap_or("127.0.0.1:0")
            .to_owned();
        args.extend(["--ca-addr", &ca]);
        for addr in ["--webhook-addr", "--admin-addr", "--query-addr"] {
            args.extend([addr, "127.0.0.1:0"]);
        }
        let program = Program::malha(&args);
        program.wait_for("malha serves from", PATIENCE);
        let addresses = fs::read(state.join("addresses.json")).expect("addresses");
        self.addresses = serde_json::from_slice(&addresses).expect("JSON");
        self.program = Some(program);
    }

    /// SIGKILL, and begin again on the same port.
    fn kill_and_begin_again(&mut self) {
        let mut program = self.program.take().expect("it runs");
        program.signal(Signal::SIGKILL);
        program.wait(PATIENCE);
        self.begin();
    }

    fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    fn addr(&self, port: &str) -> SocketAddr {
        let addr = self.addresses[port].as_str();
        addr.and_then(|addr| addr.parse().ok()).expect("an address")
    }

    /// Writes manifests at once, as a careful writer does.
    fn apply(&self, file: &str, objects: &[Value]) {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        let mesh = self.state().join("mesh");
        let half = mesh.join(format!("{file}.half"));
        fs::write(&half, list.to_string()).expect("written");
        fs::rename(half, mesh.join(file)).expect("renamed");
    }

    fn roots(&self) -> Vec<CertificateDer<'static>> {
        let text = fs::read(self.state().join("bundle.pem")).expect("a bundle");
        CertificateDer::pem_slice_iter(&text)
            .collect::<Result<_, _>>()
            .expect("PEM")
    }

    fn token(&self, namespace: &str, account: &str) -> String {
        let minted = Command::new(env!("CARGO_BIN_EXE_malha"))
            .args(["token", "--standalone"])
            .arg(self.state())
            .args(["--namespace", namespace, "--service-account", account])
            .output()
            .expect("malha runs");
        assert!(minted.status.success(), "{minted:?}");
        let token = String::from_utf8(minted.stdout).expect("a token");
        token.trim().to_owned()
    }

    /// A certificate of a service account, through the door that every pod goes through.
    async fn credentials(&self, namespace: &str, account: &str) -> Credentials {
        let token = self.token(namespace, account);
        certified(self.addr("ca"), &self.roots(), &token).await
    }

    async fn channel(&self, shown: Option<Credentials>) -> Channel {
        connect(self.addr("ca"), NAME, &self.roots(), shown).await
    }

    fn ask(&self, port: &str, path: &str) -> (u16, String) {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(self.addr(port)).expect("a port");
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        .expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
        let (_, body) = answer.split_once("\r\n\r\n").expect("a head");
        (status.expect("a status"), body.to_owned())
    }

    fn metric(&self, line: &str) -> f64 {
        let (_, text) = self.ask("admin", "/metrics");
        let found = text
            .lines()
            .find_map(|it| it.strip_prefix(line)?.trim().parse().ok());
        found.unwrap_or_else(|| panic!("no {line} in\n{text}"))
    }
}

fn pod(name: &str, account: &str, ip: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "labels": {"app": account}},
        "spec": {
            "serviceAccountName": account,
            "initContainers": [{"name": "malha-proxy", "image": "malha-proxy"}],
            "containers": [{"name": "app", "image": "app", "ports": [{"containerPort": 8080}]}],
        },
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]},
    })
}

/// A Service and its endpoints.
fn service(name: &str, cluster_ip: &str, endpoints: &[&str]) -> [Value; 2] {
    let ready =
        |ip: &&str| json!({"addresses": [ip], "conditions": {"ready": true, "serving": true}});
    [
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {
                "clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "selector": {"app": name},
                "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}],
            },
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("{name}-1"), "namespace": "shop", "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": endpoints.iter().map(ready).collect::<Vec<_>>(),
        }),
    ]
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < deadline, "{what} never came");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn only_the_proxy_of_a_pod_is_told_its_configuration() {
    let plane = Plane::start();
    plane.apply(
        "pods.json",
        &[
            pod("web-0", "web", "10.1.0.1"),
            pod("cart-0", "cart", "10.1.0.2"),
        ],
    );
    let web = plane.credentials("shop", "web").await;
    for (shown, node, code, words) in [
        (None, "web-0.shop", Code::Unauthenticated, "showed none"),
        (
            Some(&web),
            "cart-0.shop",
            Code::PermissionDenied,
            "runs as spiffe://cluster.local/ns/shop/sa/cart",
        ),
        (
            Some(&web),
            "web-0",
            Code::InvalidArgument,
            "is not <pod>.<namespace>",
        ),
        (Some(&web), "", Code::InvalidArgument, "names no node"),
        (
            Some(&web),
            "web-1.shop",
            Code::Unavailable,
            "pod shop/web-1 is not known",
        ),
    ] {
        let channel = plane.channel(shown.cloned()).await;
        let opened = Client::open(channel, node, Held::default()).await;
        let status = opened.err().unwrap_or_else(|| panic!("{node} was told"));
        assert_eq!(status.code(), code, "{node}: {status:?}");
        assert!(
            status.message().contains(words),
            "{node}: {}",
            status.message()
        );
    }
    let channel = plane.channel(Some(web)).await;
    let mut client = Client::open(channel, "web-0.shop", Held::default())
        .await
        .expect("its own");
    client.settle(QUIET).await;
    assert!(
        client.held.count(LDS) > 0,
        "{:?}",
        client.held.versions.keys()
    );
}

#[tokio::test]
async fn a_pod_that_is_not_known_yet_is_waited_for() {
    let plane = Plane::start();
    let web = plane.credentials("shop", "web").await;
    let channel = plane.channel(Some(web)).await;
    let opening = Client::open(channel, "web-0.shop", Held::default());
    let telling = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        plane.apply("pods.json", &[pod("web-0", "web", "10.1.0.1")]);
    };
    let (opened, ()) = tokio::join!(opening, telling);
    opened.expect("told as soon as it is known");
}

#[tokio::test]
async fn t13_state_of_the_world_is_refused_with_the_reason() {
    use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
    let plane = Plane::start();
    let channel = plane.channel(None).await;
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let refused = client
        .stream_aggregated_resources(tokio_stream::empty())
        .await;
    let status = refused.expect_err("not served");
    assert_eq!(status.code(), Code::Unimplemented);
    assert!(
        status.message().contains("DELTA_GRPC"),
        "{}",
        status.message()
    );
}

#[tokio::test]
async fn an_agent_is_told_the_trust_bundle() {
    let plane = Plane::start();
    plane.apply("pods.json", &[pod("web-0", "web", "10.1.0.1")]);
    let web = plane.credentials("shop", "web").await;
    let channel = plane.channel(Some(web)).await;
    let mut client = Client::open_for_bundle(channel, "web-0.shop")
        .await
        .expect("its own");
    client.keeps_bodies = true;
    client.settle(QUIET).await;
    let body = client
        .held
        .bodies
        .get(&(SDS, "ROOTCA".to_owned()))
        .expect("the bundle");
    let pem = fs::read(plane.state().join("bundle.pem")).expect("a bundle");
    let found = body.windows(pem.len()).any(|window| window == pem);
    assert!(found, "the secret holds the bundle in PEM");
}

#[tokio::test]
async fn t08_a_change_of_endpoints_costs_its_bytes_and_a_refusal_is_on_record() {
    let plane = Plane::start();
    let mut objects = vec![pod("web-0", "web", "10.1.0.1")];
    for number in 0..50 {
        let ip = format!("10.2.0.{number}");
        objects.extend(service(&format!("s{number}"), &ip, &["10.1.1.1"]));
    }
    plane.apply("mesh.json", &objects);
    let web = plane.credentials("shop", "web").await;
    let channel = plane.channel(Some(web)).await;
    let mut client = Client::open(channel, "web-0.shop", Held::default())
        .await
        .expect("its own");
    client.settle(QUIET).await;
    let clusters = client.held.count(CDS);
    assert!(clusters >= 50, "{clusters} clusters");
    let before = client.bytes;

    objects.pop();
    let [_, slice] = service("s49", "10.2.0.49", &["10.1.1.1", "10.1.1.2"]);
    objects.push(slice);
    plane.apply("mesh.json", &objects);
    let step = client
        .step(PATIENCE)
        .await
        .expect("a response")
        .expect("the stream goes on");
    assert_eq!(step, "ClusterLoadAssignment +1 -0");
    client.settle(QUIET).await;
    let bytes = client.bytes - before;
    assert!(bytes < 1000, "{bytes} bytes for one endpoint");

    let [service, slice] = service("fresh", "10.2.1.1", &["10.1.1.1"]);
    objects.extend([service, slice]);
    plane.apply("mesh.json", &objects);
    let said = client
        .refuse(PATIENCE, "no such thing")
        .await
        .expect("a response");
    assert!(said.starts_with("Cluster +1"), "{said}");
    until("the refusal on record", async || {
        plane.metric("malha_xds_nacks_total{type=\"cds\"}") >= 1.0
    })
    .await;
    let (status, body) = plane.ask("query", "/v1/proxies");
    let list: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!((status, &list["kind"]), (200, &json!("ProxyList")));
    let proxy = &list["items"][0];
    assert_eq!(proxy["pod"], "web-0");
    assert_eq!(proxy["identity"], "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(proxy["types"]["cds"]["state"], "rejected", "{proxy}");
    assert_eq!(proxy["types"]["cds"]["error"], "no such thing", "{proxy}");
    assert_eq!(proxy["types"]["eds"]["state"], "synced", "{proxy}");
    let (status, body) = plane.ask("query", "/v1/config/shop/web-0");
    assert_eq!(status, 200);
    assert!(body.contains("\"ProxyConfig\""), "{body}");
    assert_eq!(plane.ask("query", "/v1/config/shop/nobody").0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn t04_a_control_plane_that_was_killed_sends_nothing_again() {
    let (proxies, services) = (20, 100);
    let mut plane = Plane::start();
    let mut objects = Vec::new();
    for number in 0..proxies {
        objects.push(pod(
            &format!("web-{number}"),
            "web",
            &format!("10.1.0.{number}"),
        ));
    }
    for number in 0..services {
        let ip = format!("10.2.{}.{}", number / 250, number % 250);
        objects.extend(service(
            &format!("s{number}"),
            &ip,
            &["10.1.1.1", "10.1.1.2"],
        ));
    }
    plane.apply("mesh.json", &objects);
    let web = plane.credentials("shop", "web").await;
    let open = async |plane: &Plane, number: usize, held: Held| {
        let channel = plane.channel(Some(web.clone())).await;
        let node = format!("web-{number}.shop");
        Client::open(channel, &node, held).await.expect("its own")
    };
    let mut clients = Vec::new();
    for number in 0..proxies {
        clients.push(open(&plane, number, Held::default()).await);
    }
    futures::future::join_all(clients.iter_mut().map(|client| client.settle(QUIET))).await;
    let first: usize = clients.iter().map(|client| client.bytes).sum();
    assert!(
        clients
            .iter()
            .all(|client| client.held.count(EDS) >= services)
    );

    plane.kill_and_begin_again();
    let mut again = Vec::new();
    for (number, client) in clients.into_iter().enumerate() {
        again.push(open(&plane, number, client.held).await);
    }
    futures::future::join_all(again.iter_mut().map(|client| client.settle(QUIET))).await;
    let second: usize = again.iter().map(|client| client.bytes).sum();
    assert!(
        second / proxies < 500,
        "{} bytes a proxy at first, {} after the restart",
        first / proxies,
        second / proxies
    );
}

/// The agent and the Envoy of pod `shop/web-1`, as its pod would run them.
struct Sidecar {
    agent: Program,
    directory: TempDir,
    status: u16,
}

impl Sidecar {
    fn start(plane: &Plane, envoy: &Path) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name).display().to_string();
        fs::write(path("token"), plane.token("shop", "web")).expect("written");
        let [agent, status, metrics] = free_ports();
        let variables = [
            (
                "MALHA_CONTROL_PLANE",
                format!("localhost:{}", plane.addr("ca").port()),
            ),
            ("MALHA_ENVOY", envoy.display().to_string()),
            ("MALHA_RUN_DIR", path("run")),
            ("MALHA_TOKEN", path("token")),
            (
                "MALHA_ROOTS",
                plane.state().join("bundle.pem").display().to_string(),
            ),
            ("MALHA_AGENT_PORT", agent.to_string()),
            ("MALHA_STATUS_PORT", status.to_string()),
            ("MALHA_ENVOY_METRICS_PORT", metrics.to_string()),
            ("POD_IPS", "127.0.0.1".to_owned()),
            ("POD_NAME", "web-1".to_owned()),
            ("POD_NAMESPACE", "shop".to_owned()),
            ("SERVICE_ACCOUNT", "web".to_owned()),
        ];
        let variables: Vec<_> = variables
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        Self {
            agent: Program::agent(&["run"], &variables),
            directory,
            status,
        }
    }

    fn is_ready(&self) -> bool {
        try_get(self.status, "/healthz/ready").is_some_and(|(status, _)| status == 200)
    }

    fn clusters(&self) -> String {
        let socket = self.directory.path().join("run/admin.sock");
        let stream = std::os::unix::net::UnixStream::connect(socket);
        let answer = stream.ok().and_then(|stream| ask(stream, "/clusters"));
        answer.map_or_else(String::new, |(_, text)| text)
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let children = children(self.agent.pid());
        self.agent.end();
        for (pid, ..) in children {
            let _ = nix::sys::signal::kill(pid, Signal::SIGKILL);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn t04_a_real_envoy_takes_all_of_it_follows_changes_and_is_sent_nothing_again() {
    let Some(envoy) = crate::envoy::find_or_skip() else {
        return;
    };
    let mut plane = Plane::start();
    let mut objects = vec![pod("web-1", "web", "127.0.0.1")];
    for number in 0..20 {
        objects.extend(service(
            &format!("s{number}"),
            &format!("10.2.0.{}", number + 1),
            &["10.1.1.1"],
        ));
    }
    plane.apply("mesh.json", &objects);
    let sidecar = Sidecar::start(&plane, &envoy);
    until("a proxy that is ready", async || sidecar.is_ready()).await;
    let synced = |plane: &Plane| {
        let (_, body) = plane.ask("query", "/v1/proxies");
        let list: Value = serde_json::from_str(&body).expect("JSON");
        let proxy = &list["items"][0];
        let all = ["cds", "eds", "lds"]
            .iter()
            .all(|kind| proxy["types"][kind]["state"] == "synced");
        (all && proxy["envoyVersion"] == "1.40.0", list)
    };
    until("a proxy that acknowledged everything", async || {
        synced(&plane).0
    })
    .await;
    let (_, list) = synced(&plane);
    assert_eq!(
        list["items"][0]["identity"],
        "spiffe://cluster.local/ns/shop/sa/web"
    );

    objects.pop();
    let [_, slice] = service("s19", "10.2.0.20", &["10.1.1.1", "10.1.1.77"]);
    objects.push(slice);
    plane.apply("mesh.json", &objects);
    until("the new endpoint in Envoy", async || {
        sidecar.clusters().contains("10.1.1.77:8080")
    })
    .await;

    plane.kill_and_begin_again();
    until("the proxy back", async || synced(&plane).0).await;
    let sent: f64 = ["cds", "eds", "lds", "rds"]
        .map(|kind| plane.metric(&format!("malha_xds_sent_bytes_total{{type=\"{kind}\"}}")))
        .iter()
        .sum();
    assert!(sent < 500.0, "{sent} bytes to a proxy that lacks nothing");
    assert!(sidecar.is_ready());
}
