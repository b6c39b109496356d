//! `make bench-mesh`: what two sidecars add to a call, against the same call without them, in one run.
//!
//! A generator of requests in the network of a pod -> (its sidecar -> the server's sidecar) or straight -> the server.
//! Open loop: each request has an instant at which it is to be sent, and its latency counts from there, so that a proxy
//! that stalls is charged for every request it held up. Direct and meshed rounds take turns, because the machine changes
//! under both.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};
use serde_json::Value;

use crate::node::{self, Namespace, Node};

/// Requests a second; the user's limits are judged at both.
const RATES: [u32; 2] = [200, 1000];
/// How often direct and meshed take turns at each rate.
const ROUNDS: usize = 3;
/// The length of one round.
const ROUND: Duration = Duration::from_secs(10);
/// Connections that stay open, each with a thread; enough that a slow answer holds nobody else up.
const CONNECTIONS: usize = 32;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement of some minutes: make bench-mesh"]
async fn what_a_hop_costs() {
    let Some(node) = node::shared().await else {
        return;
    };
    let plain = Stage::set(node, "direct", &[]).await;
    let meshed = Stage::set(node, "meshed", &[("istio-injection", "enabled")]).await;
    meshed.namespace.apply(STRICT).await;
    meshed.wait_until_answered().await;

    let mut limits = Vec::new();
    for rate in RATES {
        // Both ways are warm before anything counts.
        plain.load(rate, Duration::from_secs(2));
        meshed.load(rate, Duration::from_secs(2));
        let (mut direct, mut mesh) = (Latencies::default(), Latencies::default());
        let mut spent = Duration::ZERO;
        for _ in 0..ROUNDS {
            direct.add(plain.load(rate, ROUND));
            let before = meshed.cpu();
            mesh.add(meshed.load(rate, ROUND));
            spent += meshed.cpu() - before;
        }
        assert_eq!((direct.failed, mesh.failed), (0, 0), "requests failed");
        let per_hop = |share: f64| (mesh.at(share) - direct.at(share)) / 2.0;
        let proxies = 2.0 * mesh.micros.len() as f64;
        let cpu = spent.as_secs_f64() * 1e6 / proxies;
        let share = cpu * f64::from(rate) / 1e4;
        for (name, value, unit) in [
            ("direct_p50", direct.at(0.5), "ms"),
            ("direct_p99", direct.at(0.99), "ms"),
            ("meshed_p50", mesh.at(0.5), "ms"),
            ("meshed_p99", mesh.at(0.99), "ms"),
            ("hop_p50", per_hop(0.5), "ms"),
            ("hop_p99", per_hop(0.99), "ms"),
            ("cpu_per_request", cpu, "us"),
            ("cpu_of_a_core", share, "%"),
        ] {
            println!("bench mesh_{name}_{rate} {value:.2} {unit}");
        }
        limits.push(Limit::new(
            format!("added per hop, p99 at {rate}/s"),
            per_hop(0.99),
            10.0,
            "ms",
        ));
        limits.push(Limit::new(
            format!("CPU of one sidecar at {rate}/s"),
            share,
            5.0,
            "% of a core",
        ));
    }
    let mut whole = 0.0;
    for (process, megabytes) in meshed.private_memory() {
        println!("bench mesh_private_{process} {megabytes:.1} MiB");
        whole += megabytes;
    }
    let memory = "private memory of one sidecar".to_owned();
    limits.push(Limit::new(memory, whole, 50.0, "MiB"));
    println!("\n{:40} {:>12} {:>10}   kept", "limit", "measured", "limit");
    limits.iter().for_each(|limit| println!("{limit}"));
}

/// One of the user's limits.
struct Limit {
    name: String,
    measured: f64,
    limit: f64,
    unit: &'static str,
}

impl Limit {
    fn new(name: String, measured: f64, limit: f64, unit: &'static str) -> Self {
        Self {
            name,
            measured,
            limit,
            unit,
        }
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kept = if self.measured < self.limit {
            "yes"
        } else {
            "no"
        };
        let Self {
            name,
            measured,
            limit,
            unit,
        } = self;
        write!(
            f,
            "{name:40} {measured:>12.2} {limit:>10.2}   {kept} ({unit})"
        )
    }
}

/// A server and a client's network to call it from.
struct Stage {
    namespace: Namespace,
    server: SocketAddr,
    host: String,
    /// Each container of both pods: pod, name, its processes' cgroup by controller.
    containers: Vec<Container>,
}

