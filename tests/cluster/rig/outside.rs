//! The real `malha serve`, outside the cluster but reached by the API server as if it ran inside.
//!
//! `manifests/base` is applied as it stands. The Deployment's own pods stay Pending, for want of a node, so its
//! processes are started here with what the pods would have had: the ServiceAccount's token, and so its rights. An
//! EndpointSlice a replica, written by hand, brings the API server's calls to the Service `malha` to this machine.
//! Endpoints may not be loopback addresses; a machine that has no other cannot run these tests, and they say so.

use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, Patch, PatchParams};
use nix::ifaddrs::getifaddrs;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::OnceCell;

use super::grants::Grants;
use super::process::Process;
use super::{Cluster, free_ports, skip};

/// The control plane's namespace and the name of its Service and ServiceAccount, as `manifests/base` has them.
pub(crate) const NAMESPACE: &str = "malha-system";
/// See [`NAMESPACE`].
pub(crate) const NAME: &str = "malha";

/// How long a control plane may take until it is ready, on busy cores.
const PATIENCE: Duration = Duration::from_secs(60);

/// Two replicas in the cluster that the tests of this binary share. `None` as [`super::shared`], and on a machine
/// without an address that an EndpointSlice may hold.
pub(crate) async fn shared() -> Option<Shared> {
    static SHARED: OnceCell<Result<ControlPlane, String>> = OnceCell::const_new();
    let cluster = super::shared().await?;
    let address = host_address_or_skip()?;
    let started = SHARED
        .get_or_init(|| async {
            ControlPlane::install_at(cluster, address, 2)
                .await
                .map_err(|error| format!("{error:#}"))
        })
        .await;
    match started {
        Ok(control_plane) => Some(Shared(control_plane)),
        Err(error) => panic!("the shared control plane did not start: {error}"),
    }
}

