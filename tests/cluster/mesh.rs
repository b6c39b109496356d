//! Two pods of the mesh on a real node: a kubelet started them, and their Envoys talk.

mod families;
mod injected;
mod life;
mod modes;
mod refusals;
mod servers;

use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Child;
use tokio::time::{sleep, timeout};

use crate::node::{self, Namespace, Node};

/// The user's own document, byte for byte: STRICT in its namespace.
pub(crate) const STRICT: &str = include_str!("../golden/xds/explained-04/applied-in-jobs.yaml");

/// How long a change may take to reach the proxies of a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server with every kind of probe, its Services, and a client; `STRICT` and the like come on top.
const SHOP: &str = r#"
apiVersion: v1
kind: ServiceAccount
metadata: {name: web}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: client}
---
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  serviceAccountName: web
  terminationGracePeriodSeconds: 1
  containers:
  - name: web
    image: rig.local/agnhost:1
    args: [netexec, --http-port=8080]
    ports: [{name: http, containerPort: 8080}]
    startupProbe: {httpGet: {path: /healthz, port: http}, periodSeconds: 1, failureThreshold: 120}
    readinessProbe: {httpGet: {path: /healthz, port: http}, periodSeconds: 1, timeoutSeconds: 10}
    livenessProbe: {tcpSocket: {port: http}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 30}
  - name: health
    image: rig.local/agnhost:1
    args: [grpc-health-checking, --port=5000, --http-port=8081]
    ports: [{name: grpc, containerPort: 5000}]
    readinessProbe: {grpc: {port: 5000}, periodSeconds: 1, timeoutSeconds: 10}
    livenessProbe: {exec: {command: [/agnhost, help]}, periodSeconds: 3, timeoutSeconds: 10, failureThreshold: 30}
  - name: secure
    image: rig.local/tools:1
    command:
    - sh
    - -c
    - |
      cd /tmp && printf '[req]\ndistinguished_name=name\n[name]\n' >config
      openssl req -config config -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key -out certificate -subj /CN=web
      exec openssl s_server -quiet -www -accept 8443 -key key -cert certificate
    ports: [{name: https, containerPort: 8443}]
    readinessProbe: {httpGet: {path: /, port: https, scheme: HTTPS}, periodSeconds: 1, timeoutSeconds: 10}
  - {name: shell, image: "rig.local/tools:1", command: [sleep, "100000"]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: https, port: 443, targetPort: 8443}
  - {name: tcp-raw, port: 9000, targetPort: 8080}
  - {name: grpc, port: 5000}
---
apiVersion: v1
kind: Service
metadata: {name: web-headless}
spec:
  clusterIP: None
  selector: {app: web}
  ports: [{name: http, port: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  serviceAccountName: client
  terminationGracePeriodSeconds: 1
  containers:
  - {name: client, image: "rig.local/tools:1", command: [sleep, "100000"]}
"#;

const OUTSIDER: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: outsider}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: client, image: "rig.local/tools:1", command: [sleep, "100000"]}
"#;

/// A namespace of the mesh with the shop in it.
struct Shop {
    node: &'static Node,
    mesh: Namespace,
}

impl Shop {
    async fn open(prefix: &str) -> Option<Self> {
        let node = node::shared().await?;
        let injected = [("istio-injection", "enabled")];
        let mesh = node.namespace(prefix, &injected).await;
        mesh.apply(SHOP).await;
        mesh.ready("pod/web").await;
        mesh.ready("pod/client").await;
        Some(Self { node, mesh })
    }

    /// A pod without a sidecar, in a namespace outside the mesh.
    async fn outsider(&self) -> Namespace {
        let outside = self.node.namespace("outside", &[]).await;
        outside.apply(OUTSIDER).await;
        outside.ready("pod/outsider").await;
        outside
    }

    async fn field(&self, object: &str, path: &str) -> String {
        let path = format!("jsonpath={{{path}}}");
        self.mesh.kubectl(&["get", object, "-o", &path]).await
    }

    /// The sum of all series of one of the server's Envoy counters.
    async fn counter(&self, name: &str) -> f64 {
        counter(&self.mesh, ("pod/web", "shell"), name).await
    }
}