struct Container {
    pod: String,
    name: String,
    cpu: PathBuf,
    pids: Vec<u32>,
}

impl Stage {
    async fn set(node: &'static Node, prefix: &str, labels: &[(&str, &str)]) -> Self {
        let namespace = node.namespace(prefix, labels).await;
        namespace.apply(node::WEB_AND_CLIENT).await;
        namespace.ready("pod/web").await;
        namespace.ready("pod/client").await;
        let address = ["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"];
        let address = namespace.kubectl(&address).await;
        let pods = namespace.kubectl(&["get", "pods", "-o", "json"]).await;
        let pods: Value = serde_json::from_str(&pods).expect("JSON");
        let directory = node.kubeconfig();
        let cgroup = std::fs::read_to_string(directory.with_file_name("cgroup"));
        Self {
            server: format!("{address}:80").parse().expect("an address"),
            host: format!("web.{}.svc.cluster.local", namespace.name()),
            containers: containers(&pods, cgroup.expect("a cluster's cgroup").trim()),
            namespace,
        }
    }

    /// The policy has reached both proxies when a call through them succeeds several times in a row.
    async fn wait_until_answered(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut in_a_row = 0;
        while in_a_row < 5 {
            assert!(Instant::now() < deadline, "no call crosses the mesh");
            let tried = self.load(10, Duration::from_millis(300));
            in_a_row = if tried.failed == 0 { in_a_row + 1 } else { 0 };
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Requests at this rate for this time, from the client's network.
    fn load(&self, rate: u32, time: Duration) -> Latencies {
        let client = self.of("client", "client");
        let pid = client.pids.first().expect("the client runs");
        let network = File::open(format!("/proc/{pid}/ns/net")).expect("the client's network");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(network, CloneFlags::CLONE_NEWNET).expect("entering the client's network");
                generate(self.server, &self.host, rate, time)
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn of(&self, pod: &str, name: &str) -> &Container {
        let mut containers = self.containers.iter();
        let found = containers.find(|container| container.pod == pod && container.name == name);
        found.expect("the container runs")
    }

    /// What both sidecars have spent.
    fn cpu(&self) -> Duration {
        let sidecars = self.containers.iter().filter(|c| c.name == "malha-proxy");
        sidecars.map(|sidecar| cpu_of(&sidecar.cpu)).sum()
    }

    /// Of the client's sidecar, by program.
    fn private_memory(&self) -> BTreeMap<String, f64> {
        let sidecar = self.of("client", "malha-proxy");
        let of = |pid: &u32| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            Some((name.trim().replace('-', "_"), private(*pid)?))
        };
        sidecar.pids.iter().filter_map(of).collect()
    }
}

/// Pages that belong to one process alone.
fn private(pid: u32) -> Option<f64> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let of = |name: &str| -> Option<f64> {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.trim().parse().ok()
    };
    Some((of("Private_Clean:")? + of("Private_Dirty:")?) / 1024.0)
}

fn cpu_of(directory: &Path) -> Duration {
    // Two hierarchies of the kernel: one directory for each controller, or one for all.
    if let Ok(usage) = std::fs::read_to_string(directory.join("cpuacct.usage")) {
        return Duration::from_nanos(usage.trim().parse().expect("nanoseconds"));
    }
    let stat = std::fs::read_to_string(directory.join("cpu.stat")).expect("the cgroup is there");
    let usage = stat
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "));
    let usage = usage.expect("the kernel counts").parse();
    Duration::from_micros(usage.expect("microseconds"))
}

fn containers(pods: &Value, cgroup: &str) -> Vec<Container> {
    let unified = Path::new("/sys/fs/cgroup").join(cgroup);
    let root = match unified.exists() {
        true => unified,
        false => Path::new("/sys/fs/cgroup/cpuacct").join(cgroup),
    };
    let mut found = Vec::new();
    for pod in pods["items"].as_array().into_iter().flatten() {
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        for list in ["initContainerStatuses", "containerStatuses"] {
            for status in pod["status"][list].as_array().into_iter().flatten() {
                let id = status["containerID"].as_str().unwrap_or_default();
                let id = id.trim_start_matches("containerd://");
                // An init container that has ended has none.
                if let Some(cpu) = below(&root, id) {
                    found.push(Container {
                        pod: name.to_owned(),
                        name: status["name"].as_str().unwrap_or_default().to_owned(),
                        pids: pids(&cpu),
                        cpu,
                    });
                }
            }
        }
    }
    found
}

/// The directory of this name, however deep.
fn below(directory: &Path, name: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(directory).ok()?.flatten();
    let mut directories = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir());
    directories.find_map(|path| match path.ends_with(name) {
        true => Some(path),
        false => below(&path, name),
    })
}