/// The shared control plane, for as long as one test uses it.
pub(crate) struct Shared(&'static ControlPlane);

impl Deref for Shared {
    type Target = ControlPlane;

    fn deref(&self) -> &ControlPlane {
        self.0
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.0.assert_every_call_was_granted();
    }
}

/// `malha serve`, several times, and what the API server needs to call it.
///
/// When it is dropped (the shared one: when each test that used it ends), every call that it made is compared with
/// what `manifests/base` grants, and the test fails where one is not covered. So the whole suite is the proof that
/// the grants are enough and that nothing is called beside them.
pub(crate) struct ControlPlane {
    replicas: Vec<Replica>,
    grants: Grants,
}

impl ControlPlane {
    /// Applies `manifests/base` and starts replicas of the caller's own; ready when this returns.
    pub(crate) async fn install(cluster: &Cluster, replicas: usize) -> Option<Self> {
        let address = host_address_or_skip()?;
        match Self::install_at(cluster, address, replicas).await {
            Ok(control_plane) => Some(control_plane),
            Err(error) => panic!("the control plane did not start: {error:#}"),
        }
    }

    async fn install_at(cluster: &Cluster, address: IpAddr, replicas: usize) -> Result<Self> {
        apply_base(cluster).await;
        let grants = Grants::of(cluster, NAMESPACE).await?;
        let replicas = (0..replicas).map(|_| Replica::new(cluster, address));
        let replicas = futures::future::try_join_all(replicas).await?;
        let plane = Self { replicas, grants };
        for replica in &plane.replicas {
            replica.process.start()?;
        }
        for replica in &plane.replicas {
            if let Err(not_ready) = replica.until_ready().await {
                // The usual reason, and one that the replica itself can only guess.
                let surplus = plane.grants.surplus_calls();
                bail!("{not_ready:#}\ncalls that manifests/base does not grant: {surplus:#?}");
            }
            replica.publish(cluster, true).await;
        }
        Ok(plane)
    }

    fn assert_every_call_was_granted(&self) {
        if std::thread::panicking() {
            return; // the first failure says more
        }
        let surplus = self.grants.surplus_calls();
        assert!(
            surplus.is_empty(),
            "the control plane made calls that manifests/base does not grant:\n{}",
            surplus.join("\n")
        );
    }

    /// The operator's overrides of what is injected, as the replicas have them.
    pub(crate) fn injector_config(&self) -> PathBuf {
        let replica = self.replicas.first().expect("a control plane has replicas");
        replica.config.with_file_name("injector.yaml")
    }

    /// The replicas, in the order in which they were started.
    pub(crate) fn replicas(&self) -> &[Replica] {
        &self.replicas
    }

    /// The replica that holds the Lease.
    pub(crate) async fn leader(&self, cluster: &Cluster) -> Option<&Replica> {
        let leases: Api<Lease> = Api::namespaced(cluster.client().await, NAMESPACE);
        let lease = leases
            .get_opt("malha-leader")
            .await
            .expect("the API server answers")?;
        let holder = lease.spec?.holder_identity?;
        self.replicas
            .iter()
            .find(|replica| holder.contains(replica.process.name()))
    }

    /// Keeps each EndpointSlice as the kubelet's probes and the endpoint controller would: ready while `/readyz` is.
    /// Never ends by itself.
    pub(crate) async fn follow_readiness(&self, cluster: &Cluster) {
        let mut published = vec![None; self.replicas.len()];
        loop {
            for (replica, published) in self.replicas.iter().zip(&mut published) {
                let ready = replica.readyz().await.is_ok();
                if *published != Some(ready) {
                    replica.publish(cluster, ready).await;
                    *published = Some(ready);
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.assert_every_call_was_granted();
    }
}

/// Applies `manifests/base` with kubectl, as an operator does.
pub(crate) async fn apply_base(cluster: &Cluster) {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests/base");
    let base = base.to_str().expect("the tree's path is UTF-8");
    let output = cluster.kubectl(["apply", "-k", base], None).await;
    assert!(
        output.status.success(),
        "kubectl apply -k manifests/base: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// One `malha serve`.
pub(crate) struct Replica {
    process: Process,
    /// Where the API server reaches its webhook.
    pub(crate) webhook: SocketAddr,
    /// Where it signs.
    pub(crate) ca: SocketAddr,
    /// Where it tells its health, on loopback.
    pub(crate) admin: SocketAddr,
    slice: String,
    config: PathBuf,
}

impl Replica {
    /// A replica that is not started yet, with the rights of the control plane's ServiceAccount and no others.
    pub(crate) async fn new(cluster: &Cluster, address: IpAddr) -> Result<Self> {
        let kubeconfig = cluster.service_account(NAMESPACE, NAME).await;
        let name = format!("{NAME}-outside-{}", cluster.next());
        let [webhook, ca, admin] = free_ports()?;
        let config = mounted_config(cluster, &name).await?;
        let wildcard = match address {
            IpAddr::V4(_) => "0.0.0.0",
            IpAddr::V6(_) => "[::]",
        };
        let process = Process::new(
            &name,
            Path::new(env!("CARGO_BIN_EXE_malha")),
            cluster.dir(),
            cluster.janitor(),
        )
        .args([
            "serve".to_owned(),
            format!("--config={}", config.display()),
            format!("--webhook-addr={wildcard}:{webhook}"),
            format!("--ca-addr={wildcard}:{ca}"),
            format!("--admin-addr=127.0.0.1:{admin}"),
            "--query-addr=127.0.0.1:0".to_owned(),
        ])
        .env("KUBECONFIG", kubeconfig)
        .env("POD_NAME", &name)
        .env("POD_NAMESPACE", NAMESPACE);
        Ok(Self {
            process,
            webhook: SocketAddr::new(address, webhook),
            ca: SocketAddr::new(address, ca),
            admin: SocketAddr::from(([127, 0, 0, 1], admin)),
            slice: name,
            config,
        })
    }

    /// The process, to stop, freeze, kill and start it again.
    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    /// Waits until it says that it is ready.
    pub(crate) async fn ready(&self) {
        if let Err(not_ready) = self.until_ready().await {
            panic!("{not_ready:#}");
        }
    }

    async fn until_ready(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while let Err(not_yet) = self.readyz().await {
            self.process.check()?;
            let name = self.process.name();
            if Instant::now() > deadline {
                let log = self.process.tail(20);
                bail!(
                    "{name} is not ready after {PATIENCE:?}: {not_yet}; the end of its log:\n{log}"
                );
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        Ok(())
    }

    /// Asks `/readyz` once; the error is what it says instead of yes.
    pub(crate) async fn readyz(&self) -> Result<(), String> {
        match get(self.admin, "/readyz").await {
            Ok((200, _)) => Ok(()),
            Ok((status, body)) => Err(format!("/readyz: {status} {}", body.trim())),
            Err(error) => Err(format!("/readyz: {error}")),
        }
    }

    /// The sum of a counter's samples whose labels hold this text.
    pub(crate) async fn counted(&self, counter: &str, label: &str) -> f64 {
        let (status, body) = get(self.admin, "/metrics")
            .await
            .expect("the admin port answers");
        assert_eq!(status, 200, "{body}");
        let samples = body
            .lines()
            .filter(|line| line.starts_with(counter) && line.contains(label));
        samples
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
            .sum()
    }

    /// Says in its EndpointSlice whether the API server may call it.
    pub(crate) async fn publish(&self, cluster: &Cluster, ready: bool) {
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": self.slice,
                "labels": { "kubernetes.io/service-name": NAME },
            },
            "addressType": if self.webhook.is_ipv4() { "IPv4" } else { "IPv6" },
            "endpoints": [{
                "addresses": [self.webhook.ip()],
                "conditions": { "ready": ready, "serving": ready, "terminating": false },
            }],
            "ports": self.ports(cluster).await,
        });
        let slices: Api<EndpointSlice> = Api::namespaced(cluster.client().await, NAMESPACE);
        slices
            .patch(
                &self.slice,
                &PatchParams::apply("test-endpoints").force(),
                &Patch::Apply(slice),
            )
            .await
            .expect("an EndpointSlice for a replica");
    }

    /// The Service's ports by name, each with the number on which this replica listens instead.
    async fn ports(&self, cluster: &Cluster) -> serde_json::Value {
        let services: Api<Service> = Api::namespaced(cluster.client().await, NAMESPACE);
        let service = services
            .get(NAME)
            .await
            .expect("manifests/base has the Service");
        let ports = service.spec.and_then(|spec| spec.ports).unwrap_or_default();
        let listening = |port: i32| match port {
            443 => Some(self.webhook.port()),
            15012 => Some(self.ca.port()),
            15014 => Some(self.admin.port()),
            _ => None,
        };
        ports
            .iter()
            .filter_map(|port| Some(json!({ "name": port.name, "port": listening(port.port)? })))
            .collect()
    }
}

/// An address of this machine that an EndpointSlice may hold: not loopback and not link-local.
pub(crate) fn host_address() -> Option<IpAddr> {
    let addresses = getifaddrs().ok()?.filter_map(|interface| {
        let address = interface.address?;
        if let Some(v4) = address.as_sockaddr_in() {
            return Some(IpAddr::V4(v4.ip()));
        }
        address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip()))
    });
    let mut usable: Vec<_> = addresses.filter(usable_as_endpoint).collect();
    usable.sort_by_key(IpAddr::is_ipv6);
    usable.first().copied()
}

fn host_address_or_skip() -> Option<IpAddr> {
    let address = host_address();
    if address.is_none() {
        let why = "this machine has only loopback and link-local addresses, and Kubernetes allows neither in an \
                   EndpointSlice; give it one (ip link add malha0 type dummy; ip addr add 192.0.2.1/32 dev malha0)";
        assert!(!super::in_ci(), "{why}");
        skip(&why);
    }
    address
}

fn usable_as_endpoint(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local() && !v6.is_unspecified(),
    }
}

/// The ConfigMap of `manifests/base` as files, as the kubelet mounts it at `/etc/malha`; the path of its settings.
async fn mounted_config(cluster: &Cluster, replica: &str) -> Result<PathBuf> {
    let config_maps: Api<ConfigMap> = Api::namespaced(cluster.client().await, NAMESPACE);
    let config = config_maps.get("malha-config").await?;
    let dir = cluster.dir().join(format!("{replica}.config"));
    std::fs::create_dir(&dir)?;
    for (file, text) in config.data.unwrap_or_default() {
        let text = text.replace(
            "/etc/malha",
            dir.to_str().context("the directory's path is UTF-8")?,
        );
        std::fs::write(dir.join(file), text)?;
    }
    Ok(dir.join("malha.yaml"))
}

/// One plain HTTP/1.1 GET: status and body.
async fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let exchange = async {
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut response = String::new();
        stream.read_to_string(&mut response).await?;
        let (head, body) = response
            .split_once("\r\n\r\n")
            .context("no end of the header")?;
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        Ok((status, body.to_owned()))
    };
    tokio::time::timeout(Duration::from_secs(2), exchange)
        .await
        .context("no answer in 2 s")?
}
