//! `malha ps`: who is connected, as whom, until when, and whether its configuration was taken.
//!
//! `GET /v1/proxies` of every replica + the pods with a sidecar -> [`Report`] -> rows

use std::collections::BTreeMap;

use anyhow::{Context as _, anyhow};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Exit, Failure, Terminal,
    cluster::{self, ControlPlane, ControlPlaneArgs, PodName, Said, ScopeArgs},
    exit::OrExit as _,
    terminal::{span, table, whole},
};
use crate::runtime::clock;

/// Where a replica tells about its proxies.
pub(super) const PATH: &str = "/v1/proxies";

/// Show the proxies: identity, certificate, and whether each took its configuration.
///
/// Asks every ready replica of the control plane, by port-forward to its port 15016, and lists the pods with a sidecar
/// that are connected to none.
///
/// Exit codes: 0; 2 with --strict where a proxy is late, refused its configuration or is not connected, or where a
/// replica could not be asked; 69 where none could.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    source: Source,
    /// How the result is written.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    /// End with 2 where something is not in order.
    #[arg(long)]
    strict: bool,
}

/// Which proxies, of which control plane.
#[derive(Debug, clap::Args)]
pub(super) struct Source {
    #[command(flatten)]
    scope: ScopeArgs,
    #[command(flatten)]
    control_plane: ControlPlaneArgs,
    /// A control plane without a cluster: where its port 15016 is, such as 127.0.0.1:15016.
    #[arg(long, value_name = "HOST:PORT", conflicts_with_all = ["kubeconfig", "context", "system_namespace"])]
    address: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// One row a proxy.
    Table,
    /// With the replica, the time of the connection, and what Envoy said about what it refused.
    Wide,
    /// One object.
    Json,
    /// NAMESPACE/POD, one a line.
    Name,
}

/// A proxy as a replica tells it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Proxy {
    pub(super) namespace: String,
    pub(super) pod: String,
    #[serde(default)]
    pub(super) identity: Option<String>,
    #[serde(default)]
    pub(super) connected_since: Option<Timestamp>,
    #[serde(default)]
    pub(super) envoy_version: Option<String>,
    #[serde(default)]
    pub(super) certificate_not_after: Option<Timestamp>,
    #[serde(default)]
    types: BTreeMap<String, Subscription>,
    /// Who told it; `None` where no replica knows the pod.
    #[serde(default)]
    replica: Option<String>,
}

/// What became of one type of resources.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Subscription {
    state: State,
    #[serde(default)]
    resources: u64,
    #[serde(default)]
    last_ack: Option<Timestamp>,
    /// Envoy's own words.
    #[serde(default)]
    error: Option<String>,
    /// What it refused.
    #[serde(default)]
    resource: Option<String>,
}

/// How far a proxy is with one type of resources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// Acknowledged.
    Synced,
    /// Sent, or to be sent, and not acknowledged yet.
    Pending,
    /// Refused; the last good one stays.
    Rejected,
    /// A state of a newer control plane.
    #[serde(other)]
    Unknown,
}

impl State {
    /// The worst of a proxy's types stands for the proxy.
    fn badness(self) -> u8 {
        match self {
            Self::Synced => 0,
            Self::Pending => 1,
            Self::Unknown => 2,
            Self::Rejected => 3,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Synced => "synced",
            Self::Pending => "pending",
            Self::Unknown => "unknown",
            Self::Rejected => "rejected",
        }
    }
}

#[derive(Deserialize)]
struct ProxyList {
    items: Vec<Proxy>,
}

/// All that could be learnt.
#[derive(Debug)]
pub(super) struct Report {
    /// By namespace and name.
    pub(super) proxies: Vec<Proxy>,
    /// Replicas that could not be asked, and why.
    silent: Vec<(String, String)>,
}

pub(super) fn run(args: Args, terminal: &mut Terminal) -> Result<Exit, Failure> {
    let now = clock::system().now();
    let (report, nobody) = args.source.ask(terminal)?;
    match args.output {
        Format::Json => terminal.result(&format!("{:#}\n", report.to_json()))?,
        Format::Name => terminal.result(&report.names())?,
        Format::Table | Format::Wide => {
            if report.proxies.is_empty() {
                terminal.note(&nobody);
            } else {
                terminal.styled(&table(&report.rows(args.output == Format::Wide, now)))?;
            }
        }
    }
    Ok(if args.strict && !report.is_in_order() {
        Exit::Warned
    } else {
        Exit::Done
    })
}