fn pids(directory: &Path) -> Vec<u32> {
    let listed = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    listed
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect()
}

/// What became of a round's requests.
#[derive(Default)]
struct Latencies {
    micros: Vec<u64>,
    failed: u64,
}

impl Latencies {
    fn add(&mut self, other: Self) {
        self.micros.extend(other.micros);
        self.micros.sort_unstable();
        self.failed += other.failed;
    }

    /// In milliseconds.
    fn at(&self, share: f64) -> f64 {
        let index = (self.micros.len() as f64 * share) as usize;
        let index = index.min(self.micros.len().saturating_sub(1));
        self.micros.get(index).copied().unwrap_or_default() as f64 / 1000.0
    }
}

/// Sends each request at its instant, over connections that stay open.
fn generate(server: SocketAddr, host: &str, rate: u32, time: Duration) -> Latencies {
    let count = (f64::from(rate) * time.as_secs_f64()) as u64;
    let interval = Duration::from_secs(1) / rate;
    let (next, failed) = (AtomicU64::new(0), AtomicU64::new(0));
    let micros = Mutex::new(Vec::with_capacity(count as usize));
    let began = Instant::now() + Duration::from_millis(20);
    let request = format!("GET /echo?msg=malha HTTP/1.1\r\nhost: {host}\r\n\r\n");
    std::thread::scope(|scope| {
        for _ in 0..CONNECTIONS.min(count as usize) {
            scope.spawn(|| {
                let mut connection = None;
                let mut own = Vec::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        break;
                    }
                    let due = began + interval * number as u32;
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    match ask(&mut connection, server, &request) {
                        Some(()) => own.push(due.elapsed().as_micros() as u64),
                        None => {
                            failed.fetch_add(1, Ordering::Relaxed);
                            connection = None;
                        }
                    }
                }
                micros.lock().expect("no thread panics").extend(own);
            });
        }
    });
    let mut micros = micros.into_inner().expect("no thread panicked");
    micros.sort_unstable();
    Latencies {
        micros,
        failed: failed.into_inner(),
    }
}

/// One request over a connection, which is opened where there is none.
fn ask(
    connection: &mut Option<BufReader<TcpStream>>,
    server: SocketAddr,
    request: &str,
) -> Option<()> {
    let patience = Duration::from_secs(5);
    if connection.is_none() {
        let stream = TcpStream::connect_timeout(&server, patience).ok()?;
        stream.set_nodelay(true).ok()?;
        stream.set_read_timeout(Some(patience)).ok()?;
        *connection = Some(BufReader::new(stream));
    }
    let stream = connection.as_mut()?;
    stream.get_mut().write_all(request.as_bytes()).ok()?;
    let mut line = String::new();
    stream.read_line(&mut line).ok()?;
    let answered = line.starts_with("HTTP/1.1 200");
    let mut length = 0;
    loop {
        line.clear();
        stream.read_line(&mut line).ok()?;
        match line.trim_end() {
            "" => break,
            header => {
                let (name, value) = header.split_once(':')?;
                if name.eq_ignore_ascii_case("content-length") {
                    length = value.trim().parse().ok()?;
                }
            }
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    answered.then_some(())
}

#[test]
fn requests_are_sent_at_their_instants_and_their_latencies_counted() {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let server = socket.local_addr().expect("an address");
    std::thread::spawn(move || {
        for stream in socket.incoming().flatten() {
            std::thread::spawn(move || {
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                while stream.read_line(&mut line).is_ok_and(|count| count > 0) {
                    if line.ends_with("\r\n\r\n") {
                        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nmalha";
                        stream.get_mut().write_all(answer).expect("written");
                        line.clear();
                    }
                }
            });
        }
    });
    let began = Instant::now();
    let told = generate(server, "web", 100, Duration::from_millis(300));
    assert_eq!((told.micros.len(), told.failed), (30, 0));
    assert!(
        began.elapsed() >= Duration::from_millis(290),
        "open loop keeps its pace"
    );
    assert!(told.at(0.5) <= told.at(0.99));
}

const STRICT: &str = r#"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default}
spec: {mtls: {mode: STRICT}}
"#;
