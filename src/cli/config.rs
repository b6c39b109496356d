//! `malha config`: what a proxy's Envoy holds beside what the control plane sent it.
//!
//! `malha-agent dump` in the pod + `GET /v1/config/NAMESPACE/POD` -> [`compare`] -> [`Pair`]s -> rows
//!
//! A version is a hash of the content, so two equal versions are equal resources. Envoy tells no version of its
//! endpoints: those are compared by address. Keys are printed by nobody: the agent names secrets only, and what looks
//! like a key is blotted out here once more.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use anyhow::{Context as _, anyhow};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Exit, Failure, Terminal,
    cluster::{self, ControlPlane, ControlPlaneArgs, PodName, Said, parse_pod},
    documents,
    exit::OrExit as _,
    terminal::{table, whole},
};

/// Show what a proxy's Envoy holds beside what the control plane sent, and mark the differences.
///
/// Runs `malha-agent dump` in the pod's sidecar (the right to exec is the operator's own) and asks the control plane by
/// port-forward. Secrets are named, never shown.
///
/// Exit codes: 0; 1 where the two differ; 65 where there is no such pod or no sidecar in it; 69 where the cluster, the
/// pod or the control plane does not answer.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The pod.
    #[arg(value_parser = parse_pod)]
    pod: String,
    /// What to show.
    #[arg(value_enum, default_value_t = Section::All)]
    section: Section,
    /// The pod's namespace; without it the kubeconfig's.
    #[arg(short, long, value_name = "NAME")]
    namespace: Option<String>,
    #[command(flatten)]
    control_plane: ControlPlaneArgs,
    /// How the result is written.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Section {
    /// Where Envoy listens.
    Listeners,
    /// Which host and path goes where.
    Routes,
    /// Whom Envoy calls.
    Clusters,
    /// At which addresses.
    Endpoints,
    /// Names of certificates and bundles.
    Secrets,
    /// All of them.
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// One row a resource.
    Table,
    /// One object, the resources included.
    Json,
    /// The same as YAML.
    Yaml,
}

/// Kinds of resources, in the order in which they are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Listener,
    Route,
    Cluster,
    Endpoints,
    Secret,
}

impl Kind {
    const ALL: [Self; 5] = [
        Self::Listener,
        Self::Route,
        Self::Cluster,
        Self::Endpoints,
        Self::Secret,
    ];

    fn word(self) -> &'static str {
        match self {
            Self::Listener => "listener",
            Self::Route => "route",
            Self::Cluster => "cluster",
            Self::Endpoints => "endpoints",
            Self::Secret => "secret",
        }
    }

    /// The list of a dump that holds them.
    fn list(self) -> &'static str {
        match self {
            Self::Listener => "listeners",
            Self::Route => "routes",
            Self::Cluster => "clusters",
            Self::Endpoints => "endpoints",
            Self::Secret => "secrets",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.word() == word)
    }

    fn is_in(self, section: Section) -> bool {
        match section {
            Section::All => true,
            Section::Listeners => self == Self::Listener,
            Section::Routes => self == Self::Route,
            Section::Clusters => self == Self::Cluster,
            Section::Endpoints => self == Self::Endpoints,
            Section::Secrets => self == Self::Secret,
        }
    }
}

/// A resource as one side has it.
#[derive(Clone, Debug, PartialEq)]
struct Held {
    version: Option<String>,
    body: Value,
    /// Envoy's words about a newer one that it refused.
    refused: Option<String>,
    /// It waits for something (endpoints, a secret) and takes no traffic yet.
    warming: bool,
}

type Resources = BTreeMap<(Kind, String), Held>;

/// One resource on both sides.
#[derive(Debug)]
struct Pair {
    kind: Kind,
    name: String,
    envoy: Option<Held>,
    sent: Option<Held>,
    verdict: Verdict,
}

