//! A real Kubernetes control plane for tests: etcd, kube-apiserver and kube-controller-manager on free ports, without
//! a node, without root, ready in seconds and gone without a trace.
//!
//! ```ignore
//! #[tokio::test(flavor = "multi_thread")]
//! async fn something_holds_on_a_real_api_server() {
//!     let Some(cluster) = rig::shared().await else { return };   // says why when it skips
//!     let namespace = cluster.namespace("holds", &[("istio-injection", "enabled")]).await;
//!     let client = cluster.client().await;
//!     ..
//! }
//! ```
//! Tests share one cluster and keep to namespaces of their own. A test that stops a component, or that needs the
//! cluster-wide objects for itself, starts a cluster of its own with [`Cluster::start`].

pub(crate) mod grants;
pub(crate) mod handshakes;
pub(crate) mod outside;
pub(crate) mod pki;
pub(crate) mod pods;
pub(crate) mod process;
pub(crate) mod programs;

use std::ffi::OsStr;
use std::fmt::Display;
use std::future::Future;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Namespace, Pod, ServiceAccount};
use kube::api::{Api, ObjectMeta, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use pki::{Files, Pki};
use process::{Janitor, Process};
use programs::Programs;

/// The issuer of service-account tokens, as kubeadm names it.
pub(crate) const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// How long a component may take to become ready. A machine whose cores are all busy takes ten times the usual 3 s.
const PATIENCE: Duration = Duration::from_secs(90);

/// The cluster that the tests of this binary share.
///
/// `None` where the cluster's programs are not built: the test is skipped, and standard error says why (in CI,
/// `CI=true`, it fails instead: a pipeline that silently tests nothing is worse than a red one).
pub(crate) async fn shared() -> Option<&'static Cluster> {
    static SHARED: OnceCell<Result<Cluster, String>> = OnceCell::const_new();
    let programs = programs_or_skip()?;
    let started = SHARED
        .get_or_init(|| async {
            Cluster::start_with(Setup::default(), programs)
                .await
                .map_err(|error| format!("{error:#}"))
        })
        .await;
    match started {
        Ok(cluster) => Some(cluster),
        Err(error) => panic!("the shared test cluster did not start: {error}"),
    }
}

/// The programs, or a word on standard error about why this test is skipped.
pub(crate) fn programs_or_skip() -> Option<Programs> {
    match Programs::find() {
        Ok(programs) => Some(programs),
        Err(error) if in_ci() => panic!("{error:#}"),
        Err(error) => {
            skip(&error);
            None
        }
    }
}

/// Whether what would be skipped elsewhere must fail.
pub(crate) fn in_ci() -> bool {
    std::env::var_os("CI").is_some_and(|ci| !ci.is_empty() && ci != "false")
}

/// Says that the running test is skipped, and why. Not by `eprintln!`, which the test harness swallows when the test
/// passes: a skip that nobody sees looks like a proof.
pub(crate) fn skip(why: &dyn Display) {
    let thread = std::thread::current();
    let _ = writeln!(
        std::io::stderr(),
        "SKIPPED {}: {why}",
        thread.name().unwrap_or("a test")
    );
}

/// What may differ between clusters.
#[derive(Clone, Debug, Default)]
pub(crate) struct Setup {
    /// Further flags of the API server.
    pub(crate) api_server: Vec<String>,
    /// Further flags of the controller manager.
    pub(crate) controllers: Vec<String>,
}

/// A running control plane. Everything ends when it is dropped, and also when this process is killed.
pub(crate) struct Cluster {
    etcd: Process,
    api_server: Process,
    controllers: Process,
    // Declared after the processes and so dropped after them; the directory goes last.
    janitor: Janitor,
    dir: Dir,
    pki: Pki,
    programs: Programs,
    port: u16,
    names: AtomicU32,
}