impl Source {
    /// The proxies that are meant, and what to say where there are none. Replicas that could not be asked are told of.
    pub(super) fn ask(&self, terminal: &mut Terminal) -> Result<(Report, String), Failure> {
        let Learnt { report, scope } = cluster::block_on(learn(self))?;
        for (replica, why) in &report.silent {
            terminal.note(&format!("warning: {replica} could not be asked: {why}"));
        }
        let Report { proxies, silent } = report;
        let nobody = scope.nobody(proxies.len());
        let covered = proxies.into_iter().filter(|proxy| scope.covers(proxy));
        let report = Report {
            proxies: covered.collect(),
            silent,
        };
        Ok((report, nobody))
    }
}

struct Learnt {
    report: Report,
    scope: Scope,
}

/// The namespace that is shown; `None` is all of them.
struct Scope(Option<String>);

impl Scope {
    fn covers(&self, proxy: &Proxy) -> bool {
        self.0
            .as_ref()
            .is_none_or(|namespace| *namespace == proxy.namespace)
    }

    fn nobody(&self, elsewhere: usize) -> String {
        match (&self.0, elsewhere) {
            (Some(namespace), 1..) => {
                format!("no proxies in namespace {namespace}; {elsewhere} in others: -A shows them")
            }
            (Some(namespace), 0) => format!("no proxies in namespace {namespace}, nor in another"),
            (None, _) => "no proxies".to_owned(),
        }
    }
}

async fn learn(args: &Source) -> Result<Learnt, Failure> {
    if let Some(address) = &args.address {
        let said = ControlPlane::Address(address).ask(PATH).await;
        let report = Report::of(said, &[])?;
        return Ok(Learnt {
            report,
            scope: Scope(args.scope.of(None)),
        });
    }
    let cluster = args.control_plane.cluster.connect().await?;
    let scope = args.scope.of(Some(cluster.namespace()));
    let plane = ControlPlane::find(&cluster, &args.control_plane.system_namespace).await?;
    let (said, pods) = tokio::join!(plane.ask(PATH), cluster.pods(scope.as_deref()));
    let pods = pods.or_exit(Exit::Unreachable)?;
    let meshed: Vec<_> = pods
        .iter()
        .filter(|pod| cluster::runs_in_mesh(pod))
        .map(PodName::of)
        .collect();
    Ok(Learnt {
        report: Report::of(said, &meshed)?,
        scope: Scope(scope),
    })
}

impl Report {
    /// Joins what the replicas said, and adds the pods that none of them knows.
    ///
    /// # Errors
    /// [`Exit::Unreachable`] where no replica could be asked.
    pub(super) fn of(said: Vec<Said>, meshed: &[PodName]) -> Result<Self, Failure> {
        let mut proxies: BTreeMap<(String, String), Proxy> = BTreeMap::new();
        let mut silent = Vec::new();
        let asked = said.len();
        for Said { replica, document } in said {
            match document.and_then(|document| read(document.as_deref())) {
                Err(why) => silent.push((replica, whole(&why))),
                Ok(list) => list.into_iter().for_each(|proxy| {
                    let proxy = Proxy {
                        replica: Some(replica.clone()),
                        ..proxy
                    };
                    let key = (proxy.namespace.clone(), proxy.pod.clone());
                    let proxy = match proxies.remove(&key) {
                        Some(known) => known.join(proxy),
                        None => proxy,
                    };
                    proxies.insert(key, proxy);
                }),
            }
        }
        if silent.len() == asked {
            let (replica, why) = silent.swap_remove(0);
            return Err(Exit::Unreachable.because(anyhow!(
                "the control plane cannot be asked about its proxies: {replica}: {why}"
            )));
        }
        for PodName { namespace, name } in meshed {
            proxies
                .entry((namespace.clone(), name.clone()))
                .or_insert_with(|| Proxy::unconnected(namespace, name));
        }
        Ok(Self {
            proxies: proxies.into_values().collect(),
            silent,
        })
    }