/// How the two sides stand to each other.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    /// Equal.
    Same,
    /// Both sides have one of this name, and nothing tells whether they are equal.
    There,
    /// Equal, and not in use yet.
    Warming,
    /// The agent's own, sent by nobody else.
    Local,
    /// Envoy refused the newer one; its words.
    Refused(String),
    /// Another version.
    Differs(&'static str),
    /// Envoy has none.
    Missing,
    /// Envoy has one that it is not to have.
    Stale,
}

impl Verdict {
    fn is_difference(&self) -> bool {
        !matches!(self, Self::Same | Self::There | Self::Warming | Self::Local)
    }

    fn word(&self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::There => "there",
            Self::Warming => "warming",
            Self::Local => "local",
            Self::Refused(_) => "refused",
            Self::Differs(_) => "differs",
            Self::Missing => "missing",
            Self::Stale => "stale",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Same => f.write_str("same"),
            Self::There => f.write_str("on both sides, not compared"),
            Self::Warming => f.write_str("same, warming: it waits for endpoints or a secret"),
            Self::Local => f.write_str("from the agent"),
            Self::Refused(words) => write!(f, "REFUSED by Envoy: {words}"),
            Self::Differs(how) => write!(f, "DIFFERS: {how}"),
            Self::Missing => f.write_str("MISSING in Envoy"),
            Self::Stale => f.write_str("STALE: no longer sent"),
        }
    }
}

pub(super) fn run(args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let Both { pod, envoy, sent } = cluster::block_on(ask(&args))?;
    if sent.is_none() {
        terminal.note(&format!(
            "warning: no replica of the control plane knows pod {pod}; what Envoy holds stands alone"
        ));
    }
    let mut pairs = compare(envoy, sent.unwrap_or_default());
    pairs.retain(|pair| pair.kind.is_in(args.section));
    let differ = pairs
        .iter()
        .filter(|pair| pair.verdict.is_difference())
        .count();
    match args.output {
        Format::Table => {
            terminal.styled(&table(&rows(&pairs)))?;
            if differ > 0 {
                terminal.note(&format!("{differ} of {} resources differ", pairs.len()));
            }
        }
        Format::Json => terminal.result(&format!("{:#}\n", to_json(&pod, &pairs)))?,
        Format::Yaml => {
            let text = documents::to_yaml(&to_json(&pod, &pairs)).or_exit(Exit::Internal)?;
            terminal.result(&text)?;
        }
    }
    Ok(if differ > 0 {
        Exit::Refused
    } else {
        Exit::Done
    })
}

struct Both {
    pod: PodName,
    envoy: Resources,
    /// `None` where no replica knows the pod.
    sent: Option<Resources>,
}

async fn ask(args: &Args) -> Result<Both, Failure> {
    let cluster = args.control_plane.cluster.connect().await?;
    let namespace = args
        .namespace
        .as_deref()
        .unwrap_or_else(|| cluster.namespace());
    let pod = cluster.pod(namespace, &args.pod).await?;
    let name = PodName::of(&pod);
    if !cluster::has_sidecar(&pod) {
        return Err(Exit::BadInput.because(anyhow!(
            "pod {name} has no container malha-proxy; `malha explain {} -n {namespace}` says why",
            args.pod
        )));
    }
    let plane = ControlPlane::find(&cluster, &args.control_plane.system_namespace).await?;
    let path = format!("/v1/config/{}/{}", name.namespace, name.name);
    let (dump, said) = tokio::join!(
        cluster.run_in_sidecar(&name, &["malha-agent", "dump"]),
        plane.ask(&path)
    );
    let envoy = dump
        .and_then(|dump| read_dump(&dump).with_context(|| format!("the dump of pod {name}")))
        .or_exit(Exit::Unreachable)?;
    let sent = sent(said).or_exit(Exit::Unreachable)?;
    Ok(Both {
        pod: name,
        envoy,
        sent,
    })
}