/// The cluster's directory: removed with it, or left for reading where `MALHA_RIG_KEEP` is set.
struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        if process::keep() {
            let _ = writeln!(
                std::io::stderr(),
                "the test cluster's files are left in {}",
                self.0.display()
            );
        } else {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

impl Cluster {
    /// Starts a cluster of the caller's own; `None` as [`shared`].
    pub(crate) async fn start(setup: Setup) -> Option<Self> {
        let programs = programs_or_skip()?;
        match Self::start_with(setup, programs).await {
            Ok(cluster) => Some(cluster),
            Err(error) => panic!("the test cluster did not start: {error:#}"),
        }
    }

    /// [`Cluster::start`] for when the programs are known to be there, and a failure is an answer.
    pub(crate) async fn start_with(setup: Setup, programs: Programs) -> Result<Self> {
        install_crypto_provider();
        let dir = Dir(tempfile::Builder::new()
            .prefix("malha-cluster-")
            .tempdir()?
            .keep());
        let janitor = Janitor::hire(&dir.0)?;
        let pki_dir = dir.0.join("pki");
        std::fs::create_dir(&pki_dir)?;
        let pki = Pki::new(&pki_dir)?;
        let authority = pki.authority();
        let token_key = pki::service_account_key(&pki_dir)?;

        let [etcd_port, peer_port, port] = free_ports()?;
        let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST)];
        let etcd_files = pki.server("etcd", &["localhost"], &loopback)?;
        let etcd_url = format!("https://127.0.0.1:{etcd_port}");
        let etcd = etcd(
            &programs,
            &janitor,
            &dir.0,
            &etcd_files,
            &authority,
            &etcd_url,
            peer_port,
        );
        let api_server = api_server(
            &programs, &janitor, &dir.0, &pki, &token_key, &etcd_url, port, &setup,
        )?;
        // The API server waits for etcd by itself.
        etcd.start()?;
        api_server.start()?;

        let cluster = Self {
            controllers: controllers(&programs, &janitor, &dir.0, &authority, &token_key, &setup),
            etcd,
            api_server,
            janitor,
            dir,
            pki,
            programs,
            port,
            names: AtomicU32::new(0),
        };
        cluster.write_kubeconfig(
            "admin",
            &cluster.pki.client("admin", "admin", &["system:masters"])?,
        )?;
        cluster.write_kubeconfig(
            "controllers",
            &cluster
                .pki
                .client("controllers", "system:kube-controller-manager", &[])?,
        )?;
        cluster.api_server_ready().await?;
        // Not earlier: a controller manager that finds an API server without its RBAC rules backs off for seconds.
        cluster.controllers.start()?;
        cluster.controllers_ready().await?;
        Ok(cluster)
    }

    /// Waits until the API server says that it is ready.
    ///
    /// # Errors
    /// It or etcd has ended, or it is not ready in time; with the end of the log.
    pub(crate) async fn api_server_ready(&self) -> Result<()> {
        let client = self.client().await;
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.etcd.check()?;
            self.api_server.check()?;
            let request = http_get("/readyz");
            let Err(not_ready) = client.request_text(request).await else {
                return Ok(());
            };
            if Instant::now() > deadline {
                bail!(
                    "kube-apiserver is not ready after {PATIENCE:?} ({not_ready}); the end of its log:\n{}",
                    self.api_server.tail(30)
                );
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    /// Waits until the controllers work: pods are refused until their namespace has a ServiceAccount `default`.
    async fn controllers_ready(&self) -> Result<()> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client().await, "default");
        let deadline = Instant::now() + PATIENCE;
        while accounts.get_opt("default").await?.is_none() {
            self.controllers.check()?;
            if Instant::now() > deadline {
                bail!(
                    "kube-controller-manager made no ServiceAccount in {PATIENCE:?}; the end of its log:\n{}",
                    self.controllers.tail(30)
                );
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        Ok(())
    }

    /// The API server's address.
    pub(crate) fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// A directory that goes with the cluster.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir.0
    }

    /// Where one of the programs is that are built for the tests.
    pub(crate) fn program(&self, name: &str) -> &Path {
        self.programs.path(name)
    }

    /// Who ends with the cluster: for processes that a test starts beside it.
    pub(crate) fn janitor(&self) -> &Janitor {
        &self.janitor
    }

    /// The API server, to stop, freeze, kill and start it again. Only for a cluster of one's own.
    pub(crate) fn api_server(&self) -> &Process {
        &self.api_server
    }

    // -- who calls --

    /// A client with all rights. Make one in each test: its connections belong to the runtime it was made in.
    pub(crate) async fn client(&self) -> Client {
        client(&self.admin_kubeconfig()).await
    }

    /// The kubeconfig of the user with all rights.
    pub(crate) fn admin_kubeconfig(&self) -> PathBuf {
        self.kubeconfig_path("admin")
    }

    /// A kubeconfig with a token of a ServiceAccount that exists, valid for a day: RBAC applies as in a pod.
    pub(crate) async fn service_account(&self, namespace: &str, name: &str) -> PathBuf {
        let token = self
            .token(namespace, name, &TokenOf::Account, &[], 86_400)
            .await;
        let file = format!("sa-{}-{namespace}-{name}", self.next());
        self.write_kubeconfig_for(&file, &json!({ "token": token }))
            .expect("the directory of the cluster is writable")
    }

    /// A token of a ServiceAccount, as the kubelet asks for it: for `audiences` (none: the API server's own) and
    /// `seconds` (at least 600), bound to what `of` names.
    pub(crate) async fn token(
        &self,
        namespace: &str,
        account: &str,
        of: &TokenOf<'_>,
        audiences: &[&str],
        seconds: i64,
    ) -> String {
        self.try_token(namespace, account, of, audiences, seconds)
            .await
            .unwrap_or_else(|error| {
                panic!("no token for {namespace}/{account} ({of:?}): {error:#}")
            })
    }

    /// [`Cluster::token`] for when a refusal is the point.
    pub(crate) async fn try_token(
        &self,
        namespace: &str,
        account: &str,
        of: &TokenOf<'_>,
        audiences: &[&str],
        seconds: i64,
    ) -> Result<String> {
        let client = self.client().await;
        let bound_object_ref = match of {
            TokenOf::Account => None,
            TokenOf::Pod(pod) => {
                let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
                Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: Some((*pod).to_owned()),
                    uid: pods.get(pod).await?.uid(),
                })
            }
        };
        let request = TokenRequest {
            metadata: ObjectMeta::default(),
            spec: TokenRequestSpec {
                audiences: audiences
                    .iter()
                    .map(|audience| (*audience).to_owned())
                    .collect(),
                bound_object_ref,
                expiration_seconds: Some(seconds),
            },
            status: None,
        };
        let accounts: Api<ServiceAccount> = Api::namespaced(client, namespace);
        let answer = accounts
            .create_token_request(account, &PostParams::default(), &request)
            .await?;
        Ok(answer
            .status
            .context("a TokenRequest without a status")?
            .token)
    }

    /// Runs kubectl with all rights; `input` is its standard input.
    pub(crate) async fn kubectl<I>(&self, args: I, input: Option<&str>) -> Output
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        self.kubectl_as(&self.admin_kubeconfig(), args, input).await
    }

    /// Runs kubectl as the user of a kubeconfig.
    pub(crate) async fn kubectl_as<I>(
        &self,
        kubeconfig: &Path,
        args: I,
        input: Option<&str>,
    ) -> Output
    where
        I: IntoIterator,
        I::Item: AsRef<OsStr>,
    {
        let mut kubectl = tokio::process::Command::new(self.programs.path("kubectl"));
        kubectl
            .env("KUBECONFIG", kubeconfig)
            .env("HOME", self.dir()) // the discovery cache of another cluster must not answer for this one
            .args(args);
        run(kubectl, input).await
    }

    // -- a place for a test --

    /// Makes a namespace with a name of its own that begins with `prefix`, and waits until pods may be made in it.
    pub(crate) async fn namespace(&self, prefix: &str, labels: &[(&str, &str)]) -> String {
        let name = format!("{prefix}-{}", self.next());
        self.named_namespace(&name, labels).await;
        name
    }

    /// Makes a namespace with this very name, and waits until pods may be made in it.
    pub(crate) async fn named_namespace(&self, name: &str, labels: &[(&str, &str)]) {
        let client = self.client().await;
        let namespace = Namespace {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                labels: Some(
                    labels
                        .iter()
                        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                        .collect(),
                ),
                ..ObjectMeta::default()
            },
            ..Namespace::default()
        };
        let namespaces: Api<Namespace> = Api::all(client.clone());
        namespaces
            .create(&PostParams::default(), &namespace)
            .await
            .expect("a namespace for a test");
        let accounts: Api<ServiceAccount> = Api::namespaced(client, name);
        eventually(
            PATIENCE,
            &format!("ServiceAccount default in {name}"),
            || async {
                accounts
                    .get_opt("default")
                    .await
                    .map_err(|error| error.to_string())?
                    .ok_or_else(|| "absent".to_owned())
            },
        )
        .await;
    }

    // -- what happened --

    /// The audit log so far, one event a line of the API server's `audit.k8s.io/v1`, stage `ResponseComplete` (or
    /// `Panic`). Pods are logged with request and response, so that the patch of each webhook is seen.
    pub(crate) fn audit(&self) -> Vec<Value> {
        let log = std::fs::read_to_string(self.audit_log()).unwrap_or_default();
        // The last line may be half written; every other one must parse.
        let whole = log.rfind('\n').map_or("", |end| &log[..end]);
        whole
            .lines()
            .map(|line| serde_json::from_str(line).expect("a line of the audit log"))
            .collect()
    }

    /// Where [`Cluster::audit`] reads.
    pub(crate) fn audit_log(&self) -> PathBuf {
        self.dir.0.join("audit.log")
    }

    /// The cluster's own certificate authority, PEM: a bundle that has nothing to do with Malha's.
    pub(crate) fn certificate_authority(&self) -> Vec<u8> {
        std::fs::read(self.pki.authority().certificate).expect("the directory of the cluster")
    }

    // -- inside --

    /// A number that no other object of this cluster has in its name.
    pub(crate) fn next(&self) -> u32 {
        self.names.fetch_add(1, Ordering::Relaxed)
    }

    fn kubeconfig_path(&self, name: &str) -> PathBuf {
        self.dir.0.join(format!("{name}.kubeconfig"))
    }

    fn write_kubeconfig(&self, name: &str, files: &Files) -> Result<PathBuf> {
        let user = json!({ "client-certificate": files.certificate, "client-key": files.key });
        self.write_kubeconfig_for(name, &user)
    }

    /// JSON is YAML: every reader of a kubeconfig takes it.
    fn write_kubeconfig_for(&self, name: &str, user: &Value) -> Result<PathBuf> {
        let cluster = json!({ "server": self.url(), "certificate-authority": self.pki.authority().certificate });
        let kubeconfig = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "test", "cluster": cluster }],
            "users": [{ "name": name, "user": user }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": name } }],
            "current-context": "test",
        });
        let path = self.kubeconfig_path(name);
        pki::write_private(&path, &serde_json::to_string_pretty(&kubeconfig)?)?;
        Ok(path)
    }
}

