//! What the pod's environment says, as settings.
//!
//! lookup (name -> text) -> [`Settings`], or an error that names the variable, its value and what is allowed
//!
//! The injector writes most of these variables (`src/inject/sidecar.rs`); those that say where things stand in the
//! container have defaults that fit the image.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;

use super::{identity, probes::Probes};
use crate::identity::{SpiffeId, TrustDomain};

/// The sidecar's own ports: redirection leaves them alone, and an application cannot have them.
pub const OUTBOUND_PORT: u16 = 15001;
/// Where redirected inbound traffic arrives.
pub const INBOUND_PORT: u16 = 15006;

/// Everything `malha-agent run` is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The pod's own name.
    pub pod: String,
    /// Its namespace.
    pub namespace: String,
    /// Who it is: its service account in its namespace and the mesh's trust domain.
    pub id: SpiffeId,
    /// Its addresses, the primary one first.
    pub pod_ips: Vec<IpAddr>,
    /// The node it runs on; empty where nobody said.
    pub node: String,
    /// The cluster, as certificates requests name it.
    pub cluster: String,
    /// The network that the pod is in; empty for the only one.
    pub network: String,
    /// The control plane's revision.
    pub revision: String,
    /// The workload that the pod belongs to, such as a Deployment's name.
    pub workload: String,
    /// Where certificates and configuration come from.
    pub control_plane: ControlPlane,
    /// Whole cores that the container may use, as the kubelet rounds them up; the node's where there is no limit.
    pub cpu_limit: Option<u32>,
    /// Names of the application's containers.
    pub app_containers: Vec<String>,
    /// TCP ports on which the application says it listens.
    pub app_ports: Vec<u16>,
    /// Handlers of the kubelet's that the agent repeats.
    pub probes: Probes,
    /// Where the application's own metrics are; `None` if nobody asked for them to be merged.
    pub app_metrics: Option<AppMetrics>,
    /// What is logged.
    pub log: LogLevels,
    /// Envoy's program.
    pub envoy: PathBuf,
    /// Sockets and bootstrap, in memory.
    pub directory: PathBuf,
    /// The token that proves to the authority who the pod is.
    pub token: PathBuf,
    /// Roots that the control plane's certificate must come from.
    pub roots: PathBuf,
    /// Probes and merged metrics.
    pub agent_port: u16,
    /// Readiness.
    pub status_port: u16,
    /// Envoy's own metrics.
    pub envoy_metrics_port: u16,
    /// The longest time between two certificates; none: about half of a certificate's life.
    pub renew_every: Option<Duration>,
    /// How long open connections may take to end after SIGTERM.
    pub termination_drain: Duration,
}

/// Where the control plane is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlPlane {
    /// The name, which its certificate must carry, or an address.
    pub host: Host,
    /// The port.
    pub port: u16,
}

/// A host as one writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// A DNS name.
    Name(String),
    /// An address.
    Ip(IpAddr),
}

/// The application's own metrics endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppMetrics {
    /// Its port on the pod.
    pub port: u16,
    /// Path and query.
    pub path: String,
    /// Whether it speaks TLS.
    pub https: bool,
}

/// Levels of `MALHA_LOG`: `trace debug info warning error critical off`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLevels {
    /// The agent's.
    pub agent: Level,
    /// Envoy's.
    pub envoy: Level,
    /// Of single components of Envoy: `upstream:debug,config:trace`; empty for none.
    pub components: String,
}

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Everything.
    Trace,
    /// For who looks for a fault.
    Debug,
    /// What happens.
    Info,
    /// What may go wrong.
    Warning,
    /// What went wrong.
    Error,
    /// What ends the process.
    Critical,
    /// Nothing.
    Off,
}