/// What was sent; `None` where all replicas answer and none knows the pod.
///
/// Every replica knows the pod, and tells the same of it, but which routes it asked for only the one that serves it knows:
/// its answer is the longest.
fn sent(said: Vec<Said>) -> anyhow::Result<Option<Resources>> {
    let mut fault = None;
    let mut longest: Option<Resources> = None;
    for Said { replica, document } in said {
        let read = document.and_then(|document| document.map(|sent| read_sent(&sent)).transpose());
        match read {
            Ok(None) => {}
            Ok(Some(sent)) => {
                let longer = longest
                    .as_ref()
                    .is_none_or(|longest| sent.len() > longest.len());
                if longer {
                    longest = Some(sent);
                }
            }
            Err(why) => fault = Some(anyhow!("{replica} could not be asked: {}", whole(&why))),
        }
    }
    match (longest, fault) {
        (Some(sent), _) => Ok(Some(sent)),
        (None, Some(fault)) => Err(fault),
        (None, None) => Ok(None),
    }
}

/// `malha-agent dump`: Envoy's own entries of `/config_dump`, by kind.
fn read_dump(document: &[u8]) -> anyhow::Result<Resources> {
    let dump: Value = serde_json::from_slice(document).context("is not JSON")?;
    let mut resources = Resources::new();
    for kind in Kind::ALL {
        let entries = dump[kind.list()]
            .as_array()
            .with_context(|| format!("has no list {}", kind.list()))?;
        for entry in entries {
            let name = name_in_dump(entry)
                .with_context(|| format!("holds an entry of {} without a name", kind.list()))?;
            resources.insert((kind, name.to_owned()), held_in_dump(entry));
        }
    }
    Ok(served_endpoints_only(resources))
}

/// Envoy lists endpoints for every cluster, those that find their own included: nobody sends them these.
fn served_endpoints_only(mut resources: Resources) -> Resources {
    let finds_its_own = |held: &Held| held.body["type"] != "EDS";
    let own: BTreeSet<_> = resources
        .iter()
        .filter(|((kind, _), held)| *kind == Kind::Cluster && finds_its_own(held))
        .map(|((_, name), _)| (Kind::Endpoints, name.clone()))
        .collect();
    resources.retain(|key, _| !own.contains(key));
    resources
}

/// Where each kind keeps the resource itself.
const BODIES: [&str; 4] = ["listener", "cluster", "route_config", "endpoint_config"];

fn name_in_dump(entry: &Value) -> Option<&str> {
    let own = || entry.get("name").and_then(Value::as_str);
    let inner = || {
        let body = BODIES.iter().find_map(|body| entry.get(body))?;
        body.get("name")
            .or_else(|| body.get("cluster_name"))?
            .as_str()
    };
    entry.as_str().or_else(own).or_else(inner)
}

fn held_in_dump(entry: &Value) -> Held {
    // Only listeners have states; every other entry is its own.
    let active = entry.get("active_state");
    let warming = entry.get("warming_state");
    let state = active.or(warming).unwrap_or(entry);
    let refused = entry.get("error_state").map(|error| {
        let details = error["details"].as_str().unwrap_or("no reason given");
        details.split_whitespace().collect::<Vec<_>>().join(" ")
    });
    let body = BODIES.iter().find_map(|body| state.get(body));
    Held {
        version: state["version_info"]
            .as_str()
            .filter(|version| !version.is_empty())
            .map(str::to_owned),
        body: body.cloned().unwrap_or(Value::Null),
        refused,
        warming: active.is_none() && warming.is_some(),
    }
}

#[derive(Deserialize)]
struct ProxyConfig {
    resources: Vec<Sent>,
}

#[derive(Deserialize)]
struct Sent {
    kind: String,
    name: String,
    version: String,
    #[serde(default)]
    json: Value,
}

/// `GET /v1/config/..`; kinds of a newer control plane are left out.
fn read_sent(document: &[u8]) -> anyhow::Result<Resources> {
    let config: ProxyConfig = serde_json::from_slice(document).context("is no ProxyConfig")?;
    let resources = config.resources.into_iter().filter_map(|sent| {
        let held = Held {
            version: Some(sent.version),
            body: sent.json,
            refused: None,
            warming: false,
        };
        Some(((Kind::parse(&sent.kind)?, sent.name), held))
    });
    Ok(resources.collect())
}