/// What a token is bound to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum TokenOf<'a> {
    /// Nothing but its account.
    Account,
    /// This pod of the same namespace, as the kubelet binds it.
    Pod(&'a str),
}

/// A client for the user of a kubeconfig. It repeats nothing by itself, so that a test sees each answer.
pub(crate) async fn client(kubeconfig: &Path) -> Client {
    install_crypto_provider();
    let kubeconfig = Kubeconfig::read_from(kubeconfig).expect("a kubeconfig of the test cluster");
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .expect("a kubeconfig of the test cluster");
    config.default_retry = false;
    Client::try_from(config).expect("a client of the test cluster")
}

/// Asks again and again until `ask` gives a value; panics with its last word when that takes longer than `patience`.
pub(crate) async fn eventually<T, F, Fut>(patience: Duration, what: &str, mut ask: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, String>>,
{
    let start = Instant::now();
    loop {
        let not_yet = match ask().await {
            Ok(value) => return value,
            Err(not_yet) => not_yet,
        };
        assert!(
            start.elapsed() < patience,
            "{what}: not within {patience:?}: {not_yet}"
        );
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

/// Runs a program to its end with `input` as its standard input.
pub(crate) async fn run(mut command: tokio::process::Command, input: Option<&str>) -> Output {
    use tokio::io::AsyncWriteExt;
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let write = async move {
        // A program may refuse before it has read everything; its own words say so.
        let _ = stdin.write_all(input.unwrap_or_default().as_bytes()).await;
    };
    // Both at once: a program that answers while it reads would fill its pipe and wait for us for ever.
    let ((), output) = tokio::join!(write, child.wait_with_output());
    output.unwrap_or_else(|error| panic!("cannot wait for {command:?}: {error}"))
}

/// kube's client takes the process-wide provider. Tests run side by side, so the first one wins and all are equal.
pub(crate) fn install_crypto_provider() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

/// A GET without a body.
pub(crate) fn http_get(path: &str) -> axum::http::Request<Vec<u8>> {
    axum::http::Request::get(path)
        .body(Vec::new())
        .expect("a path of the API server")
}

/// Ports that nobody listens on. They lie below the range from which the kernel takes the ports of outgoing
/// connections (from 32768 on), so that none is taken by chance between this look and the program's start.
pub(crate) fn free_ports<const N: usize>() -> Result<[u16; N]> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 12_000;
    // Two test binaries at once begin at different places.
    let start = u16::try_from(std::process::id().wrapping_mul(97) % u32::from(COUNT))?;
    let mut ports = [0; N];
    for port in &mut ports {
        *port = (0..COUNT)
            .map(|_| FIRST + (start + NEXT.fetch_add(1, Ordering::Relaxed) % COUNT) % COUNT)
            .find(|port| TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], *port))).is_ok())
            .context("no free port between 20000 and 32000")?;
    }
    Ok(ports)
}

