//! Whose mode is in force, and that the kubelet's probes pass in each.

use std::collections::BTreeMap;

use super::{STRICT, Shop, curl, until};
use crate::node::Namespace;

#[tokio::test(flavor = "multi_thread")]
async fn a_ports_mode_and_a_workloads_are_stronger_than_their_namespaces_and_probes_pass_in_each() {
    let Some(shop) = Shop::open("modes").await else {
        return;
    };
    let outside = shop.outsider().await;
    let ready_since = r#".status.conditions[?(@.type=="Ready")].lastTransitionTime"#;
    let ready = shop.field("pod/web", ready_since).await;
    let probed = shop.probed().await;
    shop.mesh.apply(STRICT).await;

    for mode in MODES {
        shop.mesh.apply(&policy("STRICT", mode.name)).await;
        shop.has_mode(mode, &outside, &[8080]).await;
        let other = shop.called_by_nobody(&outside, 8443).await;
        assert!(other.is_err(), "the other port stays STRICT: {other:?}");
    }
    for mode in MODES {
        shop.mesh.apply(&policy(mode.name, mode.name)).await;
        shop.has_mode(mode, &outside, &[8080, 8443]).await;
        shop.is_probed_twice(mode).await;
    }
    let failures = |probed: &Probed| -> f64 { probed.values().map(|count| count.failed).sum() };
    let now = shop.probed().await;
    assert_eq!(failures(&now), failures(&probed), "{now:?}");
    assert_eq!(
        shop.field("pod/web", ready_since).await,
        ready,
        "never unready"
    );
    let restarts = ".status.containerStatuses[*].restartCount";
    assert_eq!(shop.field("pod/web", restarts).await, "0 0 0 0");
}

#[derive(Clone, Copy)]
struct Mode {
    name: &'static str,
    /// Callers without an identity are served.
    takes_everybody: bool,
    /// Callers of the mesh show theirs.
    knows_callers: bool,
}

/// STRICT first: what was before, no policy, differs from it.
const MODES: [Mode; 3] = [
    Mode {
        name: "STRICT",
        takes_everybody: false,
        knows_callers: true,
    },
    Mode {
        name: "DISABLE",
        takes_everybody: true,
        knows_callers: false,
    },
    Mode {
        name: "PERMISSIVE",
        takes_everybody: true,
        knows_callers: true,
    },
];

fn policy(workload: &str, port: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: web}}\nspec:\n  selector: \
         {{matchLabels: {{app: web}}}}\n  mtls: {{mode: {workload}}}\n  portLevelMtls: {{\"8080\": {{mode: {port}}}}}\n"
    )
}

impl Shop {
    /// The server's ports take whom they should, and its callers in the mesh are served by each.
    async fn has_mode(&self, mode: Mode, outside: &Namespace, ports: &[u16]) {
        let name = mode.name;
        for port in ports {
            until(
                &format!(
                    "{port} under {name} takes everybody: {}",
                    mode.takes_everybody
                ),
                |answer: &Result<_, _>| answer.is_ok() == mode.takes_everybody,
                async || self.called_by_nobody(outside, *port).await,
            )
            .await;
        }
        until(
            &format!("callers are known under {name}: {}", mode.knows_callers),
            |seen: &Result<String, String>| {
                seen.as_ref()
                    .is_ok_and(|seen| seen.contains("/sa/client") == mode.knows_callers)
            },
            async || {
                self.called("http://web/header?key=X-Forwarded-Client-Cert")
                    .await
            },
        )
        .await;
        until(
            &format!("the application's own TLS goes on under {name}"),
            |answer: &Result<_, _>| answer.is_ok(),
            async || self.called("https://web/").await,
        )
        .await;
    }

    async fn called(&self, url: &str) -> Result<String, String> {
        curl(&self.mesh, "pod/client", "client", &["-k", url]).await
    }

    /// In plaintext, or with the application's TLS and no certificate of the mesh.
    async fn called_by_nobody(&self, outside: &Namespace, port: u16) -> Result<String, String> {
        let server = self.field("pod/web", ".status.podIP").await;
        let scheme = if port == 8443 { "https" } else { "http" };
        let url = format!("{scheme}://{server}:{port}");
        curl(outside, "pod/outsider", "client", &["-k", &url]).await
    }

    /// Every kind of probe succeeds twice from now on: the first may have begun before.
    async fn is_probed_twice(&self, mode: Mode) {
        let before = self.probed().await;
        let successes =
            |probed: &Probed, probe| probed.get(probe).map_or(0.0, |count| count.passed);
        until(
            &format!("each probe passes under {}", mode.name),
            |now: &Probed| {
                PROBES
                    .iter()
                    .all(|probe| successes(now, probe) >= successes(&before, probe) + 2.0)
            },
            async || self.probed().await,
        )
        .await;
    }

    /// Of the application's containers.
    async fn probed(&self) -> Probed {
        let metrics = ["get", "--raw", "/api/v1/nodes/n1/proxy/metrics/probes"];
        let metrics = self.node.kubectl(&metrics).await;
        let pod = [
            format!("namespace=\"{}\"", self.mesh.name()),
            "pod=\"web\"".to_owned(),
        ];
        let counts = metrics
            .lines()
            .filter(|line| line.starts_with("prober_probe_total{"))
            .filter(|line| pod.iter().all(|label| line.contains(label)));
        let mut probed = Probed::new();
        for line in counts {
            let number = line
                .rsplit(' ')
                .next()
                .and_then(|number| number.parse().ok());
            let number: f64 = number.expect("a number");
            for probe in PROBES {
                let [container, kind] = probe;
                let labels = [
                    format!("container=\"{container}\""),
                    format!("probe_type=\"{kind}\""),
                ];
                if labels.iter().all(|label| line.contains(label)) {
                    let count = probed.entry(probe).or_default();
                    match line.contains("result=\"successful\"") {
                        true => count.passed += number,
                        false => count.failed += number,
                    }
                }
            }
        }
        probed
    }
}

/// Container and kind: gRPC and a program; HTTPS; TCP and HTTP.
const PROBES: [[&str; 2]; 5] = [
    ["health", "Readiness"],
    ["health", "Liveness"],
    ["secure", "Readiness"],
    ["web", "Liveness"],
    ["web", "Readiness"],
];

/// What the kubelet counts.
type Probed = BTreeMap<[&'static str; 2], Count>;

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    passed: f64,
    failed: f64,
}