    fn is_in_order(&self) -> bool {
        self.silent.is_empty()
            && self
                .proxies
                .iter()
                .all(|proxy| proxy.state() == Some(State::Synced))
    }

    fn names(&self) -> String {
        let line = |proxy: &Proxy| format!("{}/{}\n", proxy.namespace, proxy.pod);
        self.proxies.iter().map(line).collect()
    }

    fn to_json(&self) -> Value {
        let items: Vec<_> = self
            .proxies
            .iter()
            .map(|proxy| {
                let mut item = json!(proxy);
                item["state"] = json!(proxy.state().map_or("unconnected", State::word));
                item
            })
            .collect();
        let silent: Vec<_> = self
            .silent
            .iter()
            .map(|(replica, why)| json!({ "replica": replica, "error": why }))
            .collect();
        json!({
            "apiVersion": "malha/v1",
            "kind": "ProxyList",
            "items": items,
            "unasked": silent,
        })
    }

    fn rows(&self, wide: bool, now: Timestamp) -> Vec<Vec<String>> {
        let mut head = vec!["POD", "IDENTITY", "CERT LEFT", "XDS", "VERSION"];
        if wide {
            head.extend(["CONNECTED", "REPLICA", "RESOURCES", "ERROR"]);
        }
        let head = head.into_iter().map(str::to_owned).collect();
        let rows = self
            .proxies
            .iter()
            .map(|proxy| proxy.row(wide, now, !self.silent.is_empty()));
        std::iter::once(head).chain(rows).collect()
    }
}

fn read(document: Option<&[u8]>) -> anyhow::Result<Vec<Proxy>> {
    let document = document.context("this version does not tell about proxies (404)")?;
    let list: ProxyList =
        serde_json::from_slice(document).context("the answer is not a ProxyList")?;
    Ok(list.items)
}

impl Proxy {
    fn unconnected(namespace: &str, pod: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            pod: pod.to_owned(),
            identity: None,
            connected_since: None,
            envoy_version: None,
            certificate_not_after: None,
            types: BTreeMap::new(),
            replica: None,
        }
    }

    /// What two replicas tell of one pod. Envoy and the agent have a stream each, which may end at different replicas;
    /// one that moved from replica to replica is known to both for a moment, and then the newer one counts.
    fn join(self, other: Self) -> Self {
        let (older, newer) = match self.connected_since <= other.connected_since {
            true => (self, other),
            false => (other, self),
        };
        let mut types = older.types.clone();
        types.extend(newer.types.clone());
        let certificate_not_after = older.certificate_not_after.max(newer.certificate_not_after);
        let of_envoy = match (&older.envoy_version, &newer.envoy_version) {
            (Some(_), None) => older,
            _ => newer,
        };
        Self {
            types,
            certificate_not_after,
            ..of_envoy
        }
    }

    /// The worst of its types; `None` where it is connected to nobody.
    fn state(&self) -> Option<State> {
        self.replica.as_ref()?;
        let awaited = self.awaited().next().map(|_| State::Pending);
        let states = self.types.values().map(|subscription| subscription.state);
        let worst = states.chain(awaited).max_by_key(|state| state.badness());
        Some(worst.unwrap_or(State::Synced))
    }

    /// What every Envoy asks for and this one has not yet: the agent's own stream does not make a proxy.
    fn awaited(&self) -> impl Iterator<Item = &'static str> {
        let asked_for = |name: &&str| !self.types.contains_key(*name);
        ["cds", "lds"].into_iter().filter(asked_for)
    }

    fn row(&self, wide: bool, now: Timestamp, some_unasked: bool) -> Vec<String> {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let mut row = vec![
            format!("{}/{}", self.namespace, self.pod),
            or_dash(self.identity.clone()),
            or_dash(self.certificate_not_after.map(|end| left(end, now))),
            self.xds(some_unasked),
            or_dash(self.envoy_version.clone()),
        ];
        if wide {
            row.extend([
                or_dash(self.connected_since.map(|since| span(since, now))),
                or_dash(self.replica.clone()),
                or_dash(self.counts()),
                or_dash(self.errors()),
            ]);
        }
        row
    }

    /// `synced`, or which types are not.
    fn xds(&self, some_unasked: bool) -> String {
        match self.state() {
            None if some_unasked => "unknown".to_owned(),
            None => "not connected".to_owned(),
            Some(State::Synced) => "synced".to_owned(),
            Some(worst) => {
                let of_worst = self.types.iter().filter(|(_, s)| s.state == worst);
                let mut names: Vec<&str> = of_worst.map(|(name, _)| name.as_str()).collect();
                if worst == State::Pending {
                    // One by one: `extend` would ask the other names to live as long as these.
                    self.awaited().for_each(|name| names.push(name));
                }
                names.sort_unstable();
                format!("{} ({})", worst.word(), names.join(","))
            }
        }
    }

    fn counts(&self) -> Option<String> {
        let counts: Vec<_> = self
            .types
            .iter()
            .map(|(name, subscription)| format!("{name} {}", subscription.resources))
            .collect();
        (!counts.is_empty()).then(|| counts.join(", "))
    }

    fn errors(&self) -> Option<String> {
        let errors: Vec<_> = self
            .types
            .iter()
            .filter(|(_, subscription)| subscription.state == State::Rejected)
            .map(
                |(
                    name,
                    Subscription {
                        error, resource, ..
                    },
                )| {
                    let error = error.as_deref().unwrap_or("no reason given");
                    // Envoy's words may be many lines.
                    let error = error.split_whitespace().collect::<Vec<_>>().join(" ");
                    match resource {
                        Some(resource) => format!("{name} {resource}: {error}"),
                        None => format!("{name}: {error}"),
                    }
                },
            )
            .collect();
        (!errors.is_empty()).then(|| errors.join("; "))
    }
}