/// A variable that cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SettingsError {
    /// Nobody set it.
    #[error("{name} is not set; {allowed}")]
    Missing {
        /// The variable.
        name: &'static str,
        /// What it should hold.
        allowed: &'static str,
    },
    /// It holds something else than it should.
    #[error("{name} is {value:?}; {allowed}")]
    Invalid {
        /// The variable.
        name: &'static str,
        /// What it holds, cut at 64 characters.
        value: String,
        /// What it should hold.
        allowed: &'static str,
    },
}

/// Longest value that an error repeats.
const SHOWN: usize = 64;

impl Settings {
    /// Reads the settings from a lookup.
    ///
    /// # Errors
    /// The first variable that is missing or cannot be read.
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, SettingsError> {
        let from = Source { lookup: &lookup };
        let agent_port = from.or("MALHA_AGENT_PORT", 15020, A_PORT, port)?;
        let status_port = from.or("MALHA_STATUS_PORT", 15021, A_PORT, port)?;
        let envoy_metrics_port = from.or("MALHA_ENVOY_METRICS_PORT", 15090, A_PORT, port)?;
        let ours = [
            OUTBOUND_PORT,
            INBOUND_PORT,
            agent_port,
            status_port,
            envoy_metrics_port,
        ];
        let namespace = from.text(
            "POD_NAMESPACE",
            "the pod's namespace, by fieldRef metadata.namespace",
        )?;
        let mesh = from.or_text("MALHA_TRUST_DOMAIN", "cluster.local");
        let mesh: TrustDomain = mesh.parse().map_err(|_| {
            invalid(
                "MALHA_TRUST_DOMAIN",
                &mesh,
                "a trust domain, as in cluster.local",
            )
        })?;
        let id = from.must(
            "SERVICE_ACCOUNT",
            "the pod's service account, by fieldRef spec.serviceAccountName",
            |account| SpiffeId::new(&mesh, &namespace, account).ok(),
        )?;
        Ok(Self {
            pod: from.text("POD_NAME", "the pod's name, by fieldRef metadata.name")?,
            namespace,
            id,
            pod_ips: from.must(
                "POD_IPS",
                "one address or more with commas between, by fieldRef status.podIPs",
                addresses,
            )?,
            node: from.optional("NODE_NAME"),
            cluster: from.or_text("MALHA_CLUSTER", "Kubernetes"),
            network: from.optional("MALHA_NETWORK"),
            revision: from.or_text("MALHA_REVISION", "default"),
            workload: from.optional("MALHA_WORKLOAD"),
            control_plane: from.must(
                "MALHA_CONTROL_PLANE",
                "host:port, as in malha.malha-system.svc:15012",
                control_plane,
            )?,
            cpu_limit: from.or("CPU_LIMIT", None, "a number of cores", |text| {
                text.parse().ok().map(Some)
            })?,
            app_containers: from.or(
                "MALHA_APP_CONTAINERS",
                Vec::new(),
                "a JSON list of names",
                json,
            )?,
            app_ports: from.or(
                "MALHA_PORTS",
                Vec::new(),
                "a JSON list of {\"containerPort\", \"name\", \"protocol\"}",
                tcp_ports,
            )?,
            probes: from.or(
                "MALHA_PROBES",
                Probes::default(),
                "a JSON object of handlers by the path at which the agent serves them",
                json,
            )?,
            app_metrics: from.or(
                "MALHA_PROMETHEUS",
                None,
                "null, or a JSON object of the strings scrape, scheme (http, https), port (1 to 65535, none of the sidecar's) and path",
                |text| app_metrics(text, &ours),
            )?,
            log: from.or(
                "MALHA_LOG",
                LogLevels::default(),
                "a JSON object of the levels agent and envoy (trace debug info warning error critical off) and of components (component:level, with commas between)",
                |text| json::<LogWire>(text).and_then(LogLevels::new),
            )?,
            envoy: from.path("MALHA_ENVOY", "envoy"),
            directory: from.path("MALHA_RUN_DIR", "/run/malha"),
            token: from.path(
                "MALHA_TOKEN",
                "/var/run/secrets/kubernetes.io/serviceaccount/token",
            ),
            roots: from.path("MALHA_ROOTS", "/etc/malha/ca/root-cert.pem"),
            agent_port,
            status_port,
            envoy_metrics_port,
            renew_every: from.or("MALHA_RENEW_EVERY", None, A_DURATION, |text| {
                duration(text).map(Some)
            })?,
            termination_drain: from.or(
                "MALHA_TERMINATION_DRAIN",
                Duration::from_secs(25),
                A_DURATION,
                duration,
            )?,
        })
    }