fn etcd(
    programs: &Programs,
    janitor: &Janitor,
    dir: &Path,
    files: &Files,
    authority: &Files,
    url: &str,
    peer_port: u16,
) -> Process {
    let peer = format!("https://127.0.0.1:{peer_port}");
    let (certificate, key, ca) = (
        files.certificate.display(),
        files.key.display(),
        authority.certificate.display(),
    );
    Process::new("etcd", programs.path("etcd"), dir, janitor).args([
        format!("--data-dir={}", dir.join("etcd").display()),
        "--unsafe-no-fsync".to_owned(), // the data lives as long as the test
        "--log-level=warn".to_owned(),
        format!("--listen-client-urls={url}"),
        format!("--advertise-client-urls={url}"),
        format!("--cert-file={certificate}"),
        format!("--key-file={key}"),
        "--client-cert-auth".to_owned(),
        format!("--trusted-ca-file={ca}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        format!("--peer-cert-file={certificate}"),
        format!("--peer-key-file={key}"),
        "--peer-client-cert-auth".to_owned(),
        format!("--peer-trusted-ca-file={ca}"),
    ])
}

#[expect(
    clippy::too_many_arguments,
    reason = "the flags of one program, gathered in one place"
)]
fn api_server(
    programs: &Programs,
    janitor: &Janitor,
    dir: &Path,
    pki: &Pki,
    token_key: &Files,
    etcd_url: &str,
    port: u16,
    setup: &Setup,
) -> Result<Process> {
    let names = [
        "localhost",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ];
    let addresses = [
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)),
    ];
    let serving = pki.server("api-server", &names, &addresses)?;
    let to_etcd = pki.client("api-server-etcd", "kube-apiserver-etcd", &[])?;
    let authority = pki.authority();
    let policy = dir.join("audit-policy.yaml");
    std::fs::write(&policy, AUDIT_POLICY)?;
    Ok(Process::new(
        "kube-apiserver",
        programs.path("kube-apiserver"),
        dir,
        janitor,
    )
    .args([
        format!("--etcd-servers={etcd_url}"),
        format!("--etcd-cafile={}", authority.certificate.display()),
        format!("--etcd-certfile={}", to_etcd.certificate.display()),
        format!("--etcd-keyfile={}", to_etcd.key.display()),
        "--bind-address=127.0.0.1".to_owned(),
        // For the Service `kubernetes`, which no pod of a cluster without nodes ever calls. From the range kept
        // for documentation, because a machine may have no address of its own and the flag must not be loopback.
        "--advertise-address=192.0.2.1".to_owned(),
        format!("--secure-port={port}"),
        "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
        format!("--tls-cert-file={}", serving.certificate.display()),
        format!("--tls-private-key-file={}", serving.key.display()),
        format!("--client-ca-file={}", authority.certificate.display()),
        format!("--service-account-issuer={ISSUER}"),
        format!(
            "--service-account-key-file={}",
            token_key.certificate.display()
        ),
        format!(
            "--service-account-signing-key-file={}",
            token_key.key.display()
        ),
        "--authorization-mode=Node,RBAC".to_owned(),
        // Beside those that are on by default: ServiceAccount, NamespaceLifecycle, LimitRanger, ResourceQuota,
        // PodSecurity, Priority, DefaultTolerationSeconds, both webhook plugins, ValidatingAdmissionPolicy, ...
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--allow-privileged=true".to_owned(),
        // A webhook's Service is resolved to the addresses of its EndpointSlices and not to its cluster address,
        // which nothing routes here: so a control plane outside the cluster is reached as one inside would be.
        "--enable-aggregator-routing=true".to_owned(),
        format!("--audit-policy-file={}", policy.display()),
        format!("--audit-log-path={}", dir.join("audit.log").display()),
        "--profiling=false".to_owned(),
    ])
    .args(&setup.api_server))
}

