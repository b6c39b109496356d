//! What a mesh under load bears: renewals by the second, and the loss of each part. On a node that such a test has for
//! itself, because the others need what is taken away here.
//!
//! `make test-node` runs them after the others, one after the other; `make soak` renews for ten minutes
//! (`MALHA_SOAK_SECONDS`) instead of half of one.

use std::{
    fs::{File, OpenOptions},
    net::IpAddr,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{
    containers::{self, Container},
    load::{Load, Running, Told},
    mesh::{STRICT, curl, until},
    node::{self, Namespace, Node},
};

/// Leaves have a day of life; a new one is asked for this often.
const RENEWAL: Duration = Duration::from_secs(10);
/// The same where renewals are waited for.
const SOON: Duration = Duration::from_secs(5);

const SERVICE: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp-raw, port: 9000, targetPort: 8080}]
"#;

/// A server, a client, and their sidecars that renew every few seconds.
struct Stage {
    node: &'static Node,
    mesh: Namespace,
    renewal: Duration,
}

impl Stage {
    async fn set(prefix: &str, renewal: Duration) -> Option<Self> {
        let node = node::shared().await?;
        let injected = [("istio-injection", "enabled")];
        let mesh = node.namespace(prefix, &injected).await;
        let stage = Self {
            node,
            mesh,
            renewal,
        };
        stage.mesh.apply(STRICT).await;
        stage.mesh.apply(SERVICE).await;
        stage.create(json!({
            "metadata": {"name": "web", "labels": {"app": "web"}},
            "spec": {"containers": [{
                "name": "web", "image": "rig.local/agnhost:1", "args": ["netexec", "--http-port=8080"],
                "ports": [{"containerPort": 8080}],
                "readinessProbe": {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 1},
            }]},
        })).await;
        stage
            .create(json!({
                "metadata": {"name": "client"},
                "spec": {"containers": [{
                    "name": "client", "image": "rig.local/tools:1", "command": ["sleep", "100000"],
                }]},
            }))
            .await;
        stage.mesh.ready("pod/web").await;
        stage.mesh.ready("pod/client").await;
        stage.answers("http://web/hostname").await;
        stage.answers("http://web:9000/hostname").await;
        Some(stage)
    }

    /// Creates a pod as the injector makes it, but for how often its sidecar renews.
    async fn create(&self, mut pod: Value) {
        pod["apiVersion"] = json!("v1");
        pod["kind"] = json!("Pod");
        pod["spec"]["terminationGracePeriodSeconds"] = json!(1);
        let create = ["create", "-o", "json", "-f", "-"];
        let dry_run = [&create[..], &["--dry-run=server"]].concat();
        let injected = self
            .mesh
            .try_kubectl(&dry_run, Some(&pod.to_string()))
            .await;
        assert!(injected.status.success(), "{injected:?}");
        let mut pod: Value = serde_json::from_slice(&injected.stdout).expect("JSON");
        for field in ["uid", "creationTimestamp", "generation", "managedFields"] {
            pod["metadata"]
                .as_object_mut()
                .expect("an object")
                .remove(field);
        }
        let sidecars = pod["spec"]["initContainers"].as_array_mut();
        let mut sidecars = sidecars.into_iter().flatten();
        let sidecar = sidecars.find(|one| one["name"] == "malha-proxy");
        let env = sidecar.expect("a sidecar")["env"].as_array_mut();
        let every = format!("{}s", self.renewal.as_secs());
        env.expect("a list")
            .push(json!({"name": "MALHA_RENEW_EVERY", "value": every}));
        let created = self.mesh.try_kubectl(&create, Some(&pod.to_string())).await;
        assert!(created.status.success(), "{created:?}");
    }

    async fn answers(&self, url: &str) {
        until(
            &format!("{url} answers"),
            |answer: &Result<_, _>| answer.is_ok(),
            async || curl(&self.mesh, "pod/client", "client", &[url]).await,
        )
        .await;
    }