    /// Says once what is in effect. Nothing secret is among it: of probes, whose headers may hold a password, only
    /// the paths are told.
    pub fn log(&self) {
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            node = self.node_id(),
            id = %self.id,
            pod_ips = ?self.pod_ips,
            cluster = self.cluster,
            network = self.network,
            revision = self.revision,
            workload = self.workload,
            control_plane = %self.control_plane,
            cpu_limit = ?self.cpu_limit,
            app_containers = ?self.app_containers,
            app_ports = ?self.app_ports,
            probes = ?self.probes,
            app_metrics = ?self.app_metrics,
            log_agent = %self.log.agent,
            log_envoy = %self.log.envoy,
            log_components = self.log.components,
            envoy = %self.envoy.display(),
            directory = %self.directory.display(),
            token = %self.token.display(),
            roots = %self.roots.display(),
            ports = ?[self.agent_port, self.status_port, self.envoy_metrics_port],
            termination_drain = ?self.termination_drain,
            "settings in effect"
        );
    }

    /// `<pod>.<namespace>`: what the control plane knows the proxy by.
    pub fn node_id(&self) -> String {
        format!("{}.{}", self.pod, self.namespace)
    }

    /// Ports that are the sidecar's and never the application's.
    pub fn own_ports(&self) -> [u16; 5] {
        [
            OUTBOUND_PORT,
            INBOUND_PORT,
            self.agent_port,
            self.status_port,
            self.envoy_metrics_port,
        ]
    }

    /// The address at which the kubelet and Prometheus reach the pod.
    pub fn primary_ip(&self) -> IpAddr {
        *self
            .pod_ips
            .first()
            .expect("POD_IPS with no address is refused when it is read")
    }

    /// Whether anybody reaches the pod over IPv6.
    pub fn has_ipv6(&self) -> bool {
        self.pod_ips.iter().any(IpAddr::is_ipv6)
    }

    /// Whether anybody reaches the pod over IPv4.
    pub fn has_ipv4(&self) -> bool {
        self.pod_ips.iter().any(IpAddr::is_ipv4)
    }

    /// Where a listener of the agent's stands for a port: on every address of the pod's families.
    pub fn listen_on(&self, port: u16) -> SocketAddr {
        match self.has_ipv6() {
            true => SocketAddr::new(IpAddr::from([0_u16; 8]), port),
            false => SocketAddr::new(IpAddr::from([0_u8; 4]), port),
        }
    }

    /// A file of the agent's own directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Envoy's admin socket.
    pub fn admin_socket(&self) -> PathBuf {
        self.file("admin.sock")
    }

    /// The socket at which the agent hands secrets to Envoy.
    pub fn sds_socket(&self) -> PathBuf {
        self.file("sds.sock")
    }

    /// Where Envoy's bootstrap is written.
    pub fn bootstrap_file(&self) -> PathBuf {
        self.file("bootstrap.json")
    }
}

/// The directory that `dump` finds Envoy in, and the port that `wait` asks, from the same lookup.
pub fn directory(lookup: impl Fn(&str) -> Option<String>) -> PathBuf {
    Source { lookup: &lookup }.path("MALHA_RUN_DIR", "/run/malha")
}

/// The port of readiness.
///
/// # Errors
/// Where the variable holds no port.
pub fn status_port(lookup: impl Fn(&str) -> Option<String>) -> Result<u16, SettingsError> {
    Source { lookup: &lookup }.or("MALHA_STATUS_PORT", 15021, A_PORT, port)
}