/// Who called what: everything is logged once. Pods with both bodies, because only then the patches of webhooks are
/// in the log; what holds secrets without.
const AUDIT_POLICY: &str = r#"
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived, ResponseStarted]
omitManagedFields: true
rules:
  - level: RequestResponse
    verbs: [create]
    resources: [{group: "", resources: [pods]}]
  - level: Metadata
"#;

fn controllers(
    programs: &Programs,
    janitor: &Janitor,
    dir: &Path,
    authority: &Files,
    token_key: &Files,
    setup: &Setup,
) -> Process {
    Process::new(
        "kube-controller-manager",
        programs.path("kube-controller-manager"),
        dir,
        janitor,
    )
    .args([
        format!(
            "--kubeconfig={}",
            dir.join("controllers.kubeconfig").display()
        ),
        "--leader-elect=false".to_owned(),
        "--use-service-account-credentials=true".to_owned(),
        format!(
            "--service-account-private-key-file={}",
            token_key.key.display()
        ),
        format!("--root-ca-file={}", authority.certificate.display()),
        format!(
            "--cluster-signing-cert-file={}",
            authority.certificate.display()
        ),
        format!("--cluster-signing-key-file={}", authority.key.display()),
        // With the default of 20 a second it needs 4 s before the first namespace has its ServiceAccount.
        "--kube-api-qps=1000".to_owned(),
        "--kube-api-burst=2000".to_owned(),
        "--secure-port=0".to_owned(),
        "--profiling=false".to_owned(),
    ])
    .args(&setup.controllers)
}