    /// Configuration reaches proxies: a Service that nobody knew yet is called. Its slice is written here, because
    /// Kubernetes' own controllers take a minute to come back to an API server.
    async fn learns(&self, service: &str) {
        let server = ["get", "pod/web", "-o", "jsonpath={.status.podIP}"];
        let known = async || {
            let server = self.mesh.try_kubectl(&server, None).await;
            String::from_utf8_lossy(&server.stdout).into_owned()
        };
        let mut server = String::new();
        until(
            "the API server knows the server's address",
            |known: &String| known.parse::<IpAddr>().is_ok(),
            async || {
                server = known().await;
                server.clone()
            },
        )
        .await;
        let new = format!(
            r#"
apiVersion: v1
kind: Service
metadata: {{name: {service}}}
spec:
  ports: [{{name: tcp-raw, port: 9000, targetPort: 8080}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {service}, labels: {{kubernetes.io/service-name: {service}}}}}
addressType: IPv4
ports: [{{name: tcp-raw, port: 8080, protocol: TCP}}]
endpoints: [{{addresses: ["{server}"], targetRef: {{kind: Pod, name: web, namespace: {}}}}}]
"#,
            self.mesh.name()
        );
        self.mesh.apply(&new).await;
        // Without its listener and its cluster the call would go out in plaintext.
        self.answers(&format!("http://{service}:9000/hostname"))
            .await;
    }

    /// HTTP over connections that are kept, HTTP over new ones, and new ones of TCP, each a handshake between proxies.
    async fn load(&self) -> [Running; 3] {
        let network = self.container("client", "client").await.network();
        let start = |load: Load| load.start(network.try_clone().expect("a descriptor"));
        let kept = Load {
            rate: 100,
            ..Load::to(&self.mesh, "web").await
        };
        let new = Load {
            rate: 50,
            keeps_connections: false,
            ..kept.clone()
        };
        let mut raw = new.clone();
        raw.server.set_port(9000);
        [kept, new, raw].map(start)
    }

    async fn container(&self, pod: &str, name: &str) -> Container {
        let mut all = containers::of(self.node, &self.mesh).await;
        all.retain(|one| one.pod == pod && one.name == name);
        all.pop().unwrap_or_else(|| panic!("{name} of {pod} runs"))
    }

    async fn sidecars(&self) -> [Sidecar; 2] {
        let of = async |pod| Sidecar {
            pod,
            network: self.container(pod, "malha-proxy").await.network(),
        };
        [of("web").await, of("client").await]
    }

    /// The control plane says once of each object that it could not be followed, and is not busy with it.
    async fn follows_quietly(&self) {
        let pods = "app.kubernetes.io/component=control-plane";
        let logs = [
            "logs",
            "-n",
            "malha-system",
            "-l",
            pods,
            "--since=60s",
            "--tail=-1",
        ];
        let logs = self.node.kubectl(&logs).await;
        let said = |line: &&str| line.contains("malha::k8s::follow");
        let said: Vec<_> = logs.lines().filter(said).collect();
        assert!(said.len() < 50, "{} lines: {:?}", said.len(), &said[..50]);
    }

    async fn restarts(&self, pod: &str) -> String {
        let path = "jsonpath={.status.initContainerStatuses[?(@.name==\"malha-proxy\")].restartCount} \
                    {.status.containerStatuses[0].restartCount}";
        let pod = format!("pod/{pod}");
        self.mesh.kubectl(&["get", &pod, "-o", path]).await
    }
}

/// A sidecar that is asked in its own network, with or without an API server.
struct Sidecar {
    pod: &'static str,
    network: File,
}