const A_PORT: &str = "a port from 1 to 65535";
const A_DURATION: &str = "a duration such as 25s, 500ms or 2m";

struct Source<'a, F> {
    lookup: &'a F,
}

impl<F: Fn(&str) -> Option<String>> Source<'_, F> {
    /// The value, if it is there and not empty.
    fn value(&self, name: &'static str) -> Option<String> {
        (self.lookup)(name).filter(|text| !text.is_empty())
    }

    fn optional(&self, name: &'static str) -> String {
        self.value(name).unwrap_or_default()
    }

    fn or_text(&self, name: &'static str, default: &str) -> String {
        self.value(name).unwrap_or_else(|| default.to_owned())
    }

    fn path(&self, name: &'static str, default: &str) -> PathBuf {
        self.value(name)
            .map_or_else(|| Path::new(default).to_owned(), PathBuf::from)
    }

    fn text(&self, name: &'static str, allowed: &'static str) -> Result<String, SettingsError> {
        self.must(name, allowed, |text| Some(text.to_owned()))
    }

    fn must<T>(
        &self,
        name: &'static str,
        allowed: &'static str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, SettingsError> {
        match self.value(name) {
            Some(text) => read(&text).ok_or_else(|| invalid(name, &text, allowed)),
            None => Err(SettingsError::Missing { name, allowed }),
        }
    }

    fn or<T>(
        &self,
        name: &'static str,
        default: T,
        allowed: &'static str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, SettingsError> {
        match self.value(name) {
            Some(text) => read(&text).ok_or_else(|| invalid(name, &text, allowed)),
            None => Ok(default),
        }
    }
}

fn invalid(name: &'static str, value: &str, allowed: &'static str) -> SettingsError {
    SettingsError::Invalid {
        name,
        value: value.chars().take(SHOWN).collect(),
        allowed,
    }
}

fn json<T: for<'de> Deserialize<'de>>(text: &str) -> Option<T> {
    serde_json::from_str(text).ok()
}

/// One that a certificate can be checked against.
fn control_plane(text: &str) -> Option<ControlPlane> {
    text.parse::<identity::ControlPlane>().ok()?;
    text.parse().ok()
}

fn port(text: &str) -> Option<u16> {
    text.parse().ok().filter(|port| *port != 0)
}

fn addresses(text: &str) -> Option<Vec<IpAddr>> {
    text.split(',').map(|ip| ip.trim().parse().ok()).collect()
}

/// `500ms`, `25s`, `2m`, `1h`.
pub fn duration(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let number: u64 = digits.parse().ok()?;
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_secs(number.checked_mul(60)?)),
        "h" => Some(Duration::from_secs(number.checked_mul(3600)?)),
        _ => None,
    }
}

fn tcp_ports(text: &str) -> Option<Vec<u16>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct AppPort {
        container_port: u16,
        protocol: Option<String>,
    }
    let ports: Vec<AppPort> = json(text)?;
    let tcp = ports
        .into_iter()
        .filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP");
    Some(tcp.map(|port| port.container_port).collect())
}

/// The author's annotations; only who asked for a scrape is scraped.
fn app_metrics(text: &str, ours: &[u16]) -> Option<Option<AppMetrics>> {
    let Some(wishes) = json::<Option<BTreeMap<String, String>>>(text)? else {
        return Some(None);
    };
    if wishes.get("scrape").map(String::as_str) != Some("true") {
        return Some(None);
    }
    let https = match wishes.get("scheme").map(String::as_str) {
        None | Some("http" | "") => false,
        Some("https") => true,
        Some(_) => return None,
    };
    let number = wishes
        .get("port")
        .map_or(Some(80), |text| port(text))
        .filter(|port| !ours.contains(port))?;
    let path = wishes.get("path").map_or("/metrics", String::as_str);
    let path = match path.strip_prefix('/') {
        Some(_) => path.to_owned(),
        None => format!("/{path}"),
    };
    Some(Some(AppMetrics {
        port: number,
        path,
        https,
    }))
}