/// Every resource of either side, by kind and name.
fn compare(mut envoy: Resources, mut sent: Resources) -> Vec<Pair> {
    let names: BTreeSet<_> = envoy.keys().chain(sent.keys()).cloned().collect();
    let pairs = names.into_iter().map(|key| {
        let (envoy, sent) = (envoy.remove(&key), sent.remove(&key));
        let (kind, name) = key;
        Pair {
            verdict: judge(kind, envoy.as_ref(), sent.as_ref()),
            kind,
            name,
            envoy,
            sent,
        }
    });
    pairs.collect()
}

fn judge(kind: Kind, envoy: Option<&Held>, sent: Option<&Held>) -> Verdict {
    // Certificate and bundle go from the agent to Envoy; the control plane sends the bundle to the agent.
    if kind == Kind::Secret {
        return match envoy {
            Some(_) => Verdict::Local,
            None => Verdict::Missing,
        };
    }
    let (envoy, sent) = match (envoy, sent) {
        (
            Some(Held {
                refused: Some(words),
                ..
            }),
            _,
        ) => return Verdict::Refused(words.clone()),
        (None, _) => return Verdict::Missing,
        (Some(_), None) => return Verdict::Stale,
        (Some(envoy), Some(sent)) => (envoy, sent),
    };
    let equal = match (&envoy.version, &sent.version) {
        (Some(envoy), Some(sent)) => envoy == sent,
        _ if kind == Kind::Endpoints && !sent.body.is_null() => {
            if addresses(&envoy.body) != addresses(&sent.body) {
                return Verdict::Differs("other addresses");
            }
            true
        }
        _ => return Verdict::There,
    };
    match (equal, envoy.warming) {
        (false, _) => Verdict::Differs("another version"),
        (true, true) => Verdict::Warming,
        (true, false) => Verdict::Same,
    }
}

/// Every `address:port` of a ClusterLoadAssignment. Envoy writes JSON with the names of the protocol; other writers put
/// them in camel case.
fn addresses(assignment: &Value) -> BTreeSet<String> {
    let either = |value: &Value, snake: &str, camel: &str| {
        value
            .get(snake)
            .or_else(|| value.get(camel))
            .cloned()
            .unwrap_or(Value::Null)
    };
    let list = |value: Value| match value {
        Value::Array(items) => items,
        _ => Vec::new(),
    };
    let localities = list(assignment["endpoints"].clone()).into_iter();
    localities
        .flat_map(|locality| list(either(&locality, "lb_endpoints", "lbEndpoints")))
        .map(|endpoint| {
            let address = &endpoint["endpoint"]["address"];
            let socket = either(address, "socket_address", "socketAddress");
            let port = either(&socket, "port_value", "portValue");
            match socket["address"].as_str() {
                Some(ip) => format!("{ip} {port}"),
                None => address.to_string(),
            }
        })
        .collect()
}

fn rows(pairs: &[Pair]) -> Vec<Vec<String>> {
    let head = ["KIND", "NAME", "ENVOY", "SENT", "STATE"]
        .map(str::to_owned)
        .to_vec();
    let version = |held: &Option<Held>| match held {
        None => "-".to_owned(),
        Some(held) => held.version.clone().unwrap_or_else(|| size(&held.body)),
    };
    let rows = pairs.iter().map(|pair| {
        vec![
            pair.kind.word().to_owned(),
            pair.name.clone(),
            version(&pair.envoy),
            version(&pair.sent),
            pair.verdict.to_string(),
        ]
    });
    std::iter::once(head).chain(rows).collect()
}

/// What to say of a resource that tells no version.
fn size(body: &Value) -> String {
    match body.get("endpoints") {
        Some(_) => match addresses(body).len() {
            1 => "1 address".to_owned(),
            count => format!("{count} addresses"),
        },
        None => "there".to_owned(),
    }
}