impl Sidecar {
    /// The sum of the agent's series that begin so.
    fn counter(&self, series: &str) -> f64 {
        use std::os::fd::AsRawFd as _;
        let network = format!(
            "--net=/proc/{}/fd/{}",
            std::process::id(),
            self.network.as_raw_fd()
        );
        let metrics = Command::new("nsenter")
            .args([&network, "--", "curl", "-sS", "--max-time", "5"])
            .arg("http://127.0.0.1:15020/stats/prometheus")
            .output()
            .expect("nsenter runs");
        let metrics = String::from_utf8_lossy(&metrics.stdout).into_owned();
        let found = metrics.lines().filter(|line| line.starts_with(series));
        found
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    fn renewed(&self) -> f64 {
        self.counter("malha_agent_renewals_total{result=\"received\"}")
    }
}

/// Waits until each has received this many more certificates.
async fn all_renew(sidecars: &[Sidecar], times: f64) {
    let wanted: Vec<_> = sidecars.iter().map(|one| one.renewed() + times).collect();
    for (sidecar, wanted) in sidecars.iter().zip(wanted) {
        until(
            &format!("{} has renewed", sidecar.pod),
            |renewed: &f64| *renewed >= wanted,
            async || sidecar.renewed(),
        )
        .await;
    }
}

/// Ends the loads and says what became of them; nothing may have failed.
fn nothing_failed(loads: [Running; 3]) -> Told {
    let mut all = Told::default();
    for load in loads {
        let told = load.stop();
        assert!(told.micros.len() > 100, "{} requests", told.micros.len());
        all.add(told);
    }
    let failures = &all.failures[..all.failures.len().min(20)];
    assert!(
        failures.is_empty(),
        "{} of {}: {failures:?}",
        all.failures.len(),
        all.micros.len()
    );
    all
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a node for itself: make test-node, and for ten minutes make soak"]
async fn leaves_are_renewed_under_load_and_no_request_fails() {
    let Some(stage) = Stage::set("renewed", RENEWAL).await else {
        return;
    };
    let seconds = std::env::var("MALHA_SOAK_SECONDS").ok();
    let seconds = seconds.map_or(30, |text| text.parse().expect("MALHA_SOAK_SECONDS"));
    let sidecars = stage.sidecars().await;
    let before = sidecars.each_ref().map(Sidecar::renewed);
    let loads = stage.load().await;
    sleep(Duration::from_secs(seconds)).await;
    // At least as often as a busy machine lets them, and the load meets each of them.
    let expected = (seconds / RENEWAL.as_secs() / 2) as f64;
    let mut renewals = 0.0;
    for (sidecar, before) in sidecars.iter().zip(before) {
        let renewed = sidecar.renewed() - before;
        assert!(renewed >= expected, "{}: {renewed} renewals", sidecar.pod);
        renewals += renewed;
    }
    let told = nothing_failed(loads);
    println!(
        "soak: {seconds} s, {} requests, 0 failed, {renewals} renewals, p50 {:.2} ms, p99 {:.2} ms",
        told.micros.len(),
        told.at(0.5),
        told.at(0.99)
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a node for itself: make test-node"]
async fn an_envoy_or_an_agent_that_is_killed_comes_back_by_itself() {
    let Some(stage) = Stage::set("killed", SOON).await else {
        return;
    };
    for pod in ["web", "client"] {
        let sidecar = stage.container(pod, "malha-proxy").await;
        signal(
            sidecar.pid_of("envoy").expect("Envoy runs"),
            Signal::SIGKILL,
        );
        until(
            &format!("{pod}: the agent has started another Envoy"),
            |running: &bool| *running,
            async || sidecar.pid_of("envoy").is_some(),
        )
        .await;
        stage.answers("http://web/hostname").await;
        assert_eq!(
            stage.restarts(pod).await,
            "0 0",
            "{pod}: no container restarts"
        );

        signal(
            sidecar.pid_of("malha-agent").expect("it runs"),
            Signal::SIGKILL,
        );
        until(
            &format!("{pod}: the kubelet has started the sidecar again, and only that"),
            |restarts: &String| restarts == "1 0",
            async || stage.restarts(pod).await,
        )
        .await;
        stage.mesh.ready(&format!("pod/{pod}")).await;
        stage.answers("http://web/hostname").await;
    }
    let loads = stage.load().await;
    all_renew(&stage.sidecars().await, 1.0).await;
    nothing_failed(loads);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a node for itself: make test-node"]
async fn without_a_control_plane_for_longer_than_a_renewal_no_request_fails() {
    let Some(stage) = Stage::set("orphaned", SOON).await else {
        return;
    };
    let malha = async |args: &[&str]| {
        let of = ["--namespace", "malha-system"];
        stage.node.kubectl(&[&of[..], args].concat()).await
    };
    let loads = stage.load().await;
    malha(&["scale", "deployment/malha", "--replicas=0"]).await;
    let pods = "app.kubernetes.io/component=control-plane";
    let gone = async || malha(&["get", "pods", "-l", pods, "-o", "name"]).await;
    until(
        "the control plane is gone",
        |left: &String| left.is_empty(),
        gone,
    )
    .await;
    let sidecars = stage.sidecars().await;
    let tries =
        |sidecar: &Sidecar| sidecar.counter("malha_agent_renewals_total") - sidecar.renewed();
    let before = sidecars.each_ref().map(tries);
    for (sidecar, before) in sidecars.iter().zip(before) {
        until(
            &format!("{} has asked in vain", sidecar.pod),
            |tries: &f64| *tries >= before + 2.0,
            async || tries(sidecar),
        )
        .await;
    }
    malha(&["scale", "deployment/malha", "--replicas=2"]).await;
    malha(&["rollout", "status", "--timeout=120s", "deployment/malha"]).await;
    all_renew(&sidecars, 1.0).await;
    stage.learns("learned").await;
    nothing_failed(loads);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a node for itself: make test-node"]
async fn without_an_api_server_leaves_are_renewed_and_no_request_fails() {
    let Some(stage) = Stage::set("adrift", SOON).await else {
        return;
    };
    let sidecars = stage.sidecars().await;
    let loads = stage.load().await;
    let mut api_server = ApiServer::find(stage.node);
    api_server.stop().await;
    let began = Instant::now();
    all_renew(&sidecars, 2.0).await;
    assert!(
        began.elapsed() > SOON / 2,
        "renewals that were begun without it"
    );
    api_server.start();
    stage.learns("learned").await;
    all_renew(&sidecars, 1.0).await;
    nothing_failed(loads);
    stage.follows_quietly().await;
}

/// The process in the node.
struct ApiServer {
    node: u32,
    pid: u32,
    arguments: Vec<String>,
    log: PathBuf,
    again: Option<Child>,
}

impl ApiServer {
    fn find(node: &Node) -> Self {
        let directory = node.kubeconfig().with_file_name("n1");
        let node = std::fs::read_to_string(directory.join("pid")).expect("the node runs");
        let node = node.trim().parse().expect("a number");
        let pid = processes(node).find(|pid| containers::comm(*pid) == "kube-apiserver");
        let pid = pid.expect("the API server runs");
        let arguments = std::fs::read_to_string(format!("/proc/{pid}/cmdline"));
        let arguments = arguments.expect("its command");
        Self {
            node,
            pid,
            arguments: arguments
                .split_terminator('\0')
                .map(str::to_owned)
                .collect(),
            log: directory.join("logs/kube-apiserver.log"),
            again: None,
        }
    }

    async fn stop(&self) {
        signal(self.pid, Signal::SIGKILL);
        let command = format!("/proc/{}/cmdline", self.pid);
        until(
            "the API server is gone",
            |gone: &bool| *gone,
            async || std::fs::read(&command).map_or(true, |left| left.is_empty()),
        )
        .await;
    }

    fn start(&mut self) {
        let log = OpenOptions::new()
            .append(true)
            .open(&self.log)
            .expect("its log");
        let node = self.node.to_string();
        let again = Command::new("nsenter")
            .args([
                "-t", &node, "--mount", "--net", "--pid", "--uts", "--ipc", "--",
            ])
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log)
            .process_group(0)
            .spawn();
        self.again = Some(again.expect("nsenter runs"));
    }
}

/// Those whose namespace of process numbers is this one's.
fn processes(like: u32) -> impl Iterator<Item = u32> {
    let of = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let wanted = of(like);
    let all = std::fs::read_dir("/proc").expect("/proc").flatten();
    let all = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    all.filter(move |pid| of(*pid) == wanted)
}

fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("Linux's pids are i32"));
    kill(pid, signal).expect("the process is there");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a node for itself: make test-node"]
async fn where_a_node_is_old_the_application_is_held_until_it_has_its_network() {
    let Some(stage) = Stage::set("old", SOON).await else {
        return;
    };
    let old = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "old"},
        "spec": {"unschedulable": true},
    });
    let created = stage
        .node
        .try_kubectl(&["create", "-f", "-"], Some(&old.to_string()))
        .await;
    assert!(created.status.success(), "{created:?}");
    let version = r#"{"status":{"nodeInfo":{"kubeletVersion":"v1.30.4"}}}"#;
    let told = [
        "patch",
        "node",
        "old",
        "--subresource=status",
        "--type=merge",
        "-p",
        version,
    ];
    stage.node.kubectl(&told).await;
    // Fails where its first call does.
    let eager = r#"
apiVersion: v1
kind: Pod
metadata: {name: eager}
spec:
  restartPolicy: Always
  terminationGracePeriodSeconds: 1
  containers:
  - name: app
    image: rig.local/tools:1
    command: [sh, -c, "curl -sS --fail --max-time 30 http://web/hostname && exec sleep 100000"]
"#;
    let order = [
        "create",
        "--dry-run=server",
        "-f",
        "-",
        "-o",
        "jsonpath={.spec.containers[*].name}",
    ];
    until(
        "the injector knows the old node",
        |names: &String| names == "malha-proxy app",
        async || {
            let output = stage.mesh.try_kubectl(&order, Some(eager)).await;
            String::from_utf8_lossy(&output.stdout).into_owned()
        },
    )
    .await;
    stage.mesh.apply(eager).await;
    stage.node.kubectl(&["delete", "node", "old"]).await;
    stage.mesh.ready("pod/eager").await;
    let path = "jsonpath={.spec.containers[*].name} {.status.containerStatuses[*].restartCount}";
    let eager = stage.mesh.kubectl(&["get", "pod/eager", "-o", path]).await;
    assert_eq!(eager, "malha-proxy app 0 0");
}