#[derive(Deserialize)]
struct LogWire {
    agent: Option<Level>,
    envoy: Option<Level>,
    components: Option<String>,
}

impl LogLevels {
    fn new(wire: LogWire) -> Option<Self> {
        let default = Self::default();
        let components = wire.components.unwrap_or_default();
        let readable = components.is_empty()
            || components.split(',').all(|one| {
                one.split_once(':').is_some_and(|(component, level)| {
                    !component.is_empty() && json::<Level>(&format!("{level:?}")).is_some()
                })
            });
        readable.then_some(Self {
            agent: wire.agent.unwrap_or(default.agent),
            envoy: wire.envoy.unwrap_or(default.envoy),
            components,
        })
    }
}

impl Default for LogLevels {
    fn default() -> Self {
        Self {
            agent: Level::Info,
            envoy: Level::Warning,
            components: String::new(),
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Trace => "trace",
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
            Self::Critical => "critical",
            Self::Off => "off",
        })
    }
}

impl std::str::FromStr for ControlPlane {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (host, digits) = text.rsplit_once(':').ok_or(())?;
        let port = port(digits).ok_or(())?;
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        let host = match bare.parse() {
            Ok(ip) => Host::Ip(ip),
            Err(_) if is_name(host) => Host::Name(host.to_owned()),
            Err(_) => return Err(()),
        };
        Ok(Self { host, port })
    }
}

impl fmt::Display for ControlPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]:{}", self.port),
            Host::Ip(ip) => write!(f, "{ip}:{}", self.port),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