fn to_json(pod: &PodName, pairs: &[Pair]) -> Value {
    let side = |held: &Option<Held>| {
        held.as_ref().map(|held| {
            let mut body = held.body.clone();
            blot(&mut body);
            json!({ "version": held.version, "json": body })
        })
    };
    let resources: Vec<_> = pairs
        .iter()
        .map(|pair| {
            json!({
                "kind": pair.kind.word(),
                "name": pair.name,
                "state": pair.verdict.word(),
                "detail": pair.verdict.is_difference().then(|| pair.verdict.to_string()),
                "envoy": side(&pair.envoy),
                "sent": side(&pair.sent),
            })
        })
        .collect();
    json!({
        "apiVersion": "malha/v1",
        "kind": "ProxyConfigComparison",
        "namespace": pod.namespace,
        "pod": pod.name,
        "resources": resources,
    })
}

/// Members of Envoy's messages that may hold what nobody is to read.
const SECRETS: [&str; 8] = [
    "private_key",
    "privateKey",
    "private_key_provider",
    "privateKeyProvider",
    "password",
    "session_ticket_keys",
    "sessionTicketKeys",
    "generic_secret",
];

fn blot(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(blot),
        Value::Object(members) => {
            for (name, member) in members {
                if SECRETS.contains(&name.as_str()) {
                    *member = json!("<redacted>");
                } else {
                    blot(member);
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entries as Envoy 1.40 writes them under `/config_dump?include_eds`.
    fn dump() -> Value {
        json!({
            "listeners": [
                { "name": "virtualInbound", "active_state": {
                    "version_info": "00000000000000a1", "last_updated": "2026-03-01T10:00:00.000Z",
                    "listener": { "@type": "type.googleapis.com/envoy.config.listener.v3.Listener", "name": "virtualInbound" },
                } },
                { "name": "0.0.0.0_8080", "active_state": {
                    "version_info": "00000000000000b1", "listener": { "name": "0.0.0.0_8080" },
                }, "error_state": { "details": "no such\n filter", "version_info": "00000000000000b2" } },
                { "name": "10.0.0.1_5432", "warming_state": {
                    "version_info": "00000000000000c1", "listener": { "name": "10.0.0.1_5432" },
                } },
            ],
            "clusters": [
                { "version_info": "00000000000000d1", "cluster": {
                    "name": "outbound|8080||web.shop.svc.cluster.local", "type": "EDS",
                    "transport_socket": { "typed_config": { "private_key": { "inline_bytes": "c2VjcmV0" } } },
                } },
                { "version_info": "00000000000000e1", "cluster": { "name": "outbound|80||old.shop.svc.cluster.local" } },
            ],
            "endpoints": [
                { "endpoint_config": { "cluster_name": "outbound|80||old.shop.svc.cluster.local" } },
                { "endpoint_config": {
                    "cluster_name": "outbound|8080||web.shop.svc.cluster.local",
                    "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": { "socket_address": {
                        "address": "10.1.0.7", "port_value": 8080 } } } }] }],
                } },
            ],
            "routes": [
                { "version_info": "00000000000000f1", "route_config": { "name": "8080" } },
            ],
            "secrets": ["default", "ROOTCA"],
        })
    }

    fn sent_document(address: &str) -> Value {
        let resource = |kind: &str, name: &str, version: &str| json!({ "kind": kind, "name": name, "version": version });
        let mut endpoints = resource(
            "endpoints",
            "outbound|8080||web.shop.svc.cluster.local",
            "0000000000000011",
        );
        endpoints["json"] = json!({
            "clusterName": "outbound|8080||web.shop.svc.cluster.local",
            "endpoints": [{ "lbEndpoints": [{ "endpoint": { "address": { "socketAddress": {
                "address": address, "portValue": 8080 } } } }] }],
        });
        json!({ "apiVersion": "malha/v1", "kind": "ProxyConfig", "resources": [
            resource("listener", "virtualInbound", "00000000000000a1"),
            resource("listener", "0.0.0.0_8080", "00000000000000b2"),
            resource("listener", "10.0.0.1_5432", "00000000000000c1"),
            resource("listener", "0.0.0.0_9090", "00000000000000c2"),
            resource("cluster", "outbound|8080||web.shop.svc.cluster.local", "00000000000000d2"),
            resource("route", "8080", "00000000000000f1"),
            resource("secret", "ROOTCA", "0000000000000012"),
            resource("quantum", "x", "0000000000000013"),
            endpoints,
        ] })
    }

    fn pairs(address: &str) -> Vec<Pair> {
        let envoy = read_dump(dump().to_string().as_bytes()).expect("a dump");
        let sent =
            read_sent(sent_document(address).to_string().as_bytes()).expect("a configuration");
        compare(envoy, sent)
    }

    #[test]
    fn each_resource_stands_beside_its_like_and_differences_are_marked() {
        assert_eq!(
            table(&rows(&pairs("10.1.0.7"))),
            "\
KIND        NAME                                        ENVOY              SENT               STATE
listener    0.0.0.0_8080                                00000000000000b1   00000000000000b2   REFUSED by Envoy: no such filter
listener    0.0.0.0_9090                                -                  00000000000000c2   MISSING in Envoy
listener    10.0.0.1_5432                               00000000000000c1   00000000000000c1   same, warming: it waits for endpoints or a secret
listener    virtualInbound                              00000000000000a1   00000000000000a1   same
route       8080                                        00000000000000f1   00000000000000f1   same
cluster     outbound|8080||web.shop.svc.cluster.local   00000000000000d1   00000000000000d2   DIFFERS: another version
cluster     outbound|80||old.shop.svc.cluster.local     00000000000000e1   -                  STALE: no longer sent
endpoints   outbound|8080||web.shop.svc.cluster.local   1 address          0000000000000011   same
secret      ROOTCA                                      there              0000000000000012   from the agent
secret      default                                     there              -                  from the agent
"
        );
    }

    #[test]
    fn endpoints_are_compared_by_address_whoever_wrote_the_json() {
        let verdict = |address| {
            let pairs = pairs(address);
            let mut endpoints = pairs
                .into_iter()
                .filter(|pair| pair.kind == Kind::Endpoints);
            endpoints.next().expect("one").verdict
        };
        assert_eq!(verdict("10.1.0.7"), Verdict::Same);
        assert_eq!(verdict("10.1.0.8"), Verdict::Differs("other addresses"));
    }

    #[test]
    fn no_key_is_printed() {
        let pod = PodName {
            namespace: "shop".into(),
            name: "web-1".into(),
        };
        let text = to_json(&pod, &pairs("10.1.0.7")).to_string();
        assert!(!text.contains("c2VjcmV0"), "{text}");
        assert!(text.contains("<redacted>"), "{text}");
    }

    #[test]
    fn the_replica_that_serves_the_pod_is_believed() {
        let said = |document| Said {
            replica: "malha-system/malha-a".to_owned(),
            document,
        };
        let known = |routes: bool| {
            let mut config = sent_document("10.1.0.7");
            if !routes {
                let resources = config["resources"].as_array_mut().expect("a list");
                resources.retain(|resource| resource["kind"] != "route");
            }
            Ok(Some(config.to_string().into_bytes()))
        };
        let answers = vec![
            said(Ok(None)),
            said(known(false)),
            said(known(true)),
            said(Err(anyhow!("late"))),
        ];
        let found = sent(answers).expect("asked").expect("known");
        assert!(found.keys().any(|(kind, _)| *kind == Kind::Route));
        assert!(sent(vec![said(Ok(None))]).expect("asked").is_none());
        let fault = sent(vec![said(Ok(None)), said(Err(anyhow!("late")))]).expect_err("late");
        assert_eq!(
            fault.to_string(),
            "malha-system/malha-a could not be asked: late"
        );
    }

    #[test]
    fn a_dump_that_is_none_is_named_as_such() {
        for (text, want) in [
            ("no", "is not JSON"),
            ("{}", "has no list listeners"),
            (
                r#"{"listeners":[{}]}"#,
                "holds an entry of listeners without a name",
            ),
        ] {
            assert_eq!(
                read_dump(text.as_bytes()).expect_err(text).to_string(),
                want
            );
        }
    }
}