pub(super) fn left(end: Timestamp, now: Timestamp) -> String {
    if end < now {
        format!("expired {} ago", span(end, now))
    } else {
        span(now, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-03-01T12:00:00Z";

    fn now() -> Timestamp {
        NOW.parse().expect("an instant")
    }

    fn said(replica: &str, items: Value) -> Said {
        let document = json!({ "apiVersion": "malha/v1", "kind": "ProxyList", "items": items });
        Said {
            replica: replica.to_owned(),
            document: Ok(Some(document.to_string().into_bytes())),
        }
    }

    fn proxy(pod: &str, since: &str, lds: Value) -> Value {
        json!({
            "namespace": "shop", "pod": pod,
            "identity": "spiffe://cluster.local/ns/shop/sa/web",
            "connectedSince": since, "envoyVersion": "1.40.0",
            "certificateNotAfter": "2026-03-01T23:30:00Z",
            "types": {
                "cds": { "state": "synced", "resources": 12, "lastAck": since },
                "lds": lds,
            },
        })
    }

    fn synced() -> Value {
        json!({ "state": "synced", "resources": 3, "lastAck": NOW })
    }

    fn text(report: &Report, wide: bool) -> String {
        table(&report.rows(wide, now()))
    }

    #[test]
    fn replicas_are_merged_and_pods_that_none_of_them_knows_are_shown() {
        let rejected = json!({
            "state": "rejected", "resources": 3, "lastAck": null,
            "error": "Proto constraint\n validation failed", "resource": "0.0.0.0_8080",
        });
        let pending = json!({ "state": "pending", "resources": 3 });
        let report = Report::of(
            vec![
                said(
                    "malha-system/malha-a",
                    json!([
                        proxy("web-1", "2026-03-01T10:00:00Z", synced()),
                        proxy("cart-1", "2026-03-01T11:59:00Z", rejected),
                    ]),
                ),
                said(
                    "malha-system/malha-b",
                    json!([
                        // the newer connection counts
                        proxy("web-1", "2026-03-01T11:00:00Z", pending),
                        proxy("api-1", "2026-03-01T10:00:00Z", synced()),
                    ]),
                ),
            ],
            &[
                PodName {
                    namespace: "shop".into(),
                    name: "web-1".into(),
                },
                PodName {
                    namespace: "shop".into(),
                    name: "late-1".into(),
                },
            ],
        )
        .expect("asked");
        assert_eq!(
            text(&report, false),
            "\
POD           IDENTITY                                CERT LEFT     XDS              VERSION
shop/api-1    spiffe://cluster.local/ns/shop/sa/web   11 h 30 min   synced           1.40.0
shop/cart-1   spiffe://cluster.local/ns/shop/sa/web   11 h 30 min   rejected (lds)   1.40.0
shop/late-1   -                                       -             not connected    -
shop/web-1    spiffe://cluster.local/ns/shop/sa/web   11 h 30 min   pending (lds)    1.40.0
"
        );
        let wide = text(&report, true);
        assert!(
            wide.contains("cds 12, lds 3   lds 0.0.0.0_8080: Proto constraint validation failed\n"),
            "{wide}"
        );
        assert!(wide.contains("1 h         malha-system/malha-b"), "{wide}");
        assert!(!report.is_in_order());
        let states: Vec<_> = report.to_json()["items"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|item| item["state"].as_str().expect("a word").to_owned())
            .collect();
        assert_eq!(states, ["synced", "rejected", "unconnected", "pending"]);
        assert_eq!(
            report.names(),
            "shop/api-1\nshop/cart-1\nshop/late-1\nshop/web-1\n"
        );
    }

    #[test]
    fn with_a_replica_that_could_not_be_asked_nobody_is_called_unconnected() {
        let silent = Said {
            replica: "malha-system/malha-b".to_owned(),
            document: Err(anyhow!("forbidden")),
        };
        let meshed = [PodName {
            namespace: "shop".into(),
            name: "web-1".into(),
        }];
        let report = Report::of(
            vec![said("malha-system/malha-a", json!([])), silent],
            &meshed,
        )
        .expect("one");
        assert!(text(&report, false).contains("unknown"));
        assert_eq!(
            report.to_json()["unasked"],
            json!([{ "replica": "malha-system/malha-b", "error": "forbidden" }])
        );
        assert!(!report.is_in_order());
    }

    #[test]
    fn where_no_replica_answers_the_control_plane_is_not_reachable() {
        let answers = [
            Err(anyhow!("connection refused")),
            Ok(None),
            Ok(Some(b"<html>".to_vec())),
        ];
        for document in answers {
            let said = Said {
                replica: "malha-system/malha-a".to_owned(),
                document,
            };
            let failure = Report::of(vec![said], &[]).expect_err("nothing was learnt");
            assert_eq!(failure.exit, Exit::Unreachable);
            assert!(failure.error.to_string().contains("malha-system/malha-a: "));
        }
    }

    #[test]
    fn envoy_and_agent_at_different_replicas_are_one_proxy() {
        let agent = json!({
            "namespace": "shop", "pod": "web-1",
            "identity": "spiffe://cluster.local/ns/shop/sa/web",
            "connectedSince": "2026-03-01T11:30:00Z",
            "certificateNotAfter": "2026-03-02T11:30:00Z",
            "types": { "sds": { "state": "synced", "resources": 1 } },
        });
        let envoy = proxy("web-1", "2026-03-01T10:00:00Z", synced());
        let told = |first: Value, second: Value| {
            let said = vec![said("a", json!([first])), said("b", json!([second]))];
            text(&Report::of(said, &[]).expect("asked"), true)
        };
        let (one, other) = (
            told(agent.clone(), envoy.clone()),
            told(envoy, agent.clone()),
        );
        for text in [&one, &other] {
            assert!(
                text.contains("23 h 30 min   synced   1.40.0    2 h "),
                "{text}"
            );
            assert!(text.contains("cds 12, lds 3, sds 1"), "{text}");
        }
        // the agent alone is no proxy
        let alone = Report::of(vec![said("a", json!([agent]))], &[]).expect("asked");
        assert!(text(&alone, false).contains("pending (cds,lds)"));
    }

    #[test]
    fn states_and_fields_of_another_version_do_not_stop_the_list() {
        let items = json!([
            { "namespace": "a", "pod": "b", "types": { "ecds": { "state": "warming" } }, "zone": "z" },
            { "namespace": "a", "pod": "c" },
        ]);
        let report = Report::of(vec![said("x", items)], &[]).expect("asked");
        let text = text(&report, false);
        assert!(text.contains("unknown (ecds)"), "{text}");
        assert!(
            text.contains("a/c   -          -           pending (cds,lds)"),
            "{text}"
        );
    }

    #[test]
    fn everyone_synced_is_in_order() {
        let items = json!([proxy("web-1", NOW, synced())]);
        assert!(
            Report::of(vec![said("x", items)], &[])
                .expect("asked")
                .is_in_order()
        );
    }
}