fn is_name(host: &str) -> bool {
    !host.is_empty()
        && host.len() <= 253
        && host
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the injector writes for a plain pod.
    fn pod(changes: &[(&str, &str)]) -> Result<Settings, SettingsError> {
        let mut variables: BTreeMap<&str, &str> = BTreeMap::from([
            ("CPU_LIMIT", "2"),
            ("HOST_IP", "10.1.0.1"),
            ("MALHA_APP_CONTAINERS", r#"["user-service"]"#),
            ("MALHA_CLUSTER", "Kubernetes"),
            ("MALHA_CONTROL_PLANE", "malha.malha-system.svc:15012"),
            ("MALHA_LOG", r#"{"agent":"info","envoy":"warning"}"#),
            ("MALHA_NETWORK", ""),
            ("MALHA_OWNER", "apps/v1/Deployment/user-service"),
            (
                "MALHA_PORTS",
                r#"[{"containerPort":8080,"name":"http","protocol":"TCP"},{"containerPort":53,"protocol":"UDP"}]"#,
            ),
            (
                "MALHA_PROBES",
                r#"{"/app-health/user-service/livez":{"httpGet":{"path":"/health","port":8080},"named":"http"}}"#,
            ),
            ("MALHA_PROMETHEUS", r#"{"port":"8080","scrape":"true"}"#),
            ("MALHA_RESTORE", "{}"),
            ("MALHA_REVISION", "default"),
            ("MALHA_TRUST_DOMAIN", "cluster.local"),
            ("MALHA_WORKLOAD", "user-service"),
            ("NODE_NAME", "node-1"),
            ("POD_IPS", "10.244.0.7,fd00::7"),
            ("POD_NAME", "user-service-5c7-x1"),
            ("POD_NAMESPACE", "shop"),
            ("SERVICE_ACCOUNT", "user"),
        ]);
        variables.extend(changes.iter().copied());
        Settings::read(|name| variables.get(name).map(|text| (*text).to_owned()))
    }

    #[test]
    fn what_the_injector_writes_is_read() {
        let settings = pod(&[]).expect("the injector's own words");
        assert_eq!(settings.node_id(), "user-service-5c7-x1.shop");
        assert_eq!(settings.primary_ip().to_string(), "10.244.0.7");
        assert!(settings.has_ipv6() && settings.has_ipv4());
        assert_eq!(settings.listen_on(15020).to_string(), "[::]:15020");
        assert_eq!(settings.app_ports, [8080]);
        assert_eq!(settings.cpu_limit, Some(2));
        assert_eq!(
            settings.control_plane.to_string(),
            "malha.malha-system.svc:15012"
        );
        assert_eq!(
            settings.app_metrics,
            Some(AppMetrics {
                port: 8080,
                path: "/metrics".to_owned(),
                https: false
            })
        );
        assert_eq!(settings.termination_drain, Duration::from_secs(25));
    }

    #[test]
    fn an_error_names_the_variable_its_value_and_what_is_allowed() {
        let cases: &[(&str, &str, &str)] = &[
            (
                "POD_NAME",
                "",
                "POD_NAME is not set; the pod's name, by fieldRef metadata.name",
            ),
            (
                "POD_IPS",
                "10.0.0.300",
                "POD_IPS is \"10.0.0.300\"; one address or more with commas between, by fieldRef status.podIPs",
            ),
            (
                "MALHA_CONTROL_PLANE",
                "malha",
                "MALHA_CONTROL_PLANE is \"malha\"; host:port, as in malha.malha-system.svc:15012",
            ),
            (
                "MALHA_STATUS_PORT",
                "0",
                "MALHA_STATUS_PORT is \"0\"; a port from 1 to 65535",
            ),
            (
                "MALHA_TERMINATION_DRAIN",
                "25",
                "MALHA_TERMINATION_DRAIN is \"25\"; a duration such as 25s, 500ms or 2m",
            ),
        ];
        for (name, value, want) in cases {
            let error = pod(&[(name, value)]).expect_err(name);
            assert_eq!(&error.to_string(), want);
        }
        for (name, value) in [
            ("MALHA_PROBES", "[]"),
            ("MALHA_LOG", r#"{"agent":"loud"}"#),
            ("MALHA_LOG", r#"{"components":"upstream"}"#),
            ("MALHA_PORTS", "8080"),
            ("MALHA_PROMETHEUS", r#"{"port":"15020","scrape":"true"}"#),
            ("MALHA_PROMETHEUS", r#"{"scheme":"ftp","scrape":"true"}"#),
            ("CPU_LIMIT", "many"),
        ] {
            let error = pod(&[(name, value)]).expect_err(name).to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }

    #[test]
    fn only_who_asked_for_a_scrape_is_scraped() {
        for text in ["null", "{}", r#"{"port":"80"}"#, r#"{"scrape":"false"}"#] {
            let settings = pod(&[("MALHA_PROMETHEUS", text)]).expect(text);
            assert_eq!(settings.app_metrics, None, "{text}");
        }
        let text = r#"{"path":"stats?x=1","scheme":"https","scrape":"true"}"#;
        let settings = pod(&[("MALHA_PROMETHEUS", text)]).expect(text);
        let want = AppMetrics {
            port: 80,
            path: "/stats?x=1".to_owned(),
            https: true,
        };
        assert_eq!(settings.app_metrics, Some(want));
    }

    #[test]
    fn a_control_plane_is_a_name_or_an_address() {
        for (text, want) in [
            (
                "malha.malha-system.svc:15012",
                Some(Host::Name("malha.malha-system.svc".to_owned())),
            ),
            ("127.0.0.1:1", Some(Host::Ip([127, 0, 0, 1].into()))),
            (
                "[::1]:1",
                Some(Host::Ip(IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1_u16]))),
            ),
            ("https://malha:1", None),
            (":1", None),
            ("malha:65536", None),
        ] {
            let read = text.parse::<ControlPlane>().ok();
            assert_eq!(read.as_ref().map(|it| &it.host), want.as_ref(), "{text}");
            if let Some(read) = read {
                assert_eq!(read.to_string(), text);
            }
        }
    }
}