/// The sum of all series of a counter of a pod's Envoy; `container` is one with curl.
async fn counter(mesh: &Namespace, (pod, container): (&str, &str), name: &str) -> f64 {
    let stats = ["curl", "-sS", "http://127.0.0.1:15090/stats/prometheus"];
    let stats = mesh.exec(pod, container, &stats).await;
    let stats = stats.expect("the proxy's metrics");
    let series = stats.lines().filter(|line| line.starts_with(name));
    series
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

pub(crate) async fn curl(
    from: &Namespace,
    pod: &str,
    container: &str,
    args: &[&str],
) -> Result<String, String> {
    let mut command = vec!["curl", "-sS", "--fail", "--max-time", "10"];
    command.extend(args);
    from.exec(pod, container, &command).await
}

/// Asks again until the answer is as wanted: configuration reaches proxies soon, and not at once.
pub(crate) async fn until<T: std::fmt::Debug>(
    what: &str,
    wanted: impl Fn(&T) -> bool,
    mut ask: impl AsyncFnMut() -> T,
) {
    let mut last = None;
    let asked = async {
        loop {
            let answer = ask().await;
            if wanted(&answer) {
                return;
            }
            last = Some(answer);
            sleep(Duration::from_millis(300)).await;
        }
    };
    if timeout(PATIENCE, asked).await.is_err() {
        panic!("{what}: not within {PATIENCE:?}; the last answer was {last:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_reached_by_every_name_it_has_and_sees_who_calls() {
    let Some(shop) = Shop::open("names").await else {
        return;
    };
    shop.mesh.apply(STRICT).await;
    let namespace = shop.mesh.name();
    let cluster_ip = shop.field("service/web", ".spec.clusterIP").await;
    let pod_ip = shop.field("pod/web", ".status.podIP").await;
    let caller = format!("URI=spiffe://cluster.local/ns/{namespace}/sa/client");
    let path = "header?key=X-Forwarded-Client-Cert";
    for address in [
        "web".to_owned(),
        format!("web.{namespace}"),
        format!("web.{namespace}.svc.cluster.local"),
        cluster_ip,
        "web-headless:8080".to_owned(),
        format!("{pod_ip}:8080"),
    ] {
        let url = format!("http://{address}/{path}");
        until(
            &format!("{url} shows {caller}"),
            |seen: &Result<String, String>| seen.as_ref().is_ok_and(|seen| seen.contains(&caller)),
            async || curl(&shop.mesh, "pod/client", "client", &[&url]).await,
        )
        .await;
    }
    // TCP is not taken apart: what goes through is what was sent, to the same server.
    let raw = curl(
        &shop.mesh,
        "pod/client",
        "client",
        &["http://web:9000/hostname"],
    )
    .await;
    assert_eq!(raw.as_deref(), Ok("web"));
    // A pod that calls its own Service is balanced to itself. (By its short name it would find itself in /etc/hosts.)
    let service = format!("http://web.{namespace}.svc.cluster.local/hostname");
    for _ in 0..20 {
        let own = curl(&shop.mesh, "pod/web", "shell", &[&service]).await;
        assert_eq!(own.as_deref(), Ok("web"));
    }
}

/// A call of `grpc.health.v1.Health/Check` in bytes: an empty message out, `SERVING` back.
#[tokio::test(flavor = "multi_thread")]
async fn grpc_and_http2_cross_the_mesh() {
    let Some(shop) = Shop::open("grpc").await else {
        return;
    };
    shop.mesh.apply(STRICT).await;
    let call = "printf '\\000\\000\\000\\000\\000' | curl -sS --max-time 10 --http2-prior-knowledge --data-binary @- \
        -H 'content-type: application/grpc' -H 'te: trailers' \
        http://web:5000/grpc.health.v1.Health/Check | od -An -tx1";
    until(
        "the gRPC server says SERVING",
        |answer: &Result<String, String>| {
            let bytes = answer.as_deref().unwrap_or_default();
            bytes
                .split_whitespace()
                .eq("00 00 00 00 02 08 01".split(' '))
        },
        async || {
            let shell = ["sh", "-c", call];
            shop.mesh.exec("pod/client", "client", &shell).await
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn between_the_pods_nothing_is_read_but_tls() {
    let Some(shop) = Shop::open("capture").await else {
        return;
    };
    let outside = shop.outsider().await;
    let server = shop.field("pod/web", ".status.podIP").await;
    let mut capture = Capture::start(shop.node, &server).await;
    let url = "http://web/echo?msg=";
    curl(
        &shop.mesh,
        "pod/client",
        "client",
        &[&format!("{url}inside-the-mesh")],
    )
    .await
    .expect("an answer in the mesh");
    // The control: the same server called in plaintext is readable, so what is not read was not there.
    let from_outside = format!("http://{server}:8080/echo?msg=from-outside");
    curl(&outside, "pod/outsider", "client", &[&from_outside])
        .await
        .expect("an answer in plaintext while the mesh is PERMISSIVE");
    let seen = capture.until("from-outside").await;
    assert!(!seen.contains("inside-the-mesh"), "{seen}");
    let client = shop.field("pod/client", ".status.podIP").await;
    assert!(
        seen.contains(&client),
        "the client's packets were looked at"
    );
}

/// What goes over the node's bridge to and from one address, as text.
struct Capture {
    tcpdump: Child,
    text: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

impl Capture {
    async fn start(node: &Node, address: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let text = dir.path().join("packets");
        let file = std::fs::File::create(&text).expect("a file");
        let mut tcpdump = tokio::process::Command::from(node.program_inside("tcpdump"));
        let mut tcpdump = tcpdump
            .args([
                "-i", "any", "-n", "-l", "-A", "-s", "0", "host", address, "and", "tcp",
            ])
            .stdout(file)
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("tcpdump starts");
        let said = tcpdump.stderr.take().expect("its standard error");
        let mut said = BufReader::new(said).lines();
        let listening = async {
            while let Ok(Some(line)) = said.next_line().await {
                if line.contains("listening on") {
                    return true;
                }
            }
            false
        };
        assert_eq!(
            timeout(PATIENCE, listening).await,
            Ok(true),
            "tcpdump listens"
        );
        Self {
            tcpdump,
            text,
            _dir: dir,
        }
    }

    /// Everything that was seen up to these words.
    async fn until(&mut self, words: &str) -> String {
        let read = || {
            let bytes = std::fs::read(&self.text).expect("what tcpdump wrote");
            String::from_utf8_lossy(&bytes).into_owned()
        };
        until(
            &format!("tcpdump shows {words}"),
            |seen: &String| seen.contains(words),
            async || read(),
        )
        .await;
        let _ = self.tcpdump.start_kill();
        read()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_refuses_whoever_shows_no_identity_and_counts_it() {
    let Some(shop) = Shop::open("strict").await else {
        return;
    };
    let outside = shop.outsider().await;
    let server = shop.field("pod/web", ".status.podIP").await;
    let plaintext = format!("http://{server}:8080/hostname");
    let from_outside = async || curl(&outside, "pod/outsider", "client", &[&plaintext]).await;
    assert_eq!(
        from_outside().await.as_deref(),
        Ok("web"),
        "PERMISSIVE takes plaintext"
    );

    shop.mesh.apply(STRICT).await;
    until(
        "plaintext is refused",
        |answer: &Result<_, _>| answer.is_err(),
        from_outside,
    )
    .await;
    let refused = async || shop.counter("envoy_listener_no_filter_chain_match").await;
    until(
        "plaintext without a chain is counted",
        |count| *count > 0.0,
        refused,
    )
    .await;

    let tls = format!("https://{server}:8080/hostname");
    let nobody = curl(&outside, "pod/outsider", "client", &["-k", &tls]).await;
    assert!(nobody.is_err(), "TLS without a certificate: {nobody:?}");
    let refused = async || shop.counter("envoy_listener_ssl_fail_verify_no_cert").await;
    until(
        "the missing certificate is counted",
        |count| *count > 0.0,
        refused,
    )
    .await;

    let make_stranger = format!(
        "cd /tmp && printf '[req]\\ndistinguished_name=name\\n[name]\\n' >config && openssl req -config config -x509 \
         -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key -out certificate -subj / -addext \
         subjectAltName=URI:spiffe://cluster.local/ns/{}/sa/client",
        shop.mesh.name()
    );
    let shell = ["sh", "-c", &make_stranger];
    let made = outside.exec("pod/outsider", "client", &shell).await;
    made.expect("a certificate of another root with the client's name");
    let certificate = [
        "-k",
        "--cert",
        "/tmp/certificate",
        "--key",
        "/tmp/key",
        &tls,
    ];
    let stranger = curl(&outside, "pod/outsider", "client", &certificate).await;
    assert!(
        stranger.is_err(),
        "a certificate of another root: {stranger:?}"
    );
    let refused = async || shop.counter("envoy_listener_ssl_fail_verify_error").await;
    until(
        "the foreign certificate is counted",
        |count| *count > 0.0,
        refused,
    )
    .await;

    let inside = curl(&shop.mesh, "pod/client", "client", &["http://web/hostname"]).await;
    assert_eq!(inside.as_deref(), Ok("web"), "the mesh itself goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_init_container_needs_the_mesh_completes() {
    let Some(shop) = Shop::open("job").await else {
        return;
    };
    shop.mesh.apply(STRICT).await;
    let call = r#"{image: "rig.local/tools:1", command: [curl, -sS, --fail, --retry, "5", --retry-all-errors, "http://web/hostname"]}"#;
    let job = format!(
        "apiVersion: batch/v1\nkind: Job\nmetadata: {{name: once}}\nspec:\n  backoffLimit: 0\n  template:\n    spec:\n      \
         restartPolicy: Never\n      initContainers: [{}]\n      containers: [{}]\n",
        call.replacen('{', "{name: before, ", 1),
        call.replacen('{', "{name: work, ", 1),
    );
    shop.mesh.apply(&job).await;
    let complete = [
        "wait",
        "--for=condition=complete",
        "--timeout=120s",
        "job/once",
    ];
    shop.mesh.kubectl(&complete).await;
}
