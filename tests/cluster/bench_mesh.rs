//! `make bench-mesh`: what two sidecars add to a call, against the same call without them, in one run.
//!
//! The generator of `load` in the network of a pod -> (its sidecar -> the server's sidecar) or straight -> the server.
//! Direct and meshed rounds take turns, because the machine changes under both.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::{
    containers::{self, Container},
    load::{Load, Told},
    node::{self, Namespace, Node},
};

/// Requests a second; the user's limits are judged at both.
const RATES: [u32; 2] = [200, 1000];
/// How often direct and meshed take turns at each rate.
const ROUNDS: usize = 3;
/// The length of one round.
const ROUND: Duration = Duration::from_secs(10);

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
        let (mut direct, mut mesh) = (Told::default(), Told::default());
        let mut spent = Duration::ZERO;
        for _ in 0..ROUNDS {
            direct.add(plain.load(rate, ROUND));
            let before = meshed.cpu();
            mesh.add(meshed.load(rate, ROUND));
            spent += meshed.cpu() - before;
        }
        for told in [&direct, &mesh] {
            assert!(told.failures.is_empty(), "{:?}", told.failures);
        }
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
    load: Load,
    containers: Vec<Container>,
}

impl Stage {
    async fn set(node: &'static Node, prefix: &str, labels: &[(&str, &str)]) -> Self {
        let namespace = node.namespace(prefix, labels).await;
        namespace.apply(node::WEB_AND_CLIENT).await;
        namespace.ready("pod/web").await;
        namespace.ready("pod/client").await;
        Self {
            load: Load::to(&namespace, "web").await,
            containers: containers::of(node, &namespace).await,
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
            let succeeded = tried.failures.is_empty();
            in_a_row = if succeeded { in_a_row + 1 } else { 0 };
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Requests at this rate for this time, from the client's network.
    fn load(&self, rate: u32, time: Duration) -> Told {
        let client = containers::find(&self.containers, "client", "client");
        let load = Load {
            rate,
            ..self.load.clone()
        };
        load.run(&client.network(), time)
    }

    /// What both sidecars have spent.
    fn cpu(&self) -> Duration {
        let sidecars = self.containers.iter().filter(|c| c.name == "malha-proxy");
        sidecars.map(Container::cpu).sum()
    }

    /// Of the client's sidecar, by program.
    fn private_memory(&self) -> BTreeMap<String, f64> {
        let sidecar = containers::find(&self.containers, "client", "malha-proxy");
        let of = |pid| Some((containers::comm(pid).replace('-', "_"), private(pid)?));
        sidecar.pids().into_iter().filter_map(of).collect()
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

const STRICT: &str = r#"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default}
spec: {mtls: {mode: STRICT}}
"#;
